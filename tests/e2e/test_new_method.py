"""A new method is one new class: everything else finds it, from the choices to the plan and to two processes.

`own_methods.py` has a head method and a row method that need one forward pass; they are registered here alone.
"""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from own_methods import Easy, Loud, Quiet, Twice
from safetensors.numpy import load_file
from test_distributed import launch

from p2d_cli.registry import HEAD_METHODS, ROW_METHODS


@pytest.fixture
def known():
    with HEAD_METHODS.added(Loud), ROW_METHODS.added(Easy):
        yield


@pytest.fixture(scope="module")
def commands(tiny_folder, few):
    common = ("--model", tiny_folder, "--dtype", "float32", "--token-budget", 100)
    return {
        "score-heads": ("score-heads", *common, "--target", few["target"], "--method", "loud", "--repeats", 2),
        "mine-data": ("mine-data", *common, "--pool", few["pool"], "--method", "easy"),
    }


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


def scores(folder):
    if (folder / "pool_scores.parquet").exists():
        return pq.read_table(folder / "pool_scores.parquet")["score"].to_numpy()
    return load_file(folder / "head_scores.safetensors")["repeats"]


def test_without_its_class_a_name_is_refused_with_the_choices(p2d, commands, tmp_path):
    for name, words in commands.items():
        done = p2d(*words, "--out", tmp_path / "out")
        assert done.code == 2, name
        assert "'random'" in done.said


@pytest.mark.parametrize("name", ["score-heads", "mine-data"])
def test_it_is_planned_timed_and_run(p2d, known, commands, tmp_path, name):
    words = (*commands[name], "--out", tmp_path / "out")
    [work] = p2d(*words, "--dry-run", "--json").json["plan"]["works"]
    [timed] = p2d(*words, "--dry-run", "--time", "--json").json["plan"]["works"]
    assert timed["seconds"] > 0
    done = p2d(*words)
    assert done.code == 0, done.said
    made = manifest(tmp_path / "out")
    assert work["tokens"] == made["tokens"] > 0
    assert np.isfinite(scores(tmp_path / "out")).all()
    told = p2d("inspect", tmp_path / "out").said
    assert f"by {made['summary']['method']}" in told
    assert ("the loudest output has length" in told) == (name == "score-heads")


def test_its_rows_are_those_of_the_least_loss(p2d, known, commands, tmp_path):
    assert p2d(*commands["mine-data"], "--out", tmp_path / "easy").code == 0
    loss = [word if word != "easy" else "loss" for word in commands["mine-data"]]
    assert p2d(*loss, "--out", tmp_path / "loss").code == 0
    np.testing.assert_allclose(scores(tmp_path / "easy"), -scores(tmp_path / "loss"))


def test_its_scores_choose_another_number(p2d, known, commands, tmp_path):
    for name, words in commands.items():
        assert p2d(*words, "--out", tmp_path / name).code == 0
        done = p2d(*words, "--scores", tmp_path / name, "--ratio", 0.5, "--out", tmp_path / f"{name} again")
        assert done.code == 0, done.said
        assert manifest(tmp_path / f"{name} again")["tokens"] == 0


@pytest.mark.parametrize(("name", "method"), [("score-heads", Loud), ("mine-data", Easy)])
def test_a_run_that_was_killed_goes_on(p2d, known, commands, tmp_path, monkeypatch, name, method):
    assert p2d(*commands[name], "--out", tmp_path / "undisturbed").code == 0
    passes, left = method.passes, [2]

    def stopping(self):
        for one in passes(self):
            read = one.read

            def read_or_stop(reader, batch, read=read):
                left[0] -= 1
                if left[0] < 0:
                    raise KeyboardInterrupt
                return read(reader, batch)

            object.__setattr__(one, "read", read_or_stop)
            yield one

    with monkeypatch.context() as patch:
        patch.setattr(method, "passes", stopping)
        assert p2d(*commands[name], "--out", tmp_path / "out").code == 130
    told = p2d(*commands[name], "--out", tmp_path / "out", "--dry-run").said
    assert "would resume" in told
    done = p2d(*commands[name], "--out", tmp_path / "out")
    assert done.code == 0, done.said
    assert "batches were finished before" in done.said
    assert np.array_equal(scores(tmp_path / "out"), scores(tmp_path / "undisturbed"))
    assert manifest(tmp_path / "out")["tokens"] == manifest(tmp_path / "undisturbed")["tokens"]


def test_a_grid_takes_both(p2d, known, tiny_folder, few, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f"""\
out = "{tmp_path / "out"}"
[defaults]
model = "{tiny_folder}"
dtype = "float32"
[score-heads]
target = "{few["target"]}"
[mine-data]
pool = "{few["pool"]}"
[train]
epochs = 1
max_steps = 1
[eval]
data = "{few["test"]}"
limit = 2
max_new_tokens = 2
[grid]
heads = ["loud"]
data = ["easy"]
"""
    )
    planned = p2d("run", recipe, "--dry-run", "--json")
    assert planned.code == 0, planned.said
    done = p2d("run", recipe)
    assert done.code == 0, done.said
    report = manifest(tmp_path / "out" / "report")["summary"]
    assert {row["name"] for row in report["rows"]} >= {"loud heads, easy rows", "random heads, random rows"}
    assert [row["is_control"] for row in report["rows"] if row["name"] == "loud heads, easy rows"] == [False]


def test_two_processes_share_it(p2d, known, commands, tmp_path):
    words = [((*line, "--out", tmp_path / f"two {name}"), ("own", 0)) for name, line in commands.items()]
    done = launch(tmp_path / "launch", 2, words)
    assert done.code == 0, done.err
    for name, line in commands.items():
        assert p2d(*line, "--out", tmp_path / f"one {name}").code == 0
        np.testing.assert_allclose(scores(tmp_path / f"two {name}"), scores(tmp_path / f"one {name}"), rtol=1e-5)
        assert manifest(tmp_path / f"two {name}")["tokens"] == manifest(tmp_path / f"one {name}")["tokens"]


def test_a_method_without_a_target_reads_the_model_all_the_same(p2d, tiny_folder, few, tmp_path):
    words = ("score-heads", "--model", tiny_folder, "--dtype", "float32", "--pool", few["pool"], "--method", "quiet")
    with HEAD_METHODS.added(Quiet):
        done = p2d(*words, "--out", tmp_path / "out")
    assert done.code == 0, done.said
    made = manifest(tmp_path / "out")
    assert made["tokens"] > 0
    assert (made["precision"], made["ledger"][0]["hardware"]) == ("float32", made["hardware"]["label"])


def test_passes_of_one_name_are_refused(p2d, commands, tmp_path):
    words = [word if word != "easy" else "twice" for word in commands["mine-data"]]
    with ROW_METHODS.added(Twice):
        done = p2d(*words, "--out", tmp_path / "out")
    assert done.code == 70
    assert "two passes are called 'weigh rows'" in done.said
    assert not (tmp_path / "out").exists()


def test_an_artifact_of_a_method_that_is_gone(p2d, commands, tmp_path):
    with HEAD_METHODS.added(Loud), ROW_METHODS.added(Easy):
        for name, words in commands.items():
            assert p2d(*words, "--out", tmp_path / name).code == 0
    for name, method in (("score-heads", "auto"), ("mine-data", "loss")):
        assert p2d("inspect", tmp_path / name).code == 0
        words = [word if word not in {"loud", "easy"} else method for word in commands[name]]
        done = p2d(*words, "--scores", tmp_path / name, "--out", tmp_path / "again")
        assert done.code == 2
        assert "which this p2d does not have" in done.said
