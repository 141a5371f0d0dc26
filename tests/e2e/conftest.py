"""One run of the whole pipeline by hand, on the fixture model and few rows, for all tests to look at."""

import json
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # what tests and launched processes share lies beside them


def first_rows(source, target, count):
    lines = source.read_text(encoding="utf-8").split("\n")[:count]
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return target


@pytest.fixture(scope="session")
def few(rows, tmp_path_factory):
    """Small cuts of the fixture's rows."""
    folder = tmp_path_factory.mktemp("rows")
    counts = {"pool": 60, "target": 12, "test": 10}
    return {name: first_rows(rows[name], folder / f"{name}.jsonl", count) for name, count in counts.items()}


@pytest.fixture(scope="session")
def commands(tiny_folder, few, tmp_path_factory):
    """The five stages by hand, and the full fine-tuning they are compared with."""
    out = tmp_path_factory.mktemp("pipeline")
    common = ("--model", tiny_folder, "--dtype", "float32")
    answer = ("--data", few["test"], "--max-new-tokens", 8)
    # So few that most of the pool is left to read for mine-data.
    selection = ("--target", few["target"], "--pool", few["pool"], "--background", 20)
    return out, {
        "heads": ("score-heads", *common, *selection, "--episodes", 16, "--out", out / "heads"),
        "subset": ("mine-data", *common, *selection, "--heads", out / "heads", "--out", out / "subset"),
        "adapter": (
            *("train", *common, "--data", out / "subset", "--heads", out / "heads"),
            *("--epochs", 2, "--batch-size", 4, "--out", out / "adapter"),
        ),
        "evaluation": ("eval", *common, *answer, "--adapter", out / "adapter", "--out", out / "evaluation"),
        "full": ("train", *common, "--scope", "full", "--data", few["pool"], "--epochs", 2, "--out", out / "full"),
        "full-evaluation": (
            *("eval", "--model", out / "full", "--dtype", "float32", *answer),
            *("--out", out / "full-evaluation"),
        ),
        "report": ("report-aer", out / "evaluation", "--reference", out / "full-evaluation", "--out", out / "report"),
    }


@pytest.fixture(scope="session")
def pipeline(p2d, commands, drawing):
    """The folder with all artifacts of the commands, made once, with their pictures."""
    out, steps = commands
    with drawing():
        for name, step in steps.items():
            done = p2d(*step)
            assert done.code == 0, f"{name}: {done.said}"
    return out


@pytest.fixture
def copy_of(pipeline, tmp_path):
    """Copy an artifact, to damage the copy."""

    def copy(name):
        return shutil.copytree(pipeline / name, tmp_path / "copies" / name)

    return copy


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
