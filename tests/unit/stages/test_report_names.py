"""What a report takes from runs: names, told apart by shares and epochs, then seeds, then folders; maps of heads."""

import pytest
from pydantic import ValidationError

from p2d_cli.core.aer import RunCost, StageCost
from p2d_cli.stages.report_aer import _describe, _distinct_names, _is_control, _Settings


def run(name="pad heads, p2d rows", path="evaluation/a", epochs=3.0, **settings):
    settings = {"scope": "heads", "heads_method": "pad", "data_method": "p2d"} | settings
    training = StageCost(
        stage="train",
        artifact=path,
        seconds={"train": 1.0},
        hardware="cpu",
        precision="float32",
        epochs=epochs,
        settings=settings,
    )
    return RunCost(name=name, stages=(training,), metrics={}, path=path, label=name)


def named(*runs):
    return [(found.name, found.label) for found in _distinct_names(list(runs))]


def test_a_name_of_its_own_stays():
    assert named(run(head_share=0.1), run("lora, p2d rows", head_share=None)) == [
        ("pad heads, p2d rows", "pad heads, p2d rows"),
        ("lora, p2d rows", "lora, p2d rows"),
    ]


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"head_share": 0.1}, "pad heads"),
        ({"head_share": 1.0}, "all heads"),
        ({"head_share": 0.1, "channels": 0.1}, "pad heads and channels"),
        ({"head_share": None, "heads_method": None, "channels": 0.1}, "channels"),
    ],
)
def test_a_run_is_called_by_what_it_trained(settings, name):
    found = run(**settings)
    assert _describe(found.stages) == f"{name}, p2d rows"
    assert not _is_control(found)


def test_shares_that_differ_are_told():
    found = named(run(head_share=0.1, row_share=0.1), run(head_share=0.05, row_share=0.1))
    assert [name for name, _ in found] == ["pad heads 10%, p2d rows", "pad heads 5%, p2d rows"]
    assert all(name == label for name, label in found), "runs of several seeds are grouped by their labels"
    found = named(*(run(head_share=heads, row_share=rows) for heads in (0.1, 0.125) for rows in (0.1, 0.5)))
    assert [name for name, _ in found] == [
        f"pad heads {heads}, p2d rows {rows}" for heads in ("10%", "12.5%") for rows in ("10%", "50%")
    ]


def test_rows_are_told_by_what_was_asked_for_and_for_one_seed_by_what_was_kept():
    def names(*asked_kept_seed):
        runs = (
            run(path=f"evaluation/{place}", rows_asked=asked, row_share=kept, seed=seed)
            for place, (asked, kept, seed) in enumerate(asked_kept_seed)
        )
        return [label for _, label in named(*runs)]

    assert names(("10%", 0.04, 0), ("10%", 0.05, 1)) == ["pad heads, p2d rows"] * 2
    assert names(("10%", 0.1, 0), ("as p2d", 0.04, 0)) == ["pad heads, p2d rows 10%", "pad heads, p2d rows as p2d"]
    assert names(("10%", 0.04, 0), ("10%", 0.05, 0)) == ["pad heads, p2d rows 4%", "pad heads, p2d rows 5%"]


def test_epochs_that_differ_are_told_after_the_shares():
    found = named(run(epochs=3.0), run(epochs=0.5))
    assert [name for name, _ in found] == ["pad heads, p2d rows, 3 epochs", "pad heads, p2d rows, 0.5 epochs"]
    assert all(name == label for name, label in found)
    found = named(run(epochs=1.0, row_share=0.1), run(epochs=3.0, row_share=0.1), run(epochs=3.0, row_share=0.2))
    assert [name for name, _ in found] == [
        "pad heads, p2d rows 10%, 1 epoch",
        "pad heads, p2d rows 10%, 3 epochs",
        "pad heads, p2d rows 20%, 3 epochs",
    ]


def test_seeds_and_folders():
    seeds = named(run(seed=0, row_share=0.1), run(seed=1, row_share=0.1), run(seed=0, row_share=0.2))
    assert seeds == [
        ("pad heads, p2d rows 10%, seed 0", "pad heads, p2d rows 10%"),
        ("pad heads, p2d rows 10%, seed 1", "pad heads, p2d rows 10%"),
        ("pad heads, p2d rows 20%", "pad heads, p2d rows 20%"),
    ]
    assert [name for name, _ in named(run(seed=0, path="e/a"), run(seed=0, path="e/b"))] == [
        "pad heads, p2d rows (a)",
        "pad heads, p2d rows (b)",
    ]


@pytest.mark.parametrize(
    ("heads", "data", "expected"),
    [
        ("pad", "p2d", False),
        ("random", "p2d", True),
        ("uniform", "p2d", True),
        ("pad", "random", True),
        ("pad", "full", True),
        ("taylor", "ifd", False),
        (None, None, False),
        ("of another p2d", "p2d", False),
    ],
)
def test_controls_are_known_by_what_was_trained(heads, data, expected):
    """Not by what mined the rows, which may be other heads."""
    assert _is_control(run(heads_method=heads, data_method=data)) is expected


MAP = {"shape": [2, 3], "selected": [4], "levels": "013589", "reads_all": [0], "reads_best": [5]}


@pytest.mark.parametrize("changed", [{}, {"reads_all": [], "reads_best": []}, {"levels": "", "shape": None}])
def test_maps_of_heads_are_taken(changed):
    assert _Settings.model_validate(MAP | changed, strict=True)
    assert _Settings.model_validate({name: MAP[name] for name in ("shape", "selected", "levels")}, strict=True)


@pytest.mark.parametrize(
    "changed",
    [
        {"reads_all": [6]},
        {"reads_best": [-1]},
        {"reads_best": "5"},
        {"selected": [6]},
        {"levels": "0135"},
        {"shape": None},
    ],
)
def test_maps_that_do_not_fit_the_model_are_refused(changed):
    with pytest.raises(ValidationError):
        _Settings.model_validate(MAP | changed, strict=True)
