"""From head scores to a selection of heads, and how well such a selection repeats.

Axes: L layers, H query heads of the layer with most, E episodes, K heads, R repeats. A head is the pair
`(layer, head)`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from p2d_cli.core.geometry import LayerHeads, ReadingHeads, share_count
from p2d_cli.errors import NonFiniteError, UsageError

SHALLOW_SHARE, DEEP_SHARE = 0.1, 2 / 3
"""Of the layers, those by whose heads all rows are read, and the best of them."""
READING_SHARE, MOST_READING, ENOUGH_ROWS = 0.1, 0.2, 16
"""Of the heads, those that read the best rows; up to twice as many where they were chosen by fewer rows than enough."""
FEWEST_LAYERS = 2
"""A single layer relates no word of the answer to what another one has found."""
SHALLOW_HEADS, FEWEST_SHALLOW = 32, 8
"""The most and the fewest heads by which all rows are read."""
NO_HEAD = "."
"""Stands in `head_levels` for a head that a layer has not."""


def lowest_layer(selected_LH: NDArray[np.bool_]) -> int:
    """Return the lowest layer with a selected head."""
    return int(np.flatnonzero(selected_LH.any(axis=1)).min())


def select_top(scores_LH: ArrayLike, count: int, candidates_LH: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the `count` candidates of highest score as bool [L, H]; among equal scores the earlier head wins.

    Args:
        scores_LH: Scores, [L, H], higher is more important; finite for candidates.
        count: Heads to select, 1 to the number of candidates.
        candidates_LH: Heads that may be selected, bool [L, H].

    Raises:
        NonFiniteError: a score is nan or infinite; names the first such `(layer, head)`.
        UsageError: `count` is out of range.
    """
    return _mask(_ranked(scores_LH, candidates_LH)[: _checked_count(count, candidates_LH)], candidates_LH)


