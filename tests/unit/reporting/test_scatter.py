import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2d_cli.core.aer import MetricValue
from p2d_cli.reporting.scatter import (
    CUT_SHORT,
    ZERO_SLOT,
    Axis,
    cost_axis,
    front_corners,
    linear_ticks,
    place_labels,
    scatter_layout,
    scatter_points,
    score_axis,
    tick_texts,
)

FRAME = (50.0, 10.0, 750.0, 410.0)
costs = st.floats(0.001, 10.0)


@given(st.lists(costs, min_size=1, max_size=12), st.booleans())
def test_costs_keep_their_order_on_the_axis(values, with_zero):
    values = sorted([*values, 0.0] if with_zero else values)
    axis = cost_axis(values)
    places = [axis.place(value) for value in values]
    assert places == sorted(places)
    assert all(0 <= place <= 1 for place in places)
    assert all(-1e-9 <= axis.place(tick) <= 1 + 1e-9 for tick in axis.ticks)


def test_a_wide_span_is_logarithmic_and_zero_has_its_slot():
    assert not cost_axis([0.4, 0.9, 1.0]).is_log
    axis = cost_axis([0.0, 0.02, 1.0])
    assert axis.is_log
    assert axis.ticks[0] == 0.0
    assert 0 < axis.place(0.0) < ZERO_SLOT < axis.place(0.02)
    assert axis.place(0.2) - axis.place(0.02) == pytest.approx(axis.place(1.0) - axis.place(0.1))
    assert cost_axis([0.02, 1.0]).slot == 0.0


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_evenly_spaced_inside_the_range(low, span):
    ticks = linear_ticks(low, low + span)
    assert 2 <= len(ticks) <= 7
    assert low <= ticks[0] < ticks[-1] <= low + span
    steps = [after - before for before, after in pairwise(ticks)]
    assert max(steps) == pytest.approx(min(steps), rel=1e-3)


def test_tick_labels_have_equally_many_digits():
    axis = Axis(0.75, 0.9, False, 0.0, (0.76, 0.78, 0.8, 0.82))
    assert tick_texts(axis) == ["0.76", "0.78", "0.80", "0.82"]


@pytest.mark.parametrize("metric", ["exact_match", "perplexity"])
@given(data=st.data())
def test_the_front_is_the_best_score_within_each_cost(row, make_report, metric, data):
    drawn = data.draw(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=8))
    rows = [
        row(f"r{number}", 100.0 * cost, metrics={metric: MetricValue(float(score), score, score, 5)})
        for number, (cost, score) in enumerate(drawn)
    ]
    report = make_report()
    points = scatter_points(type(report)(report.reference, tuple(rows), (), ()))
    corners = front_corners(points, metric)
    best = min if metric == "perplexity" else max
    for cost in {point.cost for point in points}:
        expected = best(point.score for point in points if point.cost <= cost)
        assert [score for x, score in corners if x <= cost][-1] == expected


def test_an_untrained_run_does_not_squeeze_the_others(report):
    points = scatter_points(report)
    axis = score_axis(points)
    untrained = next(point for point in points if point.kind == "untrained")
    assert not axis.holds(untrained.score)
    assert 0 < axis.clamp(untrained.score) < 0.1
    assert all(axis.holds(end) for point in points if point is not untrained for end in (point.low, point.high))
    assert axis.clamp(axis.high + 1) > 0.9


def test_an_untrained_run_near_the_others_is_on_the_scale(row, make_report):
    points = scatter_points(make_report(row("base", 0.0, 0.80), row("a", 100.0, 0.82)))
    assert all(score_axis(points).holds(point.score) for point in points)


def test_runs_without_the_metric_are_left_out_and_numbers_are_those_of_the_table(report):
    points = scatter_points(report)
    assert {point.row.name for point in points} == {row.name for row in report.rows} - {
        "not scored",
        "full fine-tuning",
    }
    assert all(report.rows[point.number - 1] is point.row for point in points)
    kinds = {point.row.name: point.kind for point in points}
    assert kinds["random heads, p2d rows"] == "control"


