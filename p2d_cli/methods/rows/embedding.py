"""embedding: rows whose mean last hidden states are most like the target's.

Legend: M rows to choose from, B rows of a batch or chunk, D hidden size.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2d_cli.data.pool import CHUNK_ROWS, Chunk
from p2d_cli.data.records import Record
from p2d_cli.engine.cost import FLOAT32
from p2d_cli.engine.passes import Arrays, Pass, scatter
from p2d_cli.engine.reader import ModelReader
from p2d_cli.methods.row_method import PoolTask, RowMethod, RowScores


class Embedding(RowMethod):
    """Cosine of a row's mean last hidden state to the mean of the target rows' (of the pool's without a target).

    The target rows are read with the first chunk. The mean of a pool is known only once all rows have been read, so
    that their states wait in a file: 4 D bytes a row, and about 5 D in the journal.
    """

    name = "embedding"
    takes_target = True
    takes_shortlist = True

    def __init__(self, task: PoolTask) -> None:
        super().__init__(task)
        self._states: NDArray[np.float32] | None = None
        """Of the first chunk with the target rows behind it, or of the whole pool."""
        self._chunks: list[slice] = []

    def passes(self) -> Iterator[Pass]:
        """Read every row, up to the last hidden state."""
        pool, target = self.task.pool, self.task.target
        for chunk in self.task.chunks():
            self._chunks.append(chunk.places)
            if not target:
                yield self._pass(chunk, rows=pool.size)
            elif len(self._chunks) == 1:
                yield self._pass(chunk, rows=len(chunk.records) + len(target), beside=target)
            else:
                yield self._pass(chunk)

    def _pass(self, chunk: Chunk, *, rows: int | None = None, beside: Sequence[Record] = ()) -> Pass:
        """Return a pass over a chunk that keeps states, of `rows` rows in all, or without that cosines."""
        records = [*chunk.records, *beside]
        ids = [example.input_ids for example in self.task.reader.examples(records)]

        def read(reader: ModelReader, batch: list[int]) -> Arrays:
            from p2d_cli.modeling.generation import mean_hidden_states

            states = mean_hidden_states(reader.model, [ids[row] for row in batch], reader.tokenizer.pad_token_id)
            return {"kept": states.numpy()}

        def keep_states(batch: list[int], arrays: Arrays) -> None:
            if self._states is None:
                self._states = self._room(rows or 0, arrays["kept"].shape[1])
            self._states[[chunk.start + row for row in batch]] = arrays["kept"]

        return Pass(
            work="embed rows",
            part=chunk.part,
            lengths=[len(row) for row in ids],
            read=read,
            keep=None if rows is not None else lambda arrays: {"kept": _cosine(self._centre_D, arrays["kept"])},
            take=keep_states if rows is not None else scatter(self.scores_M, "kept", chunk.start),
            name=lambda row: records[row].where,
            kept_bytes=8 if rows is None else FLOAT32 * self.task.reader.hidden_size,
        )

    def _room(self, rows: int, width: int) -> NDArray[np.float32]:
        if self.task.target:
            return np.empty((rows, width), dtype=np.float32)
        # A file without a name, of this process alone, which its mapping keeps; its room is taken now, since a mapped
        # file cannot say later that the disk is full.
        with tempfile.TemporaryFile(dir=self.task.job.scratch("states")) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, rows * width * FLOAT32)
            return np.memmap(file, dtype=np.float32, mode="w+", shape=(rows, width))

    @cached_property
    def _first_unit_BD(self) -> NDArray[np.float64]:
        """The states of the first chunk and of the target rows behind it, at length 1."""
        assert self._states is not None, "a chunk has rows"
        return _unit(self._states)

    @cached_property
    def _centre_D(self) -> NDArray[np.float64]:
        if self.task.target:
            return _unit(self._first_unit_BD[self._chunks[0].stop :].mean(axis=0))
        assert self._states is not None, "a chunk has rows"
        sum_D = np.zeros(self._states.shape[1])
        for places in self._chunks:
            sum_D += _unit(self._states[places]).sum(axis=0)
        return _unit(sum_D / self.task.pool.size)

    def score(self) -> RowScores:
        """Return the cosines."""
        with self.task.job.timer.phase("score"):
            if self.task.target:
                first = self._chunks[0]
                self.scores_M[first] = self._first_unit_BD[: first.stop] @ self._centre_D
            else:
                assert self._states is not None, "a chunk has rows"
                for start in range(0, len(self._states), CHUNK_ROWS):
                    block = slice(start, start + CHUNK_ROWS)
                    self.scores_M[block] = _cosine(self._centre_D, self._states[block])
        return super().score()


def _cosine(centre_D: NDArray[np.float64], states_BD: NDArray[np.float32]) -> NDArray[np.float64]:
    cosine_B: NDArray[np.float64] = _unit(states_BD) @ centre_D
    return cosine_B


def _unit(vectors: NDArray[Any]) -> NDArray[np.float64]:
    """Return the vectors, along the last axis, at length 1 and in float64."""
    exact = np.asarray(vectors, dtype=np.float64)
    lengths = np.sqrt([vector.dot(vector) for vector in np.atleast_2d(exact)])
    unit: NDArray[np.float64] = exact / lengths.reshape(*exact.shape[:-1], 1)
    return unit
