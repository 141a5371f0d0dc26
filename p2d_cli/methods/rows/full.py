"""full: every row of the pool."""

from __future__ import annotations

import numpy as np

from p2d_cli.config import MineDataConfig
from p2d_cli.methods.row_method import RowMethod, RowScores


class Full(RowMethod):
    """Keep every row, in the pool's order."""

    name = "full"
    reads_model = False
    ranks = False
    has_size = False
    is_control = True

    @classmethod
    def count(cls, config: MineDataConfig, num_rows: int) -> int:
        """Return the number of all rows."""
        del config
        return num_rows

    def score(self) -> RowScores:
        """Return 0 for each row."""
        return RowScores.measured(np.zeros(self.task.pool.size), times=0)
