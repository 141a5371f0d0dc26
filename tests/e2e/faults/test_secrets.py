"""Secrets come from the environment alone, and no artifact, journal, log, message or setting repeats them."""

import contextlib
import io
import os
import re
import subprocess
import sys

import pytest
import typer

from p2d_cli.artifacts.store import Draft
from p2d_cli.cli.commands import guarded
from p2d_cli.errors import SECRET_VARIABLES

SECRETS = {variable: f"sekrit-{number}-of-p2d" for number, variable in enumerate(SECRET_VARIABLES)}


def assert_nothing_told(*texts):
    for text in texts:
        assert "sekrit" not in text, text


def assert_nothing_written(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    told = [path for path in files if b"sekrit" in path.read_bytes() or "sekrit" in path.name]
    assert told == []


@pytest.fixture
def watched(monkeypatch):
    """Look into every draft, and the journals and checkpoints beside it, before they are cleared away."""
    seen = []
    commit = Draft.commit

    def look(draft, manifest):
        assert_nothing_written(draft.folder.parent)
        seen.append(manifest.kind)
        commit(draft, manifest)

    monkeypatch.setattr(Draft, "commit", look)
    return seen


def test_stages_write_no_secrets(p2d, tiny_folder, few, tmp_path, monkeypatch, watched):
    for variable, secret in SECRETS.items():
        monkeypatch.setenv(variable, secret)
    common = ("--model", tiny_folder, "--dtype", "float32")
    train = ("train", *common, "--data", few["target"], "--heads", tmp_path / "heads", "--out", tmp_path / "adapter")
    rows = ("--pool", few["pool"], "--target", few["target"])
    answers = ("--data", few["test"], "--limit", 2, "--max-new-tokens", 2)
    commands = [
        ("score-heads", *common, "--method", "random", "--out", tmp_path / "heads"),
        ("mine-data", *common, *rows, "--heads", tmp_path / "heads", "--out", tmp_path / "subset"),
        (*train, "--max-steps", 2, "--checkpoint-minutes", 0),
        ("eval", *common, *answers, "--adapter", tmp_path / "adapter", "--out", tmp_path / "e"),
    ]  # fmt: skip
    for words in commands:
        done = p2d(*words, "--json")
        assert done.code == 0, done.said
        shown = p2d(*words, "--print-config")
        assert_nothing_told(done.out, done.err, shown.out, shown.err)
    assert watched == ["heads", "subset", "adapter", "evaluation"]
    assert_nothing_written(tmp_path)


def test_errors_tell_no_secrets(p2d, tmp_path, monkeypatch):
    """Nor does the traceback that `P2D_DEBUG` shows, nor the document that `--json` writes."""
    for variable, secret in SECRETS.items():
        monkeypatch.setenv(variable, secret)

    def refuse(*_, **__):
        raise ValueError("401 for https://me:sekrit@hub/x with " + SECRETS["HF_TOKEN"])

    monkeypatch.setattr("p2d_cli.cli.commands.read_recipe", refuse)
    done = p2d("run", tmp_path / "r.toml", "--json")
    assert done.code == 70
    assert "401 for https://***@hub/x with ***" in done.json["message"]
    assert_nothing_told(done.out, done.err)
    monkeypatch.setenv("P2D_DEBUG", "1")
    with contextlib.redirect_stderr(io.StringIO()) as shown, pytest.raises(typer.Exit):
        guarded(refuse)()
    assert "Traceback" in shown.getvalue()
    assert_nothing_told(re.sub(r"raise ValueError.*", "", shown.getvalue()))


HUB = """
import sys
from p2d_cli.__main__ import main
for words in (
    ["eval", "-m", MODEL, "--data", "nobody/nothing", "--out", "e", "--dry-run"],
    ["eval", "-m", "nobody/nothing", "--data", ROWS, "--out", "e", "--dry-run", "--json"],
    ["mine-data", "-m", MODEL, "--pool", "nobody/nothing@main", "--method", "random", "--out", "s"],
    ["train", "-m", "https://me:sekrit@host/model", "--data", "https://me:sekrit@host/rows.jsonl", "--out", "a"],
):
    sys.argv = ["p2d", *words]
    try:
        main()
    except SystemExit as end:
        print("code", end.code, file=sys.stderr)
"""


def test_a_hub_behind_credentials(tiny_folder, few, tmp_path):
    """An endpoint with user and password that cannot be reached: every message names it without them."""
    environ = (
        os.environ
        | SECRETS
        | {"HF_ENDPOINT": "http://me:sekrit@127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
    )
    script = f"MODEL, ROWS = {str(tiny_folder)!r}, {str(few['test'])!r}\n" + HUB
    done = subprocess.run(
        [sys.executable, "-c", script], env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    codes = [line for line in done.stderr.splitlines() if line.startswith("code")]
    assert codes == ["code 0", *["code 69"] * 3], done.stderr
    assert "Traceback" not in done.stderr
    assert_nothing_told(done.stdout, done.stderr)
