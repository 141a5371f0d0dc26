"""coverage: rows that together are like all the others in their words; for no target."""

from __future__ import annotations

from p2d_cli.methods.row_method import RowMethod, RowScores
from p2d_cli.methods.words import cover_by_words


class Coverage(RowMethod):
    """Order rows so that the first are like all others in their TF-IDF vectors (see `p2d_cli.core.coverage`).

    Rows are covered by rows of their chunk, of which each gives its share of those that are to be kept.
    """

    name = "coverage"
    reads_model = False
    ranks = False

    def score(self) -> RowScores:
        """Return the place of each row in that order, from 1 for the first down to 0."""
        count = self.count(self.task.config, self.task.pool.num_rows)
        return RowScores.measured(cover_by_words(self.task, count))
