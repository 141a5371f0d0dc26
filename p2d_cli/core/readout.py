"""Telling a task's rows from other rows by what single attention heads put out, and weighing all rows by that.

p2d's own. Each head gets a linear readout of its mean output over a row's answer, and another over its prompt: the
direction in which the target's rows lie from a sample of the pool, in units of the pool's own spread (Fisher's linear
discriminant, with the covariance of the pool sample, shrunk towards its mean variance). A row's affinity is the mean
over the chosen heads of their standardised readouts, so that no head counts more for being loud. Nothing is tuned,
nothing iterates: the fit is one small eigenvalue problem a head and place.

The pool sample holds rows of the task itself, in the share that the pool has; that shifts all means alike, and
changes directions by a factor only.

Axes: Q target rows, M background rows (a sample of the pool), B rows, K heads in (layer, head) order, d head_dim,
P places: answer and prompt, or the answer alone, for which the axis may be left out; J = K * P readings, those of a
head side by side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray
from threadpoolctl import ThreadpoolController

from p2d_cli.errors import DataError, NonFiniteError

SHRINKAGE = 0.4
"""See `shrinkage_for`; found on five targets of a mixed pool, with 2 to 64 target rows and 250 and 1,000 others."""
MOST_SHRINKAGE = 0.9
PROMPT_SHARE = 0.3
"""The most that the readout of the prompt counts (`prompt_share`); half is better with 64 target rows, worse with 8."""
FOLDS = 8
_SILENT = 1e-14
"""Of a head's mean square, a variance that is nothing but rounding."""
_HEADS_AT_A_TIME = 64  # whose outputs are held in float64


@cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()


@dataclass(frozen=True)
class Background:
    """What the pool is like to each head: the centre of its outputs, and the axes and variances of their covariance."""

    centre_Jd: NDArray[np.float64]
    axes_Jdd: NDArray[np.float64]
    """In columns."""
    variances_Jd: NDArray[np.float64]
    dims_J: NDArray[np.int64]
    """Size of each head; outputs of smaller ones are filled up with zeros, which changes no readout."""
    shares_P: NDArray[np.float64]
    """How much the readout of each place counts; their sum is 1."""
    rows: float
    """How many rows of equal weight would tell as much."""

    @classmethod
    def of(
        cls,
        outputs_MKPd: ArrayLike,
        weights_M: NDArray[np.float64] | None = None,
        *,
        dims_K: NDArray[np.int64] | None = None,
        prompt: float = PROMPT_SHARE,
    ) -> Background:
        """Take a sample of the pool, in which each row may stand for another number of rows.

        Args:
            outputs_MKPd: mean head outputs, M at least 2.
            weights_M: how many rows of the pool each stands for; all for the same without it.
            dims_K: size of each head, d without it.
            prompt: how much the readout of the prompt counts, if it was read.

        Raises:
            DataError: fewer than two rows.
            NonFiniteError: an output is nan or infinite.
        """
        outputs, places = _checked(outputs_MKPd, "pool rows", fewest=2)
        weights = np.ones(len(outputs)) if weights_M is None else weights_M
        shares_M = weights / weights.sum()
        centre_Jd = np.einsum("M,MJd->Jd", shares_M, outputs)
        rows_JMd = (outputs - centre_Jd).transpose(1, 0, 2)
        covariance_Jdd = (rows_JMd * shares_M[:, None]).transpose(0, 2, 1) @ rows_JMd
        # So small matrices are slower on several threads, and far slower where another process has their core.
        with _libraries().limit(limits=1, user_api="blas"):
            variances_Jd, axes_Jdd = np.linalg.eigh(covariance_Jdd)
        loudness_J1 = np.einsum("M,MJd->J", shares_M, outputs**2)[:, None]
        _, readings, size = outputs.shape
        return cls(
            centre_Jd=centre_Jd,
            axes_Jdd=axes_Jdd,
            variances_Jd=np.where(variances_Jd > _SILENT * loudness_J1, variances_Jd, 0.0),
            dims_J=np.full(readings, size) if dims_K is None else np.repeat(dims_K, places),
            shares_P=np.array([1 - prompt, prompt]) if places == 2 else np.ones(1),
            rows=1 / float((shares_M**2).sum()),
        )


