"""Where it is known which rows are of the target's task, mine-data tells how many it found, and chooses without it."""

import json

import pyarrow.parquet as pq
import pytest


@pytest.fixture
def mine(p2d, tiny_folder, few, tmp_path):
    def run(out, *options):
        words = ("--model", tiny_folder, "--pool", few["pool"], "--target", few["target"], "--method", "lexical")
        return p2d("mine-data", *words, "--count", 4, *options, "--out", tmp_path / out)

    return run


def write(path, relevant):
    path.write_text(json.dumps({"relevant": relevant, "near": ["x"]}))
    return path


def test_precision_and_recall_by_hand(mine, tmp_path):
    assert mine("plain").code == 0
    chosen = pq.read_table(tmp_path / "plain" / "subset.parquet")["id"].to_pylist()
    every = pq.read_table(tmp_path / "plain" / "pool_scores.parquet")["id"].to_pylist()
    others = [name for name in every if name not in chosen]
    relevant = write(tmp_path / "relevance.json", [*chosen[:3], *others[:3], "of another pool"])
    done = mine("known", "--relevance", relevant)
    assert done.code == 0, done.said
    assert "75.0% of them are of the target's task (6 such rows in the pool, 50.0% found)" in done.out
    manifest = json.loads((tmp_path / "known" / "manifest.json").read_text())
    found = {name: manifest["summary"][name] for name in ("precision", "recall", "rows_relevant", "chance_precision")}
    assert found == {"precision": 0.75, "recall": 0.5, "rows_relevant": 6, "chance_precision": 6 / len(every)}
    assert manifest["ledger"][-1]["settings"]["precision"] == 0.75
    assert manifest["summary"]["listed_recall"] == 1.0
    for name in ("subset.parquet", "pool_scores.parquet"):
        assert (tmp_path / "known" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[]", 'expected a JSON object {"relevant": [ids]}'),
        ('{"relevant": "a"}', "expected a list of ids"),
        ('{"relevant": [1]}', "expected a list of ids"),
        ('{"relevant": ["nobody"]}', "none of the ids of --relevance is the id of a row"),
        (None, "--relevance"),
    ],
)
def test_a_file_that_says_nothing_is_refused(mine, tmp_path, content, told):
    path = tmp_path / "relevance.json"
    if content is not None:
        path.write_text(content)
    done = mine("out", "--relevance", path)
    assert (done.code, told in done.said) == (65, True), done.said
    assert not (tmp_path / "out").exists()
