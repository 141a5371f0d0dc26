"""A pool of rows that need not fit into memory: read again for each use, a chunk at a time.

One pass counts the rows and finds what concerns all of them: ids that repeat, and rows that are target rows as well.
During that pass 8 bytes a row are held (a digest of its id), afterwards one, but where places are looked up. A pool of
a single chunk is kept, and not read again.

Axes: N rows of the pool.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from p2d_cli.data.records import Record, SkippedRows, UnreadParts, repeated_ids_note
from p2d_cli.errors import DataError

CHUNK_ROWS = 16_384
CHUNK_CHARACTERS = 2**26
"""A chunk is meant to hold no more rows and no more text than this. Both are part of what `mine-data` computes where
rows of a chunk meet in episodes: they are no settings."""
_ROWS_BETWEEN_REPORTS = 1024


class Scan(Protocol):
    """Reads the rows of a pool from its beginning, the same at every call."""

    def __call__(self, *, skip: Callable[[str], None], with_fields: bool = False) -> Iterator[Record]:
        """Yield the records, with the columns of their rows if asked for; `skip` is told of bad rows, if allowed."""
        ...


@dataclass(frozen=True)
class Chunk:
    """Neighbouring rows of a pool."""

    start: int
    """Position of the first of them among the rows to choose from."""
    records: tuple[Record, ...]
    total: int
    """Number of rows to choose from."""

    @property
    def places(self) -> slice:
        """Their positions among the rows to choose from."""
        return slice(self.start, self.start + len(self.records))

    def name_of(self, row: int) -> str:
        """Return what messages call a row of the chunk."""
        return self.records[row].where

    @property
    def part(self) -> str:
        """A name for these rows among those of the pool; empty where they are all of them."""
        if len(self.records) == self.total:
            return ""
        return f"{self.start + 1} to {self.places.stop} of {self.total}"


@dataclass(frozen=True)
class Pool:
    """The rows of a pool; those that are target rows as well, or not listed, are there, but not to be chosen."""

    scan: Scan
    num_rows: int
    """N."""
    characters: int
    """Of all prompts and completions."""
    named_by_place: bool
    """Whether ids repeat, so that rows are named by their place in the file."""
    notes: tuple[str, ...]
    skipped: SkippedRows
    twins: NDArray[np.int64]
    """Positions of the rows that are target rows as well, ascending."""
    twin_groups: NDArray[np.int64]
    """Which of the target's groups each of them belongs to (`duplicate_groups` of the target)."""
    held: tuple[Record, ...] | None
    """All rows, without their columns, where they are few."""
    unlisted: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """Positions of other rows that are not to be chosen, ascending."""

    @classmethod
    def of(cls, records: Sequence[Record], target: Sequence[Record] = ()) -> Pool:
        """Return a pool of rows that are held, under the ids that they have; see `open_pool`."""
        pool = open_pool(lambda **_: iter(records), target)
        return replace(pool, named_by_place=False, notes=(), held=tuple(records))

    def read(self, *, with_fields: bool = False) -> Iterator[Record]:
        """Yield all rows in order, under unique ids; more or fewer than there were at first are an error."""
        held = None if with_fields else self.held
        rows = iter(held) if held is not None else self.scan(skip=_ignore, with_fields=with_fields)
        count = 0
        for count, record in enumerate(rows, start=1):
            if count > self.num_rows:
                break
            yield replace(record, id=record.where) if self.named_by_place else record
        if count != self.num_rows:
            found = "more" if count > self.num_rows else str(count)
            message = f"the pool changed while it was being read: expected {self.num_rows} rows, found {found}"
            raise DataError(message, hint="run the command again once the files stay as they are")

    @property
    def size(self) -> int:
        """Number of rows to choose from, M."""
        return self.num_rows - len(self.twins) - len(self.unlisted)

    @cached_property
    def is_excluded_N(self) -> NDArray[np.bool_]:
        """Which rows are not to be chosen."""
        is_excluded_N = np.zeros(self.num_rows, dtype=np.bool_)
        is_excluded_N[self.twins] = True
        is_excluded_N[self.unlisted] = True
        return is_excluded_N

    def only(self, chosen: ArrayLike) -> Pool:
        """Return the same pool with some of the rows to choose from, by their positions among these."""
        is_left_N = ~self.is_excluded_N
        is_left_N[self.places(chosen)] = False
        return replace(self, unlisted=np.union1d(self.unlisted, np.flatnonzero(is_left_N)))

    def chunks(self) -> Iterator[Chunk]:
        """Yield the rows to choose from in chunks of nearly equal size."""
        count = max(-(-self.num_rows // CHUNK_ROWS), -(-self.characters // CHUNK_CHARACTERS), 1)
        count = min(count, self.size)
        rows = (record for record, is_excluded in zip(self.read(), self.is_excluded_N, strict=True) if not is_excluded)
        start = 0
        for number in range(1, count + 1):
            stop = self.size * number // count
            yield Chunk(start, tuple(islice(rows, stop - start)), self.size)
            start = stop

    def places(self, chosen: ArrayLike) -> NDArray[np.int64]:
        """Return where in the pool some of the rows to choose from stand, by their positions among these."""
        return np.flatnonzero(~self.is_excluded_N)[np.asarray(chosen, dtype=np.int64)]

    def take(self, places: ArrayLike) -> list[Record]:
        """Return the rows at these places of the pool, in the order asked for; reading ends with the last of them."""
        asked: list[int] = np.asarray(places, dtype=np.int64).tolist()
        wanted, found = set(asked), {}
        for place, record in enumerate(islice(self.read(), max(asked, default=-1) + 1)):
            if place in wanted:
                found[place] = record
        return [found[place] for place in asked]


def open_pool(scan: Scan, target: Sequence[Record] = (), *, advance: Callable[[int], None] = lambda _: None) -> Pool:
    """Read through a pool once.

    Args:
        scan: reads its rows.
        target: the target rows.
        advance: is told the number of rows read since the last call.

    Raises:
        DataError: a bad row that `scan` does not skip, or no rows.
    """
    groups: dict[str, int] = {}
    for record in target:
        groups.setdefault(record.plain_text, len(groups))
    group_of = {digest64(text): number for text, number in groups.items()}
    ids, twins, twin_groups = array("Q"), array("q"), array("q")
    held: list[Record] | None = []
    characters = 0
    skipped, unread = SkippedRows(), UnreadParts()
    for place, record in enumerate(scan(skip=skipped)):
        unread.add(record)
        ids.append(digest64(record.id))
        characters += len(record.text)
        if group_of and (group := group_of.get(digest64(record.plain_text))) is not None:
            twins.append(place)
            twin_groups.append(group)
        if held is not None:
            held.append(record)
            held = held if len(held) <= CHUNK_ROWS and characters <= CHUNK_CHARACTERS else None
        if len(ids) % _ROWS_BETWEEN_REPORTS == 0:
            advance(_ROWS_BETWEEN_REPORTS)
    repeated = _repeated_ids(scan, np.asarray(ids, dtype=np.uint64))
    return Pool(
        scan=scan,
        num_rows=len(ids),
        characters=characters,
        named_by_place=bool(repeated),
        notes=(*repeated, *unread.notes()),
        skipped=skipped,
        twins=np.array(twins, dtype=np.int64),
        twin_groups=np.array(twin_groups, dtype=np.int64),
        held=None if held is None else tuple(held),
    )


def digest64(text: str) -> int:
    """Return 64 bits of a digest, the same in every process.

    Among ten million texts, two different ones share it with a probability of 3 in a million.
    """
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _repeated_ids(scan: Scan, digests_N: NDArray[np.uint64]) -> tuple[str, ...]:
    """Return a note if ids repeat. Two ids that share their digests only cost the rows their own names."""
    ordered = np.sort(digests_N)
    if not (ordered[1:] == ordered[:-1]).any():
        return ()
    _, first, times = np.unique(digests_N, return_index=True, return_counts=True)
    most = int(times.max())
    place = int(first[times == most].min())
    return (repeated_ids_note(next(islice(scan(skip=_ignore), place, None)).id, most),)


def _ignore(problem: str) -> None:
    """Leave out a bad row that the first pass has counted."""
