"""The geometry of the AER-against-score plot, shared by its PNG and its inline SVG.

Axes place values on [0, 1]; labels are placed in pixels with y pointing down, boxes are `(left, top, right, bottom)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Literal

from p2d_cli.core.aer import AerReport, AerRow, SeedGroup, pareto_front
from p2d_cli.core.metrics import lower_is_better
from p2d_cli.reporting.table import main_metric, number_text, shortened

WIDE_SPAN = 8.0
"""From this ratio of the dearest to the cheapest run on, costs are drawn on a logarithmic axis."""
ZERO_SLOT = 0.10
"""Share of a logarithmic axis set apart for runs that cost nothing, such as the untrained model."""
MOST_STRETCH = 1.6
"""How far runs that cost nothing may stretch the scale of the scores."""
CUT_SHORT = "full fine-tuning, cut short"
_LOG_MARGIN = 1.5
_TOLERATED = 0.06  # share of a label that may lie on other things
_EDGE = 0.03  # where points off the scale are marked
_REACHES = (1.0, 2.2, 3.6, 5.2)  # distances of a label, in units of the marker's radius and a gap

Kind = Literal["method", "control", "reference", "untrained"]
Box = tuple[float, float, float, float]
KIND_NAMES: dict[Kind, str] = {
    "method": "method",
    "control": "control",
    "reference": "full fine-tuning",
    "untrained": "not trained",
}


@dataclass(frozen=True)
class Point:
    """One run in the plot, or the mean of several that differ in their seed alone."""

    number: int
    """Its place in the report's table of runs, or of groups, from 1."""
    row: AerRow
    kind: Kind
    cost: float
    score: float
    low: float
    """Lower end of the score's interval; the score itself where there is none."""
    high: float


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic map of values to [0, 1]."""

    low: float
    high: float
    is_log: bool
    slot: float
    """Share of the axis before `low` in which a value of 0 stands; 0 if it has none."""
    ticks: tuple[float, ...]

    def place(self, value: float) -> float:
        """Return where a value stands; on a logarithmic axis 0 stands in the middle of its slot."""
        if not self.is_log:
            return (value - self.low) / (self.high - self.low)
        if value <= 0:
            return self.slot / 2
        return self.slot + (1 - self.slot) * math.log(value / self.low) / math.log(self.high / self.low)

    def holds(self, value: float) -> bool:
        """Say whether a value is on the scale of a linear axis."""
        return self.low <= value <= self.high

    def clamp(self, value: float) -> float:
        """Return where a value stands, or a place just inside the nearer end if it is off the scale."""
        return self.place(value) if self.holds(value) else _EDGE if value < self.low else 1 - _EDGE


@dataclass(frozen=True)
class Label:
    """Where a label's text starts, at half of its height, and whether a line must lead from the point to it."""

    left: float
    middle: float
    width: float
    is_far: bool

    def nearest_x(self, x: float) -> float:
        """Return where a leading line from column `x` arrives: at the label's nearer end, or its middle."""
        return min((self.left + share * self.width for share in (0.0, 0.5, 1.0)), key=lambda end: abs(end - x))

    def box(self, height: float, margin: float = 0.0) -> Box:
        """Return the label's box, with a margin at its left and right."""
        top, right = self.middle - height / 2, self.left + self.width + margin
        return self.left - margin, top, right, self.middle + height / 2


@dataclass(frozen=True)
class Labels:
    """The labels of all points: the runs' names, or their numbers in the table if the names do not fit."""

    texts: tuple[str, ...]
    places: tuple[Label, ...]
    are_numbers: bool


