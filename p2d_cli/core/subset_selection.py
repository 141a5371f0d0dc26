"""From pool scores to a subset of rows. Axes: N pool rows, Q target rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from p2d_cli.core.geometry import share_count
from p2d_cli.errors import DataError, UsageError

DEFAULT_RATIO = 0.1


def resolve_count(num_rows: int, ratio: float | None = None, count: int | None = None) -> int:
    """Return how many of `num_rows` rows to keep.

    Args:
        num_rows: Rows of the pool.
        ratio: Share of them, in (0, 1]: `ceil(ratio * N)`. 0.1 if neither this nor `count` is given.
        count: The number itself, 1 to N.

    Raises:
        DataError: the pool is empty.
        UsageError: both are given, or the one given is out of range.
    """
    if num_rows < 1:
        raise DataError("choosing rows: the pool has no rows")
    if ratio is not None and count is not None:
        raise UsageError("choosing rows: a share and a number exclude each other", hint="give --ratio or --count")
    if count is None:
        return share_count(DEFAULT_RATIO if ratio is None else ratio, num_rows)
    if not 1 <= count <= num_rows:
        raise UsageError(
            f"choosing rows: expected a number from 1 to {num_rows}, the size of the pool, found {count}",
            hint="lower --count, or give a share with --ratio",
        )
    return count


def rank_rows(scores: ArrayLike, first: ArrayLike | None = None) -> NDArray[np.int64]:
    """Return each row's rank, int64 [N]: 0 for the highest score, ties in row order, rows without a score last.

    Args:
        scores: [N]; infinities are scores like others, nan is a row without one.
        first: [N], what orders those without a score, likewise; they stay in row order without it.

    Raises:
        DataError: no row has a score.
    """
    values = np.asarray(scores, dtype=np.float64)
    if np.isnan(values).all():
        raise DataError(f"ranking rows: none of the {values.size} rows of the pool has a score")
    is_left_N = np.isnan(values)
    later_N = np.zeros(values.size) if first is None else np.where(is_left_N, -np.asarray(first, dtype=np.float64), 0)
    order = np.lexsort((later_N, np.where(is_left_N, 0, -values), is_left_N))  # by the last of them first, and stable
    ranks = np.empty(order.size, dtype=np.int64)
    ranks[order] = np.arange(order.size)
    return ranks


def round_robin(likeness_NQ: ArrayLike) -> NDArray[np.int64]:
    """Return the rows in the order in which the target rows, in turns, take the row most like them that is left.

    Args:
        likeness_NQ: how like each target row each row is, finite, [N, Q] with Q at least 1; ties in row order.

    Returns:
        The rows' positions, int64 [N].
    """
    likeness = np.asarray(likeness_NQ)
    wishes_QN = np.argsort(-likeness, axis=0, kind="stable").T.astype(np.int32)
    next_Q = [0] * len(wishes_QN)
    is_taken_N = np.zeros(len(likeness), dtype=np.bool_)
    order_N = np.empty(len(likeness), dtype=np.int64)
    for turn in range(len(likeness)):
        asking = turn % len(wishes_QN)
        place = next_Q[asking]
        while is_taken_N[row := wishes_QN[asking, place]]:
            place += 1
        next_Q[asking] = place + 1
        is_taken_N[row] = True
        order_N[turn] = row
    return order_N


def unit(vectors: NDArray[Any]) -> NDArray[np.float64]:
    """Return the vectors, along the last axis, at length 1 and in float64; none depends on what stands beside it."""
    exact = np.asarray(vectors, dtype=np.float64)
    lengths = np.sqrt([vector.dot(vector) for vector in exact.reshape(-1, exact.shape[-1])])
    of_length_one: NDArray[np.float64] = exact / lengths.reshape(*exact.shape[:-1], 1)
    return of_length_one
