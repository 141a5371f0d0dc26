"""An index of a pool: what its rows make of some heads, which no target changes, so that a second target reads none.

A folder: `index.json`, written last, and shards, each two NumPy files that are memory-mapped: `<number>.outputs.npy`,
float16 [n, K, P, d], and `<number>.rows.npy`, uint64 [n, 3]: the rows' digests, and 1 for rows that were too long and
cut. Rows are only ever added, a shard at a time; a shard that was being written when a process died is not listed, and
written over. In `hidden-states` may be such an index of what a model makes of rows in the end, instead of its heads.
In `users` each artifact that was made with the index has an empty file, by its key.

Axes: n rows of a shard, N rows of the index, M rows asked for, K heads in (layer, head) order, P places (answer and
prompt), d head_dim.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from p2d_cli.artifacts.digests import digest_file
from p2d_cli.artifacts.flushing import flush_directory, flush_file
from p2d_cli.artifacts.locking import lock_path, write_lock
from p2d_cli.artifacts.readings import PLACES, Digests, find_rows
from p2d_cli.errors import ArtifactError, CannotCreateError, DataError

INDEX_NAME = "index.json"
SCHEMA = "p2d.index/1"
FLOAT16 = 2
_USERS = "users"
STATES_FOLDER = "hidden-states"
"""Where an index keeps the hidden states of rows, an index of their own."""
_ROW_SHAPE = (3,)
_PROBE = f".{INDEX_NAME}.probe"


class Shard(BaseModel):
    """Some rows, read together."""

    model_config = ConfigDict(frozen=True)

    name: str = Field(pattern=r"^\d{5,}$")
    rows: int = Field(gt=0)
    seconds: float = Field(ge=0)
    tokens: int = Field(ge=0)
    by: str
    """Key of the artifact that was being made."""
    digests: dict[str, str]
    """SHA-256 of its files."""


@dataclass(frozen=True)
class IndexFound:
    """What an index whose files verify holds."""

    folder: str
    schema: str
    rows: int
    heads: int
    """How many heads read them."""
    depth: int
    """How many layers these are of, from the first."""
    head_dim: int
    bytes: int
    """Of all shards."""
    shards: int
    seconds: float
    """Spent on reading the rows; every subset that uses the index is charged with a share."""
    tokens: int
    targets: int
    """Subsets that were made with it, the interrupted ones among them."""
    source: dict[str, Any]
    """Model, template and what else decides how a row is read."""


class _Described(BaseModel):
    schema_: str = Field(alias="schema")
    context: str
    heads: list[Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)]]
    """Layer and head of each."""
    head_dim: int = Field(gt=0)
    source: dict[str, Any] = {}
    """What the context stands for, in words."""
    shards: list[Shard] = []


class PoolIndex:
    """The index in a folder, made if there is none.

    Args:
        folder: where it is.
        context: digest of what decides a reading beside the row.
        heads: layer and head of each of the K heads.
        head_dim: d.
        source: what the context stands for, in words.

    Raises:
        CannotCreateError: the folder holds something else.
        DataError: an index of another context or other heads.
        ArtifactError: the index is damaged.
    """

    def __init__(
        self, folder: Path, *, context: str, heads: list[tuple[int, int]], head_dim: int, source: dict[str, Any]
    ) -> None:
        self.folder = folder
        self._wanted = _Described(
            schema=SCHEMA, context=context, heads=[list(head) for head in heads], head_dim=head_dim, source=source
        )
        self.reload()

    def reload(self) -> None:
        """Read again which shards there are."""
        vars(self).pop("_rows_N3", None)
        vars(self).pop("_outputs", None)
        self._described = read_index(self.folder) or self._wanted
        found, wanted = self._described, self._wanted
        if (found.context, found.heads, found.head_dim) == (wanted.context, wanted.heads, wanted.head_dim):
            return
        names = sorted(
            name for name in {*found.source, *wanted.source} if found.source.get(name) != wanted.source.get(name)
        )
        what = ", ".join(f"{name}: {found.source.get(name)} there, {wanted.source.get(name)} here" for name in names)
        raise DataError(
            f"--index {self.folder} was made otherwise: {what or 'with other heads'}",
            hint="give another folder, or remove it to have it made anew",
        )

    @property
    def shards(self) -> list[Shard]:
        """The shards, in the order in which they were added."""
        return self._described.shards

    @property
    def num_rows(self) -> int:
        """Number of rows, N."""
        return sum(shard.rows for shard in self.shards)

    @property
    def row_bytes(self) -> int:
        """Bytes that a row takes."""
        return math.prod(self._shape) * FLOAT16 + math.prod(_ROW_SHAPE) * np.uint64().itemsize

    def find(self, digests_M2: Digests) -> NDArray[np.int64]:
        """Return where in the index each of these rows stands, -1 for one that is not there."""
        return find_rows(self._rows_N3[:, :2], digests_M2)

    @property
    def is_cut_N(self) -> NDArray[np.bool_]:
        """Which of its rows were too long, and cut."""
        return self._rows_N3[:, 2] > 0

    def blocks(self) -> Iterator[tuple[slice, NDArray[np.float16]]]:
        """Yield the outputs of each shard, with the places of its rows."""
        start = 0
        for shard, outputs_nKPd in zip(self.shards, self._outputs, strict=True):
            yield slice(start, start + shard.rows), outputs_nKPd
            start += shard.rows

    @contextmanager
    def adding(self) -> Iterator[None]:
        """Hold the right to add rows, and know those that others have added meanwhile.

        Raises:
            StoppedEarlyError: another process holds it.
            CannotCreateError: the folder cannot be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / _PROBE).touch()
            (self.folder / _PROBE).unlink()
        except OSError as problem:
            raise self._cannot_be_made(problem) from None
        with write_lock(self.folder):
            self.reload()
            if not self.shards:
                self._write(self._described)
            yield

    def add(
        self,
        digests_n2: Digests,
        outputs_nKPd: NDArray[Any],
        is_cut_n: NDArray[np.bool_],
        *,
        seconds: float,
        tokens: int,
        by: str,
    ) -> None:
        """Write a shard.

        Raises:
            DataError: an output is too large for float16.
        """
        with np.errstate(over="ignore"):
            halves_nKPd = outputs_nKPd.astype(np.float16)
        if not np.isfinite(halves_nKPd).all():
            raise DataError(
                f"--index {self.folder}: a head of this model puts out values beyond those of float16",
                hint="leave --index out",
            )
        name = f"{len(self.shards):05}"
        digests = {}
        rows_n3 = np.concatenate([digests_n2, is_cut_n[:, None].astype(np.uint64)], axis=1)
        for part, array in (("outputs", halves_nKPd), ("rows", rows_n3)):
            path = self.folder / f"{name}.{part}.npy"
            aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.npy")
            np.save(aside, array, allow_pickle=False)
            flush_file(aside)
            aside.replace(path)
            digests[path.name] = digest_file(path)
        shard = Shard(name=name, rows=len(digests_n2), seconds=seconds, tokens=tokens, by=by, digests=digests)
        self._write(self._described.model_copy(update={"shards": [*self.shards, shard]}))
        self.reload()

    def charge(self, key: str) -> tuple[float, int, int]:
        """Take note that an artifact is made with this index, and return its share of what others spent.

        Returns:
            seconds, tokens, and the number of artifacts that share them, this one included. What was read for this
            very artifact, before it was interrupted, is its own.
        """
        users = self.folder / _USERS
        try:
            users.mkdir(parents=True, exist_ok=True)
            (users / key).touch()
        except OSError as problem:
            if not self.shards:
                raise self._cannot_be_made(problem) from None
            # An index that others keep, and that may only be read, serves all the same.
        count = len(self._users | {key})
        shares = [(shard, 1 if shard.by == key else count) for shard in self.shards]
        seconds = sum(shard.seconds / parts for shard, parts in shares)
        return seconds, round(sum(shard.tokens / parts for shard, parts in shares)), count

    def verified(self) -> IndexFound:
        """Read every shard, and return what the index holds.

        Raises:
            ArtifactError: a shard is missing or damaged.
        """
        for shard in self.shards:
            self._load(shard, "rows", np.uint64, _ROW_SHAPE)
            self._load(shard, "outputs", np.float16, self._shape)
        paths = [self.folder / f"{shard.name}.{part}.npy" for shard in self.shards for part in ("rows", "outputs")]
        return IndexFound(
            folder=str(self.folder),
            schema=self._described.schema_,
            rows=self.num_rows,
            heads=len(self._described.heads),
            depth=1 + max((layer for layer, _ in self._described.heads), default=-1),
            head_dim=self._described.head_dim,
            bytes=sum(path.stat().st_size for path in paths),
            shards=len(self.shards),
            seconds=sum(shard.seconds for shard in self.shards),
            tokens=sum(shard.tokens for shard in self.shards),
            targets=len(self._users),
            source=self._described.source,
        )

    def _cannot_be_made(self, problem: OSError) -> CannotCreateError:
        return CannotCreateError(f"--index {self.folder}: {problem.strerror}", hint="choose another folder")

    @property
    def _users(self) -> set[str]:
        """Keys of the artifacts that were made with it."""
        folder = self.folder / _USERS
        noted = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        return noted | {shard.by for shard in self.shards}

    @property
    def _shape(self) -> tuple[int, int, int]:
        return len(self._described.heads), PLACES, self._described.head_dim

    @cached_property
    def _rows_N3(self) -> NDArray[np.uint64]:
        rows = [self._load(shard, "rows", np.uint64, _ROW_SHAPE) for shard in self.shards]
        return np.concatenate([np.empty((0, *_ROW_SHAPE), dtype=np.uint64), *rows])

    @cached_property
    def _outputs(self) -> list[NDArray[np.float16]]:
        return [self._load(shard, "outputs", np.float16, self._shape) for shard in self.shards]

    def _load(self, shard: Shard, part: str, dtype: Any, shape: tuple[int, ...]) -> NDArray[Any]:
        path = self.folder / f"{shard.name}.{part}.npy"
        damaged = ArtifactError(f"{path} is damaged", hint=f"remove {self.folder} to have the index made anew")
        try:
            if digest_file(path) != shard.digests.get(path.name):
                raise damaged
            array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError):
            raise damaged from None
        if array.dtype != dtype or array.shape != (shard.rows, *shape):
            raise damaged
        return array

    def _write(self, described: _Described) -> None:
        aside = self.folder / f".{INDEX_NAME}.{uuid.uuid4().hex[:8]}"
        aside.write_text(described.model_dump_json(by_alias=True, indent=2) + "\n", encoding="utf-8")
        flush_file(aside)
        aside.replace(self.folder / INDEX_NAME)
        flush_directory(self.folder)


