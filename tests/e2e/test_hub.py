"""Hub ids resolve to the local cache without a network; each in a process of its own, which reads the cache's place."""

import json
import os
import shutil
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, tiny_folder):
    """A hub cache with one model and the reference of one data set."""
    root = tmp_path / "hub"
    model = root / "models--somebody--tiny"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(COMMIT)
    shutil.copytree(tiny_folder, model / "snapshots" / COMMIT)
    refs = root / "datasets--somebody--rows" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text(COMMIT)
    return root


def p2d_in(cache, *words):
    environment = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "HF_HOME": str(cache)}
    command = [sys.executable, "-m", "p2d_cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_a_cached_model_is_found_by_its_id_and_known_by_its_commit(cache, tmp_path):
    command = ("score-heads", "--model", "somebody/tiny", "--method", "uniform", "--out", tmp_path / "heads", "--json")
    done = p2d_in(cache, *command)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "heads" / "manifest.json").read_text())
    assert manifest["model"]["source"] == "somebody/tiny"
    assert manifest["model"]["revision"] == COMMIT
    assert json.loads(p2d_in(cache, *command).stdout)["status"] == "up-to-date"
    pinned = [f"somebody/tiny@{COMMIT}" if word == "somebody/tiny" else word for word in command]
    assert json.loads(p2d_in(cache, *pinned).stdout)["status"] == "up-to-date", "the same commit is the same model"


def test_what_is_not_cached_is_69_with_advice(cache, tmp_path, rows):
    done = p2d_in(cache, "score-heads", "--model", "somebody/else", "--method", "uniform", "--out", tmp_path / "h")
    assert done.returncode == 69
    assert "somebody/else" in done.stderr
    assert "hf download" in done.stderr
    command = ("mine-data", "--model", "somebody/tiny", "--pool", "somebody/rows", "--method", "random")
    done = p2d_in(cache, *command, "--out", tmp_path / "s")
    assert done.returncode == 69
    assert "somebody/rows" in done.stderr


def test_a_data_set_is_known_by_its_commit(cache, tmp_path):
    command = ("mine-data", "--model", "somebody/tiny", "--pool", "somebody/rows", "--method", "random", "--dry-run")
    digests = []
    for commit in (COMMIT, COMMIT, COMMIT[::-1]):
        (cache / "datasets--somebody--rows" / "refs" / "main").write_text(commit)
        done = p2d_in(cache, *command, "--json", "--out", tmp_path / "s")
        digests.append(json.loads(done.stdout)["inputs"]["pool"]["digest"])
    assert digests[0] == digests[1] != digests[2]


def test_a_cached_data_set_is_read_by_its_id(cache, tmp_path, rows):
    """At the revision and of the split that were asked for, whatever else is in the cache."""
    lines = rows["pool"].read_text().splitlines()[:6]
    data = cache / "datasets--somebody--rows"
    for commit, name, start in ((COMMIT, "main", 0), (COMMIT[::-1], "v2", 3)):
        (data / "refs" / name).write_text(commit)
        folder = data / "snapshots" / commit / "data"
        folder.mkdir(parents=True)
        (folder / "train-00000-of-00001.jsonl").write_text("\n".join(lines[start : start + 3]) + "\n")
        (folder / "test-00000-of-00001.jsonl").write_text(lines[start] + "\n")
    command = ("mine-data", "--model", "somebody/tiny", "--pool", "somebody/rows", "--method", "full", "--json")
    done = p2d_in(cache, *command, "--out", tmp_path / "none")
    assert done.returncode == 65
    assert "several splits: test, train" in done.stderr
    done = p2d_in(cache, *command, "--split", "train", "--revision", "v2", "--out", tmp_path / "v2")
    assert done.returncode == 0, done.stderr
    found = pq.read_table(tmp_path / "v2" / "subset.parquet").to_pylist()
    assert sorted(row["prompt"] for row in found) == sorted(json.loads(line)["prompt"] for line in lines[3:])
    command = [f"{word}@{COMMIT[::-1]}" if word == "somebody/rows" else word for word in command]
    done = p2d_in(cache, *command, "--split", "train", "--out", tmp_path / "pinned")
    assert done.returncode == 0, done.stderr
    assert pq.read_table(tmp_path / "pinned" / "subset.parquet").to_pylist() == found
