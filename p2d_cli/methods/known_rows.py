"""The rows that a readout is fitted on: the target's, and a sample of the pool.

What scoring the heads has read of them is taken from the heads artifact, as far as it was read with the same model and
shown in the same way; only the others are read.

Legend: n all of these rows, Q of them the target's, M rows to choose from, K heads, P places, d head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from p2d_cli.artifacts.readings import Readings, find_rows
from p2d_cli.engine.passes import Pass
from p2d_cli.engine.readings import context_of, digests_of, head_outputs_pass
from p2d_cli.methods.row_method import PoolTask
from p2d_cli.runtime.seeding import generator


class KnownRows:
    """Reads the rows that nobody has read, and keeps what the heads put out on all of them.

    Args:
        task: the pool and its target.
        heads_LH: all heads that read, bool [L, H].
        size: rows of the sample.
    """

    def __init__(self, task: PoolTask, heads_LH: NDArray[np.bool_], size: int) -> None:
        self._task = task
        self._size = size
        self._heads_LH = heads_LH
        self.sample = np.empty(0, dtype=np.int64)
        """Positions of the rows of the sample among those to choose from, ascending."""
        self.is_known_M = np.zeros(task.pool.size, dtype=np.bool_)
        """Which rows to choose from are in the sample."""
        self.is_cut_M = np.zeros(task.pool.size, dtype=np.bool_)
        """Which rows of the sample are too long."""
        self.found = 0
        """Rows that were not read again."""
        self._outputs: dict[int, NDArray[np.float32]] = {}

    @property
    def is_read(self) -> bool:
        """Whether all of them were read; in a dry run they are not."""
        return len(self._outputs) == len(self._task.target) + len(self.sample)

    def passes(self) -> Iterator[Pass]:
        """Read what the heads artifact does not keep."""
        task, reader = self._task, self._task.reader
        with task.job.timer.phase("prepare"):
            kept = self._kept()
            self._draw(kept)
            records = [*task.target, *task.pool.take(task.pool.places(self.sample))]
            at_n = np.full(len(records), -1) if kept is None else kept.find(digests_of(records))
        self._outputs = {row: kept.outputs_nKPd[at] for row, at in enumerate(at_n) if kept is not None and at >= 0}
        self.found = len(self._outputs)
        is_known_n = at_n >= 0
        if task.readings_planned:  # what is to score the heads will keep them
            is_known_n[: len(task.target) + task.readings_planned] = True
        rows = np.flatnonzero(~is_known_n).tolist()
        examples = reader.examples(records)
        self.is_cut_M[self.sample] = [example.truncated > 0 for example in examples[len(task.target) :]]
        if not rows:
            return
        yield head_outputs_pass(
            reader,
            [examples[row] for row in rows],
            self._heads_LH,
            work="read target and background",
            take=lambda batch, arrays: self._outputs.update(
                zip((rows[row] for row in batch), arrays["outputs"], strict=True)
            ),
            name=lambda row: records[rows[row]].where,
        )

    def _kept(self) -> Readings | None:
        """Return the readings that the heads artifact keeps, if they are of use here."""
        kept = self._task.readings
        if kept is None or (self._heads_LH & ~kept.heads_LH).any():
            return None
        return kept.of(self._heads_LH) if kept.context == context_of(self._task.reader) else None

    def _draw(self, kept: Readings | None) -> None:
        """Choose the sample at random: rows that were, for the same pool, and have been read; and others."""
        task = self._task
        order = generator(task.config.seed, "mine-data", "background").permutation(task.pool.size)
        if kept is not None and kept.pool == task.job.inputs.entries["pool"].digest:
            was_read_M = np.zeros(task.pool.size, dtype=np.bool_)
            for chunk in task.pool.chunks():
                was_read_M[chunk.places] = find_rows(kept.sample_n2, digests_of(chunk.records)) >= 0
            order = order[np.argsort(~was_read_M[order], kind="stable")]
        self.sample = np.sort(order[: self._size])
        self.is_known_M[self.sample] = True

    # --- what the heads put out

    def dims(self, heads_LH: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Return the size of each of these heads."""
        return self._task.reader.shape.dims(heads_LH)

    def target(self, heads_LH: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Return what these of the heads put out on the target's rows, `[Q, K, P, d]`."""
        return self._of(heads_LH, range(len(self._task.target)))

    def background(self, heads_LH: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Return the same of the sample."""
        first = len(self._task.target)
        return self._of(heads_LH, range(first, first + len(self.sample)))

    def _of(self, heads_LH: NDArray[np.bool_], rows: range) -> NDArray[np.float32]:
        outputs = np.stack([self._outputs[row] for row in rows])
        # Smaller heads are filled up with zeros to the largest of those that were read together.
        return outputs[:, heads_LH[self._heads_LH], :, : self.dims(heads_LH).max()]
