"""A stage that is killed at any batch goes on from there, and ends with the results of one that was not."""

import json
import os
import signal
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from p2d_cli.artifacts.journal import Journal

MINING = {
    "p2d": ("--heads", "HEADS", "--background", 20),
    "generate": ("--heads", "HEADS", "--affinity", "attention", "--perf", "generate", "--max-new-tokens", 4),
    "ifd": ("--method", "ifd"),
    "embedding": ("--method", "embedding"),
}
EVALUATION = {
    "answers": ("--metric", "exact_match,token_f1", "--max-new-tokens", 4),
    "accuracy": ("--metric", "accuracy", "--choices", "CHOICES"),
    "perplexity": ("--metric", "perplexity"),
    "several": ("--metric", "exact_match,accuracy,perplexity", "--choices", "CHOICES", "--max-new-tokens", 4),
}
SCORING = {
    method: ("--method", method, "--repeats", repeats, "--episodes", 8, "--proxy-samples", 6)
    for method, repeats in {"pad": 4, "taylor": 4, "contrast": 2, "readout": 2}.items()
}
WORK = MINING | EVALUATION | SCORING


@pytest.fixture
def words(pipeline, tiny_folder, few, tmp_path):
    """The command of a piece of work, in many small batches."""
    choices = tmp_path / "choices.json"
    choices.write_text('["alpha", "bravo charlie", "delta", ""]')

    def make(work, out):
        stands_for = {"HEADS": pipeline / "heads", "CHOICES": choices}
        given = [stands_for.get(word, word) for word in WORK[work]]
        rows = ("--data", few["test"]) if work in EVALUATION else ("--pool", few["pool"], "--target", few["target"])
        budget = 40 if work in EVALUATION else 250
        common = ("--model", tiny_folder, "--dtype", "float32", "--token-budget", budget, "--out", tmp_path / out)
        stage = "mine-data" if work in MINING else "eval" if work in EVALUATION else "score-heads"
        return stage, *common, *rows, *given

    return make


def unfinished(folder):
    return list(folder.glob(".*unfinished*"))


def results(folder):
    """Every number that the artifact says, and every text."""
    tables = {path.name: known(pq.read_table(path).to_pydict()) for path in folder.glob("*.parquet")}
    tables |= {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    return tables, [path.read_text() for path in folder.glob("metrics.json")]


def known(columns):
    """Columns with None for nan, which is not equal to itself."""
    return {name: [None if value != value else value for value in column] for name, column in columns.items()}


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


@pytest.mark.parametrize("work", WORK)
def test_interrupted_at_any_batch(p2d, words, work, tmp_path, monkeypatch):
    assert p2d(*words(work, "undisturbed")).code == 0
    assert not unfinished(tmp_path)
    add, spent = Journal.add, []

    def add_and_stop(self, *arguments, seconds, tokens):
        add(self, *arguments, seconds=seconds, tokens=tokens)
        spent.append(seconds)
        if len(spent) % 2 == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "add", add_and_stop)
    codes = []
    while not codes or codes[-1] != 0:
        codes.append(p2d(*words(work, "disturbed")).code)
        assert len(unfinished(tmp_path)) == (codes[-1] != 0)
        assert codes[-1] in {0, 130}
        assert len(codes) < 40
    assert len(codes) > 2
    assert results(tmp_path / "disturbed") == results(tmp_path / "undisturbed")
    undisturbed, disturbed = (manifest_of(tmp_path / name) for name in ("undisturbed", "disturbed"))
    assert undisturbed["tokens"] == disturbed["tokens"] > 0
    assert undisturbed["summary"] == disturbed["summary"]
    phases = ("evaluate",) if work in EVALUATION else ("prepare", "proxy", "score")
    assert sum(disturbed["seconds"].get(phase, 0.0) for phase in phases) >= sum(spent)


@pytest.mark.parametrize("work", ["p2d", "answers"])
def test_killed_by_the_system(p2d, words, work, tmp_path):
    """A process that cannot clean up leaves a journal, and no artifact; the next one takes it up and says so."""
    code = (
        "import os, signal, sys\n"
        "from p2d_cli.artifacts.journal import Journal\n"
        "add = Journal.add\n"
        "def die(self, batch, *a, **k):\n"
        "    add(self, batch, *a, **k)\n"
        "    if batch == 1: os.kill(os.getpid(), signal.SIGKILL)\n"
        "Journal.add = die\n"
        "from p2d_cli.__main__ import main\n"
        "main()\n"
    )
    line = [str(word) for word in words(work, "killed")]
    done = subprocess.run([sys.executable, "-c", code, *line], capture_output=True, check=False, env=dict(os.environ))
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()
    assert len(unfinished(tmp_path)) == 1
    resumed = p2d(*line)
    assert resumed.code == 0
    assert "2 of" in resumed.said
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".killed")]
    assert p2d(*words(work, "undisturbed")).code == 0
    assert results(tmp_path / "killed") == results(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    ("work", "again"),
    [("p2d", ("--force",)), ("p2d", ("--draws", 1)), ("answers", ("--force",)), ("answers", ("--limit", 3))],
    ids=["mine-force", "mine-other-settings", "eval-force", "eval-other-settings"],
)
def test_force_and_other_settings_start_anew(p2d, words, work, again, tmp_path, monkeypatch):
    add = Journal.add

    def add_and_stop(self, *arguments, **costs):
        add(self, *arguments, **costs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", add_and_stop)
        assert p2d(*words(work, "out")).code == 130
    assert len(unfinished(tmp_path)) == 1
    if again != ("--force",):
        refused = p2d(*words(work, "out"), *again)
        assert refused.code == 73
        assert (
            f"has left finished batches of another {tmp_path / 'out'}: it differs in setting {again[0][2:]}"
            in refused.said
        )
        assert len(unfinished(tmp_path)) == 1
    resumed = p2d(*words(work, "out"), *again, "--force")
    assert resumed.code == 0
    assert "finished batches, is discarded" in resumed.said
    assert "were finished before" not in resumed.said
    assert not unfinished(tmp_path)


@pytest.mark.parametrize("work", EVALUATION)
def test_another_token_budget_gives_the_same_results(p2d, words, work, tmp_path, monkeypatch):
    """Other batches than those of the interrupted run are computed anew, whichever way rows are numbered in them."""
    add = Journal.add

    def add_and_stop(self, *arguments, **costs):
        add(self, *arguments, **costs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", add_and_stop)
        assert p2d(*words(work, "resumed")).code == 130
    assert p2d(*words(work, "resumed"), "--token-budget", 36).code == 0
    assert p2d(*words(work, "undisturbed")).code == 0
    tables = [results(tmp_path / name)[0]["predictions.parquet"] for name in ("resumed", "undisturbed")]
    likelihoods = [table.pop("log_likelihood", [0.0]) for table in tables]
    assert tables[0] == tables[1]
    assert likelihoods[0] == pytest.approx(likelihoods[1], abs=1e-4)
