"""Telling a task's rows from other rows by what single attention heads put out, and weighing all rows by that.

p2d's own. Each head gets a linear readout of its mean output over a row's completion: the direction in which the
target's rows lie from a sample of the pool, in units of the pool's own spread (Fisher's linear discriminant, with the
covariance of the pool sample, shrunk towards its mean variance). A row's affinity is the mean over the chosen heads of
their standardised readouts, so that no head counts more for being loud. Nothing is tuned, nothing iterates: the fit is
one small linear system a head.

The pool sample holds rows of the task itself, in the share that the pool has; that shifts all means alike, and
changes directions by a factor only.

Axes: Q target rows, M background rows (a sample of the pool), B rows, K heads in (layer, head) order, d head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from p2d_cli.errors import DataError, NonFiniteError

SHRINKAGE = 0.1
FOLDS = 8
_HEADS_AT_A_TIME = 64  # whose outputs are held in float64


@dataclass(frozen=True)
class Readout:
    """A fitted readout of K heads."""

    weights_Kd: NDArray[np.float64]
    offsets_K: NDArray[np.float64]

    def values(self, outputs_BKd: ArrayLike) -> NDArray[np.float64]:
        """Return each head's standardised readout, float64 `[B, K]`: mean 0, variance 1 over the background."""
        outputs = np.asarray(outputs_BKd, dtype=np.float64)
        return np.asarray(np.einsum("BKd,Kd->BK", outputs, self.weights_Kd) - self.offsets_K)

    def affinity(self, outputs_BKd: ArrayLike) -> NDArray[np.float64]:
        """Return the mean readout over heads, float64 `[B]`; higher is more like the target."""
        return np.asarray(self.values(outputs_BKd).mean(axis=1))


def fit_readout(
    target_QKd: ArrayLike,
    background_MKd: ArrayLike,
    *,
    dims_K: NDArray[np.int64] | None = None,
    shrinkage: float = SHRINKAGE,
) -> Readout:
    """Fit one linear discriminant a head.

    Args:
        target_QKd: mean head outputs of the target's rows, Q at least 1.
        background_MKd: the same of a sample of the pool, M at least 2.
        dims_K: size of each head, where some are smaller than d and their outputs are filled up with zeros.
        shrinkage: share of the covariance that is replaced by its mean variance, in (0, 1].

    Raises:
        DataError: no target rows, or fewer than two background rows.
        NonFiniteError: an output is nan or infinite.
    """
    target, background = _checked(target_QKd, background_MKd)
    centre_Kd = background.mean(axis=0)
    spread_Kdd = _covariance(background - centre_Kd, dims_K, shrinkage)
    weights_Kd = np.linalg.solve(spread_Kdd, (target.mean(axis=0) - centre_Kd)[:, :, None])[:, :, 0]
    raw_MK = np.einsum("MKd,Kd->MK", background, weights_Kd)
    deviation_K = raw_MK.std(axis=0)
    # A head that puts out the same for all rows has no direction: its readout is 0.
    scale_K = np.divide(1.0, deviation_K, out=np.zeros_like(deviation_K), where=deviation_K > 0)
    return Readout(weights_Kd * scale_K[:, None], raw_MK.mean(axis=0) * scale_K)


def held_out_affinity(
    target_QKd: ArrayLike, background_MKd: ArrayLike, *, dims_K: NDArray[np.int64] | None = None, folds: int = FOLDS
) -> NDArray[np.float64]:
    """Return each target row's affinity by a readout that was fitted without it, float64 `[Q]`.

    That is how a row of the task scores that the readout has not seen, such as one in the pool: a row below the
    quantile `a` of these is rejected as one of the task's at level `a` (cross-conformal prediction, Vovk 2015).

    Args:
        target_QKd: as for `fit_readout`; Q at least 2. Row `i` is in fold `i % folds`.
        background_MKd: likewise.
        dims_K: likewise.
        folds: parts that are left out in turn, at most Q of them.

    Raises:
        DataError: fewer than two target rows.
        NonFiniteError: an output is nan or infinite.
    """
    target, background = _checked(target_QKd, background_MKd)
    if len(target) < 2:
        raise DataError(
            "expected at least 2 target rows to score each by the others, found 1", hint="give more target rows"
        )
    folds = min(folds, len(target))
    affinity_Q = np.empty(len(target))
    fold_Q = np.arange(len(target)) % folds
    for fold in range(folds):
        is_out_Q = fold_Q == fold
        readout = fit_readout(target[~is_out_Q], background, dims_K=dims_K)
        affinity_Q[is_out_Q] = readout.affinity(target[is_out_Q])
    return affinity_Q


