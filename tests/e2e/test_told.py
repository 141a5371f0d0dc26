"""What a user is told of a result before relying on it: by the command, by inspect, and by a whole recipe."""

import json

import pyarrow.parquet as pq
import pytest

from p2d_cli.artifacts.evaluation import load_metrics
from p2d_cli.core.metrics import wilson_interval


def summary_of(folder):
    return json.loads((folder / "manifest.json").read_text())["summary"]


@pytest.fixture
def first_rows(few, tmp_path):
    """The first so many rows of a kind, in a file."""

    def make(name, count):
        path = tmp_path / f"{name}-{count}.jsonl"
        path.write_text("\n".join(few[name].read_text().splitlines()[:count]) + "\n")
        return path

    return make


@pytest.mark.parametrize("stage", ["score-heads", "mine-data"])
def test_few_target_rows_are_told_by_the_plan_and_by_the_result(
    p2d, tiny_folder, few, first_rows, pipeline, tmp_path, stage
):
    heads = ("--heads", pipeline / "heads") if stage == "mine-data" else ()
    told = "5 different target rows describe a task poorly: 8 or more are better"
    for count in (5, 8):
        line = (
            *(stage, "--model", tiny_folder, "--pool", few["pool"], "--target", first_rows("target", count), *heads),
            *("--background", 20, "--dtype", "float32", "--out", tmp_path / str(count)),
        )
        planned, done = p2d(*line, "--dry-run"), p2d(*line)
        assert done.code == 0, done.said
        for said in (planned.said, done.said, p2d("inspect", tmp_path / str(count)).said):
            assert said.count(told) == (count == 5)
            assert said.count("describe a task poorly") == (count == 5)


def test_methods_that_look_at_no_target_say_nothing_of_it(p2d, tiny_folder, few, tmp_path):
    line = ("mine-data", "--model", tiny_folder, "--pool", few["pool"], "--method", "random")
    assert p2d(*line, "--out", tmp_path / "rows").code == 0
    assert summary_of(tmp_path / "rows")["warnings"] == []


@pytest.fixture(scope="module")
def cut(p2d, tiny_folder, few, tmp_path_factory):
    """An evaluation whose answers may have one token."""
    folder = tmp_path_factory.mktemp("cut") / "evaluation"
    metrics = ("--metric", "exact_match,token_f1,perplexity", "--max-new-tokens", 1, "--dtype", "float32")
    done = p2d("eval", "--model", tiny_folder, "--data", few["test"], *metrics, "--out", folder)
    assert done.code == 0, done.said
    return folder, done


def test_answers_that_are_cut_are_counted_by_row_and_in_all(cut):
    folder, done = cut
    rows = pq.read_table(folder / "predictions.parquet")["answer_cut"].to_pylist()
    metrics = json.loads((folder / "metrics.json").read_text())
    assert sum(rows) == metrics["exact_match"]["answers_cut"] == metrics["token_f1"]["answers_cut"] > 0
    assert "answers_cut" not in metrics["perplexity"]
    assert summary_of(folder)["answers_cut"] == sum(rows)
    assert set(load_metrics(folder)) == set(metrics), "it is no metric"
    assert done.out.count(f"warning: {sum(rows)} of 10 answers were cut at --max-new-tokens 1") == 1
    assert done.out.count("warning: 10 test rows are few: scores of 30 or more tell more") == 1
    assert "warning" not in done.err


def test_answers_that_end_by_themselves_are_not(p2d, tiny_folder, rows, tmp_path):
    line = ("eval", "--model", tiny_folder, "--data", rows["test"], "--limit", 30, "--dtype", "float32", "--stop", " ")
    assert p2d(*line, "--out", tmp_path / "e").code == 0
    assert summary_of(tmp_path / "e")["answers_cut"] == 0
    assert summary_of(tmp_path / "e")["warnings"] == []


def test_scores_of_0_and_1_have_an_interval_that_leaves_room(p2d, cut, tmp_path):
    folder, _ = cut
    scored = json.loads((folder / "metrics.json").read_text())["exact_match"]
    low, high = wilson_interval(round(10 * scored["value"]), 10)
    assert (scored["low"], scored["high"]) == (low, high)
    assert high - low > 0.25
    assert f"[{low:.4f}, {high:.4f}]  10 rows" in p2d("inspect", folder).out


RECIPE = """\
[defaults]
model = "{model}"
dtype = "float32"
[score-heads]
method = "random"
[mine-data]
method = "random"
pool = "{pool}"
[train]
batch-size = 4
epochs = 1
lr = 1e-9
[train.full]
lr = 1e-9
[eval]
data = "{test}"
max-new-tokens = 1
[grid]
heads = ["random"]
data = ["random"]
"""


@pytest.fixture(scope="module")
def of_zeros(p2d, tiny_folder, few, tmp_path_factory):
    """A recipe none of whose runs scores anything."""
    folder = tmp_path_factory.mktemp("zeros")
    test = folder / "test.jsonl"
    given = [json.loads(line) for line in few["test"].read_text().splitlines()]
    test.write_text("".join(json.dumps(row | {"completion": "not that"}) + "\n" for row in given))
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE.format(model=tiny_folder, pool=few["pool"], test=test))
    done = p2d("run", recipe, "--out", folder / "out")
    assert done.code == 0, done.said
    return folder / "out", done


def test_a_table_of_zeros_is_told_as_such(of_zeros):
    folder, done = of_zeros
    told = "every run scores 0 on exact_match, so that it tells none from another; look at the answers in"
    document = json.loads((folder / "report" / "aer.json").read_text())
    assert [warning for warning in document["warnings"] if warning.startswith(told)] == document["warnings"]
    assert done.out.count(told) == 1
    assert told in (folder / "report" / "aer.md").read_text().replace("\\_", "_")
    low, high = wilson_interval(0, 10)
    assert f"0.000 [{low:.3f}, {high:.3f}]" in done.out


def test_a_recipe_says_what_its_stages_were_told_once_with_their_folders(p2d, of_zeros):
    folder, done = of_zeros
    lines = [line.strip() for line in done.out.splitlines()]
    [cut] = [line for line in lines if "answers were cut" in line]
    assert cut.startswith("warning: evaluation/")
    assert cut.count("evaluation/") == 2
    [few] = [line for line in lines if "test rows are few" in line]
    assert few.count("evaluation/") == 2
    [far] = [line for line in lines if "--lr 1e-09 is 1/" in line and "heads" in line]
    assert far.startswith("warning: adapter/")
    # What is up to date is told of as well.
    again = p2d("run", folder.parent / "recipe.toml", "--out", folder)
    assert [line for line in again.out.splitlines() if "warning" in line] == [
        line for line in done.out.splitlines() if "warning" in line
    ]


def test_scores_of_earlier_versions_are_reported_with_todays_intervals(p2d, tiny_folder, tmp_path):
    golden = tiny_folder.parent / "golden" / "v1" / "evaluation"
    scored = summary_of(golden)["metrics"]["exact_match"]
    done = p2d("report-aer", golden, "--reference", golden, "--out", tmp_path / "report", "--json")
    assert done.code == 0, done.said
    [row] = done.json["summary"]["rows"]
    found = row["metrics"]["exact_match"]
    assert (found["value"], found["count"]) == (scored["value"], scored["count"])
    hits = round(scored["value"] * scored["count"])
    assert (found["low"], found["high"]) == wilson_interval(hits, scored["count"])
    assert row["metrics"]["token_f1"] == summary_of(golden)["metrics"]["token_f1"]
