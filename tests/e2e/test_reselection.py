"""score-heads and mine-data with --scores: chosen anew by scores that are there, as if they had been scored again."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("reselection")


@pytest.fixture(scope="module")
def score(p2d, tiny_folder, few, folder):
    def run(name, *options, model=tiny_folder, rows=True):
        rows = ("--target", few["target"], "--pool", few["pool"]) if rows else ()
        out = folder / name
        return p2d("score-heads", "--model", model, *rows, "--dtype", "float32", *options, "--out", out, "--json"), out

    return run


@pytest.fixture(scope="module")
def scored(score):
    done, out = score("scored", "--repeats", 3, "--proxy-samples", 6)
    assert done.code == 0, done.said
    return out


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


@pytest.mark.parametrize(
    "options",
    [("--ratio", 0.5), ("--layers", "2-3", "--ratio", 0.25), ("--ratio", 0.5, "--selection", "top")],
    ids=["ratio", "layers", "top"],
)
def test_it_is_the_selection_of_a_scoring_with_these_settings(score, scored, options):
    name = "-".join(map(str, options)).replace("--", "")
    anew, again = score(f"anew-{name}", "--repeats", 3, "--proxy-samples", 6, *options)
    done, out = score(f"from-{name}", "--scores", scored, *options, rows=False)
    assert (anew.code, done.code) == (0, 0), done.said
    expected, found = (load_file(place / "head_scores.safetensors") for place in (again, out))
    assert found["selected"].sum() != load_file(scored / "head_scores.safetensors")["selected"].sum()
    for key in expected:
        assert np.array_equal(found[key], expected[key]), key
    assert manifest(out)["summary"]["repeatability"] == pytest.approx(manifest(again)["summary"]["repeatability"])


def test_the_scoring_is_charged_and_no_row_is_read(score, scored):
    done, out = score("charged", "--scores", scored, "--ratio", 0.3)
    assert done.code == 0, done.said
    made, first = manifest(out), manifest(scored)
    assert made["tokens"] == 0
    assert [cost["tokens"] for cost in made["ledger"]] == [first["tokens"], 0]
    assert made["ledger"][0] == first["ledger"][0]
    assert set(made["inputs"]) == {"model", "scores"}, "rows that are not read are no inputs"


def test_scores_of_another_method_are_refused(score, scored):
    done, out = score("other-method", "--scores", scored, "--method", "pad")
    assert done.code == 2
    assert "are of readout, not of --method pad" in done.said
    assert not out.exists()


def test_uniform_heads_have_no_ranking(score):
    done, uniform = score("uniform", "--method", "uniform", rows=False)
    assert done.code == 0, done.said
    done, _ = score("from-uniform", "--scores", uniform, "--ratio", 0.5)
    assert (done.code, "ranks none" in done.said) == (2, True), done.said


def test_scores_of_another_model_are_refused(score, scored, tiny_folder, tmp_path):
    other = shutil.copytree(tiny_folder, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    done, _ = score("other-model", "--scores", scored, model=other, rows=False)
    assert (done.code, "another model" in done.said) == (65, True), done.said


# --- mine-data --scores

ALL_ROWS = ("--refine", 1, "--floor-quantile", 0)
"""By default few more rows keep a score than a share asks for, and rows below a floor are left out."""


@pytest.fixture(scope="module")
def mine(p2d, tiny_folder, few, folder):
    def run(name, *options, pool=few["pool"]):
        out = folder / name
        command = ("mine-data", "--model", tiny_folder, "--pool", pool, "--dtype", "float32", *options)
        return p2d(*command, "--out", out, "--json"), out

    return run


@pytest.fixture(scope="module")
def mined(mine, scored, few):
    done, out = mine("mined", "--heads", scored, "--target", few["target"], "--shortlist", 0.6, *ALL_ROWS)
    assert done.code == 0, done.said
    return out


def test_other_shares_are_those_of_mining_anew(mine, mined, scored, few):
    more = ("--ratio", 0.4, *ALL_ROWS)
    anew, again = mine("mined-anew", "--heads", scored, "--target", few["target"], "--shortlist", 0.6, *more)
    done, out = mine("mined-from", "--scores", mined, "--ratio", 0.4)
    assert (anew.code, done.code) == (0, 0), done.said
    for name in ("subset.parquet", "pool_scores.parquet"):
        assert (out / name).read_bytes() == (again / name).read_bytes(), name
    told, expected = manifest(out)["summary"], manifest(again)["summary"]
    for name in ("method", "rows_selected", "rows_total", "rows_target", "rows_not_listed", "cut_score"):
        assert told[name] == expected[name], name
    assert manifest(out)["tokens"] == 0 < manifest(again)["tokens"]
    assert manifest(out)["ledger"][:2] == manifest(mined)["ledger"], "scoring and mining are charged"


@pytest.mark.parametrize("method", ["loss", "ifd", "embedding", "lexical"])
def test_every_method_that_ranks(mine, few, method):
    options = ("--method", method, *(("--target", few["target"]) if method in {"embedding", "lexical"} else ()))
    first, base = mine(f"{method}-base", *options)
    anew, again = mine(f"{method}-anew", *options, "--ratio", 0.5)
    done, out = mine(f"{method}-from", "--method", method, "--scores", base, "--ratio", 0.5)
    assert (first.code, anew.code, done.code) == (0, 0, 0), done.said
    assert pq.read_table(out / "subset.parquet").equals(pq.read_table(again / "subset.parquet"))


def test_the_floor_that_target_rows_set_holds_for_other_shares(mine, mined, scored, few):
    floor = ("--floor-quantile", 0.2)
    options = ("--heads", scored, "--target", few["target"], "--refine", 1, *floor)
    base, where = mine("floor-base", *options)
    anew, again = mine("floor-anew", *options, "--ratio", 0.9)
    done, out = mine("floor-from", "--scores", where, *floor, "--ratio", 0.9)
    assert (base.code, anew.code, done.code) == (0, 0, 0), done.said
    assert (out / "subset.parquet").read_bytes() == (again / "subset.parquet").read_bytes()
    for name in ("rows_selected", "floor_score", "floor_quantile"):
        assert manifest(out)["summary"][name] == manifest(again)["summary"][name], name
    assert manifest(out)["summary"]["rows_selected"] < manifest(out)["summary"]["rows_total"] * 0.9
    other, _ = mine("floor-other", "--scores", where, "--floor-quantile", 0.3)
    without, _ = mine("floor-without", "--scores", mined, *floor)
    assert (other.code, "they were found with 0.2" in other.said) == (2, True), other.said
    assert (without.code, "they were found without one" in without.said) == (2, True), without.said


def test_without_a_word_the_floor_is_that_of_the_scores(mine, scored, few):
    options = ("--heads", scored, "--target", few["target"], "--refine", 1)
    base, where = mine("own-floor-base", *options)
    anew, again = mine("own-floor-anew", *options, "--ratio", 0.9)
    done, out = mine("own-floor-from", "--scores", where, "--ratio", 0.9)
    assert (base.code, anew.code, done.code) == (0, 0, 0), done.said
    assert (out / "subset.parquet").read_bytes() == (again / "subset.parquet").read_bytes()
    assert manifest(out)["summary"]["floor_score"] == manifest(again)["summary"]["floor_score"]
    assert manifest(out)["summary"]["rows_selected"] < 54
    done, _ = mine("own-floor-from", "--scores", where, "--ratio", 0.9, "--floor-quantile", 0)
    assert (done.code, "setting floor_quantile" in done.said) == (73, True), done.said


def test_more_rows_than_a_shortlist_left_are_refused(mine, mined):
    done, out = mine("too-many", "--scores", mined, "--ratio", 0.9)
    assert (done.code, "with a greater --shortlist" in done.said) == (2, True), done.said
    assert not out.exists()


def test_more_rows_than_were_read_on_are_refused(mine, scored, few):
    first, base = mine("read-on-base", "--heads", scored, "--target", few["target"], "--floor-quantile", 0)
    done, out = mine("read-on", "--scores", base, "--ratio", 0.5)
    assert first.code == 0, first.said
    assert (done.code, "with a greater --refine" in done.said) == (2, True), done.said
    assert not out.exists()


@pytest.mark.parametrize("method", ["random", "coverage", "full"])
def test_methods_that_rank_nothing_are_refused(mine, method):
    first, base = mine(f"{method}-base", "--method", method)
    done, _ = mine(f"{method}-from", "--method", method, "--scores", base, "--ratio", 0.5)
    assert first.code == 0, first.said
    assert (done.code, "ranks none" in done.said) == (2, True), done.said


def test_scores_of_another_pool_or_method_are_refused(mine, mined, few):
    done, _ = mine("other-pool", "--scores", mined, pool=few["test"])
    assert (done.code, "of another pool" in done.said) == (65, True), done.said
    done, _ = mine("other-mining", "--scores", mined, "--method", "loss")
    assert (done.code, "give --method p2d" in done.said) == (2, True), done.said


def test_the_choice_is_measured_as_that_of_mining_anew(mine, scored, few, tmp_path):
    ids = [json.loads(line)["id"] for line in few["pool"].read_text().splitlines()]
    (tmp_path / "relevance.json").write_text(json.dumps({"relevant": ids[::3]}))
    known = ("--relevance", tmp_path / "relevance.json")
    first, base = mine("known-base", "--heads", scored, "--target", few["target"], *ALL_ROWS)
    anew, again = mine("known-anew", "--heads", scored, "--target", few["target"], "--ratio", 0.3, *ALL_ROWS, *known)
    done, out = mine("known-from", "--scores", base, "--ratio", 0.3, *known)
    assert (first.code, anew.code, done.code) == (0, 0, 0), done.said
    for name in ("precision", "recall", "chance_precision"):
        assert manifest(out)["summary"][name] == manifest(again)["summary"][name]


# --- in a recipe


@pytest.fixture(scope="module")
def recipe(tiny_folder, few, folder):
    path = folder / "recipe.toml"
    path.write_text(
        f"""\
