"""A recipe from end to end on few rows: once in full, then skipped, then only what changed."""

import json

import pytest


@pytest.fixture(scope="module")
def recipe(tiny_folder, few, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    path = folder / "recipe.toml"
    path.write_text(
        f"""\
name = "few rows"
[defaults]
model = "{tiny_folder}"
dtype = "float32"
[score-heads]
method = "contrast"
target = "{few["target"]}"
pool = "{few["pool"]}"
episodes = 8
[mine-data]
target = "{few["target"]}"
pool = "{few["pool"]}"
[train]
epochs = 1
[train.full]
lr = 0.001
[eval]
data = "{few["test"]}"
max_new_tokens = 2
limit = 4
[grid]
heads = ["contrast", "all"]
data = ["p2d"]
scope = ["heads", "attention"]
"""
    )
    return path, folder / "out"


@pytest.fixture(scope="module")
def finished(p2d, recipe):
    done = p2d("run", recipe[0], "--out", recipe[1], "--json")
    assert done.code == 0, done.said
    return done.json["stages"]


def test_the_grid_shares_what_it_can_and_ends_in_one_report(finished, recipe):
    stages = [stage["stage"] for stage in finished]
    assert all(stage["status"] == "done" for stage in finished)
    assert stages.count("score-heads") == 3, "contrast, all, and random for the control"
    assert stages.count("mine-data") == 3, "p2d, random for the control, full for the reference"
    assert stages.count("train") == stages.count("eval") == 5
    assert stages[-1] == "report-aer"
    report = json.loads((recipe[1] / "report" / "aer.json").read_text())
    assert {row["name"] for row in report["rows"]} == {
        "contrast heads, p2d rows",
        "all heads, p2d rows",
        "attention, p2d rows",
        "random heads, random rows",
        "full, all rows",
    }
    shares = {row["name"]: row["head_share"] for row in report["rows"]}
    assert shares["all heads, p2d rows"] == 1.0
    assert shares["contrast heads, p2d rows"] == 0.125
    assert next(row for row in report["rows"] if row["is_reference"])["name"] == "full, all rows"


def test_settings_came_from_the_recipe(finished, recipe):
    manifest = json.loads((recipe[1] / "adapter" / "full-full-s0" / "manifest.json").read_text())
    assert manifest["config"]["lr"] == {"value": 0.001, "origin": "recipe"}
    assert manifest["config"]["scope"] == {"value": "full", "origin": "recipe"}
    assert manifest["config"]["schedule"]["origin"] == "default"


def test_again_everything_is_up_to_date(finished, recipe, p2d):
    done = p2d("run", recipe[0], "--out", recipe[1])
    assert done.code == 0
    assert f"{len(finished)} stages, {len(finished)} of them up to date" in done.said


def test_what_an_error_interrupted_goes_on_where_it_stopped(finished, recipe, p2d, monkeypatch):
    del finished
    broken = recipe[0].with_name("broken.toml")
    broken.write_text(recipe[0].read_text().replace('data = ["p2d"]', 'data = ["p2d", "lexical"]'))

    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("p2d_cli.stages.train._compute", fail)
        assert p2d("run", broken, "--out", recipe[1]).code == 130
    again = p2d("run", broken, "--out", recipe[1], "--json").json["stages"]
    lexical = [stage for stage in again if stage["out"].endswith("subset/lexical-s0")]
    assert [stage["status"] for stage in lexical] == ["up-to-date"], "mined before the interruption"
    assert sum(stage["status"] == "done" for stage in again) == 7, "three trainings, three evaluations, the report"


def test_only_what_a_change_touches_is_redone(finished, recipe, p2d):
    del finished
    changed = recipe[0].with_name("changed.toml")
    changed.write_text(recipe[0].read_text().replace("max_new_tokens = 2", "max_new_tokens = 3"))
    stages = p2d("run", changed, "--out", recipe[1], "--json").json["stages"]
    redone = {stage["stage"] for stage in stages if stage["status"] == "done"}
    assert redone == {"eval", "report-aer"}


def test_a_dry_run_of_something_new_makes_nothing(recipe, p2d, tmp_path):
    done = p2d("run", recipe[0], "--out", tmp_path / "new", "--dry-run")
    assert done.code == 0, done.said
    assert not (tmp_path / "new").exists()


def test_seed_and_folder_may_come_from_variables(recipe, p2d, tmp_path, monkeypatch):
    monkeypatch.setenv("P2D_SEED", "7")
    monkeypatch.setenv("P2D_OUT", str(tmp_path / "there"))
    stages = p2d("run", recipe[0], "--dry-run", "--json").json["stages"]
    assert {stage["out"].rpartition("-s")[2] for stage in stages} == {"7"}
    assert all(stage["out"].startswith(str(tmp_path / "there")) for stage in stages)


def test_a_recipe_is_given_once(recipe, p2d):
    done = p2d("run", recipe[0], "--config", recipe[0])
    assert (done.code, "leave --config out" in done.said) == (2, True)


def test_a_stage_by_itself_takes_the_table_of_its_scope(recipe, p2d, few, tmp_path):
    words = (
        "train",
        "--config",
        recipe[0],
        "--data",
        few["target"],
        "--out",
        tmp_path / "a",
        "--print-config",
        "--json",
    )
    assert p2d(*words, "--scope", "full").json["lr"] == {"value": 0.001, "origin": "recipe"}
    assert p2d(*words, "--scope", "lora").json["lr"]["value"] is None


def test_only_settings_of_one_scope_alone_are_told_to_do_nothing(recipe, p2d, tmp_path):
    text = recipe[0].read_text().replace("[train.full]", "lora-rank = 8\n[train.full]\nlora-alpha = 4")
    path = tmp_path / "more.toml"
    path.write_text(text)
    done = p2d("run", path, "--out", tmp_path / "out", "--dry-run", "--json")
    assert done.code == 0, done.said
    told = [note for stage in done.json["stages"] for note in stage["plan"]["notes"] if "of no use" in note]
    assert told == ["of no use with scope full: --lora-alpha"]


def test_layers_of_the_mining_heads_do_not_bind_all_heads(recipe, p2d, tmp_path):
    limited = tmp_path / "limited.toml"
    limited.write_text(recipe[0].read_text().replace("episodes = 8", 'episodes = 8\nlayers = "0-1"'))
    done = p2d("run", limited, "--out", tmp_path / "out", "--dry-run", "--json")
    assert done.code == 0, done.said


def test_print_config_shows_the_recipe(recipe, p2d):
    assert p2d("run", recipe[0], "--print-config").json["name"] == "few rows"


def test_the_quickstart_names_files_that_are_there(tiny_folder, p2d, tmp_path):
    quickstart = tiny_folder.parent / "quickstart.toml"
    shown = p2d("run", quickstart, "--print-config").json
    assert shown["defaults"]["model"] == str(tiny_folder)
    assert shown["eval"]["data"] == str(tiny_folder.parent / "data" / "test.jsonl")
