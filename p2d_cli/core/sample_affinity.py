"""How much of an episode's attention each demo receives, and its mean over the episodes of a pool row.

Axes: B episodes of a batch, K selected heads in (layer, head) order, S demos (slots) of an episode.
Source: Data Whisperer (arXiv:2505.12212, section 3.2), with selected heads in place of one layer's heads.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from p2d_cli.errors import NonFiniteError


def demo_shares(
    attention_BKS: ArrayLike, *, normalise: Literal["pooled", "per-head"] = "pooled"
) -> NDArray[np.float64]:
    """Return each demo's share of the attention that an episode's query pays to its demos.

    `pooled` sums the heads first, `a_i = sum_h A[h, i]` and `w_i = a_i / sum_j a_j`, so that a head that looks at
    the demos more counts more. `per-head` takes each head's own shares first and then their mean, so that all
    heads count the same.

    Args:
        attention_BKS: Mean attention from the query's tokens to each demo's tokens, >= 0.
        normalise: Which of the two.

    Returns:
        float64 [B, S]; rows sum to 1. Where no attention falls on any demo, the shares are equal.
    """
    attention = np.asarray(attention_BKS, dtype=np.float64)
    if normalise == "pooled":
        return _shares(attention.sum(axis=1))
    return np.asarray(_shares(attention).mean(axis=1))


def _shares(amounts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Divide the last axis by its sum, or evenly where the sum is 0."""
    # By the largest first: subnormal amounts would lose their ratios in the sum's reciprocal.
    largest = amounts.max(axis=-1, keepdims=True)
    amounts = np.where(largest == 0, 1.0, amounts / np.where(largest == 0, 1.0, largest))
    return np.asarray(amounts / amounts.sum(axis=-1, keepdims=True))


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
        """Count one value for each slot; a row in two slots counts twice.

        Args:
            rows_BS: Pool row in each slot, 0 to N-1.
            values_BS: Value of each slot.

        Raises:
            IndexError: a row is not in the pool.
            NonFiniteError: a value is nan or infinite; nothing was added.
        """
        rows, values = np.asarray(rows_BS, dtype=np.int64), np.asarray(values_BS, dtype=np.float64)
        if rows.shape != values.shape:
            raise ValueError(f"rows of shape {list(rows.shape)} with values of shape {list(values.shape)}")
        rows, values = rows.ravel(), values.ravel()
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
