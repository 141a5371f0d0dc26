"""Recipes: their tables, paths and typos."""

from pathlib import Path

import pytest

from p2d_cli.errors import DataError, UsageError
from p2d_cli.recipes.recipe import find_recipe, read_recipe


def write(tmp_path, text):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


def test_recipe_tables_go_over_defaults_and_scopes_over_train(tmp_path):
    recipe = read_recipe(
        write(
            tmp_path,
            'out = "o"\n[defaults]\nmodel = "m"\nseed = 3\nmax-length = 64\n'
            "[train]\nseed = 4\nlr = 0.1\nepochs = 2\n[train.full]\nlr = 0.01\n",
        )
    )
    assert recipe.table("eval") == {"model": "m", "seed": 3, "max_length": 64}
    assert recipe.table("train") == {"model": "m", "seed": 4, "max_length": 64, "lr": 0.1, "epochs": 2}
    assert recipe.table("train", "full")["lr"] == 0.01
    assert recipe.table("report-aer") == {"seed": 3, "max_length": 64}


def test_input_paths_are_relative_to_the_recipe_if_they_exist_there(tmp_path):
    (tmp_path / "rows.jsonl").write_text("")
    recipe = read_recipe(write(tmp_path, '[eval]\ndata = "rows.jsonl"\nmodel = "owner/name"\n'))
    assert recipe.eval == {"data": str(tmp_path / "rows.jsonl"), "model": "owner/name"}


def test_paths_of_one_scope_are_the_recipes_too(tmp_path):
    (tmp_path / "rows.jsonl").write_text("")
    recipe = read_recipe(write(tmp_path, '[train.full]\neval-data = "rows.jsonl"\n'))
    assert recipe.table("train", "full") == {"eval_data": str(tmp_path / "rows.jsonl")}


@pytest.mark.parametrize("table", ["defaults", "reference", "grid"])
def test_a_typo_beside_the_table_of_a_scope_is_found(tmp_path, table):
    with pytest.raises(UsageError, match="unknown key 'max-lenght'"):
        read_recipe(write(tmp_path, f"[train.full]\nlr = 0.1\n[{table}]\nmax-lenght = 9\n"))


def test_dashes_and_underscores_are_one_key(tmp_path):
    text = "[defaults]\nmax_length = 1\n[train]\nmax-length = 2\n[train.full]\nmax_length = 3\n"
    recipe = read_recipe(write(tmp_path, text))
    assert [recipe.table("train", scope)["max_length"] for scope in (None, "lora", "full")] == [2, 2, 3]


def test_the_quickstart_has_a_name_that_a_file_goes_before(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_recipe(find_recipe("quickstart")).name == "quickstart"
    assert find_recipe("quickstar") == Path("quickstar")
    (tmp_path / "quickstart").write_text('name = "mine"\n')
    assert read_recipe(find_recipe("quickstart")).name == "mine"


def test_a_typo_in_one_of_several_grids(tmp_path):
    with pytest.raises(UsageError, match="unknown key 'head-ration' in the recipe's \\[grid\\]") as caught:
        read_recipe(write(tmp_path, "[[grid]]\n[[grid]]\nhead-ration = [0.1]\n"))
    assert "head" in caught.value.hint


def test_every_wrong_value_of_a_grid_is_named_as_it_is_written_and_nothing_else(tmp_path):
    with pytest.raises(UsageError) as caught:
        read_recipe(write(tmp_path, "[grid]\nheads = ['foo']\ndata-ratio = [3]\n"))
    lines = str(caught.value).splitlines()[1:]
    assert [line.split()[0] for line in lines] == ["[grid.0.heads.0]", "[grid.0.data-ratio.0]"]


def test_no_grid_at_all_is_refused_beside_another_mistake(tmp_path):
    with pytest.raises(UsageError) as caught:
        read_recipe(write(tmp_path, "name = 3\ngrid = []\n"))
    lines = str(caught.value).splitlines()[1:]
    assert [line.split()[0] for line in lines] == ["[name]", "[grid]"]


def test_a_recipe_may_begin_with_the_mark_of_an_editor(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_bytes('name = "über"\r\n[train]\r\nseed = 3\r\n'.encode("utf-8-sig"))
    assert read_recipe(path).name == "über"
    assert read_recipe(path).table("train") == {"seed": 3}


@pytest.mark.parametrize(("encoding", "byte"), [("utf-16", "0xff at byte 1"), ("latin-1", "0xfc at byte 9")])
def test_a_recipe_that_is_not_utf8(tmp_path, encoding, byte):
    path = tmp_path / "recipe.toml"
    path.write_bytes('name = "über"\n'.encode(encoding))
    with pytest.raises(DataError, match=f"not valid UTF-8: byte {byte}") as caught:
        read_recipe(path)
    assert caught.value.hint == "save it as UTF-8"


def test_globs_and_configurations_are_the_recipes_too(tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.jsonl").write_text("")
    recipe = read_recipe(
        write(tmp_path, '[train]\ndata = "rows/*.jsonl"\neval-data = "rows:main"\n[eval]\ndata = "x/*"\n')
    )
    assert recipe.train == {"data": f"{tmp_path}/rows/*.jsonl", "eval-data": f"{tmp_path}/rows:main"}
    assert recipe.eval == {"data": "x/*"}
