"""How much of an episode's attention each demo receives, and its mean over the episodes of a pool row.

Axes: B episodes of a batch, K selected heads in (layer, head) order, S demos (slots) of an episode.
Source: Data Whisperer (arXiv:2505.12212, section 3.2), with selected heads in place of one layer's heads.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from p2d_cli.errors import NonFiniteError

EMPTY_SLOT = -1
"""Row index of a demo slot that no pool row fills."""


def demo_shares(
    attention_BKS: ArrayLike,
    *,
    normalise: Literal["pooled", "per-head"] = "pooled",
    mask_BS: ArrayLike | None = None,
) -> NDArray[np.float64]:
    """Return each demo's share of the attention that an episode's query pays to its demos.

    `pooled` sums the heads first, `a_i = sum_h A[h, i]` and `w_i = a_i / sum_j a_j`, so that a head that looks at
    the demos more counts more. `per-head` takes each head's own shares first and then their mean, so that all
    heads count the same.

    Args:
        attention_BKS: Mean attention from the query's tokens to each demo's tokens, >= 0.
        normalise: Which of the two.
        mask_BS: True where a slot holds a demo; all slots do by default.

    Returns:
        float64 [B, S]; rows sum to 1 over the filled slots, and empty slots are 0. Where no attention falls on
        any demo, the shares are equal. An episode without demos is all 0.
    """
    attention = np.asarray(attention_BKS, dtype=np.float64)
    batch, _, slots = attention.shape
    filled_BS = np.ones((batch, slots), np.bool_) if mask_BS is None else np.asarray(mask_BS, np.bool_)
    attention = np.where(filled_BS[:, None, :], attention, 0.0)
    if normalise == "pooled":
        return _shares(attention.sum(axis=1), filled_BS)
    shares_BKS = _shares(attention, np.broadcast_to(filled_BS[:, None, :], attention.shape))
    mean_BS: NDArray[np.float64] = shares_BKS.mean(axis=1)
    return mean_BS


def _shares(amounts: NDArray[np.float64], filled: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Divide the last axis by its sum, or evenly over the filled slots where the sum is 0."""
    # By the largest first: subnormal amounts would lose their ratios in the sum's reciprocal.
    largest = amounts.max(axis=-1, keepdims=True)
    amounts = np.where(largest == 0, filled, amounts / np.where(largest == 0, 1.0, largest))
    totals = amounts.sum(axis=-1, keepdims=True)
    shares: NDArray[np.float64] = amounts / np.where(totals == 0, 1.0, totals)
    return shares


class AffinityTally:
    """Running mean, for each pool row, of the values that its episodes gave it.

    Args:
        num_rows: Rows of the pool, N.
    """

    def __init__(self, num_rows: int) -> None:
        self._sums = np.zeros(num_rows, dtype=np.float64)
        self._counts = np.zeros(num_rows, dtype=np.int64)

    @property
    def counts(self) -> NDArray[np.int64]:
        """How often each row was a demo, int64 [N]."""
        return self._counts.copy()

    def add(self, rows_BS: ArrayLike, values_BS: ArrayLike) -> None:
        """Count one value for each filled slot; a row that fills two slots counts twice.

        Args:
            rows_BS: Pool row in each slot, 0 to N-1, or -1 for an empty slot.
            values_BS: Value of each slot; whatever stands in an empty slot is ignored.

        Raises:
            IndexError: a row is not in the pool.
            NonFiniteError: a filled slot's value is nan or infinite; nothing was added.
        """
        rows, values = np.asarray(rows_BS, dtype=np.int64), np.asarray(values_BS, dtype=np.float64)
        if rows.shape != values.shape:
            raise ValueError(f"rows of shape {list(rows.shape)} with values of shape {list(values.shape)}")
        filled = rows != EMPTY_SLOT
        rows, values = rows[filled], values[filled]
        if rows.size and not 0 <= rows.min() <= rows.max() < self._sums.size:
            raise IndexError(f"pool rows go from 0 to {self._sums.size - 1}, found {rows.min()} to {rows.max()}")
        if not np.isfinite(values).all():
            place = int(np.flatnonzero(~np.isfinite(values))[0])
            raise NonFiniteError(
                f"scoring pool rows: expected a finite value, found {values[place]} for row {rows[place]}",
                hint="the model's attention or likelihood is not finite; try --dtype float32",
            )
        np.add.at(self._sums, rows, values)
        np.add.at(self._counts, rows, 1)

    def means(self) -> NDArray[np.float64]:
        """Return the mean value of each row, float64 [N]; nan for a row that was never a demo."""
        means = np.full(self._sums.shape, np.nan)
        np.divide(self._sums, self._counts, out=means, where=self._counts > 0)
        return means
