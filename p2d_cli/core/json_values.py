"""Objects that were written as JSON, told apart from the structs of Arrow, whose missing fields are null."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class JsonObject(dict[str, Any]):
    """An object that was written as JSON: a null in it was written too, where Arrow fills the fields of its structs."""

    __slots__ = ()


def without_nulls(value: Any) -> Any:
    """Return a value without the null fields of its objects, which Parquet and Arrow put where there are none.

    Those of a `JsonObject` stay: JSON says what it says.
    """
    if isinstance(value, JsonObject):
        return value
    if isinstance(value, Mapping):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    if isinstance(value, list | tuple):
        return [without_nulls(part) for part in value]
    return value
