"""Ordering rows so that the first of them are, between them, like all of them: facility location, greedily.

A choice S is worth `F(S) = sum over rows i of max over j in S of x_i . x_j`: how like each row its nearest chosen row
is. What a row adds never grows as others are chosen, so that the greedy choice is within `1 - 1/e` of the best
(Nemhauser, Wolsey and Fisher 1978), and what a row added earlier bounds what it adds now: only rows whose bound is
above the best that was found are looked at again (Minoux 1978).

Axes: M rows, W words or other features, C candidates that are looked at together.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

_CANDIDATES = 16


def order_by_coverage(rows_MW: Any, count: int) -> NDArray[np.int64]:
    """Return the rows' positions, int64 `[M]`: the greedy choice of `count` rows, then the others.

    Args:
        rows_MW: sparse matrix of vectors of length 1 (or 0) without negative entries, so that no likeness is negative.
        count: number of rows to choose, 0 to M.

    Returns:
        The first `count` by what each adds to those before it, ties in row order; the others by a bound of what they
        would still add.
    """
    bounds_M = np.asarray(rows_MW @ np.asarray(rows_MW.sum(axis=0)).ravel()).ravel()
    nearest_M = np.zeros(len(bounds_M))
    chosen = []
    for _ in range(count):
        best = _best(rows_MW, nearest_M, bounds_M)
        np.maximum(nearest_M, _likeness(rows_MW, [best])[:, 0], out=nearest_M)
        bounds_M[best] = -np.inf
        chosen.append(best)
    others = np.argsort(-bounds_M, kind="stable")[: len(bounds_M) - count]
    return np.concatenate([np.array(chosen, dtype=np.int64), others])


def _best(rows_MW: Any, nearest_M: NDArray[np.float64], bounds_M: NDArray[np.float64]) -> int:
    """Return the row that adds most; lowers bounds in place to what was found."""
    is_exact_M = np.zeros(len(bounds_M), dtype=np.bool_)
    while not is_exact_M[best := int(bounds_M.argmax())]:
        candidates_C = _highest(np.where(is_exact_M, -np.inf, bounds_M), _CANDIDATES)
        added_MC = np.maximum(_likeness(rows_MW, candidates_C) - nearest_M[:, None], 0)
        bounds_M[candidates_C] = added_MC.sum(axis=0)
        is_exact_M[candidates_C] = True
    return best


def _likeness(rows_MW: Any, candidates_C: ArrayLike) -> NDArray[np.float64]:
    """Return how like every row each candidate is, `[M, C]`; several times as fast as by sparse candidates."""
    return np.asarray(rows_MW @ rows_MW[candidates_C].T.toarray())


def _highest(values_M: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    if len(values_M) <= count:
        return np.flatnonzero(np.isfinite(values_M))
    highest = np.argpartition(-values_M, count)[:count]
    return highest[np.isfinite(values_M[highest])]
