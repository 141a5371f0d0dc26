"""An index of hidden states: it changes no choice of rds and embedding, and a second target reads no pool row."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest


@pytest.fixture
def mine(p2d, tiny_folder, few, tmp_path):
    def run(out, method, *options):
        given = {"--target": few["target"], "--pool": few["pool"], "--model": tiny_folder, "--dtype": "float32"}
        given |= dict(zip(options[::2], options[1::2], strict=True))
        flags = [word for flag, value in given.items() if value is not None for word in (flag, value)]
        done = p2d("mine-data", "--method", method, *flags, "--count", 12, "--out", tmp_path / out)
        assert done.code == 0, done.said
        return json.loads((tmp_path / out / "manifest.json").read_text())

    return run


def scores_of(folder):
    return pq.read_table(folder / "pool_scores.parquet")["score"].to_numpy()


@pytest.mark.parametrize(("method", "target"), [("rds", True), ("embedding", True), ("embedding", False)])
def test_it_changes_no_choice_and_serves_a_second_target(mine, few, tmp_path, method, target):
    index = tmp_path / "index"
    options = () if target else ("--target", None)
    plain, first = mine("plain", method, *options), mine("first", method, *options, "--index", index)
    np.testing.assert_allclose(scores_of(tmp_path / "first"), scores_of(tmp_path / "plain"), atol=1e-3)
    assert first["tokens"] == plain["tokens"]
    assert first["summary"]["index"]["rows_added"] == first["summary"]["rows_total"]
    second = mine("second", method, "--target", few["test"], "--index", index)
    alone = mine("alone", method, "--target", few["test"])
    np.testing.assert_allclose(scores_of(tmp_path / "second"), scores_of(tmp_path / "alone"), atol=1e-3)
    told = second["summary"]["index"]
    assert (told["rows_added"], told["targets"]) == (0, 2)
    [shard] = json.loads((index / "hidden-states" / "index.json").read_text())["shards"]
    assert second["tokens"] == alone["tokens"] - shard["tokens"]
    assert second["seconds"]["index"] == pytest.approx(shard["seconds"] / 2, abs=1e-4)


def test_a_folder_that_holds_something_else_is_refused(p2d, tiny_folder, few, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").touch()
    words = ("mine-data", "--method", "embedding", "--model", tiny_folder, "--pool", few["pool"])
    done = p2d(*words, "--index", tmp_path / "thesis", "--out", tmp_path / "out")
    assert (done.code, "holds something else than an index" in done.said) == (73, True)
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]


def test_what_a_process_that_died_has_left_is_in_nobodys_way(mine, tmp_path):
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / ".hidden-states.lock").touch()
    made = mine("made", "rds", "--index", tmp_path / "index")
    assert made["summary"]["index"]["rows_added"] == made["summary"]["rows_total"]


def test_both_methods_share_it(p2d, mine, few, tmp_path):
    index = tmp_path / "index"
    mine("rds", "rds", "--index", index)
    assert mine("embedding", "embedding", "--index", index)["summary"]["index"]["rows_added"] == 0
    shown = p2d("inspect", index / "hidden-states")
    assert (shown.code, "hidden states" in shown.said) == (0, True)


def test_a_dry_run_counts_what_it_lacks(p2d, mine, tiny_folder, few, tmp_path):
    index = tmp_path / "index"
    words = ("mine-data", "--method", "rds", "--model", tiny_folder, "--pool", few["pool"], "--dtype", "float32")
    words += ("--index", index, "--out", tmp_path / "planned", "--dry-run", "--json", "--target")
    planned = p2d(*words, few["target"]).json["plan"]
    assert not index.exists()
    made = mine("made", "rds", "--index", index)
    assert planned["tokens"] == made["tokens"]
    assert planned["disk"]["index"] == made["summary"]["rows_total"] * (2 * 2 * 128 + 24)
    again = p2d(*words, few["test"])
    assert again.code == 0, again.said
    assert "index" not in again.json["plan"]["disk"]
