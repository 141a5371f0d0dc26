"""The payload of a subset artifact: the chosen rows as they came, and the scores of all rows.

`subset.parquet` holds the rows' own columns and `id`, `score`, `rank`; a row's own column of such a name that says
something else is kept as `source_<name>`. `pool_scores.parquet` holds `id`, `score`, `rank`, `draws` of every row of
the pool, so that another ratio costs nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from p2d_cli.errors import ArtifactError

SUBSET_NAME = "subset.parquet"
POOL_SCORES_NAME = "pool_scores.parquet"
OWN_COLUMNS = ("id", "score", "rank")


@dataclass(frozen=True)
class PoolScores:
    """Scores of all rows of a pool, in the pool's order."""

    ids: tuple[str, ...]
    scores_N: NDArray[np.float64]
    """Higher is better; NaN for a row that could not be scored."""
    ranks_N: NDArray[np.int64]
    """0 is the best."""
    draws_N: NDArray[np.int64]
    """Number of measurements behind each score."""


def save_subset(folder: Path, rows: Sequence[Mapping[str, Any]], chosen: NDArray[np.int64], pool: PoolScores) -> None:
    """Write both files.

    Args:
        folder: where to.
        rows: the chosen rows' own columns, in rank order.
        chosen: their positions in the pool, in the same order.
        pool: the scores of all rows.
    """
    table = _rows_table(rows, [pool.ids[index] for index in chosen])
    table = table.append_column("score", pa.array(pool.scores_N[chosen], pa.float64()))
    table = table.append_column("rank", pa.array(pool.ranks_N[chosen], pa.int64()))
    pq.write_table(table, folder / SUBSET_NAME, compression="zstd")
    scores = pa.table(
        {
            "id": pa.array(pool.ids, pa.string()),
            "score": pa.array(pool.scores_N, pa.float64()),
            "rank": pa.array(pool.ranks_N, pa.int64()),
            "draws": pa.array(pool.draws_N, pa.int64()),
        }
    )
    pq.write_table(scores, folder / POOL_SCORES_NAME, compression="zstd")


def _rows_table(rows: Sequence[Mapping[str, Any]], ids: list[str]) -> pa.Table:
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns: dict[str, pa.Array] = {"id": pa.array(ids, pa.string())}
    for name in names:
        values = [row.get(name) for row in rows]
        if name == "id" and values == ids:
            continue
        columns[f"source_{name}" if name in OWN_COLUMNS else name] = _column(values)
    return pa.table(columns)


def _column(values: list[Any]) -> pa.Array:
    """Return the values as one Arrow column; what Parquet cannot hold becomes JSON text, one a row.

    That is: values of mixed types, integers beyond 64 bits, halves of surrogate pairs, objects without keys.
    """
    try:
        column = pa.array(values)
        if not _has_empty_struct(column.type):
            return column
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError):
        pass
    try:
        return pa.array([json.dumps(value, ensure_ascii=False) for value in values], pa.string())
    except UnicodeEncodeError:
        return pa.array([json.dumps(value) for value in values], pa.string())


def _has_empty_struct(kind: pa.DataType) -> bool:
    children = [kind.field(index).type for index in range(kind.num_fields)]
    return (pa.types.is_struct(kind) and not children) or any(map(_has_empty_struct, children))


def load_pool_scores(folder: Path) -> PoolScores:
    """Read `pool_scores.parquet`.

    Raises:
        ArtifactError: the file is missing, damaged or lacks a column.
    """
    path = folder / POOL_SCORES_NAME
    try:
        table = pq.read_table(path, columns=["id", "score", "rank", "draws"])
        return PoolScores(
            ids=tuple(map(str, table["id"].to_pylist())),
            scores_N=table["score"].to_numpy().astype(np.float64),
            ranks_N=table["rank"].to_numpy().astype(np.int64),
            draws_N=table["draws"].to_numpy().astype(np.int64),
        )
    except (OSError, pa.ArrowException, KeyError, ValueError, TypeError) as problem:
        raise ArtifactError(f"{path} cannot be read: {problem}", hint="rerun p2d mine-data") from None


def load_subset_rows(folder: Path) -> list[dict[str, Any]]:
    """Read the chosen rows, best first, with their `id`, `score` and `rank`.

    Raises:
        ArtifactError: the file is missing or damaged.
    """
    path = folder / SUBSET_NAME
    try:
        rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    except (OSError, pa.ArrowException, ValueError, OverflowError) as problem:
        raise ArtifactError(f"{path} cannot be read: {problem}", hint="rerun p2d mine-data") from None
    if not all(isinstance(row.get("id"), str) and isinstance(row.get("score"), float) for row in rows):
        hint = "rerun p2d mine-data"
        raise ArtifactError(f"{path} does not name and score every row in the columns 'id' and 'score'", hint=hint)
    return rows
