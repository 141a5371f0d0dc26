"""ifd: rows whose prompts help the model least to write their completions (arXiv:2308.12032)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from p2d_cli.engine.passes import Pass
from p2d_cli.methods.row_method import PoolTask, RowMethod, RowScores
from p2d_cli.methods.rows.loss import loss_pass


class Ifd(RowMethod):
    """Instruction-following difficulty: the completion's perplexity with its prompt over that without.

    Rows at 1 or above, whose prompt does not help at all, come last, as the authors leave them out.
    """

    name = "ifd"

    def __init__(self, task: PoolTask) -> None:
        super().__init__(task)
        self._given_M = np.empty(task.pool.size)
        self._alone_M = np.empty(task.pool.size)

    def passes(self) -> Iterator[Pass]:
        """Read every row, and then its completion behind a single token."""
        reader = self.task.reader
        for chunk in self.task.chunks():
            given = reader.completions(chunk.records)
            yield loss_pass(chunk, "read rows", given, self._given_M)
            first = reader.tokenizer.bos_token_id
            first = reader.tokenizer.eos_token_id if first is None else first
            alone = [((first, *ids[start:]), 1) for ids, start in given]
            yield loss_pass(chunk, "read completions", alone, self._alone_M)

    def score(self) -> RowScores:
        """Return the ratios, negative from 1 on."""
        ratio_M = np.exp(self._given_M - self._alone_M)
        return RowScores.measured(np.where(ratio_M < 1, ratio_M, -ratio_M))
