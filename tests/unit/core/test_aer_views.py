"""What a report shows beside its runs: those of several seeds as one, and which heads were selected."""

from dataclasses import replace

import pytest

from p2d_cli.core.aer import MetricValue, RunCost, StageCost, compare, control_warnings

TRAINED = {"scope": "heads", "head_share": 0.1, "row_share": 0.1, "learning_rate": 3e-3}


def run(name, seed, seconds, score, *, heads="pad", data="p2d", **settings):
    train = TRAINED | {"heads_method": heads, "data_method": data, "seed": seed, "trainable_share": 0.02 + seed}
    return RunCost(
        name=f"{name}, seed {seed}",
        stages=(
            StageCost("mine-data", f"d{name}{seed}", {"mine": 10.0}, "H", "float32", settings={"method": data}),
            StageCost("train", f"t{name}{seed}", {"train": seconds}, "H", "float32", settings=train | settings),
        ),
        metrics={"exact_match": MetricValue(score, score - 0.1, score + 0.2, 50)},
        path=f"runs/{name}{seed}",
        label=name,
        is_control="random" in (heads, data),
    )


FULL = replace(
    run("full", 0, 1000.0, 0.9, heads=None, data="full"),
    stages=(StageCost("train", "full", {"train": 1000.0}, "H", "float32", settings={"scope": "full", "seed": 0}),),
)


def views(*runs):
    return compare([*runs, FULL], FULL)


def test_runs_that_differ_in_their_seed_alone_are_one():
    report = views(run("p2d", 0, 90.0, 0.5), run("p2d", 1, 190.0, 0.7), run("p2d", 2, 290.0, 0.6))
    group, full = report.groups
    assert (group.name, group.seeds, full.is_reference) == ("p2d", (0, 1, 2), True)
    assert group.aer == pytest.approx((100 + 200 + 300) / 3 / 1000)
    assert group.speedup == pytest.approx(5.0)
    assert group.metrics["exact_match"] == MetricValue(pytest.approx(0.6), pytest.approx(0.5), pytest.approx(0.8), 50)
    assert group.ranges["exact_match"] == (0.5, 0.7)
    assert [report.rows[place].label for place in group.members] == ["p2d"] * 3


def test_another_learning_rate_makes_another_group():
    report = views(run("p2d", 0, 90.0, 0.5), run("p2d", 1, 90.0, 0.7, learning_rate=1e-2), run("p2d", 2, 90.0, 0.5))
    assert sorted(len(group.members) for group in report.groups) == [1, 1, 2]


def test_seeds_whose_floors_keep_other_numbers_are_one_group():
    asked = {"rows_asked": "10%"}
    [group, _] = views(*(run("p2d", seed, 90.0, 0.5, row_share=0.04 + seed / 100, **asked) for seed in (0, 1))).groups
    assert group.seeds == (0, 1)


def test_runs_of_one_seed_that_keep_other_numbers_are_not_taken_for_repeats():
    def of_a_floor(name, seed, share):
        found = run(name, seed, 90.0, 0.5, rows_asked="10%", row_share=share)
        return replace(found, label="p2d")

    assert views(of_a_floor("low", 0, 0.06), of_a_floor("high", 0, 0.04)).groups == ()


def test_there_are_no_groups_without_a_second_seed():
    report = views(run("p2d", 0, 90.0, 0.5), run("other", 1, 90.0, 0.7, heads="readout"))
    assert report.groups == ()


def test_with_seeds_a_control_is_held_against_the_means():
    """Seed by seed the control wins once; on average it loses."""
    method = [run("p2d", seed, 90.0, score) for seed, score in enumerate((0.5, 0.9))]
    control = [run("random", seed, 80.0, score, heads="random", data="random") for seed, score in enumerate((0.6, 0.6))]
    report = views(*method, *control)
    assert control_warnings(report.rows)
    assert not report.warnings
    worse = [run("p2d", seed, 90.0, score) for seed, score in enumerate((0.5, 0.6))]
    [warning] = views(*worse, *control).warnings
    assert warning.startswith("'p2d' is not better than a control: 'random'")


def test_each_map_of_heads_is_there_once_with_its_users():
    scored = StageCost(
        "score-heads", "h", {"score": 1.0}, "H", "float32",
        settings={"method": "pad", "shape": [2, 3], "selected": [4], "levels": "013589"},
    )  # fmt: skip
    runs = [replace(found, stages=(scored, *found.stages)) for found in (run("a", 0, 9.0, 0.5), run("b", 0, 9.0, 0.5))]
    [found] = views(*runs).head_maps
    assert (found.method, found.num_layers, found.num_heads, found.selected) == ("pad", 2, 3, (4,))
    assert found.used_by == ("a, seed 0", "b, seed 0")
    assert (found.reads_all, found.reads_best) == ((), ()), "an older artifact says nothing of them"


def test_a_map_says_which_heads_read_rows():
    scored = StageCost(
        "score-heads", "h", {"score": 1.0}, "H", "float32",
        settings={"method": "readout", "shape": [2, 3], "selected": [4], "levels": "013589",
                  "reads_all": [0, 1], "reads_best": [1, 5]},
    )  # fmt: skip
    found = run("a", 0, 9.0, 0.5)
    report = views(replace(found, stages=(scored, *found.stages)))
    assert (report.head_maps[0].reads_all, report.head_maps[0].reads_best) == ((0, 1), (1, 5))
    assert report.to_dict()["head_maps"][0]["reads_best"] == [1, 5]