@dataclass(frozen=True)
class Readout:
    """A fitted readout of K heads."""

    weights_Jd: NDArray[np.float64]
    offsets_J: NDArray[np.float64]
    shares_P: NDArray[np.float64]

    def values(self, outputs_BKPd: ArrayLike) -> NDArray[np.float64]:
        """Return each head's readout, float64 `[B, K]`.

        It is the weighted mean of those of its places, each with mean 0 and variance 1 over the background.
        """
        outputs, places = _by_reading(outputs_BKPd)
        values_BJ = np.einsum("BJd,Jd->BJ", outputs, self.weights_Jd) - self.offsets_J
        return np.asarray(values_BJ.reshape(len(outputs), -1, places) @ self.shares_P)

    def affinity(self, outputs_BKPd: ArrayLike) -> NDArray[np.float64]:
        """Return the mean readout over heads, float64 `[B]`; higher is more like the target."""
        return np.asarray(self.values(outputs_BKPd).mean(axis=1))


def shrinkage_for(dims_J: NDArray[np.int64], background_rows: float, target_rows: int) -> NDArray[np.float64]:
    """Return the share of each reading's covariance that its mean variance takes the place of, `[J]`, in (0, 0.9].

    `0.4 * (sqrt(d / M) + sqrt(1 / Q))`: about proportional to how wrong a covariance of size d from M rows is (the
    spread of its eigenvalues, Marchenko and Pastur 1967), and a mean of Q rows in units of their own spread. Ledoit
    and Wolf's shrinkage and OAS know the first alone, and shrink too little for few target rows; held-out target rows,
    as few as they are, choose none that is better than chance.
    """
    shrinkage_J = SHRINKAGE * (np.sqrt(dims_J / background_rows) + math.sqrt(1 / target_rows))
    return np.asarray(np.minimum(shrinkage_J, MOST_SHRINKAGE))


def fit_readout(
    target_QKPd: ArrayLike, background: Background, *, shrinkage: float | NDArray[np.float64] | None = None
) -> Readout:
    """Fit one linear discriminant a head and place.

    Args:
        target_QKPd: mean head outputs of the target's rows, Q at least 1.
        background: the same heads' on a sample of the pool.
        shrinkage: share of the covariance that is replaced by its mean variance, in (0, 1], for all readings or each;
            by default that of `shrinkage_for`.

    Raises:
        DataError: no target rows.
        NonFiniteError: an output is nan or infinite.
    """
    target, _ = _checked(target_QKPd, "target rows", fewest=1)
    if shrinkage is None:
        shrinkage = shrinkage_for(background.dims_J, background.rows, len(target))
    shrinkage_J1 = np.broadcast_to(shrinkage, len(background.dims_J))[:, None]
    variances_Jd = background.variances_Jd
    mean_J1 = (variances_Jd.sum(axis=1) / background.dims_J)[:, None]
    # A head that never varies has the identity for its covariance.
    shrunk_Jd = (1 - shrinkage_J1) * variances_Jd + shrinkage_J1 * np.where(mean_J1 > 0, mean_J1, 1.0)
    shift_Jd = np.einsum("Jde,Jd->Je", background.axes_Jdd, target.mean(axis=0) - background.centre_Jd)
    along_Jd = shift_Jd / shrunk_Jd
    deviation_J = np.sqrt((along_Jd**2 * variances_Jd).sum(axis=1))
    # A head that puts out the same for all rows has no direction: its readout is 0.
    scale_J = np.divide(1.0, deviation_J, out=np.zeros_like(deviation_J), where=deviation_J > 0)
    weights_Jd = np.einsum("Jde,Je->Jd", background.axes_Jdd, along_Jd) * scale_J[:, None]
    return Readout(weights_Jd, (background.centre_Jd * weights_Jd).sum(axis=1), background.shares_P)


