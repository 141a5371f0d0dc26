"""The comparison as cells of text: one choice of columns, figures and marks for the Markdown and the HTML report."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from p2d_cli.core.aer import AerReport, AerRow, MetricValue, SeedGroup
from p2d_cli.core.metrics import lower_is_better

MISSING = "–"
SEEDS_EXPLAINED = (
    "Runs that differ in nothing but their seed, as one: the mean of their scores, and of the ends of their intervals,"
    " since all seeds are judged by the same test rows."
)
DEFINITION = (
    "AER = (score-heads + mine-data + train) / full fine-tuning on all the data, in wall seconds; lower is better."
    " Speed-up = 1 / AER. STR = (score-heads + mine-data) / full fine-tuning."
    " Loading, compilation and evaluation are not charged."
)

Mark = Literal["reference", "extrapolated", "control", "scorer", "mixed"]
MARK_MEANINGS: dict[Mark, str] = {
    "reference": "the full fine-tuning that the others are measured against",
    "extrapolated": "its time is scaled up from a training that was cut short, and its score is unfinished",
    "control": "heads or rows chosen at random, evenly or not at all: what a method has to beat",
    "scorer": "its rows were chosen by a smaller model, whose seconds are charged with the run's",
    "mixed": "made under other conditions than the reference: not strictly comparable",
}


@dataclass(frozen=True)
class Column:
    """One column of a table."""

    title: str
    cell: Callable[[Any], str]
    """Returns the text for a run (`AerRow`), or for runs of several seeds (`SeedGroup`)."""
    unit: str = ""
    """Shown after the title, such as `s`."""

    @property
    def heading(self) -> str:
        """The title with its unit in brackets."""
        return f"{self.title} ({self.unit})" if self.unit else self.title


_RATIOS = (
    Column("AER", lambda row: ratio_text(row.aer)),
    Column("Speed-up", lambda row: speedup_text(row.speedup)),
    Column("STR", lambda row: ratio_text(row.str_ratio)),
)


def columns(report: AerReport) -> tuple[Column, ...]:
    """Return the columns to the right of a run's name, most important first."""
    metric = main_metric(report)
    knows_truth = any(row.precision is not None for row in report.rows)
    return (
        *(() if metric is None else (_score_column(metric, interval_name(report)),)),
        *_RATIOS,
        Column("Heads", lambda row: share_text(row.head_share)),
        Column("Rows", lambda row: share_text(row.row_share)),
        *((Column("Precision", lambda row: _text_of(row.precision, ".3f")),) if knows_truth else ()),
        Column("Parameters", lambda row: share_text(row.trainable_share)),
        Column("score-heads", lambda row: seconds_text(row.score_heads_seconds), "s"),
        Column("mine-data", lambda row: seconds_text(row.mine_data_seconds), "s"),
        Column("train", lambda row: seconds_text(row.train_seconds), "s"),
        Column("Total", lambda row: seconds_text(row.total_seconds), "s"),
        Column("Peak", lambda row: _text_of(row.peak_gib, ".2f"), "GiB"),
    )


def score_columns(report: AerReport) -> tuple[Column, ...]:
    """Return a column for each score of the runs, the main metric first."""
    return tuple(_score_column(name) for name in (main_metric(report), *other_metrics(report)) if name is not None)


def group_columns(report: AerReport) -> tuple[Column, ...]:
    """Return the columns to the right of the name of runs of several seeds."""
    metric = main_metric(report)
    scores: tuple[Column, ...] = ()
    if metric is not None:
        ends = Column("lowest to highest seed", lambda group: range_text(group.ranges.get(metric)))
        scores = (_score_column(metric, f"mean, {interval_name(report)}"), ends)
    return (*scores, *_RATIOS, Column("Runs", lambda group: str(len(group.members))))


def _score_column(metric: str, unit: str = "") -> Column:
    return Column(metric, lambda row: score_text(row.metrics.get(metric)), unit)


def main_metric(report: AerReport) -> str | None:
    """Return the reference's first metric, else that of the first run that has one, else None."""
    rows = sorted(report.rows, key=lambda row: not row.is_reference)
    return next((next(iter(row.metrics)) for row in rows if row.metrics), None)


def other_metrics(report: AerReport) -> tuple[str, ...]:
    """Return the metrics beside the main one, in the order in which the rows name them."""
    names = dict.fromkeys(name for row in report.rows for name in row.metrics)
    return tuple(name for name in names if name != main_metric(report))


