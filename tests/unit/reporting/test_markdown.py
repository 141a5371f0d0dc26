import re

import pytest

from p2d_cli.reporting.markdown import aer_markdown, code, escape
from p2d_cli.reporting.table import columns

HOSTILE = "a|b `c` *d* <script>\n[x](http://e) \\ # $x$"


def _cells(line):
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def _table(text, number=0):
    tables = re.findall(r"(?:^\|.*\|$\n?)+", text, flags=re.MULTILINE)
    return [_cells(line) for line in tables[number].splitlines()]


def test_the_table_has_every_run_in_order_and_every_figure(report):
    heading, rule, *lines = _table(aer_markdown(report))
    assert len({len(heading), len(rule), *map(len, lines)}) == 1
    assert [line[0] for line in lines] == [str(number) for number in range(1, len(report.rows) + 1)]
    for line, row in zip(lines, report.rows, strict=True):
        assert line[1].startswith(row.name)
        assert line[2:] == [column.cell(row) for column in columns(report)]
    assert [float(line[heading.index("AER")]) for line in lines] == sorted(row.aer for row in report.rows)


def test_marks_stand_at_the_names_and_in_a_legend(report):
    text = aer_markdown(report)
    names = {line[1] for line in _table(text)[2:]}
    assert {"random heads, p2d rows †", "pad heads, p2d rows ‡", "full fine-tuning §¶"} <= names
    for sign, word in {"§": "reference", "¶": "extrapolated", "†": "control", "‡": "mixed"}.items():
        assert f"{sign} {word}: " in text


def test_the_legend_holds_only_what_occurs(make_report, row):
    text = aer_markdown(make_report(row("a")))
    assert "§ reference" in text
    assert not re.search("[¶†‡]", text)
    assert "Warnings" not in text
    assert "Not strictly comparable" not in text


def test_warnings_flags_and_artifacts_are_listed(report):
    text = aer_markdown(report)
    assert f"## Warnings\n\n- {report.warnings[0]}\n" in text
    assert f"## Not strictly comparable\n\n- {report.flags[0]}\n" in text
    for number, row in enumerate(report.rows, start=1):
        assert f"{number}. `{row.path}`" in text


def test_a_hostile_name_stays_in_its_cell(make_report, row):
    text = aer_markdown(make_report(row(HOSTILE, 10.0), warnings=(HOSTILE,)))
    line = _table(text)[2]
    assert len(line) == len(_table(text)[0])
    assert re.sub(r"\\(.)", r"\1", line[1]) == " ".join(HOSTILE.split())
    assert "<script>" not in text.replace("`runs/" + " ".join(HOSTILE.split()) + "`", "").replace("\\<script\\>", "")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("exact_match", "exact_match"), ("_x_", r"\_x\_"), ("a  b\nc", "a b c"), ("a\\|b", r"a\\\|b")],
)
def test_escape(text, expected):
    assert escape(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"), [("a/b", "`a/b`"), ("a`b", "``a`b``"), ("`a", "`` `a ``"), ("a\nb", "`a b`")]
)
def test_code_spans_survive_backticks(text, expected):
    assert code(text) == expected
