"""Rows as they come from a file or the hub, before anything is made of them, and where they come from."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, Literal

from p2d_cli.core.json_values import JsonObject
from p2d_cli.errors import DataError

SourceKind = Literal["files", "dataset-folder", "hub"]
RowFormat = Literal["jsonl", "json", "csv", "tsv", "parquet", "arrow", "hub"]

FORMATS: dict[str, RowFormat] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
TEXT_FORMATS = frozenset({"jsonl", "json", "csv", "tsv"})


@dataclass(frozen=True)
class RowSource:
    """Where rows are to be read from."""

    spec: str
    """As the user wrote it."""
    kind: SourceKind
    format: RowFormat
    files: tuple[Path, ...] = ()
    """In reading order; empty for a hub data set."""
    repo: str | None = None
    revision: str | None = None
    split: str | None = None
    config_name: str | None = None
    notes: tuple[str, ...] = ()
    """What is worth to be told of how the files were chosen."""
    labels: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Columns of labels and what their numbers stand for, by the data set's card; files may say more of their own."""

    @property
    def names(self) -> tuple[str, ...]:
        """What rows call each of the files: its path from the folder that holds them all, most often its name alone."""
        folder = os.path.commonpath([path.parent for path in self.files]) if self.files else "."
        return tuple(path.relative_to(folder).as_posix() for path in self.files)


@dataclass(frozen=True)
class RawRow:
    """One row as it came."""

    where: str
    fields: dict[str, Any]
    labels: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """What the numbers of a column stand for, where the data set says so (a `ClassLabel` of `datasets`)."""


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be read, though the ones after it may be."""

    where: str
    problem: DataError


def format_of(path: PurePath) -> RowFormat | None:
    """Return the format that a file's name stands for; None for none that p2d reads."""
    name = path.name.lower()
    row_format = FORMATS.get(PurePath(name.removesuffix(".gz")).suffix)
    return None if name.endswith(".gz") and row_format not in TEXT_FORMATS else row_format


def is_unicode(text: str) -> bool:
    """Say whether a text can be written: it holds no half of a surrogate pair."""
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def holds(value: Any) -> bool:
    """Say whether a value holds something: no null, false, empty text, or collection of nothing else."""
    if isinstance(value, Mapping):
        return any(map(holds, value.values()))
    if isinstance(value, list | tuple):
        return any(map(holds, value))
    return value is not None and value is not False and value != "" and value != b""


def unpack_json(value: Any) -> Any:
    """Return what a text holds that is JSON, as a cell of CSV may be; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, object_hook=JsonObject)
    except (ValueError, RecursionError):
        return value
