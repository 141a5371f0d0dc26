"""rds: rows that target rows take in turns, by the position-weighted mean of last hidden states (RDS+).

As published by Ivison et al. (Large-Scale Data Selection for Instruction Tuning, arXiv:2503.01807): token `i` of a row
counts `i` times, the cosine tells how like a target row each row is, and one after the other the target rows take the
row most like them that is left.

Legend: M rows to choose from, Q target rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from p2d_cli.config import MineDataConfig
from p2d_cli.core.subset_selection import round_robin, unit
from p2d_cli.engine.passes import Pass
from p2d_cli.engine.readings import LATE_MEAN
from p2d_cli.methods.hidden_states import HiddenStateMethod
from p2d_cli.methods.row_method import PoolTask, RowScores


class Rds(HiddenStateMethod):
    """Score rows by their place in the order in which the target rows take them: 1 the first, `1 / M` the last.

    What is held of the pool, and kept in the journal, are 4 Q bytes a row.
    """

    name = "rds"
    mean = LATE_MEAN

    def __init__(self, task: PoolTask) -> None:
        super().__init__(task)
        self._likeness_MQ = np.empty((task.pool.size, len(task.target)), dtype=np.float32)

    @classmethod
    def check_settings(cls, config: MineDataConfig) -> None:
        """Refuse to go without target rows."""
        if config.scores is None and config.target is None:
            raise ValueError("--method rds needs --target: rows that take those of the pool in turns")

    def passes(self) -> Iterator[Pass]:
        """Read the target rows, and then every row, up to the last hidden state."""
        yield from self.target_passes()
        yield from self.pool_passes(
            lambda states_BD: (unit(states_BD) @ self.target_QD.T).astype(np.float32), self._likeness_MQ
        )

    def score(self) -> RowScores:
        """Return the places in the order, as scores."""
        with self.task.job.timer.phase("score"):
            order_M = round_robin(self._likeness_MQ)
            self.scores_M[order_M] = 1 - np.arange(len(order_M)) / len(order_M)
        return RowScores.measured(self.scores_M, self.notes)
