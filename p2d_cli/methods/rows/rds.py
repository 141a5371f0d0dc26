"""rds: rows that target rows take in turns, by the position-weighted mean of last hidden states (RDS+).

As published by Ivison et al. (Large-Scale Data Selection for Instruction Tuning, arXiv:2503.01807): token `i` of a row
counts `i` times, the cosine tells how like a target row each row is, and one after the other the target rows take the
row most like them that is left.

Legend: M rows to choose from, Q target rows, B rows of a batch, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2d_cli.config import MineDataConfig
from p2d_cli.core.subset_selection import round_robin
from p2d_cli.data.records import Record
from p2d_cli.engine.cost import FLOAT32
from p2d_cli.engine.passes import Arrays, Pass, scatter
from p2d_cli.engine.reader import ModelReader
from p2d_cli.methods.row_method import PoolTask, RowMethod, RowScores


class Rds(RowMethod):
    """Score rows by their place in the order in which the target rows take them: 1 the first, `1 / M` the last.

    What is held of the pool, and kept in the journal, are 4 Q bytes a row.
    """

    name = "rds"
    takes_target = True
    takes_shortlist = True

    def __init__(self, task: PoolTask) -> None:
        super().__init__(task)
        self._states: dict[int, NDArray[np.float32]] = {}
        """Of the target rows."""
        self._likeness_MQ = np.empty((task.pool.size, len(task.target)), dtype=np.float32)

    @classmethod
    def check_settings(cls, config: MineDataConfig) -> None:
        """Refuse to go without target rows."""
        if config.scores is None and config.target is None:
            raise ValueError("--method rds needs --target: rows that take those of the pool in turns")

    def passes(self) -> Iterator[Pass]:
        """Read the target rows, and then every row, up to the last hidden state."""
        target = self.task.target
        yield self._pass(
            target,
            work="embed target",
            take=lambda batch, arrays: self._states.update(zip(batch, arrays["states"], strict=True)),
            kept_bytes=FLOAT32 * self.task.reader.hidden_size,
        )
        for chunk in self.task.chunks():
            yield self._pass(
                chunk.records,
                work="embed rows",
                part=chunk.part,
                keep=lambda arrays: {"likeness": _unit(arrays["states"]) @ self._target_QD.T},
                take=scatter(self._likeness_MQ, "likeness", chunk.start),
                kept_bytes=FLOAT32 * len(target),
            )

    def _pass(self, records: Sequence[Record], **options: Any) -> Pass:
        ids = [example.input_ids for example in self.task.reader.examples(records)]

        def read(reader: ModelReader, batch: list[int]) -> Arrays:
            from p2d_cli.modeling.generation import mean_hidden_states

            padding = reader.tokenizer.pad_token_id
            return {"states": mean_hidden_states(reader.model, [ids[row] for row in batch], padding, late=True).numpy()}

        return Pass(lengths=[len(row) for row in ids], read=read, name=lambda row: records[row].where, **options)

    @cached_property
    def _target_QD(self) -> NDArray[np.float32]:
        return _unit(np.stack([self._states[row] for row in range(len(self._states))]))

    def score(self) -> RowScores:
        """Return the places in the order, as scores."""
        with self.task.job.timer.phase("score"):
            order_M = round_robin(self._likeness_MQ)
            self.scores_M[order_M] = 1 - np.arange(len(order_M)) / len(order_M)
        return super().score()


def _unit(states_BD: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the vectors at length 1."""
    unit: NDArray[np.float32] = states_BD / np.linalg.norm(states_BD, axis=1, keepdims=True)
    return unit
