"""Rows of a pool whose readings lie in an index: only those that it lacks are read, and are added to it.

Legend: M rows to choose from, n rows that are read, K heads, P places, d head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2d_cli.artifacts.pool_index import PoolIndex
from p2d_cli.artifacts.readings import PLACES, Digests
from p2d_cli.core.readout import Readout
from p2d_cli.engine.counting import CountingReader
from p2d_cli.engine.passes import Pass, scatter
from p2d_cli.engine.reader import ModelReader
from p2d_cli.engine.readings import context_of, describe_context, digests_of, head_outputs_pass
from p2d_cli.methods.known_rows import KnownRows
from p2d_cli.methods.row_method import PoolTask
from p2d_cli.runtime import distributed


class IndexedRows:
    """Keeps the index of a pool complete, and reads it.

    Args:
        task: the pool; its settings name the index.
        heads_LH: the heads that read all rows, bool [L, H].
        known: rows that have been read already.
    """

    def __init__(self, task: PoolTask, heads_LH: NDArray[np.bool_], known: KnownRows) -> None:
        self._task = task
        self._heads_LH = heads_LH
        self._known = known
        self._digests_M2: Digests = np.empty((task.pool.size, 2), dtype=np.uint64)
        self.is_cut_M = np.zeros(task.pool.size, dtype=np.bool_)
        """Which rows are too long, as the index tells."""
        self.notes: dict[str, Any] = {}
        """Figures for the summary."""

    @cached_property
    def _index(self) -> PoolIndex:
        task = self._task
        assert task.config.index is not None, "there is an index"
        return PoolIndex(
            Path(task.config.index).expanduser(),
            context=context_of(task.reader),
            heads=[(layer, head) for layer, head in np.argwhere(self._heads_LH).tolist()],
            head_dim=int(task.reader.shape.dims(self._heads_LH).max()),
            source=describe_context(task.reader),
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
        if (
            isinstance(reader, CountingReader) and not reader.is_exact
        ):  # a few rows stand for many, and are equal to them
            return lacking_M
        is_first_M = np.zeros(len(lacking_M), dtype=np.bool_)
        is_first_M[np.unique(self._digests_M2, axis=0, return_index=True)[1]] = True
        return lacking_M & is_first_M

    def _read(self, lacking_M: NDArray[np.bool_]) -> Iterator[Pass]:
        job, reader, known = self._task.job, self._task.reader, self._known
        dims_K = reader.shape.dims(self._heads_LH)
        for chunk in self._task.chunks():
            rows = np.flatnonzero(lacking_M[chunk.places])
            outputs_nKPd = np.empty((len(rows), len(dims_K), PLACES, dims_K.max()), dtype=np.float16)
            is_cut_n = known.is_cut_M[chunk.start + rows]
            before = job.timer.seconds.get("score", 0.0), getattr(reader, "tokens", 0)
            is_known_n = known.is_known_M[chunk.start + rows]
            unread = np.flatnonzero(~is_known_n)
            if unread.size:
                records = [chunk.records[row] for row in rows[unread]]
                examples = reader.examples(records)
                is_cut_n[unread] = [example.truncated > 0 for example in examples]
                yield head_outputs_pass(
                    reader,
                    examples,
                    self._heads_LH,
                    work="read rows",
                    part=chunk.part,
                    take=scatter(outputs_nKPd, "outputs", unread),
                    name=lambda row, records=records: records[row].where,
                )
            if rows.size and isinstance(reader, ModelReader):  # and not one that only counts
                places = np.searchsorted(known.sample, chunk.start + rows[is_known_n])
                outputs_nKPd[is_known_n] = known.background(self._heads_LH)[places]
                self._add(self._digests_M2[chunk.start + rows], outputs_nKPd, is_cut_n, *before)

    def _add(
        self,
        digests_n2: Digests,
        outputs_nKPd: NDArray[np.float16],
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
                lambda: self._index.add(digests_n2, outputs_nKPd, is_cut_n, seconds=spent, tokens=read, by=job.key)
            )
            self._index.reload()

    def _charge(self) -> None:
        """Charge this target with its share of what was spent on the index before."""
        job = self._task.job
        seconds, tokens, targets = distributed.from_main(lambda: self._index.charge(job.key))
        if seconds:
            job.timer.charge("index", seconds)
        self.notes |= {"seconds_shared": seconds, "tokens_shared": tokens, "targets": targets}

    def affinity(self, readout: Callable[[], Readout]) -> NDArray[np.float64]:
        """Return the affinity of each row, nan where the index lacks it, as in a dry run."""
        found_M = np.full(len(self._digests_M2), np.nan)
        places_M = self._index.find(self._digests_M2)
        if (places_M < 0).any():
            return found_M
        self.is_cut_M = self._index.is_cut_N[places_M]
        with self._task.job.timer.phase("score"):
            for block, outputs_nKPd in self._index.blocks():
                here = np.flatnonzero((places_M >= block.start) & (places_M < block.stop))
                found_M[here] = readout().affinity(outputs_nKPd)[places_M[here] - block.start]
        return found_M


def _enter(held: ExitStack, index: PoolIndex) -> None:
    held.enter_context(index.adding())
