"""What an interrupted run has left to go on from, and whose it is."""

import pytest

from p2d_cli.artifacts.journal import Journal
from p2d_cli.artifacts.unfinished import Origin, is_worth_keeping, progress_in


@pytest.mark.parametrize("batches", [0, 1, 3])
def test_a_journal_is_progress_once_a_batch_is_finished(tmp_path, batches):
    with Journal(tmp_path / "read.jsonl", [[0], [1], [2]]) as journal:
        for batch in range(batches):
            journal.add(batch, {}, seconds=1.0, tokens=1)
    assert progress_in(tmp_path) == ("finished batches" if batches else "")


def test_checkpoints_are_progress_once_they_are_sealed(tmp_path):
    assert progress_in(tmp_path / "missing") == ""
    for updates in (1, 20):
        folder = tmp_path / "checkpoints" / "micro-batch-4" / f"checkpoint-{updates}"
        folder.mkdir(parents=True)
        before = progress_in(tmp_path)
        (folder / "p2d_seal.json").write_text("{}")
        assert before == ("" if updates == 1 else "1 update")
    assert progress_in(tmp_path) == "20 updates"


def test_whose_it_is_is_recorded_once(tmp_path):
    assert Origin.load(tmp_path / "x") == Origin({}, forced=False)
    Origin({"settings": {"seed": 1}}, forced=True).save(tmp_path / "x")
    Origin({"settings": {"seed": 1}}, forced=False).save(tmp_path / "x")
    assert Origin.load(tmp_path / "x") == Origin({"settings": {"seed": 1}}, forced=True)
    (tmp_path / "x" / "origin.json").write_text("[]")
    assert Origin.load(tmp_path / "x") == Origin({}, forced=False)


def test_what_diverged_is_worth_keeping_again_once_its_command_goes_on(tmp_path):
    with Journal(tmp_path / "read.jsonl", [[0]]) as journal:
        journal.add(0, {}, seconds=1.0, tokens=1)
    assert is_worth_keeping(tmp_path)
    (tmp_path / "diverged").touch()
    assert not is_worth_keeping(tmp_path)
    Origin({}, forced=False).save(tmp_path)
    assert is_worth_keeping(tmp_path)
