"""A grid becomes runs: every combination once, the controls and the reference added."""

from pathlib import Path

import pytest

from p2d_cli.engine.stage_run import RunOptions
from p2d_cli.errors import UsageError
from p2d_cli.recipes.grid import Point, Points
from p2d_cli.recipes.recipe import Grid, Recipe
from p2d_cli.stages.run import RecipeRun


def points(overrides=None, **fields):
    return Points(Recipe(out=Path("o"), **fields), overrides or {}).all


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


def test_several_grids_are_united():
    grids = (Grid(data=("p2d",), scope=("heads", "lora")), Grid(data=("full",), scope=("full",), seed=(0, 1)))
    assert names(grid=grids, **{"score-heads": {"method": "pad"}}) == [
        "heads-pad-p2d-s0",
        "lora-p2d-s0",
        "full-full-s0",
        "full-full-s1",
        "heads-random-random-s0",
        "heads-random-random-s1",
    ]
    assert names(grid=[{"seed": [1]}, {"seed": [1, 2]}], controls=False) == ["heads-pad-p2d-s1", "heads-pad-p2d-s2"]


def test_sizes_are_axes_too():
    grid = {"heads": ["pad", "all"], "data": ["p2d", "full"], "head-ratio": [0.05, 0.5], "data-ratio": [0.1, 0.2]}
    assert names(grid=grid) == [
        "heads-pad-h0.05-p2d-d0.1-s0",
        "heads-pad-h0.05-p2d-d0.2-s0",
        "heads-pad-h0.5-p2d-d0.1-s0",
        "heads-pad-h0.5-p2d-d0.2-s0",
        "heads-pad-h0.05-full-s0",
        "heads-pad-h0.5-full-s0",
        "heads-all-p2d-d0.1-s0",
        "heads-all-p2d-d0.2-s0",
        "heads-all-full-s0",
        "heads-random-h0.05-random-d0.1-s0",
        "heads-random-h0.05-random-d0.2-s0",
        "heads-random-h0.5-random-d0.1-s0",
        "heads-random-h0.5-random-d0.2-s0",
    ]
    assert names(grid={"scope": ["lora"], "head_ratio": [0.5], "data_ratio": [0.2]}) == [
        "lora-p2d-d0.2-s0",
        "heads-random-random-d0.2-s0",
    ]


def test_a_seed_given_as_a_flag_goes_over_the_grid():
    assert names({"seed": 7}, grid=Grid(seed=(0, 1)), controls=False) == ["heads-pad-p2d-s7"]
    assert names(defaults={"seed": 5}, controls=False) == ["heads-pad-p2d-s5"]


def test_an_output_is_needed():
    with pytest.raises(UsageError, match="names no output folder"):
        RecipeRun(Recipe(), {}, RunOptions(), lambda *_: None)


def test_names_leave_out_what_a_scope_has_not():
    assert Point(heads=None, data="full", scope="full", seed=0).name == "full-full-s0"


def test_sizes_that_the_settings_rule_out_are_refused_before_anything_is_done(tmp_path):
    begun = []
    mine = {"pool": "pool.jsonl", "target": "target.jsonl", "shortlist": 0.3}
    given = {"defaults": {"model": "model"}, "mine-data": mine, "grid": {"data_ratio": [0.1, 0.5]}}
    run = RecipeRun(Recipe(out=tmp_path, **given), {}, RunOptions(), lambda stage, _: begun.append(stage))
    with pytest.raises(UsageError, match=r"--shortlist 0\.3 is less than the share of rows to keep, 0\.5"):
        run.run()
    assert begun == []


class Recorder(RecipeRun):
    """Does no stage, and notes which take their scores from another artifact."""

    def __init__(self, **fields):
        recipe = Recipe(out=Path("o"), controls=False, defaults={"model": "m", "pool": "rows"}, **fields)
        super().__init__(recipe, {}, RunOptions(), lambda *_: None)
        self.scores = {}

    def _stage(self, name, out, *, table=None, **settings):
        if name in {"score-heads", "mine-data"}:
            self.scores[out.relative_to("o").as_posix()] = settings.get("scores")
        return out


def sources(**fields):
    run = Recorder(**fields)
    run.run()
    return run.scores


