from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2d_cli.core.sample_affinity import AffinityTally, demo_shares
from p2d_cli.errors import NonFiniteError

MODES = ["pooled", "per-head"]


def _plain_shares(attention: np.ndarray, mode: str) -> np.ndarray:
    """The definition, one number at a time."""
    batch, heads, slots = attention.shape
    shares = np.zeros((batch, slots))
    for b in range(batch):
        groups = [list(range(heads))] if mode == "pooled" else [[k] for k in range(heads)]
        for group in groups:
            amount = {s: sum(attention[b, k, s] for k in group) for s in range(slots)}
            total = sum(amount.values())
            for s in range(slots):
                shares[b, s] += (amount[s] / total if total > 0 else 1 / slots) / len(groups)
    return shares


@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1), batch=st.integers(1, 3), heads=st.integers(1, 4), slots=st.integers(1, 5))
@pytest.mark.parametrize("mode", MODES)
def test_shares_are_the_plain_definition(mode: str, seed: int, batch: int, heads: int, slots: int):
    rng = np.random.default_rng(seed)
    attention = rng.exponential(size=(batch, heads, slots)) * rng.integers(0, 2, size=(batch, heads, 1))
    shares = demo_shares(attention, normalise=mode)
    assert shares == pytest.approx(_plain_shares(attention, mode), abs=1e-12)
    assert shares.sum(axis=1) == pytest.approx(np.ones(batch))


@pytest.mark.parametrize("mode", MODES)
def test_shares_follow_the_order_of_demos_and_ignore_the_order_of_heads_and_the_scale(mode: str):
    rng = np.random.default_rng(0)
    attention = rng.random((2, 3, 4))
    shares = demo_shares(attention, normalise=mode)
    demos, heads = rng.permutation(4), rng.permutation(3)
    assert demo_shares(attention[:, :, demos], normalise=mode) == pytest.approx(shares[:, demos])
    assert demo_shares(attention[:, heads], normalise=mode) == pytest.approx(shares)
    for scale in (1e-300, 1e9):
        assert demo_shares(attention * scale, normalise=mode) == pytest.approx(shares)


def test_pooled_weighs_heads_by_their_attention_and_per_head_does_not():
    attention = np.array([[[8.0, 0.0], [0.5, 1.5]]])
    assert demo_shares(attention) == pytest.approx(np.array([[0.85, 0.15]]))
    assert demo_shares(attention, normalise="per-head") == pytest.approx(np.array([[0.625, 0.375]]))


@pytest.mark.parametrize("mode", MODES)
def test_no_attention_gives_equal_shares(mode: str):
    shares = demo_shares(np.zeros((2, 3, 4), dtype=np.float32), normalise=mode)
    assert shares == pytest.approx(np.full((2, 4), 1 / 4))


def test_the_tally_is_the_mean_of_each_rows_values():
    rng = np.random.default_rng(0)
    tally, seen = AffinityTally(6), {row: [] for row in range(6)}
    for _ in range(20):
        rows, values = rng.integers(0, 5, size=(2, 3)), rng.normal(size=(2, 3))
        tally.add(rows, values)
        for row, value in zip(rows.ravel().tolist(), values.ravel().tolist(), strict=True):
            seen[row].append(value)
    assert tally.counts.tolist() == [len(values) for values in seen.values()]
    means = tally.means()
    assert means[:5] == pytest.approx([np.mean(seen[row]) for row in range(5)])
    assert math.isnan(means[5])
    assert tally.counts[5] == 0


def test_a_row_in_two_slots_counts_twice():
    tally = AffinityTally(2)
    tally.add([[1, 1]], [[1.0, 3.0]])
    assert tally.counts.tolist() == [0, 2]
    assert tally.means()[1] == 2.0
    tally.counts[0] = 99
    assert tally.counts.tolist() == [0, 2]


def test_the_tally_refuses_foreign_rows_and_values_that_are_not_finite_and_stays_as_it_was():
    tally = AffinityTally(2)
    for rows in ([[0, 2]], [[0, -1]]):
        with pytest.raises(IndexError, match="from 0 to 1"):
            tally.add(rows, [[1.0, 1.0]])
    with pytest.raises(NonFiniteError, match="found nan for row 1"):
        tally.add([[0, 1]], [[1.0, math.nan]])
    with pytest.raises(ValueError, match="with values of shape"):
        tally.add([[0, 1]], [[1.0]])
    assert tally.counts.tolist() == [0, 0]
