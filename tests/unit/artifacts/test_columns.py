"""Types of columns that are seen one value after the other are those that Arrow infers from all values at once."""

import datetime
import json
from decimal import Decimal

import pyarrow as pa
from hypothesis import example, given, settings
from hypothesis import strategies as st

from p2d_cli.artifacts.columns import Columns

FLOATS = st.floats(allow_nan=False)
PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 5),
    st.sampled_from([-(2**63) - 1, -(2**63), -(2**53) - 1, -(2**53), 2**53, 2**53 + 1, 2**63 - 1, 2**63, 2**64]),
    FLOATS,
    st.sampled_from(["", "a", "\u2028😀", "\ud800", b"", b"\xff"]),
    st.decimals(-100, 100, places=2),
    st.dates(),
    st.datetimes(),
    st.datetimes(timezones=st.just(datetime.UTC)),
)
NAMES = st.sampled_from(["b", "a", "c", "\ud800"])
VALUES = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3), max_leaves=5
)
ONE_KIND = st.sampled_from(["a", "b"]) | st.none()
RECORDS = st.fixed_dictionaries({}, optional={"a": ONE_KIND, "b": st.lists(st.integers(0, 3)), "c": FLOATS})
COLUMN = st.one_of(st.lists(VALUES), *(st.lists(kind) for kind in (ONE_KIND, RECORDS, st.lists(RECORDS), FLOATS)))


def inferred_at_once(values):
    """The type that Arrow gives the values; None where the column must be JSON."""
    try:
        kind = pa.array(values).type
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError):
        return None
    return None if "struct<>" in str(kind) else kind


@settings(deadline=None, max_examples=120)
@given(values=COLUMN.filter(bool), order=st.randoms(use_true_random=False))
@example(values=[{"b": 1}, [{"a": 1}, {"b": 2}]], order=None)
@example(values=[[{"a": 1}, {"b": 2}], [{"b": 1, "a": 2}]], order=None)
@example(values=[Decimal("1.25"), Decimal("100")], order=None)
def test_types_are_those_of_all_values_by_rank(values, order):
    places = list(range(len(values)))
    order.shuffle(places) if order else places.reverse()
    columns = Columns()
    for rank in places:
        columns.add({"x": values[rank]}, rank)
    column = columns.found()["x"]
    assert column.type == inferred_at_once(values)
    if column.type is not None:
        assert column.array(values).equals(pa.array(values))


@settings(deadline=None, max_examples=40)
@given(values=st.lists(st.recursive(st.sampled_from(["é", "\ud800", 1, 2.5, None]), st.lists), min_size=1))
def test_json_texts_say_what_the_values_said(values):
    columns = Columns()
    for rank, value in enumerate([*values, 1, "mixed"]):
        columns.add({"x": value}, rank)
    column = columns.found()["x"]
    assert column.type is None
    assert [json.loads(text) for text in column.array(values).to_pylist()] == values


def test_columns_stand_in_the_order_of_the_ranks():
    columns = Columns()
    for rank, row in [(2, {"c": 1, "a": 1}), (1, {"a": 1, "b": 1}), (0, {"z": 1})]:
        columns.add(row, rank)
    assert list(columns.found()) == ["z", "a", "b", "c"]