def prompt_share(
    target_QKPd: ArrayLike, background_MKPd: ArrayLike, *, dims_K: NDArray[np.int64] | None = None
) -> float:
    """Return how much the readout of the prompt is to count beside that of the answer, 0 to 0.3.

    Prompts that look alike whatever the task tell nothing, and would count as noise. So the share is `0.3 (2 A - 1)^2`,
    with the area A under the ROC curve of held-out target rows by their prompts alone, as it is for normal affinities:
    `2 A - 1 = erf(t / 2)` where they lie `t` of the pool's standard deviations above its mean.

    Args:
        target_QKPd: as for `fit_readout`. With a single row, which none is left to tell by, the share is 0, as it is
            where the answer alone was read.
        background_MKPd: mean head outputs of a sample of the pool, M at least 2.
        dims_K: as for `Background.of`.
    """
    target, rows = np.asarray(target_QKPd), np.asarray(background_MKPd)
    if len(target) < 2 or target.ndim < 4:
        return 0.0
    target, rows = target[:, :, 1], rows[:, :, 1]
    background = Background.of(rows, dims_K=dims_K)
    affinity_M = fit_readout(target, background).affinity(rows)
    apart = held_out_affinity(target, background).mean() - affinity_M.mean()
    spread = float(affinity_M.std())
    return PROMPT_SHARE * math.erf(max(apart, 0.0) / spread / 2) ** 2 if spread else 0.0


def held_out_affinity(target_QKPd: ArrayLike, background: Background, *, folds: int = FOLDS) -> NDArray[np.float64]:
    """Return each target row's affinity by a readout that was fitted without it, float64 `[Q]`.

    That is how a row of the task scores that the readout has not seen, such as one in the pool.

    Args:
        target_QKPd: as for `fit_readout`; Q at least 2. Row `i` is in fold `i % folds`.
        background: likewise.
        folds: parts that are left out in turn, at most Q of them.

    Raises:
        DataError: fewer than two target rows.
        NonFiniteError: an output is nan or infinite.
    """
    target = np.asarray(target_QKPd, dtype=np.float64)
    _checked(target, "target rows, to score each by the others", fewest=2)
    affinity_Q = np.empty(len(target))
    for is_out_Q in _folds(len(target), folds):
        affinity_Q[is_out_Q] = fit_readout(target[~is_out_Q], background).affinity(target[is_out_Q])
    return affinity_Q


def floor_below(held_out_Q: NDArray[np.float64], level: float) -> float:
    """Return the affinity that a further row of the task falls below with a probability of `level`.

    Student's prediction bound, `mean - t * sd * sqrt(1 + 1/Q)` with Q - 1 degrees of freedom: a quantile of a few rows
    lies too high, and a handful of rows could not tell a small one at all.

    Args:
        held_out_Q: affinities of target rows, see `held_out_affinity`; Q at least 2.
        level: in (0, 1).
    """
    from scipy.special import stdtrit

    count = len(held_out_Q)
    spread = float(held_out_Q.std(ddof=1)) * math.sqrt(1 + 1 / count)
    return float(held_out_Q.mean()) + float(stdtrit(count - 1, level)) * spread


@dataclass(frozen=True)
class Area:
    """An area under a ROC curve, with an interval over target rows."""

    value: float
    low: float
    high: float


def held_out_area(
    target_QKPd: ArrayLike, background_MKPd: ArrayLike, *, dims_K: NDArray[np.int64] | None = None, level: float = 0.95
) -> Area:
    """Return how well all heads together tell a target row that they have not seen from background rows.

    Each target row is placed among the background by a readout that was fitted without it, and without the half of the
    background that it is compared with. The interval is Wilson's, with the target rows as trials: so it stays wide
    where all of a few rows lie on top (Wilson 1927).

    Args:
        target_QKPd: as for `fit_readout`; Q at least 2.
        background_MKPd: mean head outputs of a sample of the pool, M at least 4.
        dims_K: as for `Background.of`.
        level: of the interval.

    Raises:
        DataError: too few rows.
        NonFiniteError: an output is nan or infinite.
    """
    target, rows = np.asarray(target_QKPd, dtype=np.float64), np.asarray(background_MKPd, dtype=np.float64)
    require_halves(len(target), len(rows))
    above: list[float] = []
    prompt = prompt_share(target, rows, dims_K=dims_K)
    for half in (0, 1):
        background = Background.of(rows[half::2], dims_K=dims_K, prompt=prompt)
        for is_out_Q in _folds(len(target), FOLDS):
            readout = fit_readout(target[~is_out_Q], background)
            low_M1 = readout.affinity(rows[1 - half :: 2])[:, None]
            above += [float(_area(value[None, None], low_M1)[0]) for value in readout.affinity(target[is_out_Q])]
    value, count = float(np.mean(above)), len(target)
    spread = NormalDist().inv_cdf(0.5 + level / 2)
    centre = value + spread**2 / (2 * count)
    width = spread * math.sqrt(value * (1 - value) / count + spread**2 / (4 * count**2))
    low, high = ((centre + sign * width) / (1 + spread**2 / count) for sign in (-1, 1))
    return Area(value, max(low, 0.0), min(high, 1.0))


