"""mine-data that is killed at any batch goes on from there, and ends with the scores of one that was not."""

import json
import os
import signal
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from p2d_cli.artifacts.journal import Journal

METHODS = {
    "p2d": ("--heads", "HEADS"),
    "generate": ("--heads", "HEADS", "--perf", "generate", "--max-new-tokens", 4),
    "ifd": ("--method", "ifd"),
    "embedding": ("--method", "embedding"),
}


@pytest.fixture
def words(pipeline, tiny_folder, few, tmp_path):
    """The command of a method, in many small batches."""

    def make(method, out):
        given = [pipeline / "heads" if word == "HEADS" else word for word in METHODS[method]]
        inputs = ("--model", tiny_folder, "--pool", few["pool"], "--target", few["target"])
        return "mine-data", *inputs, *given, "--dtype", "float32", "--token-budget", 250, "--out", tmp_path / out

    return make


def unfinished(folder):
    return list(folder.glob(".*unfinished*"))


def scores(folder):
    return pq.read_table(folder / "pool_scores.parquet").to_pydict()


@pytest.mark.parametrize("method", METHODS)
def test_interrupted_at_any_batch(p2d, words, method, tmp_path, monkeypatch):
    assert p2d(*words(method, "undisturbed")).code == 0
    assert not unfinished(tmp_path)
    add, left = Journal.add, []

    def add_and_stop(self, *arguments, **costs):
        add(self, *arguments, **costs)
        left.append(None)
        if len(left) % 2 == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "add", add_and_stop)
    codes = []
    while not codes or codes[-1] != 0:
        codes.append(p2d(*words(method, "disturbed")).code)
        assert len(unfinished(tmp_path)) == (codes[-1] != 0)
        assert codes[-1] in {0, 130}
        assert len(codes) < 40
    assert len(codes) > 2
    assert scores(tmp_path / "disturbed") == scores(tmp_path / "undisturbed")
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("undisturbed", "disturbed")]
    assert manifests[0]["tokens"] == manifests[1]["tokens"]
    assert manifests[0]["summary"] == manifests[1]["summary"]


def test_killed_by_the_system(p2d, words, tmp_path):
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
    line = [str(word) for word in words("p2d", "killed")]
    done = subprocess.run([sys.executable, "-c", code, *line], capture_output=True, check=False, env=dict(os.environ))
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()
    assert len(unfinished(tmp_path)) == 1
    resumed = p2d(*line)
    assert resumed.code == 0
    assert "2 of" in resumed.said
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".killed")]


@pytest.mark.parametrize("again", [("--force",), ("--draws", 1)], ids=["force", "other-settings"])
def test_force_and_other_settings_start_anew(p2d, words, again, tmp_path, monkeypatch):
    add = Journal.add

    def add_and_stop(self, *arguments, **costs):
        add(self, *arguments, **costs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", add_and_stop)
        assert p2d(*words("p2d", "out")).code == 130
    assert len(unfinished(tmp_path)) == 1
    resumed = p2d(*words("p2d", "out"), *again)
    assert resumed.code == 0
    assert "were finished before" not in resumed.said
    assert not unfinished(tmp_path)
