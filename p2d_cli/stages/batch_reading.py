"""Reading one batch in spite of what can go wrong with it: too little memory, and values that are not finite."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import reduce
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from p2d_cli.errors import (
    LESS_MEMORY,
    NOT_FINITE_HINT,
    MemoryExhaustedError,
    NonFiniteError,
    first_line,
    is_out_of_memory,
)
from p2d_cli.modeling.memory import release_memory
from p2d_cli.stages.execution import StageRun

Arrays = Mapping[str, NDArray[Any]]
ROWS_NAMED = 3
"""How many rows of a batch an error names."""


class TokenCounter(Protocol):
    """What counts the tokens that were read."""

    tokens: int


def concatenated(first: Arrays, second: Arrays) -> Arrays:
    """Join what two halves of a batch gave, one behind the other."""
    return {name: np.concatenate([array, second[name]]) for name, array in first.items()}


def halves(batch: list[int]) -> tuple[list[int], list[int]] | None:
    """Cut a batch in two; None if it is a single row."""
    middle = len(batch) // 2
    return (batch[:middle], batch[middle:]) if middle else None


class BatchReader:
    """Compute a batch; in halves, or halves of halves, if it does not fit into memory.

    Later batches are cut as finely right away: they hold about as many tokens.

    Args:
        job: the running stage; its summary tells how many batches did not fit.
        counter: its count is set back when a batch has to be read again.
        label: what the batches are for.
        batches: row indices of each batch.
        compute: turns row indices into arrays.
        join: puts the arrays of two halves together.
        halve: cuts a batch in two; None if it cannot be cut.
        unchecked: arrays that may hold values that are not finite.
        name: what messages call a row.
    """

    def __init__(
        self,
        job: StageRun[Any],
        counter: TokenCounter,
        label: str,
        batches: Sequence[list[int]],
        compute: Callable[[list[int]], Arrays],
        *,
        join: Callable[[Arrays, Arrays], Arrays] = concatenated,
        halve: Callable[[list[int]], tuple[list[int], list[int]] | None] = halves,
        unchecked: Collection[str] = (),
        name: Callable[[int], str] = "row {}".format,
    ) -> None:
        self._job, self._counter, self._label = job, counter, label
        self._numbers = {batch[0]: number for number, batch in enumerate(batches, start=1) if batch}
        self._total = len(batches)
        self._compute, self._join, self._halve = compute, join, halve
        self._unchecked, self._name = unchecked, name
        self._cuts = 0

    def __call__(self, batch: list[int]) -> Arrays:
        """Return the arrays of a batch.

        Raises:
            NonFiniteError: one of them has a value that is not finite; the batch and its row are named.
            MemoryExhaustedError: a single row does not fit into memory.
        """
        try:
            arrays = reduce(self._join, (self._read(part, self._cuts) for part in self._parts(batch, self._cuts)))
        except NonFiniteError as problem:
            raise NonFiniteError(f"{self._where(batch)}: {problem.message}", hint=problem.hint) from None
        self._require_finite(batch, arrays)
        return arrays

    def _parts(self, batch: list[int], cuts: int) -> list[list[int]]:
        """Cut a batch so many times, each part in two."""
        parts = [batch]
        for _ in range(cuts):
            parts = [piece for part in parts for piece in (self._halve(part) or (part,))]
        return parts

    def _read(self, part: list[int], cuts: int) -> Arrays:
        tokens = self._counter.tokens
        try:
            return self._compute(part)
        except Exception as problem:
            if not is_out_of_memory(problem):
                raise
            found = first_line(problem)
        self._counter.tokens = tokens
        release_memory(cycles=False)
        pieces = self._halve(part)
        if pieces is None:
            raise MemoryExhaustedError(f"{self._label}: out of memory with {self._names(part)} alone: {found}",
                                       hint=LESS_MEMORY)  # fmt: skip
        self._note(cuts + 1)
        return reduce(self._join, (self._read(piece, cuts + 1) for piece in pieces))

    def _note(self, cuts: int) -> None:
        facts = self._job.facts
        facts["out_of_memory"] = facts.get("out_of_memory", 0) + 1
        if cuts > self._cuts:
            self._cuts = cuts
            self._job.progress.note(f"{self._label}: out of memory; going on with batches cut into {2**cuts} parts")

    def _require_finite(self, batch: list[int], arrays: Arrays) -> None:
        for name, array in arrays.items():
            if name in self._unchecked or not np.issubdtype(array.dtype, np.floating) or np.isfinite(array).all():
                continue
            rows = np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(axis=1))
            of_rows = [batch[row] for row in rows] if len(array) == len(batch) else batch
            raise NonFiniteError(
                f"{self._where(batch)}: {name} of {self._names(of_rows)} is not finite; nothing was written",
                hint=NOT_FINITE_HINT,
            )

    def _where(self, batch: list[int]) -> str:
        return f"{self._label}, batch {self._numbers.get(batch[0], '?')} of {self._total}"

    def _names(self, rows: Iterable[int]) -> str:
        names = [self._name(row) for row in rows]
        more = f" and {len(names) - ROWS_NAMED} more" if len(names) > ROWS_NAMED else ""
        return ", ".join(names[:ROWS_NAMED]) + more