def select_spread(
    scores_LH: ArrayLike, count: int, candidates_LH: NDArray[np.bool_], groups_L: Sequence[LayerHeads]
) -> NDArray[np.bool_]:
    """Return `count` candidates of high score, spread over layers and key/value groups; bool [L, H].

    Trained heads that crowd into few layers or groups move few parameters and learn less. Heads are taken by falling
    score, passing over those whose layer has its even share, `ceil(count / L)` of the layers with candidates, or whose
    group is taken already while there are others; what that leaves open is filled up by score alone.

    Args:
        scores_LH: Scores, [L, H], higher is more important; finite for candidates.
        count: Heads to select, 1 to the number of candidates.
        candidates_LH: Heads that may be selected, bool [L, H].
        groups_L: Which heads of each layer share keys and values.

    Raises:
        NonFiniteError: a score is nan or infinite.
        UsageError: `count` is out of range.
    """
    share = -(-_checked_count(count, candidates_LH) // int(candidates_LH.any(axis=1).sum()))
    taken, passed = [], []
    heads_of_layer, used_groups = Counter[int](), set()
    for place in _ranked(scores_LH, candidates_LH).tolist():
        layer, head = divmod(place, candidates_LH.shape[1])
        group = (layer, groups_L[layer].group_of(head))
        if heads_of_layer[layer] == share or group in used_groups:
            passed.append(place)
            continue
        taken.append(place)
        heads_of_layer[layer] += 1
        used_groups.add(group)
    return _mask(np.array([*taken, *passed][:count]), candidates_LH)


def select_uniform(count: int, candidates_LH: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return `count` candidates spread evenly over depth and, within a layer, over its heads: a control.

    They are evenly spaced in `(layer, head)` order, hence the counts of two layers with as many candidates differ by at
    most one.
    """
    places = np.arange(_checked_count(count, candidates_LH))
    there = np.flatnonzero(candidates_LH)
    return _mask(there[(2 * places + 1) * len(there) // (2 * count)], candidates_LH)


def select_readers(
    scores_LH: ArrayLike,
    depths: str,
    exists_LH: NDArray[np.bool_],
    groups_L: Sequence[LayerHeads],
    *,
    target_rows: int = ENOUGH_ROWS,
) -> ReadingHeads:
    """Return the heads that read rows: of the first layers all rows, of some more those that the first found best.

    The first are spread evenly and do not depend on scores, so that what they read serves every target; the others are
    a tenth of the model's heads, those of the highest scores, spread over these layers. With fewer than 16 target rows
    they are more, a fifth with 8: what a few rows tell of each head is less sure.

    Args:
        scores_LH: Scores, [L, H], finite for existing heads.
        depths: number of layers that all rows are read, and the best, such as `3,15`; `auto` for a tenth and two thirds
            of all, or more where these have few heads.
        exists_LH: Heads that there are, bool [L, H].
        groups_L: Which heads of each layer share keys and values.
        target_rows: How many rows the scores come from.

    Raises:
        UsageError: the model has not so many layers, or no heads in the first ones.
    """
    shallow, deep = _depths(depths, exists_LH)
    first_LH, both_LH = (exists_LH & (np.arange(len(exists_LH)) < depth)[:, None] for depth in (shallow, deep))
    share = min(READING_SHARE * max(ENOUGH_ROWS / target_rows, 1.0), MOST_READING)
    count = min(share_count(share, int(exists_LH.sum())), int(both_LH.sum()))
    return ReadingHeads(
        shallow_LH=select_uniform(min(SHALLOW_HEADS, int(first_LH.sum())), first_LH),
        deep_LH=select_spread(scores_LH, count, both_LH, groups_L),
    )


def _depths(text: str, exists_LH: NDArray[np.bool_]) -> tuple[int, int]:
    layers, counts_L = len(exists_LH), exists_LH.sum(axis=1).cumsum()
    if text == "auto":
        enough = 1 + int(np.searchsorted(counts_L, min(FEWEST_SHALLOW, int(counts_L[-1]))))
        shallow = max(math.ceil(layers * SHALLOW_SHARE), enough, min(FEWEST_LAYERS, layers))
        return shallow, max(math.ceil(layers * DEEP_SHARE), shallow)
    shallow, deep = (int(part) for part in text.split(","))
    if deep > layers or not counts_L[min(shallow, layers) - 1]:
        raise UsageError(
            f"--depth {text}: the model has {layers} layers, and the first {min(shallow, layers)} of them"
            f" {counts_L[min(shallow, layers) - 1]} heads",
            hint=f"give numbers up to {layers}, the first of which is at least {int(np.argmax(counts_L > 0)) + 1}",
        )
    return shallow, deep


def candidate_layers(text: str | None, num_layers: int) -> range:
    """Return the layers that `text` names, first and last as in `15-29`; all without it.

    Raises:
        UsageError: the model has no such layers.
    """
    if text is None:
        return range(num_layers)
    first, last = (int(end) for end in text.split("-"))
    if not first <= last < num_layers:
        raise UsageError(
            f"expected the first and the last of layers 0 to {num_layers - 1}, found {text}",
            hint=f"write --layers 0-{num_layers - 1} for all of them",
        )
    return range(first, last + 1)


def candidate_heads(text: str | None, exists_LH: NDArray[np.bool_], count: int = 1) -> NDArray[np.bool_]:
    """Return the heads that there are in the layers that `text` names, bool [L, H]; see `candidate_layers`.

    `upper` is the upper half of the layers, or as many of the uppermost as have `count` heads.
    """
    if text == "upper":
        above_L = exists_LH.sum(axis=1)[::-1].cumsum()[::-1]
        first = min(len(exists_LH) // 2, int(np.flatnonzero(above_L >= min(count, above_L[0])).max()))
        return exists_LH & (np.arange(len(exists_LH)) >= first)[:, None]
    candidates_LH = np.zeros_like(exists_LH)
    layers = candidate_layers(text, len(exists_LH))
    candidates_LH[layers.start : layers.stop] = exists_LH[layers.start : layers.stop]
    return candidates_LH


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Return Spearman's rank correlation of two equally large arrays, with average ranks for ties.

    Returns:
        A number in [-1, 1]; nan if either array is constant, has fewer than two entries, or holds a nan.
    """
    x, y = np.asarray(a, dtype=np.float64).ravel(), np.asarray(b, dtype=np.float64).ravel()
    if x.size != y.size:
        raise ValueError(f"cannot correlate {x.size} with {y.size} values")
    if np.isnan(x).any() or np.isnan(y).any():
        return math.nan
    x_ranks, y_ranks = _centred_ranks(x), _centred_ranks(y)
    spread = math.sqrt(float(x_ranks @ x_ranks) * float(y_ranks @ y_ranks))
    if spread == 0.0:
        return math.nan
    return min(1.0, max(-1.0, float(x_ranks @ y_ranks) / spread))


def jaccard(a: ArrayLike, b: ArrayLike) -> float:
    """Return the share of two selections (bool, same shape) that they have in common, `|a & b| / |a | b|`.

    Two empty selections are the same selection: 1.
    """
    x, y = np.asarray(a, dtype=np.bool_), np.asarray(b, dtype=np.bool_)
    if x.shape != y.shape:
        raise ValueError(f"cannot compare selections of shapes {list(x.shape)} and {list(y.shape)}")
    union = int(np.count_nonzero(x | y))
    return int(np.count_nonzero(x & y)) / union if union else 1.0


def expected_jaccard(total: int, count: int) -> float:
    """Return the expected Jaccard overlap of two independent random selections of `count` out of `total`.

    Exact: the common part X is hypergeometric, and the value is `E[X / (2 * count - X)]`.
    """
    if not 0 <= count <= total:
        raise ValueError(f"cannot select {count} of {total}")
    if count == 0:
        return 1.0
    common = range(max(0, 2 * count - total), count + 1)
    log_sets = _log_choose(total, count)
    return math.fsum(
        math.exp(_log_choose(count, x) + _log_choose(total - count, count - x) - log_sets) * x / (2 * count - x)
        for x in common
    )


@dataclass(frozen=True)
class Repeatability:
    """How far rankings from re-drawn samples agree: means over all pairs of repeats."""

    mean_spearman: float
    """Mean rank correlation, in [-1, 1]; nan if no pair has one."""
    mean_jaccard: float
    """Mean overlap of the selections, in [0, 1]."""
    chance_jaccard: float
    """Overlap that random selections of the same size would have."""
    draws: int
    """Number of repeats."""


def repeatability(
    repeats_RLH: ArrayLike,
    candidates_LH: NDArray[np.bool_],
    select: Callable[[NDArray[np.float64]], NDArray[np.bool_]],
) -> Repeatability | None:
    """Compare the rankings and the selections between repeats.

    Args:
        repeats_RLH: Scores of each repeat, [R, L, H].
        candidates_LH: Heads that may be selected, bool [L, H]; others are left out of account.
        select: makes a selection of as many of them each time, bool [L, H], from scores [L, H].

    Returns:
        The agreement, or None if there are fewer than two repeats.

    Raises:
        NonFiniteError: a score is not finite.
    """
    repeats = np.asarray(repeats_RLH, dtype=np.float64)
    if len(repeats) < 2:
        return None
    selections = [select(scores_LH) for scores_LH in repeats]
    count = int(selections[0].sum())
    correlations = [spearman(a, b) for a, b in combinations(repeats[:, candidates_LH], 2)]
    known = [value for value in correlations if not math.isnan(value)]
    return Repeatability(
        mean_spearman=math.fsum(known) / len(known) if known else math.nan,
        mean_jaccard=float(np.mean([jaccard(a, b) for a, b in combinations(selections, 2)])),
        chance_jaccard=expected_jaccard(int(candidates_LH.sum()), count),
        draws=len(repeats),
    )


def contrast_scores(target_share: ArrayLike, num_demos: int) -> NDArray[np.float64]:
    """Return how far each head favours the target demo over chance: mean share over episodes minus `1/S`.

    p2d's own score: in each episode one of `num_demos` demos comes from the target task, and a head that knows
    the task looks at that one from the query.

    Args:
        target_share: Share of a head's attention from query to demos that falls on the target demo, in [0, 1];
            [E, K] or [E, L, H].
        num_demos: Demos an episode, S.

    Returns:
        float64 without the first axis, in [-1/S, 1 - 1/S]; 0 is chance.
    """
    shares = np.asarray(target_share, dtype=np.float64)
    if len(shares) == 0 or num_demos < 1:
        raise ValueError(f"contrast needs episodes and demos, found {len(shares)} and {num_demos}")
    return np.asarray(shares.mean(axis=0) - 1.0 / num_demos)


def head_levels(scores_LH: NDArray[np.floating[Any]], exists_LH: NDArray[np.bool_]) -> str:
    """Return a digit a head, layer by layer: the tenth of the ranking that it stands in, 9 the highest.

    Equal scores share the lowest of their places. A head that there is none of (`exists_LH`, bool [L, H]) has a dot.
    """
    scores = scores_LH[exists_LH]
    lower = np.searchsorted(np.sort(scores), scores, side="left")
    levels = np.full(scores_LH.size, NO_HEAD)
    levels[exists_LH.ravel()] = (10 * lower // scores.size).astype(str)
    return "".join(levels.tolist())


def _ranked(scores_LH: ArrayLike, candidates_LH: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the candidates' places in (layer, head) order by falling score, the earlier of equal ones first."""
    scores = np.asarray(scores_LH, dtype=np.float64)
    if (unknown := np.argwhere(candidates_LH & ~np.isfinite(scores))).size:
        layer, head = unknown[0].tolist()
        raise NonFiniteError(
            f"selecting heads: expected finite scores, found {scores[layer, head]} for (layer {layer}, head {head})",
            hint="a weight, activation or gradient of this model is not finite; try --dtype float32",
        )
    places = np.flatnonzero(candidates_LH)
    return places[np.argsort(-scores.ravel()[places], kind="stable")]


def _checked_count(count: int, candidates_LH: NDArray[np.bool_]) -> int:
    total = int(candidates_LH.sum())
    if not 1 <= count <= total:
        raise UsageError(f"selecting heads: expected a number from 1 to {total}, found {count}")
    return count


def _mask(places: NDArray[Any], like_LH: NDArray[np.bool_]) -> NDArray[np.bool_]:
    selected = np.zeros(like_LH.size, dtype=np.bool_)
    selected[places] = True
    return selected.reshape(like_LH.shape)


def _centred_ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, place, sizes = np.unique(values, return_inverse=True, return_counts=True)
    average = np.cumsum(sizes) - (sizes - 1) / 2
    return np.asarray(average[place] - (values.size + 1) / 2)


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
