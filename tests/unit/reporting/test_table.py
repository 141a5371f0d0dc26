import math

import pytest

from p2d_cli.core.aer import MetricValue
from p2d_cli.reporting.table import (
    MISSING,
    better_is,
    columns,
    main_metric,
    marks_of,
    marks_used,
    number_text,
    other_metrics,
    ratio_text,
    reference_sentence,
    score_text,
    seconds_text,
    share_text,
    shortened,
    speedup_text,
)


@pytest.mark.parametrize(
    ("make", "value", "text"),
    [
        (ratio_text, 0.0, "0.000"),
        (ratio_text, 0.12345, "0.123"),
        (ratio_text, 0.00432, "0.0043"),
        (ratio_text, 0.00001, "<0.001"),
        (speedup_text, 6.25, "6.25×"),
        (speedup_text, 1234.5, "1,234×"),
        (speedup_text, None, MISSING),
        (share_text, 0.1, "10%"),
        (share_text, 0.00213, "0.213%"),
        (share_text, None, MISSING),
        (seconds_text, 0.0, "0"),
        (seconds_text, 0.123, "0.12"),
        (seconds_text, 61.23, "61.2"),
        (seconds_text, 12345.6, "12,346"),
        (number_text, 0.8, "0.800"),
        (number_text, 12.3456, "12.35"),
        (number_text, math.nan, MISSING),
        (score_text, None, MISSING),
        (score_text, MetricValue(0.5, 0.4, 0.6, 9), "0.500 [0.400, 0.600]"),
        (score_text, MetricValue(0.5, math.nan, math.nan, 0), "0.500"),
    ],
)
def test_figures_as_text(make, value, text):
    assert make(value) == text


def test_the_main_metric_is_the_references_first_one(row, make_report):
    f1 = MetricValue(0.7, 0.6, 0.8, 10)
    report = make_report(row("a", metrics={"token_f1": f1, "exact_match": f1}), row("b", metrics={"rougeL": f1}))
    assert main_metric(report) == "exact_match"
    assert set(other_metrics(report)) == {"token_f1", "rougeL"}
    assert columns(report)[0].cell(report.rows[0]) == "0.700 [0.600, 0.800]"


def test_without_any_score_there_is_no_score_column(row, make_report):
    report = make_report(row("a", metrics={}))
    report = type(report)(report.reference, report.rows[:1], (), ())
    assert main_metric(report) is None
    assert columns(report)[0].title == "AER"


def test_marks(report):
    found = {row.name: marks_of(row, report) for row in report.rows}
    assert found == {
        "base model": (),
        "not scored": (),
        "random heads, p2d rows": ("control",),
        "contrast heads, p2d rows": (),
        "pad heads, p2d rows": ("mixed",),
        "full fine-tuning": ("reference", "extrapolated"),
    }
    assert marks_used(report) == ("reference", "extrapolated", "control", "mixed")


def test_the_reference_says_how_it_was_obtained(report, make_report):
    assert "extrapolated from 40 of 100 updates" in reference_sentence(report)
    assert "measured over all 100 updates" in reference_sentence(make_report())


def test_lower_perplexity_is_better():
    assert (better_is("perplexity"), better_is("exact_match")) == ("lower", "higher")


@pytest.mark.parametrize("length", [1, 43, 44, 45, 200])
def test_shortened_keeps_both_ends_within_the_limit(length):
    name = "".join(chr(ord("a") + index % 26) for index in range(length))
    short = shortened(name, 44)
    assert len(short) == min(length, 44)
    assert (short[0], short[-1]) == (name[0], name[-1])
