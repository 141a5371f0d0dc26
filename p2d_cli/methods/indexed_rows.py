"""Rows of a pool whose readings lie in an index: only those that it lacks are read, and are added to it.

Legend: M rows to choose from, n rows that are read, K heads, P places, d head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2d_cli.artifacts.digests import digest_json
from p2d_cli.artifacts.pool_index import FLOAT16, STATES_FOLDER, PoolIndex, read_index
from p2d_cli.artifacts.readings import PLACES, Digests
from p2d_cli.core.subset_selection import unit
from p2d_cli.data.prompts import EncodedExample
from p2d_cli.engine.counting import CountingReader
from p2d_cli.engine.passes import Pass, scatter
from p2d_cli.engine.reader import ModelReader
from p2d_cli.engine.readings import describe_context, digests_of, head_outputs_pass, hidden_states_pass
from p2d_cli.errors import ArtifactError
from p2d_cli.methods.known_rows import KnownRows
from p2d_cli.methods.row_method import PoolTask
from p2d_cli.runtime import distributed


@dataclass(frozen=True)
class Kept:
    """What an index keeps of each row: some readings, `[K, P, d]`."""

    folder: Path
    heads: list[tuple[int, int]]
    """Layer and head of each of the K heads."""
    size: int
    """d."""
    source: dict[str, Any]
    """What decides a reading beside the row."""
    read: Callable[..., Pass]
    """Returns the pass that reads some examples, as `outputs`; its options are those of `Pass`."""
    known: KnownRows | None = None
    """Rows that have been read already."""
    known_readings: Callable[[], NDArray[np.float32]] | None = None
    """Returns their readings."""


def kept_outputs(task: PoolTask, heads_LH: NDArray[np.bool_], known: KnownRows) -> Kept:
    """Return what an index keeps of rows that some heads read, bool `[L, H]`."""
    assert task.config.index is not None, "there is an index"
    return Kept(
        folder=Path(task.config.index).expanduser(),
        heads=[(layer, head) for layer, head in np.argwhere(heads_LH).tolist()],
        size=int(task.reader.shape.dims(heads_LH).max()),
        source=describe_context(task.reader),
        read=lambda examples, **options: head_outputs_pass(task.reader, examples, heads_LH, **options),
        known=known,
        known_readings=lambda: known.background(heads_LH),
    )


def kept_states(task: PoolTask) -> Kept:
    """Return what an index keeps of the last hidden states of rows, as if these were what a single head puts out.

    Raises:
        CannotCreateError: the folder that it is to lie in holds something else than an index.
    """
    assert task.config.index is not None, "there is an index"
    folder = Path(task.config.index).expanduser()
    read_index(folder)
    return Kept(
        folder=folder / STATES_FOLDER,
        heads=[(0, 0)],
        size=task.reader.hidden_size,
        source=describe_context(task.reader) | {"keeps": "hidden states"},
        read=lambda examples, **options: hidden_states_pass(
            task.reader,
            examples,
            # Their length is of no use, and may be beyond float16.
            keep=lambda arrays: {"outputs": unit(arrays["states"])[:, None].astype(np.float16)},
            kept_bytes=PLACES * FLOAT16 * task.reader.hidden_size,
            **options,
        ),
    )


class IndexedRows:
    """Keeps the index of a pool complete, and reads it.

    Args:
        task: the pool.
        kept: what the index keeps of a row, and where.
    """

    def __init__(self, task: PoolTask, kept: Kept) -> None:
        self._task = task
        self._kept = kept
        self._digests_M2: Digests = np.empty((task.pool.size, 2), dtype=np.uint64)
        self.is_cut_M = np.zeros(task.pool.size, dtype=np.bool_)
        """Which rows are too long, as the index tells."""
        self.notes: dict[str, Any] = {}
        """Figures for the summary."""

    @cached_property
    def _index(self) -> PoolIndex:
        kept = self._kept
        return PoolIndex(
            kept.folder,
            context=digest_json(kept.source),
            heads=kept.heads,
            head_dim=kept.size,
            source=kept.source,
        )

    @property
    def disk_bytes(self) -> int:
        """What the rows that it lacks will take."""
        return int(self._lacking_M().sum()) * self._index.row_bytes

    def passes(self) -> Iterator[Pass]:
        """Read the rows that the index lacks, and add each chunk of them."""
        job, index = self._task.job, self._index
        for chunk in self._task.chunks():
            self._digests_M2[chunk.places] = digests_of(chunk.records)
        lacking_M = self._lacking_M()
        found = int((index.find(self._digests_M2) >= 0).sum())
        self.notes = {"rows_found": found, "rows_added": int(lacking_M.sum())}
        if job.options.dry_run:
            yield from self._read(lacking_M)
            return
        self._charge()
        if not lacking_M.any():
            return
        with ExitStack() as held:
            distributed.from_main(lambda: _enter(held, index))
            index.reload()
            lacking_M &= self._lacking_M()
            size = lacking_M.sum() * index.row_bytes / 1e6
            job.progress.note(
                f"the index grows by {lacking_M.sum():,} rows of {index.row_bytes:,} bytes: {size:,.1f} MB"
            )
            yield from self._read(lacking_M)

    def _lacking_M(self) -> NDArray[np.bool_]:
        """Return which rows the index lacks, of equal ones the first."""
        lacking_M = self._index.find(self._digests_M2) < 0
        reader = self._task.reader
        if isinstance(reader, CountingReader) and not reader.is_exact:
            return lacking_M  # a few rows stand for many, and are equal to them
        is_first_M = np.zeros(len(lacking_M), dtype=np.bool_)
        is_first_M[np.unique(self._digests_M2, axis=0, return_index=True)[1]] = True
        return lacking_M & is_first_M

    def _read(self, lacking_M: NDArray[np.bool_]) -> Iterator[Pass]:
        job, reader, kept = self._task.job, self._task.reader, self._kept
        for chunk in self._task.chunks():
            rows = np.flatnonzero(lacking_M[chunk.places])
            readings_nKPd = np.empty((len(rows), len(kept.heads), PLACES, kept.size), dtype=np.float16)
            is_cut_n = np.zeros(len(rows), dtype=np.bool_)
            is_known_n = np.zeros(len(rows), dtype=np.bool_)
            if kept.known is not None:
                is_cut_n = kept.known.is_cut_M[chunk.start + rows]
                is_known_n = kept.known.is_known_M[chunk.start + rows]
            before = job.timer.seconds.get("score", 0.0), getattr(reader, "tokens", 0)
            unread = np.flatnonzero(~is_known_n)
            if unread.size:
                records = [chunk.records[row] for row in rows[unread]]
                examples: Sequence[EncodedExample] = reader.examples(records)
                is_cut_n[unread] = [example.truncated > 0 for example in examples]
                yield kept.read(
                    examples,
                    work="read rows",
                    part=chunk.part,
                    take=scatter(readings_nKPd, "outputs", unread),
                    name=lambda row, records=records: records[row].where,
                )
            if rows.size and isinstance(reader, ModelReader):  # and not one that only counts
                if kept.known is not None and kept.known_readings is not None:
                    places = np.searchsorted(kept.known.sample, chunk.start + rows[is_known_n])
                    readings_nKPd[is_known_n] = kept.known_readings()[places]
                self._add(self._digests_M2[chunk.start + rows], readings_nKPd, is_cut_n, *before)

    def _add(
        self,
        digests_n2: Digests,
        readings_nKPd: NDArray[np.float16],
        is_cut_n: NDArray[np.bool_],
        seconds: float,
        tokens: int,
    ) -> None:
        """Add rows to the index; `seconds` and `tokens` are those spent before they were read."""
        job, reader = self._task.job, self._task.reader
        assert isinstance(reader, ModelReader), "rows were read"
        spent, read = job.timer.seconds.get("score", 0.0) - seconds, reader.tokens - tokens
        with job.timer.phase("save"):
            distributed.from_main(
                lambda: self._index.add(digests_n2, readings_nKPd, is_cut_n, seconds=spent, tokens=read, by=job.key)
            )
            self._index.reload()

    def _charge(self) -> None:
        """Charge this target with its share of what was spent on the index before."""
        job = self._task.job
        seconds, tokens, targets = distributed.from_main(lambda: self._index.charge(job.key))
        if seconds:
            job.timer.charge("index", seconds)
        self.notes |= {"seconds_shared": seconds, "tokens_shared": tokens, "targets": targets}

    def score(self, of: Callable[[NDArray[np.float16]], NDArray[Any]], into_M: NDArray[Any]) -> None:
        """Put what `of` makes of each row's readings, `[n, K, P, d]`, into an array of all rows; not in a dry run.

        Raises:
            ArtifactError: the index has lost rows meanwhile.
        """
        if self._task.job.options.dry_run:
            return
        places_M = self._index.find(self._digests_M2)
        if (places_M < 0).any():
            raise ArtifactError(
                f"--index {self._kept.folder} lacks rows that it had: something else writes there", hint="run it again"
            )
        self.is_cut_M = self._index.is_cut_N[places_M]
        with self._task.job.timer.phase("score"):
            for block, readings_nKPd in self._index.blocks():
                here = np.flatnonzero((places_M >= block.start) & (places_M < block.stop))
                into_M[here] = of(readings_nKPd)[places_M[here] - block.start]


def _enter(held: ExitStack, index: PoolIndex) -> None:
    held.enter_context(index.adding())


def describe_index(found: dict[str, Any]) -> str:
    """Say what an index has saved, and what share of its making this run is charged with."""
    line = f"index: {found['rows_found']:,} rows were there, {found['rows_added']:,} were added"
    if found["seconds_shared"]:
        line += f"; charged with {found['seconds_shared']:.1f} s, its share among {found['targets']} targets"
    return line
