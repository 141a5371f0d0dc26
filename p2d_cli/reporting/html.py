"""The comparison as one self-contained HTML page: no scripts, no other files, no network.

Colours follow the reader's light or dark setting. Whatever comes from a report is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape

from p2d_cli.core.aer import AerReport, AerRow
from p2d_cli.reporting.head_maps import HEAD_MAP_STYLE, head_maps_html
from p2d_cli.reporting.scatter import (
    CUT_SHORT,
    KIND_NAMES,
    Label,
    Layout,
    Point,
    scatter_layout,
    shown_rows,
    tick_texts,
)
from p2d_cli.reporting.table import (
    DEFINITION,
    MARK_MEANINGS,
    SEEDS_EXPLAINED,
    better_is,
    columns,
    group_columns,
    group_mark,
    interval_name,
    main_metric,
    marks_of,
    marks_used,
    other_metrics,
    ratio_text,
    reference_sentence,
    score_text,
    seconds_text,
    share_text,
    speedup_text,
)

_STAGES = ("score-heads", "mine-data", "train")
_LETTER_WIDTH, _LINE_HEIGHT, _RADIUS = 6.6, 16.0, 5.0  # pixels, of labels and markers in the plot
_UNFOLDED = 6  # entries of a notice that stand open
_BAR_PERCENT = 80.0  # width of the longest bar; the rest is for its figure
_DWARFED = 3.0  # a reference so many times as long as the longest other run has its bar cut
_STYLE = """
:root { color-scheme: light dark;
  --page: #ffffff; --panel: #f6f7f9; --ink: #1b1f24; --muted: #5b6470; --line: #d9dde2; --grid: #eceff2;
  --method: #0072b2; --control: #c24e00; --untrained: #7d8691;
  --score-heads: #0072b2; --mine-data: #5fb3e4; --train: #b9c0c8;
  --warn-back: #fff6e0; --warn-edge: #d99a00; --link: #005a8e; }
@media (prefers-color-scheme: dark) { :root {
  --page: #14171b; --panel: #1c2026; --ink: #e4e7eb; --muted: #9aa4b0; --line: #353c45; --grid: #262c33;
  --method: #56b4e9; --control: #f08c4a; --untrained: #8b949e;
  --score-heads: #2f8fcc; --mine-data: #86cdf5; --train: #555e69;
  --warn-back: #2b2410; --warn-edge: #c79a2b; --link: #7cc4f2; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 8px; }
h2 { font-size: 18px; margin: 40px 0 8px; }
p { margin: 0 0 8px; max-width: 78ch; }
a { color: var(--link); }
.muted, figcaption { color: var(--muted); font-size: 13.5px; }
.notice { border-left: 4px solid var(--warn-edge); background: var(--warn-back); padding: 10px 16px; margin: 20px 0;
  overflow-wrap: anywhere; }
.notice h2 { font-size: 15px; margin: 0 0 4px; } .notice ul { margin: 0; padding-left: 20px; }
figure { margin: 0; } figure svg { width: 100%; height: auto; display: block; } .narrow { display: none !important; }
svg text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  fill: var(--ink); }
svg .tick { fill: var(--muted); } svg .grid { stroke: var(--grid); } svg .frame { stroke: var(--line); }
svg .slot { stroke: var(--line); stroke-dasharray: 3 3; }
svg .front { fill: none; stroke: var(--untrained); stroke-width: 1.5; }
svg .dotted { stroke: var(--muted); stroke-dasharray: 1 3; } svg .lead { stroke: var(--untrained); stroke-width: .8; }
svg .label { paint-order: stroke; stroke: var(--page); stroke-width: 3px; stroke-linejoin: round; }
svg .interval { stroke-width: 1.3; opacity: .65; } svg .marker { stroke-width: 2; } svg .target { fill: transparent; }
.method { fill: var(--method); stroke: var(--method); } .control { fill: var(--page); stroke: var(--control); }
.reference { fill: var(--ink); stroke: var(--ink); } .untrained { fill: var(--untrained); stroke: var(--untrained); }
svg a:hover .label, svg a:focus .label { font-weight: 700; } svg a:hover .marker { stroke-width: 5; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 20px; margin: 8px 0; padding: 0; list-style: none; font-size: 13.5px;
  color: var(--muted); }
.legend svg { width: 18px; height: 14px; vertical-align: -2px; margin-right: 6px; display: inline-block; }
.swatch { display: inline-block; width: 12px; height: 12px; margin-right: 6px; vertical-align: -1px;
  border-radius: 2px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: 6px 8px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--muted); font-weight: 600; vertical-align: bottom; line-height: 1.25; }
th small { display: block; font-weight: 400; }
th.name, td.name { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 200px; }
td.name { font-weight: 600; } tr.is-reference td { background: var(--panel); }
tr:target td { background: var(--warn-back); }
.mark { display: inline-block; font-size: 11.5px; font-weight: 500; line-height: 1.4; color: var(--muted);
  border: 1px solid var(--line); border-radius: 9px; padding: 0 7px; margin-left: 4px; white-space: nowrap; }
dl.marks { display: grid; grid-template-columns: max-content 1fr; gap: 4px 12px; margin: 12px 0 0; font-size: 13.5px; }
dl.marks dt .mark { margin: 0; } dl.marks dd { margin: 0; color: var(--muted); }
.bars + p { margin-top: 10px; }
.bars { display: grid; grid-template-columns: minmax(120px, 280px) 1fr; gap: 7px 14px; font-size: 13.5px; }
.bars .who { overflow-wrap: anywhere; line-height: 1.3; align-self: center; }
.bars .how { display: flex; align-items: center; }
.total { padding-left: 8px; color: var(--muted); font-variant-numeric: tabular-nums; white-space: nowrap; }
.piece { height: 16px; flex: none; }
.cut { clip-path: polygon(0 0, 100% 0, calc(100% - 6px) 25%, 100% 50%, calc(100% - 6px) 75%, 100% 100%, 0 100%); }
.score-heads { background: var(--score-heads); }
.mine-data { background: var(--mine-data); } .train { background: var(--train); }
code { font: 12.5px ui-monospace, SFMono-Regular, Consolas, "Liberation Mono", monospace; overflow-wrap: anywhere; }
pre { font: 12.5px/1.45 ui-monospace, SFMono-Regular, Consolas, "Liberation Mono", monospace; overflow-x: auto;
  background: var(--panel); padding: 12px 16px; }
ol.artifacts { padding-left: 28px; } ol.artifacts li { margin: 2px 0; overflow-wrap: anywhere; }
@media (max-width: 720px) {
  main { padding: 20px 16px 48px; } h1 { font-size: 22px; }
  .wide { display: none !important; } .narrow { display: block !important; }
  .bars { grid-template-columns: 1fr; gap: 2px; } .bars .how { margin-bottom: 8px; }
  table.main thead { display: none; } table.main, table.main tbody { display: block; }
  table.main tr { display: grid; grid-template-columns: 1fr 1fr; column-gap: 20px; padding: 10px 0;
    border-bottom: 1px solid var(--line); }
  table.main td { display: flex; justify-content: space-between; gap: 8px; padding: 2px 0; border: 0; }
  table.main td::before { content: attr(data-label); color: var(--muted); white-space: normal; text-align: left; }
  table.main td.name, table.main td.score { grid-column: 1 / -1; } table.main td.number { display: none; }
  table.main td.name { display: block; font-size: 15px; }
  table.main td.name::before { content: attr(data-number) ". "; }
  table.main tr.is-reference td { background: none; }
}
@media print { .notice { break-inside: avoid; } tr { break-inside: avoid; } }
"""


def aer_html(report: AerReport, *, recipe: str | None = None) -> str:
    """Return the comparison as an HTML document that needs nothing but itself.

    Args:
        report: what to show.
        recipe: the text of the recipe that made the runs, if one did.
    """
    sections = [
        _header(report),
        _notice("Warnings", report.warnings),
        _notice("Not strictly comparable", report.flags),
        _section("Score against cost", _scatter(report)),
        _section("Over seeds", _group_table(report) if report.groups else ""),
        _section("All runs, lowest AER first", _main_table(report) + _marks(report)),
        _section("Where the time went", _bars(report)),
        _section("Which heads", head_maps_html(report.head_maps)),
        _section("Other scores", _score_table(report) if other_metrics(report) else ""),
        _section("Artifacts", _artifacts(report)),
        _section("The recipe that made it all", _recipe(recipe)),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>Adaptation efficiency</title>\n'
        f"<style>{_STYLE}{HEAD_MAP_STYLE}</style>\n</head>\n<body>\n<main>\n{''.join(sections)}</main>\n</body>\n</html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}</section>\n" if body else ""


def _header(report: AerReport) -> str:
    return (
        f"<header>\n<h1>Adaptation efficiency</h1>\n<p>{escape(reference_sentence(report))}</p>\n"
        f'<p class="muted">{escape(DEFINITION)}</p>\n</header>\n'
    )


def _notice(title: str, texts: Sequence[str]) -> str:
    """Return a box with a list, or nothing; what would make it long is folded up."""
    if not texts:
        return ""
    body = _list(texts[:_UNFOLDED])
    if more := texts[_UNFOLDED:]:
        body += f"<details><summary>{len(more)} more</summary>\n{_list(more)}</details>\n"
    return f'<section class="notice">\n<h2>{escape(title)}</h2>\n{body}</section>\n'


def _list(texts: Iterable[str]) -> str:
    return "<ul>\n" + "".join(f"<li>{escape(text)}</li>\n" for text in texts) + "</ul>\n"


# --- tables


def _main_table(report: AerReport) -> str:
    shown, metric = columns(report), main_metric(report)
    units = (f"<small>{escape(column.unit)}</small>" if column.unit else "" for column in shown)
    headings = "".join(f"<th>{escape(column.title)}{unit}</th>" for column, unit in zip(shown, units, strict=True))
    lines = []
    for number, row in enumerate(report.rows, start=1):
        cells = "".join(
            f'<td{_class("score", column.title == metric)} data-label="{escape(column.heading)}">'
            f"{escape(column.cell(row))}</td>"
            for column in shown
        )
        kind = _class("is-reference", row.is_reference)
        lines.append(f'<tr id="run-{number}"{kind}>{_name_cells(number, row, report)}{cells}</tr>\n')
    return (
        '<div class="scroll"><table class="main">\n<thead><tr><th></th><th class="name">Run</th>'
        f"{headings}</tr></thead>\n<tbody>\n{''.join(lines)}</tbody>\n</table></div>\n"
    )


def _score_table(report: AerReport) -> str:
    names = [name for name in (main_metric(report), *other_metrics(report)) if name is not None]
    lines = []
    for number, row in enumerate(report.rows, start=1):
        cells = "".join(f"<td>{escape(score_text(row.metrics.get(name)))}</td>" for name in names)
        lines.append(f"<tr>{_name_cells(number, row, report)}{cells}</tr>\n")
    headings = "".join(f"<th>{escape(name)}</th>" for name in names)
    return (
        f'<div class="scroll"><table>\n<thead><tr><th></th><th class="name">Run</th>{headings}</tr></thead>\n'
        f"<tbody>\n{''.join(lines)}</tbody>\n</table></div>\n"
    )


def _name_cells(number: int, row: AerRow, report: AerReport) -> str:
    details = {"mixed": f": {', '.join(row.mixed)}"}
    marks = "".join(
        f' <span class="mark">{mark}{escape(details.get(mark, ""))}</span>' for mark in marks_of(row, report)
    )
    return f'<td class="number">{number}</td><td class="name" data-number="{number}">{escape(row.name)}{marks}</td>'


def _marks(report: AerReport) -> str:
    items = (
        f'<dt><span class="mark">{mark}</span></dt><dd>{escape(MARK_MEANINGS[mark])}</dd>\n'
        for mark in marks_used(report)
    )
    return f'<dl class="marks">\n{"".join(items)}</dl>\n'


def _group_table(report: AerReport) -> str:
    shown = group_columns(report)
    headings = "".join(f"<th>{escape(column.heading)}</th>" for column in shown)
    lines = []
    for number, group in enumerate(report.groups, start=1):
        mark = group_mark(group)
        name = escape(group.name) + (f' <span class="mark">{mark}</span>' if mark else "")
        cells = "".join(
            f'<td data-label="{escape(column.heading)}">{escape(column.cell(group))}</td>' for column in shown
        )
        kind = _class("is-reference", group.is_reference)
        numbered = f'<td class="number">{number}</td><td class="name" data-number="{number}">{name}</td>'
        lines.append(f'<tr id="group-{number}"{kind}>{numbered}{cells}</tr>\n')
    return (
        f'<p class="muted">{escape(SEEDS_EXPLAINED)}</p>\n<div class="scroll"><table class="main seeds">\n'
        f'<thead><tr><th></th><th class="name">Runs</th>{headings}</tr></thead>\n<tbody>\n{"".join(lines)}</tbody>\n'
        "</table></div>\n"
    )


def _recipe(recipe: str | None) -> str:
    return "" if recipe is None else f"<details><summary>Show it</summary>\n<pre>{escape(recipe)}</pre></details>\n"


def _artifacts(report: AerReport) -> str:
    items = "".join(f"<li>{escape(row.name)}: <code>{escape(row.path)}</code></li>\n" for row in report.rows)
    return (
        '<p class="muted">Every figure of a run stands in the manifest of its evaluation, with the costs of the stages'
        f' that led to it.</p>\n<ol class="artifacts">\n{items}</ol>\n'
    )


def _class(name: str, applies: bool) -> str:
    return f' class="{name}"' if applies else ""


# --- stacked stage times


def _bars(report: AerReport) -> str:
    scale = _bar_scale(report.rows)
    legend = "".join(f'<li><span class="swatch {stage}"></span>{stage}</li>\n' for stage in _STAGES)
    note = ""
    if any(row.total_seconds > scale for row in report.rows):
        note = '<p class="muted">A bar with a torn end is longer than is drawn: read its figure.</p>\n'
    rows = "".join(_bar(row, scale) for row in report.rows)
    return f'<ul class="legend">\n{legend}</ul>\n<div class="bars">\n{rows}</div>\n{note}'


def _bar_scale(rows: Sequence[AerRow]) -> float:
    """Return the seconds of a full bar: of the longest run, or of the longest but the reference if that dwarfs them."""
    longest = max((row.total_seconds for row in rows), default=0.0)
    others = max((row.total_seconds for row in rows if not row.is_reference), default=0.0)
    return others if 0 < others < longest / _DWARFED else longest


def _bar(row: AerRow, scale: float) -> str:
    seconds = (row.score_heads_seconds, row.mine_data_seconds, row.train_seconds)
    room = _BAR_PERCENT / scale if scale > 0 else 0.0
    pieces = ""
    for stage, value in zip(_STAGES, seconds, strict=True):
        if value > 0:
            cut = " cut" if value > scale else ""
            pieces += (
                f'<span class="piece {stage}{cut}" style="width:{min(value, scale) * room:.3f}%" '
                f'title="{escape(row.name)}: {stage} {seconds_text(value)} s"></span>'
            )
    total = f'<span class="total">{seconds_text(row.total_seconds)} s</span>'
    return f'<div class="who">{escape(row.name)}</div><div class="how">{pieces}{total}</div>\n'


# --- score against cost


def _scatter(report: AerReport) -> str:
    if main_metric(report) is None:
        return '<p class="muted">No run has a score.</p>\n'
    wide = scatter_layout(report, (64.0, 12.0, 1108.0, 424.0))
    narrow = scatter_layout(report, (46.0, 10.0, 348.0, 330.0))
    metric, rows = wide.metric or "", "group" if report.groups else "run"
    return (
        f"<figure>\n{_svg(wide, rows, 'wide', 1120, 478)}{_svg(narrow, rows, 'narrow', 358, 384)}{_plot_legend(wide)}"
        f"<figcaption>{better_is(metric).capitalize()} and further left is better. Each line through a point is its"
        f" {interval_name(report)}.{_plot_notes(report, wide)}</figcaption>\n</figure>\n"
    )


def _plot_notes(report: AerReport, layout: Layout) -> str:
    notes = []
    if any(not layout.up.holds(point.score) for point in layout.points):
        notes.append("An arrow head marks a run whose score is off the scale.")
    if layout.is_cut_short:
        notes.append("Full fine-tuning was cut short: the dotted line is its cost; what it would reach is not known.")
    if missing := len(shown_rows(report)) - len(layout.points) - layout.is_cut_short:
        notes.append(f"{missing} of the {len(shown_rows(report))} runs have no such score and are not shown.")
    if report.groups:
        notes.append("Runs that differ in their seed alone are one point, at their means.")
    return "".join(f" {note}" for note in notes)


def _svg(layout: Layout, rows: str, width_class: str, width: int, height: int) -> str:
    parts = "".join((*_axes(layout), *_reference_lines(layout), _front(layout), *_points(layout, rows)))
    metric = escape(layout.metric or "")
    return (
        f'<svg class="{width_class}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{metric} of each run against its AER">\n{parts}</svg>\n'
    )


def _axes(layout: Layout) -> Iterator[str]:
    left, top, right, bottom = layout.frame
    for tick, text in zip(layout.up.ticks, tick_texts(layout.up), strict=True):
        y = layout.y(tick)
        yield _line("grid", left, y, right, y) + _text("tick", left - 8, y + 4, text, "end")
    for text, x in _uncrowded_ticks(layout):
        yield _line("frame", x, bottom, x, bottom + 5) + _text("tick", x, bottom + 19, text, "middle")
    yield _line("frame", left, bottom, right, bottom) + _line("frame", left, top, left, bottom)
    if layout.slot_x is not None:
        yield _line("slot", layout.slot_x, top, layout.slot_x, bottom)
    log = " (logarithmic)" if layout.along.is_log else ""
    yield _text("tick", (left + right) / 2, bottom + 40, f"AER{log}", "middle")
    yield _text("tick label", left + 8, top + 10, layout.metric or "", "start")


def _uncrowded_ticks(layout: Layout) -> Iterator[tuple[str, float]]:
    """Yield the ticks of the cost axis whose labels do not run into the one before."""
    last = -1e9
    for tick, text in zip(layout.along.ticks, tick_texts(layout.along), strict=True):
        x = layout.x(tick)
        if x - last >= _LETTER_WIDTH * (len(text) + 1):
            last = x
            yield text, x


def _reference_lines(layout: Layout) -> Iterator[str]:
    left, top, right, bottom = layout.frame
    if layout.cut_short_x is not None:
        label = layout.cut_short_label(_LETTER_WIDTH * len(CUT_SHORT), _LINE_HEIGHT, _RADIUS)
        yield _line("dotted", layout.cut_short_x, top, layout.cut_short_x, bottom)
        yield _text("tick label", label.left + label.width, label.middle + 4, CUT_SHORT, "end")
    for point in layout.points:
        if point.kind == "reference":
            x, y = layout.x(point.cost), layout.y(point.score)
            yield _line("dotted", x, top, x, bottom) + _line("dotted", left, y, right, y)


def _front(layout: Layout) -> str:
    corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in layout.front)
    return f'<polyline class="front" points="{corners}"/>\n'


def _points(layout: Layout, rows: str) -> Iterator[str]:
    """Yield each run as a link to its row in the table of `rows`, with a title that a pointer over it shows."""
    labels = layout.labels(lambda text: _LETTER_WIDTH * len(text), height=_LINE_HEIGHT, radius=_RADIUS)
    for point, text, label in zip(layout.points, labels.texts, labels.places, strict=True):
        x = layout.x(point.cost)
        interval = f'<line class="interval {point.kind}" x1="{x:.1f}" x2="{x:.1f}" '
        interval += f'y1="{layout.y(point.high):.1f}" y2="{layout.y(point.low):.1f}"/>'
        yield (
            f'<a href="#{rows}-{point.number}"><title>{escape(_hover(point, layout))}</title>{interval}'
            f"{_marker(point, layout)}{_label(point, layout, text, label)}</a>\n"
        )


def _hover(point: Point, layout: Layout) -> str:
    row, speedup = point.row, point.row.speedup
    times = "" if speedup is None else f" ({speedup_text(speedup)})"
    score = score_text(row.metrics[layout.metric or ""])
    shares = f"heads {share_text(row.head_share)}, rows {share_text(row.row_share)}"
    return f"{row.name}\nAER {ratio_text(row.aer)}{times}\n{layout.metric} {score}\n{shares}\n{KIND_NAMES[point.kind]}"


def _marker(point: Point, layout: Layout) -> str:
    x, y = layout.x(point.cost), layout.y(point.score)
    corners: tuple[tuple[float, float], ...]
    target = f'<circle class="target" cx="{x:.1f}" cy="{y:.1f}" r="12"/>'
    if not layout.up.holds(point.score):
        tip = 7 if point.score < layout.up.low else -7
        corners = ((x, y + tip), (x - 6, y - tip / 2), (x + 6, y - tip / 2))
    elif point.kind == "reference":
        corners = ((x, y - 7), (x + 7, y), (x, y + 7), (x - 7, y))
    else:
        return f'<circle class="marker {point.kind}" cx="{x:.1f}" cy="{y:.1f}" r="{_RADIUS:g}"/>{target}'
    outline = " ".join(f"{corner_x:.1f},{corner_y:.1f}" for corner_x, corner_y in corners)
    return f'<polygon class="marker {point.kind}" points="{outline}"/>{target}'


def _label(point: Point, layout: Layout, text: str, label: Label) -> str:
    x, lead = layout.x(point.cost), ""
    if label.is_far:
        lead = _line("lead", x, layout.y(point.score), label.nearest_x(x), label.middle)
    # A text that ends at its point is hung up at its end, as the reader's font may be of another width.
    right = label.left + label.width
    place, anchor = (right, "end") if right < x else (label.left, "start") if label.left > x else (x, "middle")
    return lead + _text("label", place, label.middle + 4, text, anchor)


def _plot_legend(layout: Layout) -> str:
    shapes = {
        kind: f'<circle class="marker {kind}" cx="9" cy="7" r="{_RADIUS:g}" stroke-width="2"/>' for kind in KIND_NAMES
    }
    shapes["reference"] = '<polygon class="marker reference" points="9,1 15,7 9,13 3,7"/>'
    used = {point.kind for point in layout.points}
    items = [(shapes[kind], name) for kind, name in KIND_NAMES.items() if kind in used]
    items.append(('<line class="front" x1="0" x2="18" y1="7" y2="7"/>', "Pareto front: the best score a cost buys"))
    return f'<ul class="legend">\n{_legend_items(items)}</ul>\n'


def _legend_items(items: Iterable[tuple[str, str]]) -> str:
    return "".join(
        f'<li><svg viewBox="0 0 18 14" aria-hidden="true">{shape}</svg>{escape(name)}</li>\n' for shape, name in items
    )


def _line(name: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{name}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>\n'


def _text(name: str, x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="{name}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>\n'
