"""The Arrow types of columns whose values come one after the other and are not held.

`pyarrow` infers a type from all values at once. What it looks at is the kinds of values at each place of their
structure, so that a few values of every column are enough to ask it: one of each kind. They are kept in the order of
the rows' ranks, which is the order of columns and of the fields of structs.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import count
from typing import Any

import pyarrow as pa

from p2d_cli.core.json_values import JsonObject, without_nulls

# Where integers stop to be exact in float64, and to fit into 64 bits.
_LIMITS = (-(2**63), -(2**53), 2**53 + 1, 2**63)
_SHOWN_AS_JSON = frozenset({"arguments", "parameters"})
"""Fields of tool calls and of tools that templates write as they are."""
_SHOWN_WITH_NULLS = _SHOWN_AS_JSON | {"tools", "functions"}
"""Likewise, and a null field in what was written as JSON is a part of them."""
Place = tuple[int, int]
"""Rank of a row, and a number that grows with its values."""


@dataclass
class _Kinds:
    """One value of each kind that stands at some place of a column's values, with the first place where it does."""

    first: Place = (2**63, 0)
    plain: dict[Any, tuple[Place, Any]] = field(default_factory=dict)
    items: _Kinds | None = None
    """Of lists."""
    fields: dict[str, _Kinds] = field(default_factory=lambda: defaultdict(_Kinds))
    """Of objects."""
    empty_object: Place | None = None
    is_written: bool = False
    """Whether there is an object that was written as JSON."""
    has_written_null: bool = False
    """Whether a field of such an object is null."""

    def add(self, value: Any, rank: int, numbers: Iterator[int]) -> None:
        """Look at a value."""
        place = (rank, next(numbers))
        self.first = min(self.first, place)
        if isinstance(value, dict):
            if not value:
                self.empty_object = min(place, self.empty_object or place)
            if isinstance(value, JsonObject):
                self.is_written = True
                self.has_written_null = self.has_written_null or any(part is None for part in value.values())
            for name, part in value.items():
                self.fields[name].add(part, rank, numbers)
        elif isinstance(value, list | tuple):
            self.items = self.items or _Kinds()
            self.items.first = min(self.items.first, place)
            for child in value:
                self.items.add(child, rank, numbers)
        else:
            kind = _kind(value)
            if kind not in self.plain or place < self.plain[kind][0]:
                self.plain[kind] = (place, value)

    def parts(self, names: frozenset[str] = frozenset()) -> Iterator[tuple[_Kinds, frozenset[str]]]:
        """Return these values and all inside them, each with the names of the fields that lead there from `names`."""
        yield self, names
        if self.items is not None:
            yield from self.items.parts(names)
        for name, kinds in self.fields.items():
            yield from kinds.parts(names | {name})

    def has_surrogates(self) -> bool:
        """Return whether a text or the name of a field holds half of a surrogate pair."""
        return any((str, False) in part.plain or not all(map(_is_unicode, part.fields)) for part, _ in self.parts())

    def merges_numbers(self) -> bool:
        """Return whether whole numbers would become floats in what models are shown as JSON: a tool's arguments."""
        return any(
            not names.isdisjoint(_SHOWN_AS_JSON)
            and {kind[0] for kind in part.plain if isinstance(kind, tuple)} >= {int, float}
            for part, names in self.parts()
        )

    def says_nulls(self) -> bool:
        """Return whether nulls are there because JSON has them, and not because Arrow fills them in."""
        return any(part.is_written for part, _ in self.parts())

    def loses_nulls(self, name: str) -> bool:
        """Return whether nulls of what models are shown as JSON would look like those that Arrow fills in.

        Args:
            name: the column's.
        """
        return any(
            part.has_written_null and not names.isdisjoint(_SHOWN_WITH_NULLS)
            for part, names in self.parts(frozenset({name}))
        )

    def samples(self) -> list[Any]:
        """Return values that Arrow infers the same type from as from all that were added."""
        found: list[tuple[Place, Any]] = list(self.plain.values())
        if self.items is not None:
            found.append((self.items.first, self.items.samples()))
        if self.empty_object is not None:
            found.append((self.empty_object, {}))
        for name, kinds in self.fields.items():
            found += [(kinds.first, {name: sample}) for sample in kinds.samples()]
        return [sample for _, sample in sorted(found, key=lambda pair: pair[0])]


def _kind(value: Any) -> Any:
    """Return what Arrow tells values apart by, as far as it bears on the type."""
    if isinstance(value, str):
        return str, _is_unicode(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return int, sum(value >= limit for limit in _LIMITS)
    if isinstance(value, Decimal):
        _, digits, exponent = value.as_tuple()
        return Decimal, len(digits), exponent
    return type(value), str(getattr(value, "tzinfo", None))


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True)
class Column:
    """How a column is written."""

    type: pa.DataType | None
    """None: as JSON text, one a row. So are values of mixed types, integers beyond 64 bits, halves of surrogate pairs,
    objects without keys, arguments of tools that are whole numbers here and floats there, and tools and their arguments
    with nulls of their own."""
    ascii_only: bool
    """Whether JSON text escapes what is not ASCII, as it must where there are halves of surrogate pairs."""
    says_nulls: bool
    """Whether JSON text keeps nulls, which Arrow has not filled in."""

    def array(self, values: list[Any]) -> pa.Array:
        """Return values as Arrow.

        Raises:
            pa.ArrowException: a value does not fit the type after all.
        """
        if self.type is not None:
            return pa.array(values, type=self.type)
        shown = values if self.says_nulls else map(without_nulls, values)
        texts = [json.dumps(value, ensure_ascii=self.ascii_only, default=str) for value in shown]
        return pa.array(texts, pa.string())


class Columns:
    """Finds the columns of rows."""

    def __init__(self) -> None:
        self._rows = _Kinds()
        self._numbers = count()

    def add(self, row: Mapping[str, Any], rank: int) -> None:
        """Look at a row."""
        self._rows.add(dict(row), rank, self._numbers)

    def found(self) -> dict[str, Column]:
        """Return the columns, in the order in which they first stand in the rows by rank."""
        in_order = sorted(self._rows.fields.items(), key=lambda item: item[1].first)
        return {
            name: Column(_type_of(name, kinds), ascii_only=kinds.has_surrogates(), says_nulls=kinds.says_nulls())
            for name, kinds in in_order
        }


def _type_of(name: str, kinds: _Kinds) -> pa.DataType | None:
    if kinds.merges_numbers() or kinds.loses_nulls(name):
        return None
    try:
        kind = pa.array([*kinds.samples(), None]).type
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError):
        return None
    return None if _has_empty_struct(kind) else kind


def _has_empty_struct(kind: pa.DataType) -> bool:
    children = [kind.field(index).type for index in range(kind.num_fields)]
    return (pa.types.is_struct(kind) and not children) or any(map(_has_empty_struct, children))
