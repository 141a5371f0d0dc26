"""What was finished before a crash is there after it, bit by bit; what was not is not."""

import numpy as np
import pytest

from p2d_cli.artifacts.journal import Journal, pack_texts, unpack_texts

PLAN = [[2, 0], [1], [3, 4]]


def arrays(seed):
    rng = np.random.default_rng(seed)
    return {"scores": rng.normal(size=(2, 3)).astype(np.float32), "perf": np.array([np.nan, rng.random()])}


@pytest.fixture
def path(tmp_path):
    """A journal with two of three batches."""
    path = tmp_path / "folder" / "work.jsonl"
    with Journal(path, PLAN) as journal:
        journal.add(0, arrays(0), seconds=1.5, tokens=10)
        journal.add(1, arrays(1), seconds=0.5, tokens=4)
    return path


def test_finished_batches_come_back_bit_by_bit(path):
    with Journal(path, PLAN) as journal:
        assert sorted(journal.finished) == [0, 1]
        for batch, entry in journal.finished.items():
            assert {name: (a.dtype, a.shape, a.tobytes()) for name, a in entry.arrays.items()} == {
                name: (a.dtype, a.shape, a.tobytes()) for name, a in arrays(batch).items()
            }
        assert (journal.finished[0].seconds, journal.finished[0].tokens) == (1.5, 10)


def test_a_journal_goes_on(path):
    with Journal(path, PLAN) as journal:
        journal.add(2, arrays(2), seconds=1, tokens=1)
    with Journal(path, PLAN) as journal:
        assert sorted(journal.finished) == [0, 1, 2]


def test_a_journal_of_another_plan_starts_anew(path):
    with Journal(path, [[0], [1]]) as journal:
        assert journal.finished == {}
    with Journal(path, PLAN) as journal:
        assert journal.finished == {}


def test_wherever_a_crash_cuts_the_file_whole_lines_before_it_survive(path):
    whole = path.read_bytes()
    ends = [index + 1 for index, byte in enumerate(whole) if byte == ord("\n")]
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with Journal(path, PLAN) as journal:
            assert len(journal.finished) == max(sum(end <= length for end in ends) - 1, 0)
            journal.add(2, arrays(2), seconds=0, tokens=0)
        with Journal(path, PLAN) as journal:
            assert 2 in journal.finished, length


def test_a_flipped_bit_drops_that_line_and_those_behind_it(path):
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(b'"batch":1') + 8] ^= 2
    path.write_bytes(bytes(damaged))
    with Journal(path, PLAN) as journal:
        assert sorted(journal.finished) == [0]


@pytest.mark.parametrize("texts", [[], [""], ["a", "", "é\n\x00"], ["\ud800 alone", "日本", "🙂"]])
def test_texts_come_back_as_they_were(tmp_path, texts):
    with Journal(tmp_path / "j", [[0]]) as journal:
        journal.add(0, {"texts": pack_texts(texts)}, seconds=0.0, tokens=0)
    with Journal(tmp_path / "j", [[0]]) as journal:
        assert unpack_texts(journal.finished[0].arrays["texts"]) == texts


def test_a_journal_that_cannot_be_begun_is_closed(tmp_path, monkeypatch):
    """Otherwise what could not be written is written once more when it is collected, and fails there."""
    streams = []

    def fail(self, line):
        streams.append(self._stream)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Journal, "_append", fail)
    with pytest.raises(OSError, match="No space left"):
        Journal(tmp_path / "read.jsonl", [[0]])
    assert streams[0].closed