controls = false
[defaults]
model = "{tiny_folder}"
dtype = "float32"
[score-heads]
method = "readout"
background = 20
target = "{few["target"]}"
pool = "{few["pool"]}"
[mine-data]
floor_quantile = 0
target = "{few["target"]}"
pool = "{few["pool"]}"
[train]
epochs = 1
[eval]
data = "{few["test"]}"
max_new_tokens = 2
limit = 4
[[grid]]
heads = ["readout", "random"]
data = ["random"]
head-ratio = [0.25, 0.5]
[[grid]]
scope = ["lora"]
data = ["p2d", "random"]
data-ratio = [0.2, 0.5]
"""
    )
    return path


def test_a_grid_of_shares_scores_and_mines_once(p2d, recipe, folder):
    planned = p2d("run", recipe, "--out", folder / "swept", "--dry-run", "--json")
    assert planned.code == 0, planned.said
    plans = {"/".join(stage["out"].split("/")[-2:]): stage["plan"] for stage in planned.json["stages"]}
    assert plans["heads/readout-h0.5-s0"]["tokens"] == 0 < plans["heads/readout-s0"]["tokens"]
    assert plans["subset/p2d-d0.2-s0"]["tokens"] == 0 < plans["subset/p2d-d0.5-s0"]["tokens"]

    done = p2d("run", recipe, "--out", folder / "swept", "--json")
    assert done.code == 0, done.said
    heads = {place.name: manifest(place) for place in (folder / "swept" / "heads").iterdir()}
    assert set(heads) == {"readout-s0", "readout-h0.25-s0", "readout-h0.5-s0", "random-h0.25-s0", "random-h0.5-s0"}
    assert {name for name, made in heads.items() if made["tokens"]} == {"readout-s0"}
    subsets = {place.name: manifest(place) for place in (folder / "swept" / "subset").iterdir()}
    assert {name for name, made in subsets.items() if made["tokens"]} == {"p2d-d0.5-s0"}
    assert subsets["p2d-d0.2-s0"]["summary"]["rows_selected"] == 12

    report = json.loads((folder / "swept" / "report" / "aer.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    scoring = heads["readout-s0"]["ledger"][0]["seconds"]
    mining = subsets["p2d-d0.5-s0"]["ledger"][-1]["seconds"]
    assert scoring["score"] > 0
    assert mining["score"] > 0
    for share in ("25%", "50%"):
        assert rows[f"readout heads {share}, random rows"]["score_heads_seconds"] >= scoring["score"]
    for share in ("20%", "50%"):
        assert rows[f"lora, p2d rows {share}"]["score_heads_seconds"] >= scoring["score"]
        assert rows[f"lora, p2d rows {share}"]["mine_data_seconds"] >= mining["score"]
