"""The comparison as Markdown (GitHub's dialect), for a README, an issue or a pull request."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from p2d_cli.core.aer import AerReport, AerRow, SeedGroup
from p2d_cli.reporting.table import (
    DEFINITION,
    MARK_MEANINGS,
    SEEDS_EXPLAINED,
    Column,
    Mark,
    columns,
    group_columns,
    marks_of,
    marks_used,
    other_metrics,
    reference_sentence,
    score_columns,
)

SIGNS: dict[Mark, str] = {"reference": "§", "extrapolated": "¶", "control": "†", "scorer": "#", "mixed": "‡"}
# An underscore between letters is no emphasis in this dialect; leaving it bare keeps `exact_match` readable.
_SPECIAL = re.compile(r"([\\`*\[\]<>|#~$&!]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))")


def aer_markdown(report: AerReport) -> str:
    """Return the comparison as a Markdown document: the table by AER, its legend, warnings, and the artifacts."""
    legend = (f"{SIGNS[mark]} {mark}: {MARK_MEANINGS[mark]}" for mark in marks_used(report))
    parts = ["# Adaptation efficiency", escape(reference_sentence(report))]
    if report.groups:
        parts += [
            "## Over seeds",
            escape(SEEDS_EXPLAINED),
            _table("Runs", group_columns(report), report.groups, report),
            "## Each run",
        ]
    parts += [_table("Run", columns(report), report.rows, report), "  \n".join(legend)]
    if report.warnings:
        parts += ["## Warnings", _bullets(report.warnings)]
    if report.flags:
        parts += ["## Not strictly comparable", _bullets(report.flags)]
    if other_metrics(report):
        parts += ["## Other scores", _table("Run", score_columns(report), report.rows, report)]
    paths = (f"{number}. {code(row.path)}" for number, row in enumerate(report.rows, start=1))
    parts += ["## Artifacts", "\n".join(paths), escape(DEFINITION)]
    return "\n\n".join(part for part in parts if part) + "\n"


def escape(text: str) -> str:
    """Return text that Markdown shows as it is, on one line, in a table cell too."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def code(text: str) -> str:
    """Return text as a code span on one line, whatever backticks it holds."""
    flat = " ".join(text.split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", flat)), default=0))
    return f"{fence} {flat} {fence}" if flat.startswith("`") or flat.endswith("`") else f"{fence}{flat}{fence}"


def _table(heading: str, shown: Sequence[Column], rows: Sequence[AerRow | SeedGroup], report: AerReport) -> str:
    headings = ["no.", heading, *(escape(column.heading) for column in shown)]
    lines = [headings, ["---:", "---", *["---:"] * len(shown)]]
    for number, row in enumerate(rows, start=1):
        signs = "".join(SIGNS[mark] for mark in marks_of(row, report))
        lines.append([str(number), f"{escape(row.name)} {signs}".rstrip(), *(column.cell(row) for column in shown)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _bullets(texts: Iterable[str]) -> str:
    return "\n".join(f"- {escape(text)}" for text in texts)