@dataclass(frozen=True)
class Layout:
    """Everything in its place, for a plot whose axes span `frame` in pixels."""

    metric: str | None
    points: tuple[Point, ...]
    along: Axis
    up: Axis
    frame: Box
    is_cut_short: bool = False
    """Whether the reference was cut short, so that its cost is drawn, a line without a point, and no score."""

    def x(self, cost: float) -> float:
        """Return the pixel column of a cost."""
        return self.frame[0] + self.along.place(cost) * (self.frame[2] - self.frame[0])

    def y(self, score: float) -> float:
        """Return the pixel row of a score, clamped to the scale."""
        return self.frame[3] - self.up.clamp(score) * (self.frame[3] - self.frame[1])

    @property
    def slot_x(self) -> float | None:
        """The pixel column where the slot for runs that cost nothing ends, if there is one."""
        return self.frame[0] + self.along.slot * (self.frame[2] - self.frame[0]) if self.along.slot else None

    @property
    def cut_short_x(self) -> float | None:
        """The pixel column of a reference that was cut short, if it was."""
        return self.x(1.0) if self.is_cut_short else None

    def cut_short_label(self, width: float, height: float, gap: float) -> Label:
        """Return where `CUT_SHORT` stands: left of the line, under the plot's top."""
        return Label(self.x(1.0) - gap - width, self.frame[1] + 1.6 * height, width, is_far=False)

    @property
    def front(self) -> tuple[tuple[float, float], ...]:
        """The corners of the Pareto front in pixels."""
        return tuple((self.x(cost), self.y(score)) for cost, score in front_corners(self.points, self.metric))

    def labels(self, width_of: Callable[[str], float], *, height: float, radius: float) -> Labels:
        """Place a label beside each point, of texts whose width in pixels `width_of` returns; a marker has `radius`."""
        anchors = [(self.x(point.cost), self.y(point.score)) for point in self.points]
        # Labels keep off the markers, the intervals, the front's steps, and the words beside a cut-short reference.
        obstacles: list[Box] = []
        for (x, y), point in zip(anchors, self.points, strict=True):
            obstacles.append((x - radius, y - radius, x + radius, y + radius))
            obstacles.append((x - 1, self.y(point.high), x + 1, self.y(point.low)))
        for (from_x, from_y), (to_x, to_y) in pairwise(self.front):
            obstacles.append((from_x - 1, min(from_y, to_y) - 1, to_x + 1, max(from_y, to_y) + 1))
        if self.is_cut_short:
            obstacles.append(self.cut_short_label(width_of(CUT_SHORT), height, radius).box(height))
        names = tuple(label_text(point, self.up) for point in self.points)
        numbers = tuple(str(point.number) for point in self.points)
        for texts in (names, numbers):
            widths = [width_of(text) for text in texts]
            places, is_free = place_labels(
                anchors, widths, height=height, gap=1.8 * radius, bounds=self.frame, obstacles=obstacles
            )
            if is_free:
                break
        return Labels(texts, places, texts is numbers)


def scatter_layout(report: AerReport, frame: Box) -> Layout:
    """Lay out the plot of a report in the given box of pixels."""
    points, is_cut_short = scatter_points(report), report.reference.extrapolated
    costs = [point.cost for point in points] + [1.0] * is_cut_short
    return Layout(main_metric(report), points, cost_axis(costs), score_axis(points), frame, is_cut_short)


def scatter_points(report: AerReport) -> tuple[Point, ...]:
    """Return the runs, or groups of runs, that have the report's main metric, cheapest first.

    A reference that was cut short is not among them: what is known is its cost, not what it would have reached.
    """
    metric = main_metric(report)
    found = []
    for number, row in enumerate(shown_rows(report), start=1):
        score = row.metrics.get(metric) if metric is not None else None
        if score is None or not math.isfinite(score.value) or not math.isfinite(row.aer):
            continue
        if row.is_reference and report.reference.extrapolated:
            continue
        ends = [end for end in (score.value, score.low, score.high) if math.isfinite(end)]
        kind: Kind = "method" if row.total_seconds > 0 else "untrained"
        if row.is_reference or row.is_control:
            kind = "reference" if row.is_reference else "control"
        found.append(Point(number, row, kind, row.aer, score.value, min(ends), max(ends)))
    return tuple(found)


def shown_rows(report: AerReport) -> tuple[AerRow, ...]:
    """Return what the plot shows: the report's groups, where it has some, each like its first run; else its runs."""
    shared = {item.name for item in fields(AerRow)} & {item.name for item in fields(SeedGroup)}
    means = ({name: getattr(group, name) for name in shared} for group in report.groups)
    firsts = (report.rows[group.members[0]] for group in report.groups)
    return tuple(replace(first, **mean) for first, mean in zip(firsts, means, strict=True)) or report.rows


def front_corners(points: Sequence[Point], metric: str | None) -> tuple[tuple[float, float], ...]:
    """Return the staircase through the points that no other one beats: the best score that each cost buys."""
    sign = -1.0 if metric is not None and lower_is_better(metric) else 1.0
    corners: list[tuple[float, float]] = []
    for index in pareto_front((point.cost, sign * point.score) for point in points):
        if corners:
            corners.append((points[index].cost, corners[-1][1]))
        corners.append((points[index].cost, points[index].score))
    return tuple(dict.fromkeys(corners))


def cost_axis(costs: Sequence[float]) -> Axis:
    """Return the axis for AER: from 0 on, or logarithmic where the span of the costs is wide."""
    positive = [cost for cost in costs if cost > 0] or [1.0]
    low, high = min(positive), max(positive)
    if high / low < WIDE_SPAN:
        return Axis(-0.04 * high, 1.08 * high, False, 0.0, linear_ticks(0.0, 1.08 * high))
    slot = ZERO_SLOT if min(costs, default=1.0) <= 0 else 0.0
    low, high = low / _LOG_MARGIN, high * _LOG_MARGIN
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if math.log10(high / low) < 3 else (1,)
    ticks = (float(f"{factor}e{decade}") for decade in decades for factor in factors)
    zero = (0.0,) if slot else ()
    return Axis(low, high, True, slot, (*zero, *(tick for tick in ticks if low <= tick <= high)))


