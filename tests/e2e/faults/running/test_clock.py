"""A clock that is set back or forward while a stage runs: no duration comes from it."""

import ast
import json
import time
from pathlib import Path

import pytest

import p2d_cli

WALL_CLOCK = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "datetime.today", "date.today"}
DATES = {
    *(("stage_run.py", "_commit"), ("locking.py", "_describe_holder"), ("progress.py", "note")),
    ("terminal.py", "__init__"),
}
"""Where a date or the time of day is written down, and nothing is computed from it."""


def wall_clock_calls():
    for path in sorted(Path(p2d_cli.__file__).parent.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            for node in ast.walk(function):
                if isinstance(node, ast.Attribute) and any(ast.unparse(node).endswith(name) for name in WALL_CLOCK):
                    yield path.name, function.name
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "time":
                yield path.name, "imports from time, where this test does not look"


def test_no_duration_comes_from_the_wall_clock():
    assert set(wall_clock_calls()) == DATES


@pytest.mark.parametrize("name", ["train", "mine-data"])
def test_a_clock_that_jumps(p2d, words, tmp_path, monkeypatch, name):
    """By an hour, back and forth, each time it is read."""
    now, reads = time.time(), 0

    def jumping():
        nonlocal reads
        reads += 1
        return now + 3600 * (-1) ** reads * reads

    work = {"train": ("train", "heads"), "mine-data": ("mine-data", "loss")}[name]
    started = time.perf_counter()
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", jumping)
        done = p2d(*words(work, tmp_path / "out"), "--json")
    took = time.perf_counter() - started
    assert done.code == 0, done.said
    seconds = json.loads((tmp_path / "out" / "manifest.json").read_text())["seconds"]
    assert all(value >= 0 for value in seconds.values())
    assert sum(seconds.values()) <= took
    assert 0 <= done.json["wall_seconds"] <= took
