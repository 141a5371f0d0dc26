"""Axes of a grid: rows by another method's number, epochs, the untrained model, and inputs of a seed of its own."""

import json

import pyarrow.parquet as pq
import pytest


@pytest.fixture(scope="module")
def finished(p2d, tiny_folder, few, tmp_path_factory):
    """Two seeds, each with target rows of its own, so that what lies above the floor differs."""
    folder = tmp_path_factory.mktemp("axes")
    target = few["target"].read_text().splitlines()
    for seed in (0, 1):
        (folder / f"target-{seed}.jsonl").write_text("\n".join(target[6 * seed : 6 * seed + 6]) + "\n")
    recipe = folder / "recipe.toml"
    recipe.write_text(
        f"""\
out = "{folder / "out"}"
untrained = true
[defaults]
model = "{tiny_folder}"
dtype = "float32"
target = "target-{{seed}}.jsonl"
pool = "{few["pool"]}"
[mine-data]
ratio = 0.3
[train]
epochs = 1
[eval]
data = "{few["test"]}"
max-new-tokens = 2
limit = 4
[[grid]]
data = ["p2d", "lexical"]
count-of = "p2d"
seed = [0, 1]
[[grid]]
data = ["lexical"]
epochs = [2]
"""
    )
    planned = p2d("run", recipe, "--dry-run")
    assert planned.code == 0, planned.said
    done = p2d("run", recipe, "--json")
    assert done.code == 0, done.said
    return folder / "out"


def summary_of(folder):
    return json.loads((folder / "manifest.json").read_text())["summary"]


def test_other_methods_keep_as_many_rows_as_the_one_that_is_named(finished):
    for seed in (0, 1):
        mined = summary_of(finished / "subset" / f"p2d-s{seed}")
        for method in ("lexical", "random"):
            taken = finished / "subset" / f"{method}-as-p2d-s{seed}"
            assert summary_of(taken)["rows_selected"] == mined["rows_selected"]
            assert summary_of(taken)["rows_asked"] == "as p2d"
            costs = json.loads((taken / "manifest.json").read_text())["ledger"]
            assert [cost["stage"] for cost in costs] == ["mine-data"], "the other rows' cost is none of theirs"
    numbers = {summary_of(finished / "subset" / f"p2d-s{seed}")["rows_selected"] for seed in (0, 1)}
    assert len(numbers) == 2, "each seed has its own floor"


def test_seeds_are_one_group_though_their_floors_keep_other_numbers(finished):
    report = json.loads((finished / "report" / "aer.json").read_text())
    groups = {group["name"]: group["seeds"] for group in report["groups"]}
    assert groups == {
        "readout heads, p2d rows": [0, 1],
        "readout heads, lexical rows as p2d, 1 epoch": [0, 1],
        "readout heads, lexical rows 30%, 2 epochs": [0],
        "random heads, random rows as p2d, 1 epoch": [0, 1],
        "random heads, random rows 30%, 2 epochs": [0],
        "base model": [],
        "full, all rows": [0],
    }


def test_each_seed_has_its_own_target_rows(finished):
    for seed in (0, 1):
        for stage in (f"heads/readout-s{seed}", f"subset/p2d-s{seed}"):
            entry = json.loads((finished / stage / "manifest.json").read_text())["inputs"]["target"]
            assert entry["source"].endswith(f"target-{seed}.jsonl")


def test_epochs_are_an_axis(finished):
    path = finished / "adapter" / "heads-readout-lexical-e2-s0" / "training_log.jsonl"
    log = [json.loads(line) for line in path.read_text().splitlines()]
    assert max(entry["epoch"] for entry in log) == 2


def test_by_hand_as_many_rows_as_a_subset_has(p2d, finished, tiny_folder, few, tmp_path):
    words = (
        "mine-data",
        "--method",
        "random",
        "--model",
        tiny_folder,
        "--pool",
        few["pool"],
        "--out",
        tmp_path / "out",
    )
    mined = finished / "subset" / "p2d-s0"
    done = p2d(*words, "--count-of", mined)
    assert done.code == 0, done.said
    kept = pq.read_table(mined / "subset.parquet").num_rows
    assert pq.read_table(tmp_path / "out" / "subset.parquet").num_rows == kept
    assert p2d(*words, "--count", kept).said.count("up to date") == 1, "it is the number that counts"
    refused = p2d(*words, "--count-of", mined, "--ratio", 0.1)
    assert (refused.code, "--ratio and --count-of exclude each other" in refused.said) == (2, True)
    missing = p2d(*words, "--count-of", tmp_path / "nothing")
    assert (missing.code, "found nothing there" in missing.said) == (65, True)
    wrong = p2d(*words, "--count-of", few["pool"])
    assert (wrong.code, "expected an artifact of kind subset" in wrong.said, "found a file" in wrong.said) == (
        65,
        True,
        True,
    )