def score_axis(points: Sequence[Point]) -> Axis:
    """Return a linear axis that holds the scores and their intervals.

    Runs that cost nothing are left off the scale, to be marked at its end, if they would stretch it too far: an
    untrained model's score would squeeze the differences between trained ones out of sight.
    """
    charged = [point for point in points if point.cost > 0] or points
    (low, high), (lowest, highest) = (
        (min((point.low for point in shown), default=0.0), max((point.high for point in shown), default=1.0))
        for shown in (charged, points)
    )
    if highest - lowest <= MOST_STRETCH * (high - low):
        low, high = lowest, highest
    margin = 0.08 * (high - low) or 0.05 * (abs(high) or 1.0)
    low, high = low - margin, high + margin
    return Axis(low, high, False, 0.0, linear_ticks(low, high))


def linear_ticks(low: float, high: float, at_most: int = 7) -> tuple[float, ...]:
    """Return round values within [low, high], 1, 2 or 5 times a power of ten apart."""
    power = 10.0 ** math.floor(math.log10((high - low) / at_most))
    step = next(
        factor * power
        for factor in (1, 2, 5, 10, 20)
        if math.floor(high / (factor * power)) - math.ceil(low / (factor * power)) < at_most
    )
    first, last = math.ceil(low / step), math.floor(high / step)
    return tuple(float(f"{index * step:.12g}") for index in range(first, last + 1))


def label_text(point: Point, up: Axis) -> str:
    """Return the run's name, with its score if that is off the scale."""
    name = shortened(point.row.name)
    return name if up.holds(point.score) else f"{name}: {number_text(point.score)}"


def tick_texts(axis: Axis) -> list[str]:
    """Return the labels of an axis's ticks, on a linear axis all with as many digits behind the point."""
    plain = [f"{tick:.6g}" for tick in axis.ticks]
    if axis.is_log or any("e" in text for text in plain):
        return plain
    digits = max((len(text.partition(".")[2]) for text in plain), default=0)
    return [f"{tick:.{digits}f}" for tick in axis.ticks]


def place_labels(
    anchors: Sequence[tuple[float, float]],
    widths: Sequence[float],
    *,
    height: float,
    gap: float,
    bounds: Box,
    obstacles: Sequence[Box],
) -> tuple[tuple[Label, ...], bool]:
    """Place a label beside each anchor, apart from one another and from the obstacles as far as can be.

    Greedy, most crowded anchors first: each label takes the nearest free place around its anchor, or the one with
    the least overlap.

    Args:
        anchors: Centres of the markers, in pixels, as everything here.
        widths: Widths of the labels.
        height: Height of every label.
        gap: Distance from an anchor to a label beside it, the marker's radius included.
        bounds: Where labels may stand.
        obstacles: What labels should not cover, such as markers and intervals.

    Returns:
        The labels in the order of the anchors, and whether none of them covers more than a line's breadth.
    """

    def neighbours(index: int) -> int:
        x, y = anchors[index]
        return sum(abs(x - other_x) < widths[index] and abs(y - other_y) < 40 for other_x, other_y in anchors)

    taken = list(obstacles)
    placed: dict[int, Label] = {}
    is_free = True
    for index in sorted(range(len(anchors)), key=neighbours, reverse=True):
        candidates = _candidates(anchors[index], widths[index], height, gap)
        options = [(_overlap(label.box(height), taken, bounds), rank, label) for rank, label in enumerate(candidates)]
        overlap, _, placed[index] = min(options, key=lambda option: option[:2])
        taken.append(placed[index].box(height, margin=gap / 3))
        is_free = is_free and overlap <= _TOLERATED * widths[index] * height
    return tuple(placed[index] for index in range(len(anchors))), is_free


def _candidates(anchor: tuple[float, float], width: float, height: float, gap: float) -> Iterator[Label]:
    """Yield places around an anchor, best first: beside it, above and below, diagonal, then the same further out."""
    x, y = anchor
    for reach in _REACHES:
        near = reach * gap
        diagonal, level = 0.7 * near, 0.7 * near + height / 2
        for left, middle in (
            (x + near, y),
            (x - near - width, y),
            (x + diagonal, y - level),
            (x + diagonal, y + level),
            (x - diagonal - width, y - level),
            (x - diagonal - width, y + level),
            (x - width / 2, y - near - height / 2),
            (x - width / 2, y + near + height / 2),
        ):
            yield Label(left, middle, width, reach > 1.0)


def _overlap(box: Box, taken: Sequence[Box], bounds: Box) -> float:
    """Return the area in which a box covers others, and of what of it lies out of bounds, which counts tenfold."""
    area = (box[2] - box[0]) * (box[3] - box[1])
    outside = area - _common_area(box, bounds)
    return (10 * outside if outside > 1e-6 * area else 0.0) + math.fsum(_common_area(box, other) for other in taken)


def _common_area(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
