import numpy as np
import pytest

from p2d_cli.engine.tuning import DEFAULT_LEARNING_RATE, HIGHEST_DEFAULT_RATE, default_learning_rate


def test_a_tenth_of_the_heads_and_all_of_them_have_the_rates_that_were_tuned():
    """At the rate of a tenth all heads learn nothing, see the study's `choices.md`."""
    assert default_learning_rate("heads", 0.1) == DEFAULT_LEARNING_RATE["heads"]
    assert default_learning_rate("heads", 1.0) == DEFAULT_LEARNING_RATE["attention"]


def test_more_heads_have_lower_rates():
    rates = [default_learning_rate("heads", share) for share in (0.01, 0.05, 0.1, 0.2, 0.5, 0.9, 1.0)]
    assert rates == sorted(rates, reverse=True)
    assert len(set(rates)) == len(rates)
    assert rates[4] == pytest.approx(1e-3 * 0.5 ** -np.log10(3), rel=0.05)


def test_one_head_of_very_many_has_the_highest_rate_that_was_tried():
    assert default_learning_rate("heads", 1e-4) == HIGHEST_DEFAULT_RATE


@pytest.mark.parametrize(("scope", "rate"), DEFAULT_LEARNING_RATE.items())
def test_other_scopes_have_their_own_rate_whatever_heads_are_selected(scope, rate):
    assert default_learning_rate(scope, None) == rate
    if scope != "heads":
        assert default_learning_rate(scope, 0.5) == rate
