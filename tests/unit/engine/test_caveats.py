"""What is told of a result, and when it is not."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2d_cli.config import TrainConfig
from p2d_cli.data.records import Message, Record
from p2d_cli.engine import caveats

LOSSES = st.lists(st.floats(0.01, 10), min_size=3, max_size=60)


def log_of(losses):
    return [{"step": 0, "eval_loss": 1.0}, *({"step": step, "loss": loss} for step, loss in enumerate(losses, start=1))]


@given(LOSSES)
def test_a_loss_that_falls_is_told_nothing_of(losses):
    assert caveats.of_losses(log_of(sorted(losses, reverse=True)), None, None) == []


@given(LOSSES)
def test_a_loss_that_rises_is_told_of_in_one_sentence(losses):
    [told] = caveats.of_losses(log_of([*sorted(losses), 11.0]), None, None)
    assert told.startswith("the loss rose, from ")
    assert told.endswith("try a lower --lr")


def test_of_noise_the_ends_are_compared_and_not_two_updates():
    losses = 2 - np.linspace(0, 1, 60) + 0.4 * np.random.default_rng(0).normal(size=60)
    losses[0], losses[-1] = 1.0, 2.0
    assert caveats.of_losses(log_of(losses.tolist()), None, None) == []
    [told] = caveats.of_losses(log_of(losses[::-1].tolist()), None, None)
    first, last = losses[-10:].mean(), losses[:10].mean()
    assert f"from {first:.3f} in the first 10 updates to {last:.3f} in the last:" in told


def test_a_rate_that_is_left_behind_at_once_is_seen_by_the_first_update():
    [told] = caveats.of_losses(log_of([1.9, 40.0, 30.0, 20.0, 9.0, 5.0, 3.1, 2.9, 3.0]), None, None)
    assert "from 1.900 in the first update to 3.000 in the last 3 updates" in told


@pytest.mark.parametrize("losses", [[], [2.0], [1.0, 2.0]])
def test_two_updates_say_nothing(losses):
    assert caveats.of_losses(log_of(losses), None, None) == []


@pytest.mark.parametrize(
    ("untrained", "best", "is_told"),
    [
        (1.0, 1.1, True),
        (1.0, 1.0, False),
        (1.0, 0.9, False),
        (None, 0.9, False),
        (1.0, None, False),
        (np.nan, 1, False),
    ],
)
def test_the_untrained_model_may_do_better_on_held_out_rows(untrained, best, is_told):
    found = caveats.of_losses(log_of([3.0, 2.0, 1.0]), untrained, best)
    assert len(found) == is_told
    if is_told:
        assert "the untrained model does better on the held-out rows" in found[0]
    # One sentence is enough, also where the loss rose as well.
    assert len(caveats.of_losses(log_of([1.0, 2.0, 3.0]), untrained, best)) == 1


@pytest.mark.parametrize(
    ("rate", "told"),
    [
        (0.003, ""),
        (0.03, ""),
        (3e-4, ""),
        (0.031, "--lr 0.031 is 10 times the default of such a training, 0.003"),
        (2.9e-4, "--lr 0.00029 is 1/10 of the default of such a training, 0.003"),
        (1.1, "--lr 1.1 is 367 times the default of such a training, 0.003"),
        (1110.0, "--lr 1110 is 3.7e+05 times the default of such a training, 0.003"),
        (1e-6, "--lr 1e-06 is 1/3.0e+03 of the default of such a training, 0.003"),
    ],
)
def test_a_rate_is_far_from_the_default_from_ten_times_on(rate, told):
    assert caveats.of_plan(30, rate, 0.003) == ([told] if told else [])


@pytest.mark.parametrize(("updates", "told"), [(1, "one update is few"), (29, "29 updates are few"), (30, "")])
def test_few_updates(updates, told):
    assert [text.startswith(told) for text in caveats.of_plan(updates, 1.0, 1.0)] == [True] * bool(told)


LORA = {"lora_rank", "lora_targets"}


@pytest.mark.parametrize(
    ("settings", "aimed", "told"),
    [
        ({"heads": "h"}, {"heads", "projections"}, []),
        ({"heads": "h"}, {"heads", *LORA}, ["of no use with scope heads: --lora-targets, --lora-rank"]),
        ({"heads": "h"}, {"heads"}, []),
        ({"scope": "full", "heads": "h"}, {"scope", "heads"}, ["of no use with scope full: --heads"]),
        ({"scope": "attention"}, {"projections"}, ["of no use with scope attention: --projections"]),
        ({}, LORA, []),
        ({}, {"projections"}, []),
        ({}, {"projections", *LORA}, ["of no use beside --lora-targets: --projections"]),
    ],
)
def test_settings_without_effect_are_told_if_they_were_given_for_this_training(settings, aimed, told):
    config = TrainConfig(model="m", data="d", out="o", **settings)
    assert caveats.of_unused(config, aimed) == told


def test_a_rank_is_too_high_if_it_is_for_every_module():
    assert caveats.of_rank(64, [(128, 64), (32, 128)]) == []
    assert caveats.of_rank(65, [(128, 64), (32, 128)]) == [
        "--lora-rank 65 is more than any adapted module can use: rank 64 changes as much"
    ]


def test_held_out_rows_that_are_all_learnt():
    learnt, other = (SimpleNamespace(input_ids=ids) for ids in ((1, 2), (1, 3)))
    assert len(caveats.of_held_out([learnt, other], [learnt, learnt])) == 1
    assert caveats.of_held_out([learnt], [learnt, other]) == []
    assert caveats.of_held_out([learnt], []) == []


def rows(*prompts):
    return [Record(str(place), (Message("user", text),), "yes", None, {}, "f:1") for place, text in enumerate(prompts)]


def test_target_rows_that_say_the_same_count_once():
    assert caveats.of_target(rows(*"abcdefgh")) == []
    assert caveats.of_target(rows(*"abcdefgg")) == [
        "7 different target rows describe a task poorly: 8 or more are better"
    ]
    assert caveats.of_target(rows("a", "a")) == ["one target row describes a task poorly: 8 or more are better"]
    assert caveats.of_target(()) == []


def test_answers():
    assert caveats.of_answers(30, 0, 128) == []
    assert caveats.of_answers(29, 2, 128) == [
        "29 test rows are few: scores of 30 or more tell more",
        "2 of 29 answers were cut at --max-new-tokens 128",
    ]
    assert caveats.of_answers(1, 0, 128)[0].startswith("1 test row is few")


@pytest.mark.parametrize(
    ("size", "accumulation", "processes", "told"), [(8, 1, 8, False), (4, 2, 3, True), (2, 1, 1, False)]
)
def test_processes_without_a_row_are_told(size, accumulation, processes, told):
    found = caveats.of_processes(size, accumulation, processes)
    assert found == (
        ["3 processes share micro-batches of 2 rows, and some wait: --batch-size 6 gives each a row"] * told
    )


def test_only_looks_behind_an_update_count_as_failed():
    looks = [{"step": 0, "eval_loss": math.nan}, {"step": 3, "loss": 2.0}, {"step": 3, "eval_loss": 1.0}]
    assert caveats.of_losses(looks, math.nan, 1.0) == []
    [told] = caveats.of_losses([*looks, {"step": 6, "eval_loss": math.inf}], math.nan, 1.0)
    assert told.startswith("the held-out loss was not finite after update 6")
