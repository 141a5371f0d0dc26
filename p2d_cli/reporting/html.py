"""The comparison as one self-contained HTML page: what the template `report.html.j2` draws."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from p2d_cli.core.aer import CHARGED_STAGES, AerReport, AerRow, HeadMap
from p2d_cli.reporting import scatter, table

_LETTER_WIDTH = 6.6  # pixels, of labels in the plot
_DWARFED = 3.0  # a reference so many times as long as the longest other run has its bar cut


def aer_html(report: AerReport, *, recipe: str | None = None) -> str:
    """Return the comparison as an HTML document that needs nothing but itself, with the text of the runs' recipe."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: f"{value:.1f}" if isinstance(value, float) else value,
    )
    wide = scatter.scatter_layout(report, (64.0, 12.0, 1108.0, 424.0))
    return environment.get_template("report.html.j2").render(
        report=report,
        recipe=recipe,
        metric=table.main_metric(report),
        wide=wide,
        narrow=scatter.scatter_layout(report, (46.0, 10.0, 348.0, 330.0)),
        notes=_plot_notes(report, wide),
        stages=CHARGED_STAGES,
        scatter=scatter,
        table=table,
        width_of=_width_of,
        uncrowded_ticks=_uncrowded_ticks,
        bar_scale=_bar_scale,
        heads_at=_heads_at,
        head_marks=_head_marks,
        zip=zip,
    )


def _plot_notes(report: AerReport, layout: scatter.Layout) -> Iterator[str]:
    if any(not layout.up.holds(point.score) for point in layout.points):
        yield "An arrow head marks a run whose score is off the scale."
    if layout.is_cut_short:
        yield "Full fine-tuning was cut short: the dotted line is its cost; what it would reach is not known."
    shown = len(scatter.shown_rows(report))
    if missing := shown - len(layout.points) - layout.is_cut_short:
        yield f"{missing} of the {shown} runs have no such score and are not shown."
    if report.groups:
        yield "Runs that differ in their seed alone are one point, at their means."


def _width_of(text: str) -> float:
    return _LETTER_WIDTH * len(text)


def _uncrowded_ticks(layout: scatter.Layout) -> Iterator[tuple[float, str]]:
    """Yield the ticks of the cost axis whose labels do not run into the one before."""
    last = -1e9
    for tick, text in zip(layout.along.ticks, scatter.tick_texts(layout.along), strict=True):
        x = layout.x(tick)
        if x - last >= _width_of(text + " "):
            last = x
            yield x, text


def _bar_scale(rows: Sequence[AerRow]) -> float:
    """Return the seconds of a full bar: of the longest run, or of the longest but the reference if that dwarfs them."""
    longest = max((row.total_seconds for row in rows), default=0.0)
    others = max((row.total_seconds for row in rows if not row.is_reference), default=0.0)
    return others if 0 < others < longest / _DWARFED else longest


def _heads_at(level: str, found: HeadMap) -> list[int]:
    return [head for head, digit in enumerate(found.levels) if digit == level]


def _head_marks(report: AerReport) -> Iterator[tuple[str, HeadMap]]:
    """Yield what each mark in the report's maps means, with a map of one head that has it."""
    bare = HeadMap(method="", artifact="", num_layers=1, num_heads=1, selected=(), levels="0", used_by=())
    yield "selected for training", replace(bare, selected=(0,))
    if any(found.reads_all for found in report.head_maps):
        yield "reads all rows", replace(bare, reads_all=(0,))
    if any(found.reads_best for found in report.head_maps):
        yield "reads those that the others found best", replace(bare, reads_best=(0,))