def inspect_index(folder: Path) -> IndexFound | None:
    """Verify an index and return what it holds; None where the folder holds something else.

    Raises:
        ArtifactError: the index is damaged, or of a newer p2d.
    """
    if not (folder / INDEX_NAME).is_file():
        return None
    found = read_index(folder)
    assert found is not None, "its file is there"
    heads = [(layer, head) for layer, head in found.heads]
    index = PoolIndex(folder, context=found.context, heads=heads, head_dim=found.head_dim, source=found.source)
    return index.verified()


def read_index(folder: Path) -> _Described | None:
    """Read `index.json`; None where there is no such folder, or an empty one.

    Raises:
        CannotCreateError: the folder holds something else.
        ArtifactError: the file is damaged, or of a newer p2d.
    """
    path = folder / INDEX_NAME
    if not path.exists():
        if folder.exists() and (not folder.is_dir() or not all(_is_ours(one.name) for one in folder.iterdir())):
            raise CannotCreateError(
                f"--index {folder} holds something else than an index", hint="choose another folder"
            )
        return None
    try:
        described = _Described.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as problem:
        what = problem.strerror if isinstance(problem, OSError) else "it is no description of an index"
        raise ArtifactError(f"{path} cannot be read: {what}", hint=f"remove {folder} to have it made anew") from None
    if described.schema_ != SCHEMA:
        raise ArtifactError(f"{path} has schema {described.schema_}, this p2d knows {SCHEMA}", hint="upgrade p2d")
    return described


def _is_ours(name: str) -> bool:
    """Say whether it may be there before `index.json` is: the other index, and what a process that died has left."""
    others = {_USERS, STATES_FOLDER, lock_path(Path(STATES_FOLDER)).name}
    return name in others or name.startswith(f".{INDEX_NAME}.")
