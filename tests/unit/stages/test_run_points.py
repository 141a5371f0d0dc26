"""A grid becomes runs: every combination once, the controls and the reference added."""

from pathlib import Path

import pytest

from p2d_cli.config import Grid, Recipe
from p2d_cli.errors import UsageError
from p2d_cli.stages.execution import RunOptions
from p2d_cli.stages.run import Point, RecipeRun


def points(overrides=None, **fields):
    recipe = Recipe(out=Path("o"), **fields)
    return RecipeRun(recipe, overrides or {}, RunOptions(), lambda *_: None).points()


def names(*args, **fields):
    return [point.name for point in points(*args, **fields)]


def test_without_a_grid_there_is_one_run_and_its_control():
    assert names(**{"score-heads": {"method": "pad"}}) == ["heads-pad-p2d-s0", "heads-random-random-s0"]


def test_the_grid_is_a_product_and_the_control_is_not_repeated():
    grid = Grid(heads=("contrast", "random"), data=("p2d", "random"), seed=(0, 1))
    found = names(grid=grid)
    assert len(found) == len(set(found)) == 8
    assert "heads-random-random-s1" in found


def test_scopes_without_selected_heads_appear_once_for_all_heads():
    grid = Grid(heads=("contrast", "pad"), data=("p2d",), scope=("heads", "lora"))
    assert names(grid=grid, controls=False) == ["heads-contrast-p2d-s0", "heads-pad-p2d-s0", "lora-p2d-s0"]


def test_a_seed_given_as_a_flag_goes_over_the_grid():
    assert names({"seed": 7}, grid=Grid(seed=(0, 1)), controls=False) == ["heads-auto-p2d-s7"]
    assert names(defaults={"seed": 5}, controls=False) == ["heads-auto-p2d-s5"]


def test_an_output_is_needed():
    with pytest.raises(UsageError, match="names no output folder"):
        RecipeRun(Recipe(), {}, RunOptions(), lambda *_: None)


def test_names_leave_out_what_a_scope_has_not():
    assert Point(heads=None, data="full", scope="full", seed=0).name == "full-full-s0"
