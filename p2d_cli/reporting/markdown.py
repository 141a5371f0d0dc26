"""The comparison as Markdown (GitHub's dialect), for a README, an issue or a pull request."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from p2d_cli.core.aer import AerReport, AerRow
from p2d_cli.reporting.table import (
    DEFINITION,
    MARK_MEANINGS,
    SEEDS_EXPLAINED,
    Mark,
    columns,
    group_columns,
    group_mark,
    main_metric,
    marks_of,
    marks_used,
    other_metrics,
    reference_sentence,
    score_text,
)

SIGNS: dict[Mark, str] = {"reference": "§", "extrapolated": "¶", "control": "†", "scorer": "#", "mixed": "‡"}
# An underscore between letters is no emphasis in this dialect; leaving it bare keeps `exact_match` readable.
_SPECIAL = re.compile(r"([\\`*\[\]<>|#~$&!]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))")


def aer_markdown(report: AerReport) -> str:
    """Return the comparison as a Markdown document: the table by AER, its legend, warnings, and the artifacts."""
    parts = ["# Adaptation efficiency", escape(reference_sentence(report))]
    if report.groups:
        parts += ["## Over seeds", escape(SEEDS_EXPLAINED), _group_table(report), "## Each run"]
    parts += [_main_table(report), _legend(report)]
    if report.warnings:
        parts += ["## Warnings", _bullets(report.warnings)]
    if report.flags:
        parts += ["## Not strictly comparable", _bullets(report.flags)]
    if other_metrics(report):
        parts += ["## Other scores", _score_table(report)]
    parts += ["## Artifacts", _artifacts(report.rows), escape(DEFINITION)]
    return "\n\n".join(part for part in parts if part) + "\n"


def escape(text: str) -> str:
    """Return text that Markdown shows as it is, on one line, in a table cell too."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def code(text: str) -> str:
    """Return text as a code span on one line, whatever backticks it holds."""
    flat = " ".join(text.split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", flat)), default=0))
    return f"{fence} {flat} {fence}" if flat.startswith("`") or flat.endswith("`") else f"{fence}{flat}{fence}"


def _main_table(report: AerReport) -> str:
    shown = columns(report)
    lines = [
        [str(number), _marked_name(row, report), *(column.cell(row) for column in shown)]
        for number, row in enumerate(report.rows, start=1)
    ]
    return _table(["no.", "Run", *(escape(column.heading) for column in shown)], lines)


def _group_table(report: AerReport) -> str:
    shown = group_columns(report)
    lines = []
    for number, group in enumerate(report.groups, start=1):
        mark = group_mark(group)
        name = f"{escape(group.name)} {SIGNS[mark] if mark else ''}".rstrip()
        lines.append([str(number), name, *(column.cell(group) for column in shown)])
    return _table(["no.", "Runs", *(escape(column.heading) for column in shown)], lines)


def _score_table(report: AerReport) -> str:
    names = [name for name in (main_metric(report), *other_metrics(report)) if name is not None]
    lines = [
        [str(number), _marked_name(row, report), *(score_text(row.metrics.get(name)) for name in names)]
        for number, row in enumerate(report.rows, start=1)
    ]
    return _table(["no.", "Run", *map(escape, names)], lines)


def _table(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rule = ["---:", "---", *["---:"] * (len(headings) - 2)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, rule, *lines))


def _marked_name(row: AerRow, report: AerReport) -> str:
    signs = "".join(SIGNS[mark] for mark in marks_of(row, report))
    return f"{escape(row.name)} {signs}".rstrip()


def _legend(report: AerReport) -> str:
    return "  \n".join(f"{SIGNS[mark]} {mark}: {MARK_MEANINGS[mark]}" for mark in marks_used(report))


def _bullets(texts: Iterable[str]) -> str:
    return "\n".join(f"- {escape(text)}" for text in texts)


def _artifacts(rows: Sequence[AerRow]) -> str:
    return "\n".join(f"{number}. {code(row.path)}" for number, row in enumerate(rows, start=1))