def interval_name(report: AerReport) -> str:
    """Return what the scores' intervals are: `95% interval`."""
    return "interval" if report.confidence is None else f"{100 * report.confidence:.6g}% interval"


def marks_of(row: AerRow | SeedGroup, report: AerReport) -> tuple[Mark, ...]:
    """Return the marks that a run carries, in the order of `MARK_MEANINGS`; of a group only what all its runs are."""
    found: dict[Mark, bool] = {
        "reference": row.is_reference,
        "control": row.is_control and not row.is_reference,
    }
    if isinstance(row, AerRow):
        found["extrapolated"] = row.is_reference and report.reference.extrapolated
        found["scorer"] = row.scorer_model is not None
        found["mixed"] = bool(row.mixed)
    return tuple(mark for mark in MARK_MEANINGS if found.get(mark))


def marks_used(report: AerReport) -> tuple[Mark, ...]:
    """Return the marks that any run carries, in the order of `MARK_MEANINGS`."""
    used = {mark for row in report.rows for mark in marks_of(row, report)}
    return tuple(mark for mark in MARK_MEANINGS if mark in used)


def reference_sentence(report: AerReport) -> str:
    """Say in one sentence what the denominator is and how it was obtained."""
    reference = report.reference
    name = next((f"'{row.name}'" for row in report.rows if row.is_reference), "the reference")
    seconds = f"{seconds_text(reference.seconds)} s of training"
    if reference.extrapolated:
        how = f"extrapolated from {reference.measured_steps} of {reference.planned_steps} updates"
    elif reference.measured_steps is not None:
        how = f"measured over all {reference.measured_steps} updates"
    else:
        how = "measured"
    where = " in ".join(text for text in (reference.hardware, reference.precision) if text)
    return f"Reference: {name}, {seconds}{' on ' * bool(where)}{where}, {how}."


def better_is(metric: str) -> Literal["lower", "higher"]:
    """Say which way a metric improves."""
    return "lower" if lower_is_better(metric) else "higher"


def number_text(value: float) -> str:
    """Return a score with three digits behind the point, or four significant ones from 10 on."""
    if math.isnan(value):
        return MISSING
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.4g}"


def score_text(metric: MetricValue | None) -> str:
    """Return `value [low, high]`; the interval is left out where there is none."""
    if metric is None or math.isnan(metric.value):
        return MISSING
    if math.isnan(metric.low) or math.isnan(metric.high):
        return number_text(metric.value)
    return f"{number_text(metric.value)} [{number_text(metric.low)}, {number_text(metric.high)}]"


def range_text(ends: tuple[float, float] | None) -> str:
    """Return `low to high`, or one number where they are the same."""
    if ends is None:
        return MISSING
    low, high = map(number_text, ends)
    return low if low == high else f"{low} to {high}"


def ratio_text(ratio: float) -> str:
    """Return a ratio with three digits behind the point, four below 0.01, and `<0.001` where those would hide it."""
    if 0 < ratio < 0.001:
        return "<0.001"
    return f"{ratio:.4f}" if 0 < ratio < 0.01 else f"{ratio:.3f}"


def speedup_text(speedup: float | None) -> str:
    """Return `6.25×`; a run that cost nothing has no speed-up."""
    return MISSING if speedup is None else f"{speedup:,.2f}×" if speedup < 100 else f"{speedup:,.0f}×"


def share_text(share: float | None) -> str:
    """Return a share of one as a percentage with three significant digits."""
    return MISSING if share is None else f"{100 * share:.3g}%"


def _text_of(value: float | None, digits: str) -> str:
    return MISSING if value is None else f"{value:{digits}}"


def seconds_text(seconds: float) -> str:
    """Return seconds without a unit: two digits behind the point below 10, one below 1,000."""
    digits = 2 if seconds < 10 else 1 if seconds < 1000 else 0
    return "0" if seconds == 0 else f"{seconds:,.{digits}f}"


def shortened(name: str, at_most: int = 44) -> str:
    """Return a run's name on one line, with its middle left out where it is long."""
    flat = " ".join(name.split())
    if len(flat) <= at_most:
        return flat
    tail = at_most // 2 - 1
    return f"{flat[: at_most - tail - 1]}…{flat[len(flat) - tail :]}"
