"""coverage: rows that together are like all the others in their words; for no target."""

from __future__ import annotations

import math

import numpy as np

from p2d_cli.core.coverage import order_by_coverage
from p2d_cli.core.subset_selection import resolve_count
from p2d_cli.methods.row_method import RowMethod, RowScores
from p2d_cli.methods.words import count_all, count_words


class Coverage(RowMethod):
    """Order rows so that the first are like all others in their TF-IDF vectors (see `p2d_cli.core.coverage`).

    Rows are covered by rows of their chunk, of which each gives its share of those that are to be kept.
    """

    name = "coverage"
    reads_model = False
    ranks = False

    def score(self) -> RowScores:
        """Return the place of each row in that order, from 1 for the first down to 0."""
        job, pool = self.task.job, self.task.pool
        frequencies = count_all(self.task, "score")
        share = resolve_count(pool.num_rows, job.config.ratio, job.config.count) / pool.size
        with job.timer.phase("score"), job.progress.task("cover rows", pool.size) as advance:
            for chunk in pool.chunks():
                _, rows_BV = frequencies.weigh(*count_words(chunk.records))
                size = len(chunk.records)
                kept = min(math.ceil(share * size) + 1, size)  # one more: chunks differ by 1
                self.scores_M[chunk.start + order_by_coverage(rows_BV, kept)] = 1 - np.arange(size) / size
                advance(size)
        return super().score()
