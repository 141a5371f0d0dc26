"""loss: rows whose completions the model finds hardest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from p2d_cli.data.pool import Chunk
from p2d_cli.engine.passes import Arrays, Pass, scatter
from p2d_cli.engine.reader import Completion
from p2d_cli.engine.readings import completion_pass
from p2d_cli.methods.row_method import RowMethod


class Loss(RowMethod):
    """Mean loss of the completion, in nats a token."""

    name = "loss"

    def passes(self) -> Iterator[Pass]:
        """Read every row once."""
        for chunk in self.task.chunks():
            yield loss_pass(chunk, "read rows", self.task.reader.completions(chunk.records), self.scores_M)


def loss_pass(chunk: Chunk, work: str, completions: Sequence[Completion], loss_M: NDArray[np.float64]) -> Pass:
    """Return a pass that puts the mean loss of each completion of a chunk, in nats a token, into `loss_M`."""

    def weigh(_: list[int], sums_B: NDArray[np.float64], counts_B: NDArray[np.int64]) -> Arrays:
        return {"loss": -sums_B / np.maximum(counts_B, 1)}

    take = scatter(loss_M, "loss", chunk.start)
    return completion_pass(completions, weigh, work=work, part=chunk.part, take=take, name=chunk.name_of, kept_bytes=8)
