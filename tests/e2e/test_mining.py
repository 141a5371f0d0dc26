"""What mine-data finds on the fixture, where the truth is known, and what it leaves out."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer

RELEVANT = 180


@pytest.fixture(scope="module")
def skills(rows):
    return json.loads((Path(rows["pool"]).parent / "skills.json").read_text())


@pytest.fixture(scope="module")
def mine(p2d, tiny_folder, rows, tmp_path_factory):
    """Heads by a method, and the rows that they choose from the whole pool, as many as are relevant."""
    folder = tmp_path_factory.mktemp("mining")

    def run(heads, *options):
        target, pool = ("--target", rows["target"]), ("--pool", rows["pool"])
        chosen = folder / heads
        if not chosen.exists():
            done = p2d("score-heads", "--model", tiny_folder, "--method", heads, *target, *pool, "--out", chosen)
            assert done.code == 0, done.said
        out = folder / "-".join(["rows", heads, *map(str, options)]).replace("--", "")
        done = p2d(
            *("mine-data", "--model", tiny_folder, "--heads", chosen, *target, *pool),
            *("--count", RELEVANT, *options, "--out", out),
        )
        assert done.code == 0, done.said
        return out

    return run


def precision(folder, skills):
    ids = pq.read_table(folder / "subset.parquet").to_pydict()["id"]
    return np.mean([skills[row] == "route" for row in ids])


@pytest.mark.parametrize("heads", ["readout", "contrast", "uniform", "random"])
def test_any_tenth_of_the_heads_reads_out_the_task(mine, skills, heads):
    assert precision(mine(heads), skills) >= 0.98


def test_attention_needs_the_right_heads(mine, skills):
    assert precision(mine("contrast", "--affinity", "attention"), skills) > 0.7
    assert precision(mine("random", "--preset", "paper"), skills) < 0.5


def test_a_shortlist_holds_the_rows_that_share_most_words(mine, p2d, rows, tiny_folder, tmp_path, skills):
    """Of which the heads choose; the model reads no others."""
    all_to_the_end = ("--refine", 1)
    shorter = mine("readout", "--shortlist", 0.5, *all_to_the_end)
    scored = pq.read_table(shorter / "pool_scores.parquet").to_pylist()
    words = ("--method", "lexical", "--pool", rows["pool"], "--target", rows["target"], "--ratio", 0.5)
    assert p2d("mine-data", "--model", tiny_folder, *words, "--out", tmp_path / "words").code == 0
    listed = set(pq.read_table(tmp_path / "words" / "subset.parquet")["id"].to_pylist())
    assert {row["id"] for row in scored if row["score"] is not None and not np.isnan(row["score"])} == listed
    assert all(row["draws"] == (row["id"] in listed) for row in scored)
    whole, half = (
        json.loads((folder / "manifest.json").read_text()) for folder in (mine("readout", *all_to_the_end), shorter)
    )
    assert half["tokens"] < 0.7 * whole["tokens"]
    assert half["summary"]["rows_not_listed"] == len(scored) - len(listed)
    assert half["seconds"]["shortlist"] > 0
    assert precision(mine("readout", "--shortlist", 0.5), skills) >= 0.98


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--shortlist", 0.05), "--shortlist 0.05 is less than the share of rows to keep, 0.1"),
        (("--shortlist", 0.01, "--count", 1000), "of which 1000 are to be chosen"),
        (("--shortlist", 0), "greater than 0"),
    ],
)
def test_a_shortlist_that_is_too_short(p2d, tiny_folder, rows, tmp_path, options, told):
    where = ("--model", tiny_folder, "--pool", rows["pool"], "--target", rows["target"], "--method", "embedding")
    done = p2d("mine-data", *where, *options, "--out", tmp_path / "out")
    assert (done.code, told in done.said) == (2, True), done.said
    done = p2d("mine-data", *where[:4], *where[6:], "--shortlist", 0.5, "--out", tmp_path / "out")
    assert (done.code, "--shortlist needs --target" in done.said) == (2, True), done.said


@pytest.mark.parametrize("rows_a_chunk", [16_384, 500])
def test_coverage_chooses_rows_that_the_others_are_like(p2d, rows, tiny_folder, tmp_path, monkeypatch, rows_a_chunk):
    """Judged by scikit-learn's TF-IDF and beside a random choice; of several chunks each gives its share."""
    monkeypatch.setattr("p2d_cli.data.pool.CHUNK_ROWS", rows_a_chunk)
    pool = [json.loads(line) for line in Path(rows["pool"]).read_text().splitlines()]
    texts = [f"{row['prompt']}\n{row['completion']}" for row in pool]
    vectors = TfidfVectorizer(token_pattern=r"(?u)\w+|[^\w\s]", sublinear_tf=True).fit_transform(texts)
    likeness = (vectors @ vectors.T).toarray()
    place_of = {row["id"]: place for place, row in enumerate(pool)}
    covered = {}
    for method in ("coverage", "random"):
        words = ("mine-data", "--model", tiny_folder, "--method", method, "--pool", rows["pool"], "--count", 40)
        done = p2d(*words, "--out", tmp_path / method, "--json")
        assert (done.code, done.json["summary"]["rows_selected"]) == (0, 40), done.said
        places = [place_of[row] for row in pq.read_table(tmp_path / method / "subset.parquet")["id"].to_pylist()]
        assert len(set(places)) == 40
        covered[method] = likeness[:, places].max(axis=1).mean()
        if method == "coverage":
            chunks = -(-len(pool) // rows_a_chunk)
            shares = np.bincount([place * chunks // len(pool) for place in places], minlength=chunks)
            assert shares.max() - shares.min() <= 1
    assert covered["coverage"] > 1.1 * covered["random"]


def test_scores_do_not_depend_on_the_batches(mine):
    whole, small = (
        pq.read_table(mine("readout", "--dtype", "float32", "--token-budget", budget) / "pool_scores.parquet")
        for budget in (8192, 300)
    )
    np.testing.assert_allclose(whole["score"], small["score"], atol=1e-4)


def test_pool_rows_that_are_target_rows_are_left_out_and_reported(p2d, pipeline, tiny_folder, few, tmp_path):
    target = few["target"].read_text().splitlines()
    mixed = tmp_path / "pool.jsonl"
    shouted = json.loads(target[1])
    shouted["id"], shouted["prompt"] = "shouted", shouted["prompt"].upper() + " "
    mixed.write_text(few["pool"].read_text() + target[0] + "\n" + json.dumps(shouted) + "\n")
    done = p2d(
        *("mine-data", "--model", tiny_folder, "--heads", pipeline / "heads", "--target", few["target"]),
        *("--pool", mixed, "--ratio", 1, "--floor-quantile", 0, "--out", tmp_path / "s"),
    )
    assert done.code == 0, done.said
    assert "2 pool rows are target rows as well" in done.said
    scores = pq.read_table(tmp_path / "s" / "pool_scores.parquet").to_pylist()
    assert len(scores) == 62
    assert {row["id"] for row in scores if row["draws"] == 0} == {json.loads(target[0])["id"], "shouted"}
    chosen = set(pq.read_table(tmp_path / "s" / "subset.parquet").to_pydict()["id"])
    assert len(chosen) == 60
    assert "shouted" not in chosen


def test_rows_longer_than_the_context_are_cut_and_counted(p2d, pipeline, tiny_folder, few, tmp_path):
    done = p2d(
        *("mine-data", "--model", tiny_folder, "--heads", pipeline / "heads", "--target", few["target"]),
        *("--pool", few["pool"], "--max-length", 6, "--out", tmp_path / "s"),
    )
    assert done.code == 0, done.said
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    assert manifest["summary"]["truncated_rows"] > 0
    assert f"{manifest['summary']['truncated_rows']} rows were cut to fit the context" in done.said


@pytest.mark.parametrize("skill", ["reverse", "sort", "successor"])
def test_skills_whose_prompts_look_alike_are_told_apart_by_their_answers(
    p2d, tiny_folder, rows, skills, skill, tmp_path
):
    """`BEHJ -> JHEB` beside `BEHJ -> CFIK`: words do not help here, and chance is below a tenth."""
    pool = [json.loads(line) for line in Path(rows["pool"]).read_text().splitlines()]
    target = [row for row in pool if skills[row["id"]] == skill][:48]
    shown = {row["id"] for row in target}
    for name, part in (("target", target), ("pool", [row for row in pool if row["id"] not in shown])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    inputs = ("--model", tiny_folder, "--target", tmp_path / "target.jsonl", "--pool", tmp_path / "pool.jsonl")
    assert p2d("score-heads", *inputs, "--method", "readout", "--out", tmp_path / "heads").code == 0
    found = {}
    for method, options in (("p2d", ("--heads", tmp_path / "heads", "--pick", "top")), ("lexical", ())):
        done = p2d("mine-data", *inputs, "--method", method, *options, "--count", 132, "--out", tmp_path / method)
        assert done.code == 0, done.said
        ids = pq.read_table(tmp_path / method / "subset.parquet").to_pydict()["id"]
        found[method] = np.mean([skills[row] == skill for row in ids])
    assert found["p2d"] > 0.5 > 0.3 > found["lexical"]


def test_no_row_below_the_floor_is_kept(mine, skills):
    """The pool holds 180 rows of the task; as many as twice that are asked for."""
    out = mine("readout", "--count", 2 * RELEVANT, "--floor-quantile", 0.05)
    summary = json.loads((out / "manifest.json").read_text())["summary"]
    scores = np.array(pq.read_table(out / "pool_scores.parquet").to_pydict()["score"], dtype=float)
    assert summary["rows_selected"] == (scores >= summary["floor_score"]).sum() < 2 * RELEVANT
    assert summary["cut_score"] >= summary["floor_score"]
    assert precision(out, skills) > 0.9
    assert summary["rows_selected"] > 0.8 * RELEVANT
    everything = mine("readout", "--count", 2 * RELEVANT, "--floor-quantile", 0)
    assert json.loads((everything / "manifest.json").read_text())["summary"]["rows_selected"] == 2 * RELEVANT


def test_a_share_below_the_floor_is_kept_as_it_is(mine):
    out = mine("readout", "--count", 20, "--floor-quantile", 0.05)
    assert json.loads((out / "manifest.json").read_text())["summary"]["rows_selected"] == 20


@pytest.mark.parametrize("how", [(), ("--target", "task.jsonl", "--affinity", "attention")])
def test_attention_sets_no_floor(p2d, tiny_folder, rows, tmp_path, how):
    where = ("--model", tiny_folder, "--heads", tmp_path, "--pool", rows["pool"])
    done = p2d("mine-data", *where, *how, "--floor-quantile", 0.05, "--out", tmp_path / "out")
    assert (done.code, "--floor-quantile needs --target and the readout" in done.said) == (2, True), done.said


def test_a_pool_without_the_task_has_no_row_above_the_floor(mine, p2d, tiny_folder, rows, skills, tmp_path):
    pool = [json.loads(line) for line in Path(rows["pool"]).read_text().splitlines()]
    others = tmp_path / "others.jsonl"
    others.write_text("".join(json.dumps(row) + "\n" for row in pool if skills[row["id"]] != "route"))
    heads = mine("readout").parent / "readout"
    done = p2d(
        *("mine-data", "--model", tiny_folder, "--heads", heads, "--target", rows["target"], "--pool", others),
        *("--floor-quantile", 0.5, "--out", tmp_path / "out"),
    )
    assert (done.code, "the pool holds none of the task, or shows it in another form" in done.said) == (65, True), (
        done.said
    )
