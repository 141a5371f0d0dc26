"""Rows as they come from a file or the hub, before anything is made of them, and where they come from."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be read, though the ones after it may be."""

    where: str
    problem: DataError


def format_of(path: Path) -> RowFormat | None:
    """Return the format that a file's name stands for; None for none that p2d reads."""
    name = path.name.lower()
    row_format = FORMATS.get(Path(name.removesuffix(".gz")).suffix)
    return None if name.endswith(".gz") and row_format not in TEXT_FORMATS else row_format
