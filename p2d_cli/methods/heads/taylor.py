"""taylor: heads whose removal would change the loss most, to first order (Michel et al. 2019)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2d_cli.engine.passes import Arrays, Pass
from p2d_cli.engine.reader import ModelReader
from p2d_cli.methods.head_method import HeadMethod, HeadTask, RepeatScores


class Taylor(HeadMethod):
    """First-order effect on the loss of removing each head, averaged over target rows."""

    name = "taylor"

    def __init__(self, task: HeadTask) -> None:
        super().__init__(task)
        self._rows = task.sample()
        self._total_K: NDArray[np.float64] | Any = 0.0

    def passes(self) -> Iterator[Pass]:
        """Read each row forward and backward."""
        rows = self._rows
        examples = self.task.reader.examples(rows)

        def read(reader: ModelReader, batch: list[int]) -> Arrays:
            from p2d_cli.modeling.importance import taylor_scores

            labelled = reader.labelled([examples[row] for row in batch])
            [effect_BK] = taylor_scores(reader.model, reader.layout, [labelled])
            return {"effect": effect_BK.numpy()}

        def take(batch: list[int], arrays: Arrays) -> None:
            del batch
            self._total_K = self._total_K + arrays["effect"].sum(axis=0)

        yield Pass(
            work="read rows",
            part=self.task.part,
            lengths=[len(example.input_ids) for example in examples],
            logits=[len(example.input_ids) - example.answer_start for example in examples],
            kind="learn",
            read=read,
            take=take,
            name=lambda row: rows[row].where,
        )

    def score(self) -> RepeatScores:
        """Return the mean effect over rows."""
        return RepeatScores(self.task.reader.shape.table(self._total_K / len(self._rows)), {"rows": len(self._rows)})
