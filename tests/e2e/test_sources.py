"""Rows out of folders through the real command line: each split for itself, and subsets that others can open."""

import json
import shutil

import pyarrow.parquet as pq
import pytest


def rows_of(count, word):
    return "".join(
        json.dumps({"prompt": f"{word} {number}", "completion": str(number)}) + "\n" for number in range(count)
    )


@pytest.fixture
def folder(tmp_path):
    """A data set as it is cloned from the hub: 10 rows to train and 4 to test."""
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    for split, count in (("train", 10), ("test", 4)):
        (folder / "data" / f"{split}-00000-of-00001-a09b74b3ef9c3b56.jsonl").write_text(rows_of(count, split))
    (folder / "dataset_infos.json").write_text('{"default": {"splits": {}}}')
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A set\n")
    return folder


@pytest.fixture
def train(p2d, tiny_folder, tmp_path):
    def run(*words):
        return p2d("train", "--model", tiny_folder, *words, "--dry-run", "--json", "--out", tmp_path / "out")

    return run


def planned_rows(done):
    assert done.code == 0, done.said
    return done.json["plan"]["rows"]["data"]


def test_rows_to_test_on_are_not_trained_on(train, folder):
    done = train("--data", folder)
    assert done.code == 65
    assert "several splits: test, train" in done.said
    assert "--split" in done.said
    assert planned_rows(train("--data", folder, "--split", "train")) == 10
    assert planned_rows(train("--data", folder, "--split", "test")) == 4
    assert planned_rows(train("--data", f"{folder}/data/train-*.jsonl")) == 10
    next((folder / "data").glob("test-*")).unlink()
    assert planned_rows(train("--data", folder)) == 10


def test_a_missing_shard_is_named(train, folder):
    next((folder / "data").glob("train-*")).rename(folder / "data" / "train-00001-of-00002.jsonl")
    done = train("--data", folder, "--split", "train")
    assert done.code == 65
    assert "data/train-00000-of-00002 is missing" in done.said


def test_a_subset_opens_with_datasets_and_is_read_by_p2d_as_before(p2d, tiny_folder, folder, tmp_path):
    import datasets

    mine = (
        "mine-data",
        "--model",
        tiny_folder,
        "--method",
        "random",
        "--count",
        3,
        "--pool",
        folder,
        "--split",
        "train",
    )
    contents = []
    for name in ("one", "two"):
        done = p2d(*mine, "--out", tmp_path / name, "--json")
        assert done.code == 0, done.said
        contents.append((tmp_path / name / "README.md").read_bytes())
    assert contents[0] == contents[1]
    assert str(tmp_path).encode() not in contents[0]
    manifest = json.loads((tmp_path / "one" / "manifest.json").read_text())
    assert manifest["outputs"]["README.md"]["content"] is False, "what is made from a subset stays current"
    found = pq.read_table(tmp_path / "one" / "subset.parquet").to_pylist()
    opened = datasets.load_dataset(str(tmp_path / "one"), split="train", cache_dir=str(tmp_path / "cache"))
    assert opened.to_list() == found
    shutil.copytree(tmp_path / "one", tmp_path / "foreign", ignore=shutil.ignore_patterns("manifest.json"))
    for place in ("one", "foreign"):
        done = p2d(
            "mine-data",
            "--model",
            tiny_folder,
            "--method",
            "full",
            "--pool",
            tmp_path / place,
            "--out",
            tmp_path / f"of-{place}",
        )
        assert done.code == 0, done.said
        again = pq.read_table(tmp_path / f"of-{place}" / "subset.parquet").to_pylist()
        assert [row["prompt"] for row in again] == [row["prompt"] for row in found]


def test_an_edited_card_is_noticed(p2d, tiny_folder, folder, tmp_path):
    mine = (
        "mine-data",
        "--model",
        tiny_folder,
        "--method",
        "random",
        "--count",
        3,
        "--pool",
        folder,
        "--split",
        "train",
    )
    assert p2d(*mine, "--out", tmp_path / "one").code == 0
    card = tmp_path / "one" / "README.md"
    card.write_text(card.read_text().replace("path: subset.parquet", "path: pool_scores.parquet"))
    done = p2d("inspect", tmp_path / "one")
    assert done.code == 65
    assert "README.md is damaged" in done.said


@pytest.mark.parametrize("flag", ["--data", "--eval-data"])
def test_a_flag_that_is_given_twice_leaves_no_rows_out_in_silence(train, folder, flag):
    files = sorted((folder / "data").iterdir())
    done = train(
        *(word for path in files for word in (flag, path)), *(() if flag == "--data" else ("--data", files[0]))
    )
    assert done.code == 2
    assert f"{flag} is given 2 times" in done.said
    assert "glob in quotes" in done.said
