"""Rows by a mean of their last hidden states, and its cosine to that of others.

Legend: M rows to choose from, Q target rows, B rows of a batch, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from p2d_cli.core.subset_selection import unit
from p2d_cli.engine.passes import Pass, scatter
from p2d_cli.engine.readings import hidden_states_pass
from p2d_cli.methods.indexed_rows import IndexedRows, describe_index, kept_states
from p2d_cli.methods.row_method import PoolTask, RowMethod


class HiddenStateMethod(RowMethod):
    """Reads the target's rows, and then every row of the pool, up to the last hidden state; or finds it in an index."""

    takes_target = True
    takes_shortlist = True
    takes_index = True
    mean: ClassVar[int]
    """Which of the two means counts; see `hidden_states_pass`."""

    def __init__(self, task: PoolTask) -> None:
        super().__init__(task)
        self._states: dict[int, NDArray[np.float32]] = {}
        """Of the target's rows."""
        self.indexed = IndexedRows(task, kept_states(task)) if task.config.index is not None else None

    def target_passes(self) -> Iterator[Pass]:
        """Read the target's rows."""
        records = self.task.target
        yield hidden_states_pass(
            self.task.reader,
            self.task.reader.examples(records),
            work="embed target",
            take=lambda batch, arrays: self._states.update(zip(batch, arrays["states"], strict=True)),
            name=lambda row: records[row].where,
        )

    def pool_passes(self, of: Callable[[NDArray[Any]], NDArray[Any]], into_M: NDArray[Any]) -> Iterator[Pass]:
        """Read the pool's rows, and put what `of` makes of their states, `[B, D]`, into an array of them all."""
        if self.indexed is not None:
            yield from self.indexed.passes()
            self.indexed.score(lambda kept_nKPd: of(kept_nKPd[:, 0, self.mean].astype(np.float32)), into_M)
            return
        for chunk in self.task.chunks():
            yield hidden_states_pass(
                self.task.reader,
                self.task.reader.examples(chunk.records),
                work="embed rows",
                part=chunk.part,
                keep=lambda arrays: {"kept": of(arrays["states"][:, self.mean])},
                kept_bytes=into_M[:1].nbytes,
                take=scatter(into_M, "kept", chunk.start),
                name=lambda row, records=chunk.records: records[row].where,
            )

    @cached_property
    def target_QD(self) -> NDArray[np.float64]:
        """The states of the target's rows, at length 1."""
        return unit(np.stack([self._states[row][self.mean] for row in range(len(self._states))]))

    def disk(self) -> dict[str, int]:
        """Return the bytes by which the index will grow."""
        return {} if self.indexed is None else {"index": self.indexed.disk_bytes}

    @classmethod
    def describe(cls, summary: dict[str, Any]) -> list[str]:
        """Say what an index has saved."""
        return [describe_index(summary["index"])] if "index" in summary else []

    @property
    def notes(self) -> dict[str, Any]:
        """What the summary says of the index."""
        return {} if self.indexed is None else {"index": self.indexed.notes}
