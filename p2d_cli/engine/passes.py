"""What a stage has a model do: passes over tokenized rows, which a reader computes, counts or times. Imports no torch.

A pass says what is shown, what is read of each batch, and where that goes; the reader (`p2d_cli.engine.reader`) does
the rest. A dry run hands the same passes to a reader that counts (`p2d_cli.engine.counting`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from p2d_cli.data.batching import token_batches
from p2d_cli.engine.cost import (
    BatchShape,
    ModelSize,
    WorkKind,
    backward_flops,
    cache_bytes,
    forward_flops,
    largest_of,
    learn_bytes,
    read_bytes,
)
from p2d_cli.runtime.hardware import synchronizer

if TYPE_CHECKING:
    from p2d_cli.engine.reader import ModelReader

Arrays = Mapping[str, NDArray[Any]]
SHORTEST_TIMING = 0.2
"""Seconds: a batch is timed again until its readings take so long together."""
TIMED_TOKENS = 8
"""Generated tokens that are timed."""


def concatenated(first: Arrays, second: Arrays) -> Arrays:
    """Join what two halves of a batch gave, one behind the other."""
    return {name: np.concatenate([array, second[name]]) for name, array in first.items()}


def scatter(into: NDArray[Any], name: str, at: int | NDArray[np.int64] = 0) -> Callable[[list[int], Arrays], None]:
    """Return what puts the array `name` of each batch where its rows belong: from `at` on, or where `at` says."""
    places = (lambda batch: [at + row for row in batch]) if isinstance(at, int) else at.__getitem__

    def take(batch: list[int], arrays: Arrays) -> None:
        into[places(batch)] = arrays[name]

    return take


@dataclass(frozen=True, kw_only=True)
class Pass:
    """A forward pass over sequences, and where its kind is `learn` a backward pass too."""

    work: str
    """What it is for, as the progress bar calls it, which is also the name of its journal."""
    part: str = ""
    """What tells it from other passes of the same work, such as the rows of a pool that it is over; no two of a stage
    may have work and part in common, since that is how finished batches are found again."""
    lengths: Sequence[int]
    """Tokens of each sequence."""
    read: Callable[[ModelReader, list[int]], Arrays]
    """Reads a batch, given the indices of its sequences. What heavy libraries it needs, it imports itself."""
    take: Callable[[list[int], Arrays], None]
    """Is given each batch with its arrays, in order."""
    keep: Callable[[Arrays], Arrays] | None = None
    """Turns what was read of a batch into what is kept of it; by default all of it is."""
    content: int = 0
    """Digest of the sequences, where an interrupted run may have read others of the same lengths under this name."""
    name: Callable[[int], str] = "row {}".format
    """What messages call a sequence."""
    unchecked: Collection[str] = ()
    """Arrays that may hold values that are not finite."""
    join: Callable[[Arrays, Arrays], Arrays] = concatenated
    """Puts the arrays of two halves of a batch together."""
    logits: Sequence[int] = ()
    """Positions of each sequence whose logits are computed; none where it is empty."""
    layers: int | None = None
    """How many layers are computed; None for all."""
    kind: WorkKind = "read"
    kept_bytes: int = 0
    """What is kept of each sequence, in the journal."""
    longest: int = 0
    """Tokens of the longest answer, where answers are generated."""
    memory: Mapping[str, int] = field(default_factory=dict)
    """Bytes by part, beside those of the pass itself."""

    @property
    def label(self) -> str:
        """The work with its part."""
        return f"{self.work} {self.part}" if self.part else self.work

    def batches(self, token_budget: int) -> list[list[int]]:
        """Group sequences of similar length under the token budget."""
        return token_batches(self.lengths, token_budget=token_budget)

    def tokens(self, batch: list[int], arrays: Arrays) -> int:
        """Return how many tokens reading a batch took, padding included."""
        del arrays
        return len(batch) * max(self.lengths[row] for row in batch)

    # --- what it costs

    def shape(self, batch: list[int]) -> BatchShape:
        """Return the size of a batch."""
        return BatchShape.of([(self.lengths[row], self.logits[row] if self.logits else 0) for row in batch])

    def planned(self, batches: Sequence[list[int]]) -> tuple[int, int]:
        """Return the forward passes and the tokens that reading all batches takes."""
        return len(batches), sum(self.shape(batch).tokens for batch in batches)

    def steps(self, token_budget: int) -> Steps:
        """Return its batches as the steps of a plan."""
        batches = self.batches(token_budget)
        shapes = [self.shape(batch) for batch in batches]
        passes, tokens = self.planned(batches)
        return Steps(
            work=self.work,
            kind=self.kind,
            rows=len(self.lengths),
            shapes=shapes,
            passes=passes,
            tokens=tokens,
            longest=self.longest,
            flops=self.flops,
            seconds=lambda load, step: self.seconds(load(), batches[step]),
            memory=lambda size, itemsize: (
                {"weights": size.weight_bytes(itemsize)} | self.bytes(size, largest_of(shapes), itemsize)
            ),
            kept_bytes=self.kept_bytes * len(self.lengths),
        )

    def flops(self, size: ModelSize, shape: BatchShape) -> float:
        """Return the floating-point operations of a batch."""
        forward = forward_flops(size, shape, layers=self.layers)
        return forward + backward_flops(size, shape) if self.kind == "learn" else forward

    def bytes(self, size: ModelSize, largest: BatchShape, itemsize: int) -> dict[str, int]:
        """Return the memory that the largest batch takes, by part."""
        if self.kind != "learn":
            return read_bytes(size, largest, itemsize) | dict(self.memory)
        return learn_bytes(size, largest, itemsize, layers=size.depth) | dict(self.memory)

    def seconds(self, reader: ModelReader, batch: list[int]) -> float:
        """Return what a batch takes on the model."""
        return repeated(lambda: self.read(reader, batch), reader.device)


@dataclass(frozen=True, kw_only=True)
class AnswerPass(Pass):
    """Generation of answers behind prompts; `read` returns their texts, and the array `new_tokens` `[1]`."""

    kind: WorkKind = "answer"
    references: Sequence[int] = ()
    """Tokens of each reference answer, which a plan takes for those of the answer."""
    generate: Callable[[ModelReader, list[int], int], Any]
    """Generates at most so many tokens for a batch."""

    def batches(self, token_budget: int) -> list[list[int]]:
        """Group prompts of similar length, with room for their answers, under the token budget."""
        return token_batches([length + self.longest for length in self.lengths], token_budget=token_budget)

    def tokens(self, batch: list[int], arrays: Arrays) -> int:
        """Return the tokens of the prompts and of what was generated, without padding."""
        return sum(self.lengths[row] for row in batch) + int(arrays["new_tokens"].sum())

    def _answer(self, row: int) -> int:
        return min(self.references[row], self.longest)

    def shape(self, batch: list[int]) -> BatchShape:
        """Return the size of a batch of prompts, and as its logits the steps until its longest answer ends."""
        length = max(self.lengths[row] for row in batch)
        return BatchShape(len(batch), length, max(map(self._answer, batch)))

    def planned(self, batches: Sequence[list[int]]) -> tuple[int, int]:
        """Return the steps of answers as long as the references, and the tokens as they are, without padding."""
        steps = sum(self.shape(batch).logits for batch in batches)
        tokens = sum(self.lengths[row] + self._answer(row) for batch in batches for row in batch)
        return steps, tokens

    def flops(self, size: ModelSize, shape: BatchShape) -> float:
        """Return the operations of reading prompts and of each step behind them; the first comes from the prompts."""
        prompt = forward_flops(size, replace(shape, logits=shape.rows))
        step = forward_flops(size, BatchShape(shape.rows, 1, shape.rows))
        _, queries, _ = size.first()
        cached = 4.0 * queries * shape.rows * (shape.length + shape.logits / 2)
        return prompt + (shape.logits - 1) * (step + cached)

    def bytes(self, size: ModelSize, largest: BatchShape, itemsize: int) -> dict[str, int]:
        """Return the memory that the largest batch takes, by part, with the cache of keys and values."""
        length = largest.length + self.longest
        parts = read_bytes(size, BatchShape(largest.rows, length, largest.rows), itemsize)
        return parts | {"key/value cache": cache_bytes(size, largest.rows, length, itemsize)}

    def seconds(self, reader: ModelReader, batch: list[int]) -> float:
        """Return what a batch takes, from its first token and a few more."""

        def timed(tokens: int) -> float:
            return repeated(lambda: self.generate(reader, batch, tokens), reader.device)

        first = timed(1)
        each = max(timed(1 + TIMED_TOKENS) - first, 0.0) / TIMED_TOKENS
        return first + each * (self.shape(batch).logits - 1)


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Work in a given order of batches, such as optimizer steps, which the stage does itself with `run`.

    The batches of a pass are steps, too, where they are counted.
    """

    work: str
    kind: WorkKind
    rows: int
    shapes: Sequence[BatchShape]
    """Of each step's batch."""
    flops: Callable[[ModelSize, BatchShape], float]
    """Returns the operations of a step."""
    seconds: Callable[[Callable[[], ModelReader], int], float]
    """Times the step of this index; is given what loads the model."""
    memory: Callable[[ModelSize, int], Mapping[str, int]]
    """Returns bytes by part, those of the model's weights included, for activations of so many bytes."""
    run: Callable[[ModelReader], None] = lambda _: None
    times: float = 1.0
    """How often all steps are done."""
    counted: bool = True
    """Whether the manifest counts the tokens."""
    passes: int | None = None
    """Forward passes, if not one a step."""
    tokens: int | None = None
    """Tokens, if not those of the batches with their padding."""
    longest: int = 0
    """Tokens of the longest answer, where answers are generated."""
    kept_bytes: int = 0
    """What is kept of it in a journal."""


def repeated(work: Callable[[], Any], device: str = "cpu") -> float:
    """Return the mean seconds of doing something, after once to warm up."""
    synchronize = synchronizer(device)
    work()
    synchronize()
    started, times = time.perf_counter(), 0
    while times == 0 or time.perf_counter() - started < SHORTEST_TIMING:
        work()
        synchronize()
        times += 1
    return (time.perf_counter() - started) / times
