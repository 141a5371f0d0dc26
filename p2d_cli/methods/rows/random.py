"""random: rows by chance."""

from __future__ import annotations

from p2d_cli.methods.row_method import RowMethod, RowScores
from p2d_cli.runtime.seeding import generator


class Random(RowMethod):
    """Draw scores by chance."""

    name = "random"
    reads_model = False
    ranks = False
    is_control = True

    def score(self) -> RowScores:
        """Return a random number for each row."""
        draw = generator(self.task.config.seed, "mine-data", "random")
        return RowScores.measured(draw.random(self.task.pool.size), times=0)