def test_a_reference_that_was_cut_short_is_a_line_and_no_point(row, make_report):
    rows = row("a", 100.0, 0.82), row("b", 900.0, 0.5)
    whole, cut = scatter_layout(make_report(*rows), FRAME), scatter_layout(make_report(*rows, extrapolated=True), FRAME)
    assert [point.kind for point in whole.points] == ["method", "method", "reference"]
    assert whole.cut_short_x is None
    assert [point.kind for point in cut.points] == ["method", "method"]
    assert cut.cut_short_x == pytest.approx(whole.x(whole.points[-1].cost))
    assert cut.x(0.9) < cut.cut_short_x < FRAME[2]


def test_labels_keep_off_what_names_the_line(row, make_report):
    rows = [row(f"a run of number {number}", 900.0 - number, 0.9 - number / 1000) for number in range(3)]
    layout = scatter_layout(make_report(*rows, extrapolated=True), FRAME)
    note = layout.cut_short_label(7.0 * len(CUT_SHORT), 15.0, 5.0)
    for label in layout.labels(lambda text: 7.0 * len(text), height=15.0, radius=5.0).places:
        beside = label.left + label.width <= note.left or note.left + note.width <= label.left
        assert beside or abs(label.middle - note.middle) >= 14


def test_missing_intervals_shrink_to_the_score(row, make_report):
    lone = {"exact_match": MetricValue(0.5, math.nan, math.inf, 1)}
    point = next(point for point in scatter_points(make_report(row("a", metrics=lone))) if point.row.name == "a")
    assert (point.low, point.high) == (0.5, 0.5)


def _boxes(labels, height):
    return [(label.left, label.middle - height / 2, label.left + label.width, label.middle + height / 2)
            for label in labels]  # fmt: skip


def _apart(a, b):
    return a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


anchors = st.lists(st.tuples(st.floats(60, 740), st.floats(20, 400)), max_size=12)


@settings(max_examples=50)
@given(anchors)
def test_labels_stay_inside_and_free_ones_are_apart(points):
    labels, is_free = place_labels(points, [60.0] * len(points), height=12, gap=8, bounds=FRAME, obstacles=[])
    boxes = _boxes(labels, 12)
    assert len(boxes) == len(points)
    assert all(FRAME[0] <= box[0] and box[2] <= FRAME[2] for box in boxes)
    assert all(FRAME[1] <= box[1] and box[3] <= FRAME[3] for box in boxes)
    if is_free:  # up to the breadth of a line
        for index, box in enumerate(boxes):
            for other in boxes[:index]:
                overlap_x = min(box[2], other[2]) - max(box[0], other[0])
                overlap_y = min(box[3], other[3]) - max(box[1], other[1])
                assert _apart(box, other) or overlap_x * overlap_y <= 0.1 * 60 * 12


def test_a_label_evades_an_obstacle_on_its_right():
    (alone,), _ = place_labels([(100, 100)], [50.0], height=12, gap=8, bounds=FRAME, obstacles=[])
    assert alone.left == 108
    (evading,), is_free = place_labels(
        [(200, 100)], [50.0], height=12, gap=8, bounds=FRAME, obstacles=[(205, 90, 300, 110)]
    )
    assert is_free
    assert evading.left + evading.width <= 200


def test_names_give_way_to_numbers_in_a_crowd(row, make_report):
    def width(text):
        return 6.0 * len(text)

    few = scatter_layout(make_report(row("a", 100.0, 0.7)), FRAME).labels(width, height=14, radius=5)
    assert set(few.texts) == {"a", "full fine-tuning"}
    assert not few.are_numbers
    crowd = [row(f"a rather long name of a run {number}", 100.0 + number, 0.80) for number in range(40)]
    layout = scatter_layout(make_report(*crowd), FRAME)
    many = layout.labels(width, height=14, radius=5)
    assert many.are_numbers
    assert [int(text) for text in many.texts] == [point.number for point in layout.points]