@pytest.mark.parametrize("kind", ["own share beside", "none of its own"])
def test_shares_of_heads_are_selected_by_one_scoring(kind):
    grids = [{"heads": ["pad", "random"], "data": ["random"], "head-ratio": [0.01, 0.03]}]
    own = kind == "own share beside"
    found = sources(grid=[*grids, {"heads": ["pad"], "data": ["random"]}] if own else grids)
    scored = "heads/pad-s0" if own else "heads/pad-h0.03-s0"
    assert found[scored] is None
    assert found["heads/pad-h0.01-s0"] == f"o/{scored}"
    assert ("heads/pad-s0" in found) == own, "a share that nothing asks for could be more than its layers have"
    assert found["heads/random-h0.01-s0"] is None


def test_the_heads_that_mine_are_scored_and_others_selected_from_them():
    found = sources(grid={"data": ["p2d"], "head-ratio": [0.2, 0.5]}, **{"score-heads": {"method": "readout"}})
    assert found["heads/readout-s0"] is None
    assert found["heads/readout-h0.2-s0"] == found["heads/readout-h0.5-s0"] == "o/heads/readout-s0"


def test_shares_of_rows_are_chosen_by_the_mining_of_the_greatest():
    grid = {"scope": ["lora"], "data": ["p2d", "random"], "data-ratio": [0.2, 0.5]}
    found = sources(grid=grid)
    assert found["subset/p2d-d0.5-s0"] is None
    assert found["subset/p2d-d0.2-s0"] == "o/subset/p2d-d0.5-s0"
    assert found["subset/random-d0.2-s0"] is None


@pytest.mark.parametrize("table", [{}, {"method": "auto"}, {"method": "readout"}])
def test_auto_and_what_it_stands_for_are_one_artifact(table):
    found = sources(grid={"heads": ["auto", "readout"], "data": ["p2d"]}, **{"score-heads": table})
    assert [name for name in found if name.startswith("heads/")] == ["heads/readout-s0"]


def test_a_preset_names_the_method_too():
    found = sources(grid={"data": ["p2d"]}, **{"score-heads": {"preset": "paper"}})
    assert list(found) == ["heads/pad-s0", "subset/p2d-s0", "subset/full-s0"]


def test_what_was_named_after_auto_stays_where_it_is(tmp_path):
    """Of a recipe that an older p2d has run."""
    (tmp_path / "heads" / "auto-s0").mkdir(parents=True)
    (tmp_path / "adapter" / "heads-auto-p2d-s0").mkdir(parents=True)
    places = {}

    class Placing(RecipeRun):
        def _resolve(self, name, out, table, settings):
            places.setdefault(name, out)
            raise StopIteration

    auto, own = {"method": "auto"}, {"method": "readout"}
    for table, stage, name, expected in (
        (auto, "score-heads", "heads/readout-s0", "heads/auto-s0"),
        (auto, "score-heads", "heads/readout-h0.5-s0", "heads/readout-h0.5-s0"),
        (auto, "train", "adapter/heads-readout-p2d-s0", "adapter/heads-auto-p2d-s0"),
        (own, "score-heads", "heads/readout-s0", "heads/readout-s0"),
        ({"preset": "paper"}, "score-heads", "heads/pad-s0", "heads/pad-s0"),
    ):
        places.clear()
        given = {"defaults": {"model": "m", "pool": "rows"}, "score-heads": table}
        run = Placing(Recipe(out=tmp_path, **given), {}, RunOptions(), lambda *_: None)
        with pytest.raises(StopIteration):
            run._stage(stage, tmp_path / name)
        assert places[stage] == tmp_path / expected


def test_other_methods_may_keep_as_many_rows_as_one_of_them():
    grid = {"heads": ["pad"], "data": ["p2d", "lexical", "full"], "count-of": "p2d"}
    assert names(grid=grid) == [
        "heads-pad-p2d-s0",
        "heads-pad-lexical-as-p2d-s0",
        "heads-pad-full-s0",
        "heads-random-random-as-p2d-s0",
    ]
    with pytest.raises(ValueError, match="count-of and data-ratio exclude each other"):
        Grid(**grid, data_ratio=(0.1,))


def test_epochs_are_an_axis_and_part_of_a_name():
    assert names(grid={"heads": ["pad"], "epochs": [1, 0.5]}, controls=False) == [
        "heads-pad-p2d-e1-s0",
        "heads-pad-p2d-e0.5-s0",
    ]


def test_rows_by_number_and_by_share_have_scores_in_common():
    grid = [{"data": ["p2d", "rds"], "count-of": "p2d"}, {"data": ["rds"], "data-ratio": [0.1]}]
    run = Recorder(grid=grid, **{"mine-data": {"target": "rows"}})
    run.run()
    assert run.scores["subset/rds-as-p2d-s0"] == "o/subset/rds-d0.1-s0"
    assert run.scores["subset/p2d-s0"] is None
