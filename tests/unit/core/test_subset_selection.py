from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2d_cli.core.subset_selection import rank_rows, resolve_count, round_robin
from p2d_cli.errors import DataError, UsageError

_scores = st.lists(st.sampled_from([-math.inf, -1.0, -0.0, 0.0, 2.5, math.inf, math.nan]), min_size=1, max_size=12)


def test_count_is_the_ceiling_of_the_share_or_the_number_itself():
    assert resolve_count(270, ratio=0.1) == 27
    assert resolve_count(271, 0.1, None) == 28
    assert resolve_count(271) == 28
    assert resolve_count(10, ratio=1.0) == 10
    assert resolve_count(1, ratio=0.001) == 1
    assert resolve_count(10, None, 10) == 10


@pytest.mark.parametrize("ratio", [0.0, -1.0, 1.5, math.nan])
def test_an_impossible_share_is_refused(ratio: float):
    with pytest.raises(UsageError, match="share must be above 0"):
        resolve_count(10, ratio=ratio)


@pytest.mark.parametrize("count", [0, -3, 11])
def test_an_impossible_number_is_refused(count: int):
    with pytest.raises(UsageError, match=f"from 1 to 10, the size of the pool, found {count}"):
        resolve_count(10, count=count)


def test_share_and_number_exclude_each_other_and_an_empty_pool_is_data_error():
    with pytest.raises(UsageError, match="exclude each other"):
        resolve_count(10, ratio=0.1, count=1)
    with pytest.raises(DataError, match="no rows"):
        resolve_count(0, ratio=0.1)


@settings(deadline=None)
@given(scores=_scores)
def test_ranking_is_a_plain_sort_with_ties_in_row_order_and_nan_last(scores: list[float]):
    if all(math.isnan(score) for score in scores):
        with pytest.raises(DataError, match=f"none of the {len(scores)} rows"):
            rank_rows(scores)
        return
    order = sorted(
        range(len(scores)), key=lambda i: (math.isnan(scores[i]), 0 if math.isnan(scores[i]) else -scores[i], i)
    )
    ranks = rank_rows(scores)
    assert ranks.dtype == np.int64
    assert [int(np.flatnonzero(ranks == rank)[0]) for rank in range(len(scores))] == order


def test_no_rows_cannot_be_ranked():
    with pytest.raises(DataError, match="none of the 0 rows"):
        rank_rows([])
    with pytest.raises(DataError, match="none of the 2 rows"):
        rank_rows([math.nan, math.nan])


@pytest.mark.parametrize("shape", [(1, 1), (7, 1), (9, 4), (3, 8), (60, 5)])
def test_target_rows_take_turns_as_in_a_slow_plain_version(shape: tuple[int, int]):
    likeness = np.random.default_rng(0).integers(0, 6, shape) / 4  # with ties
    left = list(range(shape[0]))
    expected = []
    while left:
        asking = len(expected) % shape[1]
        expected.append(max(left, key=lambda row: (likeness[row, asking], -row)))
        left.remove(expected[-1])
    assert round_robin(likeness).tolist() == expected


@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(st.sampled_from([-1.0, 0.0, 2.5, math.inf, math.nan]), st.sampled_from([-2.0, 0.0, 1.0])),
        min_size=1,
        max_size=12,
    )
)
def test_rows_without_a_score_are_ordered_by_a_first_look(rows):
    scores, first = (list(part) for part in zip(*rows, strict=True))
    if all(math.isnan(score) for score in scores):
        with pytest.raises(DataError):
            rank_rows(scores, first)
        return
    left = list(range(len(scores)))
    expected = []
    while left:
        known = [row for row in left if not math.isnan(scores[row])]
        by, among = (scores, known) if known else (first, left)
        best = max(by[row] for row in among)
        expected.append(next(row for row in among if by[row] == best))
        left.remove(expected[-1])
    assert np.argsort(rank_rows(scores, first)).tolist() == expected


def test_a_first_look_moves_no_row_that_has_a_score():
    scores = [0.5, math.nan, 0.7, math.nan, 0.5]
    assert rank_rows(scores, [9, 1, 0, 2, 99]).tolist() == [1, 4, 0, 3, 2]
    assert rank_rows(scores).tolist() == [1, 3, 0, 4, 2]