def separation(
    target_QKd: ArrayLike, background_MKd: ArrayLike, *, dims_K: NDArray[np.int64] | None = None
) -> NDArray[np.float64]:
    """Return how well each head alone tells target rows from background rows that its readout was not fitted on.

    Both sets of rows are halved; the readout of one half is judged on the other, and the other way round.

    Args:
        target_QKd: as for `fit_readout`, in random order; Q at least 2.
        background_MKd: likewise; M at least 4.
        dims_K: likewise.

    Returns:
        float64 `[K]`: area under the ROC curve, mean of both halves; 0.5 is chance, 1 is perfect.

    Raises:
        DataError: too few rows for two halves.
        NonFiniteError: an output is nan or infinite.
    """
    target, background = np.asarray(target_QKd), np.asarray(background_MKd)
    require_halves(len(target), len(background))
    dims_K = np.full(target.shape[1], target.shape[2]) if dims_K is None else dims_K
    blocks = (slice(start, start + _HEADS_AT_A_TIME) for start in range(0, target.shape[1], _HEADS_AT_A_TIME))
    return np.concatenate([_separation(target[:, block], background[:, block], dims_K[block]) for block in blocks])


def _separation(target_QKd: ArrayLike, background_MKd: ArrayLike, dims_K: NDArray[np.int64]) -> NDArray[np.float64]:
    target, background = _checked(target_QKd, background_MKd)
    areas = []
    for half in (0, 1):
        readout = fit_readout(target[half::2], background[half::2], dims_K=dims_K)
        areas.append(_area(readout.values(target[1 - half :: 2]), readout.values(background[1 - half :: 2])))
    return np.asarray(np.mean(areas, axis=0))


def _area(high_QK: NDArray[np.float64], low_MK: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the chance that a value of the first lies above one of the second, ties counting half, `[K]`."""
    areas = []
    for high_Q, low_M in zip(high_QK.T, np.sort(low_MK, axis=0).T, strict=True):
        below = np.searchsorted(low_M, high_Q, side="left") + np.searchsorted(low_M, high_Q, side="right")
        areas.append(below.mean() / (2 * len(low_M)))
    return np.array(areas)


def _covariance(
    centred_MKd: NDArray[np.float64], dims_K: NDArray[np.int64] | None, shrinkage: float
) -> NDArray[np.float64]:
    """Return each head's shrunk covariance, `[K, d, d]`; the identity for a head that never varies.

    What fills up a small head has no covariance with anything, so that its readout is the one that it has alone.
    """
    size = centred_MKd.shape[2]
    rows_KMd = centred_MKd.transpose(1, 0, 2)
    covariance_Kdd = rows_KMd.transpose(0, 2, 1) @ rows_KMd / len(centred_MKd)
    variance_K = np.trace(covariance_Kdd, axis1=1, axis2=2) / (size if dims_K is None else dims_K)
    mean_K11 = np.where(variance_K > 0, variance_K, 1.0)[:, None, None]
    return np.asarray((1 - shrinkage) * covariance_Kdd + (shrinkage * mean_K11 * np.eye(size)))


def require_halves(target: int, background: int) -> None:
    """Refuse to judge heads by so few rows that they make no two halves.

    Raises:
        DataError: there are fewer than 2 target rows or 4 pool rows.
    """
    if target < 2 or background < 4:
        raise DataError(
            f"expected at least 2 target rows and 4 pool rows to judge a head, found {target} and {background}",
            hint="give more rows",
        )


def _checked(target: ArrayLike, background: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    target_QKd, background_MKd = np.asarray(target, dtype=np.float64), np.asarray(background, dtype=np.float64)
    if len(target_QKd) < 1 or len(background_MKd) < 2:
        raise DataError(
            f"expected target rows and at least 2 pool rows to tell them from, found {len(target_QKd)} and "
            f"{len(background_MKd)}",
            hint="give more rows",
        )
    if not (np.isfinite(target_QKd).all() and np.isfinite(background_MKd).all()):
        raise NonFiniteError(
            "reading head outputs: expected finite numbers, found nan or infinity", hint="try --dtype float32"
        )
    return target_QKd, background_MKd