def separation(
    target_QKPd: ArrayLike, background_MKPd: ArrayLike, *, dims_K: NDArray[np.int64] | None = None
) -> NDArray[np.float64]:
    """Return how well each head alone tells target rows from background rows that its readout was not fitted on.

    Both sets of rows are halved; the readout of one half is judged on the other, and the other way round.

    Args:
        target_QKPd: as for `fit_readout`, in random order; Q at least 2.
        background_MKPd: as for `held_out_area`.
        dims_K: as for `Background.of`.

    Returns:
        float64 `[K]`: area under the ROC curve, mean of both halves; 0.5 is chance, 1 is perfect.

    Raises:
        DataError: too few rows for two halves.
        NonFiniteError: an output is nan or infinite.
    """
    target, background = np.asarray(target_QKPd), np.asarray(background_MKPd)
    require_halves(len(target), len(background))
    dims_K = np.full(target.shape[1], target.shape[-1]) if dims_K is None else dims_K
    prompt = prompt_share(target, background, dims_K=dims_K)
    blocks = (slice(start, start + _HEADS_AT_A_TIME) for start in range(0, target.shape[1], _HEADS_AT_A_TIME))
    return np.concatenate(
        [_separation(target[:, block], background[:, block], dims_K[block], prompt) for block in blocks]
    )


def _separation(
    target_QKPd: ArrayLike, background_MKPd: ArrayLike, dims_K: NDArray[np.int64], prompt: float
) -> NDArray[np.float64]:
    target = np.asarray(target_QKPd, dtype=np.float64)
    background = np.asarray(background_MKPd, dtype=np.float64)
    areas = []
    for half in (0, 1):
        readout = fit_readout(target[half::2], Background.of(background[half::2], dims_K=dims_K, prompt=prompt))
        areas.append(_area(readout.values(target[1 - half :: 2]), readout.values(background[1 - half :: 2])))
    return np.asarray(np.mean(areas, axis=0))


def _folds(count: int, folds: int) -> Iterator[NDArray[np.bool_]]:
    """Yield which of the rows are left out, at most `folds` times."""
    fold_Q = np.arange(count) % min(folds, count)
    for fold in range(int(fold_Q.max()) + 1):
        yield fold_Q == fold


def _area(high_QK: NDArray[np.float64], low_MK: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the chance that a value of the first lies above one of the second, ties counting half, `[K]`."""
    areas = []
    for high_Q, low_M in zip(high_QK.T, np.sort(low_MK, axis=0).T, strict=True):
        below = np.searchsorted(low_M, high_Q, side="left") + np.searchsorted(low_M, high_Q, side="right")
        areas.append(below.mean() / (2 * len(low_M)))
    return np.array(areas)


def require_halves(target: int, background: int) -> None:
    """Refuse to judge heads by so few rows that they make no two halves.

    Raises:
        DataError: there are fewer than 2 target rows or 4 pool rows.
    """
    if target < 2 or background < 4:
        raise DataError(
            f"expected at least 2 target rows and 4 pool rows to judge a head, found {target} and {background}",
            hint="give more rows, that differ",
        )


def _by_reading(outputs_nKPd: ArrayLike) -> tuple[NDArray[np.float64], int]:
    """Return the outputs as `[n, J, d]`, and P."""
    found = np.asarray(outputs_nKPd, dtype=np.float64)
    places = found.shape[2] if found.ndim == 4 else 1
    return found.reshape(len(found), found.shape[1] * places, found.shape[-1]), places


def _checked(outputs: ArrayLike, what: str, *, fewest: int) -> tuple[NDArray[np.float64], int]:
    found, places = _by_reading(outputs)
    if len(found) < fewest:
        raise DataError(f"expected at least {fewest} {what}, found {len(found)}", hint="give more rows")
    if not np.isfinite(found).all():
        raise NonFiniteError(
            "reading head outputs: expected finite numbers, found nan or infinity", hint="try --dtype float32"
        )
    return found, places
