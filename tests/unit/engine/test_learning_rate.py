import math

import numpy as np
import pytest

from p2d_cli.config import TrainConfig
from p2d_cli.engine.rate_probe import PROBED_UPDATES, RateProbe, lent, probed
from p2d_cli.engine.training_defaults import (
    ANCHOR_RATE,
    ANCHOR_WIDTH,
    ENOUGH_UPDATES,
    HIGHEST_RATE,
    batch_size_for,
    default_learning_rate,
)
from p2d_cli.engine.tuning import Tuning
from p2d_cli.modeling.training import TrainingPlan, planned_updates


def test_a_tenth_of_the_heads_and_all_of_them_have_the_rates_that_were_tuned():
    """At the rate of a tenth all heads learn nothing, see the study's `choices.md`."""
    assert default_learning_rate("heads", ANCHOR_WIDTH, 0.1) == ANCHOR_RATE["heads"]
    assert default_learning_rate("heads", ANCHOR_WIDTH, 1.0) == ANCHOR_RATE["attention"]


def test_more_heads_have_lower_rates():
    rates = [default_learning_rate("heads", ANCHOR_WIDTH, share) for share in (0.01, 0.05, 0.1, 0.2, 0.5, 0.9, 1.0)]
    assert rates == sorted(rates, reverse=True)
    assert len(set(rates)) == len(rates)
    assert rates[4] == pytest.approx(1e-3 * 0.5 ** -np.log10(3), rel=0.05)


def test_one_head_of_very_many_has_the_highest_rate_that_was_tried():
    assert default_learning_rate("heads", ANCHOR_WIDTH, 1e-4) == HIGHEST_RATE


@pytest.mark.parametrize(("scope", "rate"), ANCHOR_RATE.items())
def test_other_scopes_have_their_own_rate_whatever_heads_are_selected(scope, rate):
    assert default_learning_rate(scope, ANCHOR_WIDTH) == rate
    if scope != "heads":
        assert default_learning_rate(scope, ANCHOR_WIDTH, 0.5) == rate


@pytest.mark.parametrize(
    ("scope", "rate"), [("heads", 4.2e-4), ("full", 4.2e-5), ("lora", 6.5e-4), ("attention", 1.4e-4)]
)
def test_rates_fall_with_the_hidden_size(scope, rate):
    """At 4,096, the width of models of 7 and 8 billion parameters."""
    share = 0.1 if scope == "heads" else None
    assert default_learning_rate(scope, 4096, share) == pytest.approx(rate, rel=0.02)
    widths = (64, ANCHOR_WIDTH, 1024, 2048, 4096, 8192)
    rates = [default_learning_rate(scope, width, share) for width in widths]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == rates[1]


def test_a_model_that_does_not_tell_its_width_has_the_rates_of_the_anchor():
    assert default_learning_rate("full", 0) == ANCHOR_RATE["full"]


@pytest.mark.parametrize(
    ("rows", "epochs", "expected"), [(20, 3, 2), (100, 3, 4), (200, 3, 8), (320, 3, 16), (10_000, 1, 16), (3, 1, 2)]
)
def test_an_update_has_as_many_rows_as_leave_enough_updates(rows, epochs, expected):
    assert batch_size_for(rows, epochs) == expected
    if expected > 2:
        assert math.ceil(rows / expected) * epochs >= ENOUGH_UPDATES


@pytest.mark.parametrize("multiple", [1, 2, 3, 4, 6, 8, 24])
def test_rows_of_an_update_can_be_shared_by_all_processes(multiple):
    for rows in (5, 50, 500, 5000):
        size = batch_size_for(rows, 3.0, multiple)
        assert size % multiple == 0
        assert size <= max(16, multiple)


PLAN = TrainingPlan(
    epochs=3.0, max_steps=40, learning_rate=1e-3, batch_size=4, accumulation=2, schedule="cosine",
    warmup_ratio=0.03, weight_decay=0.0, max_grad_norm=1.0, autocast="float32", device="cpu", seed=3,
    checkpointing=False, trackers=("trackio",), eval_steps=7, patience=2,
)  # fmt: skip


@pytest.mark.parametrize("updates", [1, 11, PROBED_UPDATES, 40])
@pytest.mark.parametrize("rows", [1, 30, 47, 48, 49, 5000])
def test_a_probe_makes_a_few_updates_and_looks_once(rows, updates):
    """No more than the training itself makes."""
    plan = probed(PLAN, 2e-3, rows, updates)
    assert planned_updates(rows, plan) == plan.eval_steps == min(PROBED_UPDATES, updates)
    assert not plan.looks_first
    assert (plan.learning_rate, plan.max_steps, plan.patience, plan.trackers) == (2e-3, None, None, ())


@pytest.mark.parametrize(("rows", "held_out", "looks"), [(3, 0, 0), (4, 0, 1), (99, 0, 24), (999, 0, 64), (3, 90, 64)])
def test_rows_to_look_at_are_lent_where_there_are_no_others(rows, held_out, looks):
    own, others = range(rows), range(1000, 1000 + held_out)
    learnt, looked_at = lent(own, others, 0)
    assert len(looked_at) == looks
    assert set(looked_at) <= set(others or own)
    assert sorted(learnt) == [row for row in own if row not in set(looked_at)]


def test_the_rate_of_the_lowest_loss_is_taken():
    tried = RateProbe().adding(3e-3, 1.25, 100, 2.0).adding(1e-3, 1.5, 100, 2.0).adding(9e-3, math.inf, 0, 1.0)
    assert tried.best == 3e-3
    assert tried.described() == "1.500 at 0.001, 1.250 at 0.003, diverged at 0.009"
    assert (tried.tokens, tried.seconds) == (200, 5.0)
    assert tried.adding(1e-3, 1.25, 0, 0.0).best == 1e-3


def test_what_was_tried_is_found_again(tmp_path):
    assert RateProbe.load(tmp_path).losses == {}
    tried = RateProbe().adding(3e-3, 1.25, 100, 2.0).adding(9e-3, math.inf, 0, 1.0)
    tried.save(tmp_path)
    assert RateProbe.load(tmp_path) == tried
    (tmp_path / "rates.json").write_text("{")
    assert RateProbe.load(tmp_path) == RateProbe()


@pytest.mark.parametrize(("rows", "expected"), [(48, 2), (2000, 16)])
def test_the_number_of_processes_does_not_change_what_auto_comes_to(monkeypatch, rows, expected):
    tuning = object.__new__(Tuning)
    tuning.config = TrainConfig(model="m", data="d", out="o")
    for processes in (1, 2, 3, 8):
        monkeypatch.setattr("p2d_cli.runtime.distributed.world_size", lambda count=processes: count)
        assert tuning.batch_size(rows) == expected
