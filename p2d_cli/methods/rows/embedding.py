"""embedding: rows whose mean last hidden states are most like the target's.

Legend: M rows to choose from, B rows of a batch or chunk, D hidden size.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from p2d_cli.core.subset_selection import unit
from p2d_cli.data.pool import CHUNK_ROWS
from p2d_cli.engine.cost import FLOAT32
from p2d_cli.engine.passes import Pass
from p2d_cli.engine.readings import MEAN
from p2d_cli.methods.hidden_states import HiddenStateMethod
from p2d_cli.methods.row_method import RowScores


class Embedding(HiddenStateMethod):
    """Cosine of a row's mean last hidden state to the mean of the target rows' (of the pool's without a target).

    The mean of a pool is known only once all rows have been read, so that their states wait in a file: 4 D bytes a row,
    and about 5 D in the journal.
    """

    name = "embedding"
    mean = MEAN

    def passes(self) -> Iterator[Pass]:
        """Read every row, up to the last hidden state."""
        if self.task.target:
            yield from self.target_passes()
            yield from self.pool_passes(
                lambda states_BD: unit(states_BD) @ unit(self.target_QD.mean(axis=0)), self.scores_M
            )
            return
        states_MD = self._room()
        yield from self.pool_passes(lambda states_BD: states_BD, states_MD)
        if self.task.job.options.dry_run:
            return
        with self.task.job.timer.phase("score"):
            blocks = [slice(start, start + CHUNK_ROWS) for start in range(0, len(states_MD), CHUNK_ROWS)]
            centre_D = unit(np.sum([unit(states_MD[block]).sum(axis=0) for block in blocks], axis=0))
            for block in blocks:
                self.scores_M[block] = unit(states_MD[block]) @ centre_D

    def _room(self) -> NDArray[np.float32]:
        """Return room for the states of the pool: a file without a name, which its mapping keeps."""
        shape = (self.task.pool.size, self.task.reader.hidden_size)
        if self.task.job.options.dry_run:
            return np.broadcast_to(np.float32(0), shape)
        # It is of this process alone, and its room is taken now: a mapped file cannot say later that the disk is full.
        with tempfile.TemporaryFile(dir=self.task.job.scratch("states")) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, shape[0] * shape[1] * FLOAT32)
            return np.memmap(file, dtype=np.float32, mode="w+", shape=shape)

    def score(self) -> RowScores:
        """Return the cosines."""
        return RowScores.measured(self.scores_M, self.notes)
