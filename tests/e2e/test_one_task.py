"""A pool whose rows are all of the target's task: nothing to find there, but rows that cover it."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import first_rows, write_rows
from sklearn.metrics import roc_auc_score


@pytest.fixture(scope="module")
def one_task(rows, tmp_path_factory):
    """The fixture's rows of the target's own skill."""
    skills = json.loads((rows["pool"].parent / "skills.json").read_text())
    lines = [line for line in rows["pool"].read_text().splitlines() if skills[json.loads(line)["id"]] == "route"]
    path = tmp_path_factory.mktemp("one-task") / "pool.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def mine(p2d, tiny_folder, rows, one_task, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mined")
    common, given = ("--model", tiny_folder, "--dtype", "float32"), ("--target", rows["target"])
    assert p2d("score-heads", *common, *given, "--pool", rows["pool"], "--out", folder / "heads").code == 0

    def run(name, *options, pool=one_task, target=rows["target"]):
        out, inputs = folder / name, ("--heads", folder / "heads", "--target", target, "--pool", pool)
        done = p2d("mine-data", *common, *inputs, *options, "--out", out)
        assert done.code == 0, done.said
        summary = json.loads((out / "manifest.json").read_text())["summary"]
        return done.said, summary, pq.read_table(out / "subset.parquet").to_pylist(), out

    return run


def scores(out):
    return pq.read_table(out / "pool_scores.parquet")["score"].to_numpy()


def test_it_is_noticed_and_covered(mine, p2d, tiny_folder, one_task, tmp_path):
    said, summary, chosen, _ = mine("auto", "--count", 20)
    assert "seems to be of one task" in said
    assert summary["pool_area"] < 0.7
    assert "floor_score" not in summary
    words = ("--method", "coverage", "--pool", one_task, "--count", 20, "--out", tmp_path / "words")
    assert p2d("mine-data", "--model", tiny_folder, *words).code == 0
    assert [row["id"] for row in chosen] == pq.read_table(tmp_path / "words" / "subset.parquet")["id"].to_pylist()


def test_the_highest_are_kept_where_they_are_asked_for(mine):
    said, _, chosen, out = mine("top", "--count", 20, "--pick", "top")
    assert "seems to be of one task" not in said
    assert [row["score"] for row in chosen] == (-np.sort(-scores(out)))[:20].tolist()


def test_answers_that_repeat_are_counted(mine, one_task):
    said, summary, chosen, _ = mine("auto", "--count", 20)
    every = {json.loads(line)["completion"] for line in one_task.read_text().splitlines()}
    assert summary["answers_total"] == len(every)
    assert summary["answers_selected"] == len({row["completion"] for row in chosen})
    assert f"{summary['answers_selected']} different answers, of {len(every)} in the pool" in said


def test_a_mixed_pool_is_not_taken_for_one(mine, rows):
    said, summary, _, _ = mine("mixed", pool=rows["pool"])
    assert "one task" not in said
    assert summary["pool_area"] > 0.9


@pytest.mark.parametrize("pick", ["auto", "cover"])
def test_rows_that_are_kept_cover_those_above_the_floor(mine, rows, pick):
    said, summary, covering, out = mine(f"kept-{pick}", "--count", 30, "--pick", pick, pool=rows["pool"])
    assert ("keeping 30 of them that cover the others in their words" in said) == (pick == "auto")
    assert summary["picked"] == "cover"
    _, _, top, _ = mine("best", "--count", 30, "--pick", "top", pool=rows["pool"])
    assert {row["id"] for row in covering} != {row["id"] for row in top}
    assert all(row["score"] >= summary["floor_score"] for row in covering)
    every = scores(out)
    likely = max(30, 2 * (every >= summary["middle_score"]).sum())
    assert min(row["score"] for row in covering) >= np.sort(every[~np.isnan(every)])[::-1][:likely].min()
    assert summary["floor_score"] < summary["middle_score"]
    ranks = pq.read_table(out / "pool_scores.parquet")["rank"].to_numpy()
    assert sorted(ranks) == list(range(len(ranks)))


def test_cover_leaves_rows_alone_that_were_not_read_on(mine, rows):
    _, _, covering, _ = mine("refined", "--count", 30, "--pick", "cover", "--refine", 0.05, pool=rows["pool"])
    assert all(np.isfinite(row["score"]) for row in covering)


def test_cover_without_a_floor_is_refused(p2d, tiny_folder, rows, tmp_path):
    common = ("--model", tiny_folder, "--target", rows["target"], "--pool", rows["pool"], "--heads", tmp_path)
    done = p2d("mine-data", *common, "--pick", "cover", "--floor-quantile", 0, "--out", tmp_path / "out")
    assert done.code == 2
    assert "--method coverage covers a whole pool" in done.said


@pytest.mark.parametrize("method", ["rds", "lexical"])
def test_a_method_without_a_floor_keeps_the_best_rows(mine, rows, method):
    options = ("--method", method, "--count", 30)
    said, _, covering, _ = mine(f"{method}-cover", *options, "--pick", "cover", pool=rows["pool"])
    _, _, top, _ = mine(f"{method}-top", *options, pool=rows["pool"])
    assert "--pick cover is of no use without a floor" in said
    assert covering == top


def test_a_single_target_row_has_no_floor_to_cover_above(mine, rows, tmp_path):
    one = first_rows(rows["target"], tmp_path / "one.jsonl", 1)
    said, _, covering, _ = mine("one", "--count", 30, "--pick", "cover", target=one, pool=rows["pool"])
    _, _, top, _ = mine("one-top", "--count", 30, "--pick", "top", target=one, pool=rows["pool"])
    assert "--pick cover is of no use without a floor" in said
    assert covering == top


def test_a_pool_of_equal_rows_is_not_called_one_task(mine, tmp_path):
    pool = write_rows(tmp_path / "pool.jsonl", [{"prompt": "a b", "completion": "c"}] * 40)
    said, summary, _, _ = mine("equal", pool=pool)
    assert "pool_of_one_task" not in summary
    assert "of one task" not in said


def test_the_area_is_that_of_held_out_rows(mine, p2d, tiny_folder, rows, tmp_path):
    """Without a second stage the scores are at hand; those of held-out rows are a little lower than of the fitted."""
    common = ("--model", tiny_folder, "--dtype", "float32", "--target", rows["target"], "--pool", rows["pool"])
    heads = tmp_path / "heads"
    assert p2d("score-heads", *common, "--depth", "trained", "--out", heads).code == 0
    assert p2d("mine-data", *common, "--heads", heads, "--out", tmp_path / "out").code == 0
    summary = json.loads((tmp_path / "out" / "manifest.json").read_text())["summary"]
    pool = scores(tmp_path / "out")
    fitted = roc_auc_score(np.repeat([0, 1], [len(pool), 1]), np.append(pool, summary["target_affinity"]))
    assert 0.9 < summary["pool_area"] <= fitted + 0.02
