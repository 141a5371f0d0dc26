"""The payload of a subset artifact: the chosen rows as they came, and the scores of all rows.

`subset.parquet` holds the rows' own columns and `id`, `score`, `rank`; a row's own column of such a name that says
something else is kept as `source_<name>`. `pool_scores.parquet` holds `id`, `score`, `rank`, `draws` of every row of
the pool, so that another ratio costs nothing. Neither is ever held as a whole.

Axes: N rows of the pool.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from p2d_cli.artifacts.cards import save_data_card
from p2d_cli.artifacts.columns import Column, Columns
from p2d_cli.errors import ArtifactError
from p2d_cli.pipeline import JSON_MARK

SUBSET_NAME = "subset.parquet"
POOL_SCORES_NAME = "pool_scores.parquet"
OWN_COLUMNS = ("id", "score", "rank")
GROUP_ROWS = 2**17
"""Rows of a row group of the pool's scores."""
PART_ROWS, PART_CHARACTERS, MOST_PARTS = 2**14, 2**26, 256
"""Rows and characters of the chosen rows that are held at a time, and the number of files that they are parted into."""
WAITING_CHARACTERS = 2**25
_POOL_SCHEMA = pa.schema({"id": pa.string(), "score": pa.float64(), "rank": pa.int64(), "draws": pa.int64()})
_ARROW = "\0arrow"
_Spilled = tuple[int, str, float, dict[str, Any]]
"""Rank, id, score and own columns of a chosen row."""


@dataclass(frozen=True)
class PoolScores:
    """Scores of all rows of a pool, in the pool's order."""

    scores_N: NDArray[np.float64]
    """Higher is better; NaN for a row that could not be scored."""
    ranks_N: NDArray[np.int64]
    """0 is the best."""
    draws_N: NDArray[np.int64]
    """Number of measurements behind each score."""


@dataclass(frozen=True)
class NamedPoolScores(PoolScores):
    """The same, with the rows' ids."""

    ids: tuple[str, ...]


def save_subset(
    folder: Path, rows: Iterable[tuple[str, Mapping[str, Any]]], pool: PoolScores, count: int, *, characters: int = 0
) -> None:
    """Write both files.

    Args:
        folder: where to.
        rows: id and own columns of every row of the pool, in its order.
        pool: their scores.
        count: number of rows chosen: those of rank 0 to `count - 1`.
        characters: of the texts of all rows, from which to tell how many rows can be held.
    """
    with TemporaryDirectory(dir=folder, prefix=".rows-") as spill:
        chosen = _ChosenRows(Path(spill), count, parts=-(-characters // PART_CHARACTERS))
        ids: list[str] = []
        with pq.ParquetWriter(folder / POOL_SCORES_NAME, _POOL_SCHEMA, compression="zstd") as writer:
            for place, (name, fields) in enumerate(rows):
                ids.append(name)
                if len(ids) == GROUP_ROWS:
                    _write_scores(writer, ids, pool, place + 1)
                    ids.clear()
                if (rank := int(pool.ranks_N[place])) < count:
                    chosen.add(rank, name, float(pool.scores_N[place]), fields)
            if ids:
                _write_scores(writer, ids, pool, place + 1)
        chosen.write(folder / SUBSET_NAME)


def _write_scores(writer: pq.ParquetWriter, ids: Sequence[str], pool: PoolScores, end: int) -> None:
    """Write the scores of the rows before position `end`, of which these are the ids."""
    part = slice(end - len(ids), end)
    columns = [ids, pool.scores_N[part], pool.ranks_N[part], pool.draws_N[part]]
    writer.write_table(pa.table(columns, schema=_POOL_SCHEMA))


def save_subset_card(folder: Path, *, method: str, chosen: int, total: int) -> None:
    """Write the card by which `datasets.load_dataset` opens the folder: the chosen rows, or `pool_scores`.

    Args:
        folder: with both files.
        method: by which rows were chosen.
        chosen: number of chosen rows.
        total: number of rows of the pool.
    """
    text = (
        f"`{SUBSET_NAME}` holds {chosen} of the {total} rows of a pool, the best first, chosen by `{method}`: their own"
        " columns as they came, and `id`, `score` (higher is better) and `rank` (0 is the best). "
        f"`{POOL_SCORES_NAME}` holds `id`, `score`, `rank` and `draws`, the number of measurements behind the score, "
        "of every row of the pool."
    )
    tables = {"default": (SUBSET_NAME, "train"), "pool_scores": (POOL_SCORES_NAME, "train")}
    save_data_card(folder, tables, title="Rows chosen with p2d", text=text)


class _ChosenRows:
    """Chosen rows on their way into the order of their ranks, in files of neighbouring ranks.

    Args:
        folder: for these files.
        count: number of rows to come.
        parts: number of files that are needed for the rows' texts.
    """

    def __init__(self, folder: Path, count: int, *, parts: int) -> None:
        parts = min(max(parts, -(-count // PART_ROWS), 1), MOST_PARTS)
        self._rows_a_part = -(-count // parts)
        self._folder = folder
        self._waiting: dict[int, list[str]] = {}
        self._waiting_characters = 0
        self._columns = Columns()
        self._own_ids = True

    def add(self, rank: int, name: str, score: float, fields: Mapping[str, Any]) -> None:
        """Take a row."""
        self._columns.add(fields, rank)
        self._own_ids = self._own_ids and fields.get("id") == name
        line = json.dumps([rank, name, score, fields], default=_arrow_text)
        self._waiting.setdefault(rank // self._rows_a_part, []).append(line)
        self._waiting_characters += len(line)
        if self._waiting_characters > WAITING_CHARACTERS:
            self._spill()

    def _spill(self) -> None:
        for part, lines in self._waiting.items():
            with self._path(part).open("a", encoding="ascii") as stream:
                stream.writelines(f"{line}\n" for line in lines)
        self._waiting.clear()
        self._waiting_characters = 0

    def _path(self, part: int) -> Path:
        return self._folder / f"{part}.jsonl"

    def write(self, path: Path) -> None:
        """Write the rows, one row group a part."""
        self._spill()
        columns = self._columns.found()
        if self._own_ids:
            columns.pop("id", None)
        while True:
            try:
                self._write(path, columns)
            except _MisfitError as misfit:
                name = str(misfit)
                columns[name] = replace(columns[name], type=None)
            else:
                return

    def _write(self, path: Path, columns: Mapping[str, Column]) -> None:
        parts = (part for part in map(self._path, range(MOST_PARTS)) if part.exists())
        tables = (_table(_read_rows(part), columns) for part in parts)
        if (first := next(tables, None)) is None:
            return
        with pq.ParquetWriter(path, first.schema, compression="zstd") as writer:
            for table in chain([first], tables):
                writer.write_table(table)


def _read_rows(part: Path) -> list[_Spilled]:
    with part.open(encoding="ascii") as stream:
        rows: list[_Spilled] = [json.loads(line, object_hook=_arrow_value) for line in stream]
    return sorted(rows, key=lambda row: row[0])


class _MisfitError(Exception):
    """A value does not fit the type of its column, which is named."""


def _table(rows: Sequence[_Spilled], columns: Mapping[str, Column]) -> pa.Table:
    """Return rows as they stand in the file; columns of JSON are marked, and read again as they came.

    Raises:
        _MisfitError: a value does not fit its column; as JSON, every value does.
    """
    arrays = {"id": pa.array([name for _, name, _, _ in rows], pa.string())}
    marks: dict[str, dict[bytes, bytes]] = {}
    for column, name in _free_names(columns).items():
        try:
            arrays[name] = columns[column].array([fields.get(column) for _, _, _, fields in rows])
        except (pa.ArrowException, OverflowError, UnicodeEncodeError):
            if columns[column].type is None:
                raise
            raise _MisfitError(column) from None
        if columns[column].type is None:
            marks[name] = JSON_MARK
    arrays["score"] = pa.array([score for _, _, score, _ in rows], pa.float64())
    arrays["rank"] = pa.array([rank for rank, _, _, _ in rows], pa.int64())
    fields = [pa.field(name, array.type, metadata=marks.get(name)) for name, array in arrays.items()]
    return pa.table(arrays, pa.schema(fields))


def _free_names(columns: Iterable[str]) -> dict[str, str]:
    """Return the name under which each column is written: `source_` before those of p2d's own."""
    taken = {*OWN_COLUMNS, *columns}
    names = {}
    for column in columns:
        name = column
        while name in OWN_COLUMNS or (name != column and name in taken):
            name = f"source_{name}"
        taken.add(name)
        names[column] = name
    return names


def _arrow_text(value: Any) -> dict[str, str]:
    """Return a value that JSON does not know, such as bytes or a time, in a form that it does."""
    batch = pa.record_batch({"": pa.array([value])})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return {_ARROW: base64.b64encode(sink.getvalue()).decode("ascii")}


def _arrow_value(fields: dict[str, Any]) -> Any:
    """Undo `_arrow_text`."""
    if fields.keys() != {_ARROW}:
        return fields
    with pa.ipc.open_stream(base64.b64decode(fields[_ARROW])) as reader:
        return reader.read_all()[""][0].as_py()


def load_pool_scores(folder: Path) -> NamedPoolScores:
    """Read `pool_scores.parquet`.

    Raises:
        ArtifactError: the file is missing, damaged or lacks a column.
    """
    path = folder / POOL_SCORES_NAME
    try:
        table = pq.read_table(path, columns=["id", "score", "rank", "draws"])
        return NamedPoolScores(
            ids=tuple(map(str, table["id"].to_pylist())),
            scores_N=table["score"].to_numpy().astype(np.float64),
            ranks_N=table["rank"].to_numpy().astype(np.int64),
            draws_N=table["draws"].to_numpy().astype(np.int64),
        )
    except (OSError, pa.ArrowException, KeyError, ValueError, TypeError) as problem:
        raise ArtifactError(f"{path} cannot be read: {problem}", hint="rerun p2d mine-data") from None


def load_extreme_rows(folder: Path, count: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Read the best of the chosen rows and the last ones, `count` of each, best first, without holding the others.

    Raises:
        ArtifactError: the file is missing or damaged, or holds more rows than the pool.
    """
    path = folder / SUBSET_NAME
    try:
        with pq.ParquetFile(path) as file, pq.ParquetFile(folder / POOL_SCORES_NAME) as pool:
            if file.metadata.num_rows > pool.metadata.num_rows:
                raise ArtifactError(f"{folder} holds more rows than its pool", hint="rerun p2d mine-data")
            groups = range(file.metadata.num_row_groups)
            best = _rows_of_groups(file, groups, count)[:count]
            last = _rows_of_groups(file, reversed(groups), count)[-count:]
    except (OSError, pa.ArrowException, ValueError, OverflowError) as problem:
        raise ArtifactError(f"{path} cannot be read: {problem}", hint="rerun p2d mine-data") from None
    if not all(isinstance(row.get("id"), str) and isinstance(row.get("score"), float) for row in [*best, *last]):
        hint = "rerun p2d mine-data"
        raise ArtifactError(f"{path} does not name and score every row in the columns 'id' and 'score'", hint=hint)
    return best, last


def _rows_of_groups(file: pq.ParquetFile, groups: Iterable[int], count: int) -> list[dict[str, Any]]:
    """Return the rows of the first of these row groups that hold so many, in the file's order."""
    chosen: list[int] = []
    found = 0
    for group in groups:
        if found < count:
            chosen.append(group)
            found += file.metadata.row_group(group).num_rows
    rows: list[dict[str, Any]] = file.read_row_groups(sorted(chosen)).to_pylist()
    return rows
