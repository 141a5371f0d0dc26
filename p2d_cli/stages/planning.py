"""What a stage would take, told before anything heavy is loaded: passes, tokens, memory, disk, unfinished work.

Here is what the plans of all stages have in common. `plan_selection` and `plan_tuning` follow each stage's own path up
to the batches, with a tokenizer that needs no torch, and count instead of computing; `plan_ahead` does so for stages
whose inputs are still to be made. `--time` then has a few of these batches timed on the model (`plan_timing`).

Legend: L layers, H query heads a layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2d_cli.artifacts.checkpoints import newest_checkpoint
from p2d_cli.config import RowOptions
from p2d_cli.core.cost import (
    BatchShape,
    ModelSize,
    StagePlan,
    Work,
    WorkKind,
    cache_bytes,
    forward_flops,
    model_size,
    read_bytes,
)
from p2d_cli.core.geometry import share_count
from p2d_cli.data.batching import token_batches
from p2d_cli.modeling.model_files import ModelFiles, tensor_shapes
from p2d_cli.runtime.hardware import likely_dtype
from p2d_cli.stages.execution import StageRun
from p2d_cli.stages.planned_rows import RowCounter

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
CHECKPOINTS_AT_ONCE = 3
"""Two are kept, and a third is there while it is being written."""
JOURNAL_OVERHEAD = 4 / 3
"""Arrays stand in journals as base64."""
FOUR_BITS = 0.56
"""Bytes a weight, with the scales of its block."""


class Planner:
    """What the plans of all stages are made with.

    Args:
        job: the stage that is planned.
        files: the model that it would run.
        unfinished: where an interrupted run of the same work would have left what it had finished.
    """

    def __init__(self, job: StageRun[Any], files: ModelFiles, unfinished: Path | None) -> None:
        self.job = job
        self.files = files
        self.config: Any = job.config
        self.size: ModelSize = model_size(files.config, tensor_shapes(files))
        self.precision = likely_dtype(self.config.dtype, self.config.device)
        self.itemsize = ITEMSIZE[self.precision]
        self.works: list[Work] = []
        self.rows: dict[str, int] = {}
        self.memory: dict[str, int] = {"weights": self.size.parameters * self.itemsize}
        self.disk: dict[str, int] = {}
        self.notes: list[str] = []
        self.other_seconds: dict[str, float] = {}
        self._unfinished = unfinished

    @cached_property
    def counter(self) -> RowCounter:
        """Tokenizes rows; loaded when it is first needed."""
        if not isinstance(self.config, RowOptions):
            raise TypeError(f"{type(self.config).__name__} has no settings for rows")
        return RowCounter(self.job, self.files, self.config)

    def read(self, name: str, sizes: Sequence[tuple[int, int]], *, layers: int | None = None) -> None:
        """Add one forward pass over sequences of these `(length, logits)`, up to a layer."""
        if not sizes:
            return
        shapes = self.counter.shapes(sizes)
        flops = [forward_flops(self.size, shape, layers=layers) for shape in shapes]
        self.add(name, "read", shapes, flops, rows=len(sizes))
        self.need(read_bytes(self.size, largest_of(shapes), self.itemsize))

    def add(
        self,
        name: str,
        kind: WorkKind,
        shapes: Sequence[BatchShape],
        flops: Sequence[float],
        *,
        rows: int,
        times: float = 1.0,
        backward: bool = False,
    ) -> None:
        """Add passes over these batches, all of them `times` times."""
        middle = int(np.argsort(flops)[len(flops) // 2])
        passes = round(len(shapes) * times)
        self.works.append(
            Work(
                name=name,
                kind=kind,
                rows=rows,
                passes=passes,
                backward_passes=passes if backward else 0,
                tokens=round(sum(shape.tokens for shape in shapes) * times),
                flops=sum(flops) * times,
                typical=shapes[middle],
                largest=largest_of(shapes),
                typical_flops=flops[middle],
            )
        )

    def need(self, memory: dict[str, int]) -> None:
        """Take parts of memory into account, each at its largest."""
        for part, size in memory.items():
            self.memory[part] = max(self.memory.get(part, 0), size)

    def plan(self, heads_LH: NDArray[np.bool_] | None = None) -> StagePlan:
        """Return what was gathered, timed if that was asked for, with these heads trained or read."""
        known = "counter" in vars(self)
        if self.job.options.timed:
            self._time(heads_LH)
        if self.config.dtype == "auto" and self.memory:
            self.notes.append(f"precision taken as {self.precision}, as --dtype auto would choose here")
        return StagePlan(
            rows=self.rows,
            exact=not known or self.counter.is_exact,
            works=tuple(self.works),
            memory={part: size for part, size in self.memory.items() if size},
            disk={part: size for part, size in self.disk.items() if size},
            other_seconds=self.other_seconds,
            resume=tuple(self._resume()),
            notes=tuple(self.notes),
        )

    def _resume(self) -> list[str]:
        if self._unfinished is None or not self._unfinished.is_dir():
            return []
        return _unfinished_work(self._unfinished, self.works, self.job.key)

    def _time(self, heads_LH: NDArray[np.bool_] | None) -> None:
        from p2d_cli.stages.plan_timing import PlanTimer

        timer = PlanTimer(self.job, self.files, self.size, heads_LH)
        timed = []
        for work in self.works:
            timed.append(replace(work, seconds=timer.rate(work) * work.flops))
            if timer.start_seconds is not None:
                self.other_seconds["start"] = timer.start_seconds
        self.works = timed
        if "counter" in vars(self):
            self.other_seconds["tokenize"] = self.counter.seconds


def largest_of(shapes: Iterable[BatchShape]) -> BatchShape:
    """Return the batch that takes the most memory."""
    return max(shapes, key=lambda shape: (shape.tokens, shape.logits))


def sizes_of(examples: Iterable[Any], *, logits: bool) -> list[tuple[int, int]]:
    """Return the length of each example, and the number of its answer's tokens if their logits are wanted."""
    return [
        (len(example.input_ids), len(example.input_ids) - example.answer_start if logits else 0) for example in examples
    ]


def assumed_heads(size: ModelSize, ratio: float) -> NDArray[np.bool_]:
    """Return heads that stand for a selection that is still to be made: spread evenly, down from the very last."""
    total = size.layers * size.heads
    count = share_count(ratio, total)
    heads_LH = np.zeros(total, dtype=np.bool_)
    heads_LH[[(index + 1) * total // count - 1 for index in range(count)]] = True
    return heads_LH.reshape(size.layers, size.heads)


# --- generation


def add_answers(planner: Planner, name: str, prompts: Sequence[tuple[int, int]]) -> None:
    """Count generation, of answers as long as the references; a batch goes on until its longest answer ends."""
    size, most = planner.size, planner.config.max_new_tokens
    shapes = planner.counter.shapes([(length + most, min(answer, most)) for length, answer in prompts])
    steps_of = _longest_answers(planner, prompts)
    asked = [BatchShape(shape.rows, shape.length - most, steps) for shape, steps in zip(shapes, steps_of, strict=True)]
    planner.add(name, "answer", asked, [_answer_flops(size, shape) for shape in asked], rows=len(prompts))
    steps = sum(steps_of)
    tokens = sum(length + min(answer, most) for length, answer in prompts)
    planner.works[-1] = replace(planner.works[-1], passes=steps, tokens=tokens)
    largest = largest_of(shapes)
    planner.need(read_bytes(size, replace(largest, logits=largest.rows), planner.itemsize))
    planner.need({"key/value cache": cache_bytes(size, largest.rows, largest.length, planner.itemsize)})
    planner.notes.append(
        f"{name}: answers as long as the references, {steps:,} steps; at most {len(shapes) * most:,} steps of"
        f" {most} new tokens"
    )


def _answer_flops(size: ModelSize, asked: BatchShape) -> float:
    """Return the operations of reading prompts and generating so many steps behind them, the first from the prompts."""
    prompt = forward_flops(size, replace(asked, logits=asked.rows))
    step = forward_flops(size, BatchShape(asked.rows, 1, asked.rows))
    cached = 4.0 * size.queries * size.layers * asked.rows * (asked.length + asked.logits / 2)
    return prompt + (asked.logits - 1) * (step + cached)


def _longest_answers(planner: Planner, prompts: Sequence[tuple[int, int]]) -> list[int]:
    """Return the number of steps that each batch generates."""
    most = planner.config.max_new_tokens
    batches = token_batches([length + most for length, _ in prompts], token_budget=planner.counter.token_budget)
    return [max(min(prompts[index][1], most) for index in batch) for batch in batches]


# --- unfinished work


def _unfinished_work(folder: Path, works: Sequence[Work], key: str) -> list[str]:
    """Say what an interrupted run of the artifact with this key has finished of each work."""
    found = [f"{name}: {done} of {work.passes} batches" for work in works for name, done in _journals(folder, work)]
    for place in sorted((folder / "checkpoints").glob("micro-batch-*")):
        checkpoint, problems = newest_checkpoint(place, work=key)
        found += [f"not from {problem}" for problem in problems]
        if checkpoint is not None:
            found.append(f"train: from update {checkpoint.folder.name.rpartition('-')[2]}")
    return found


def _journals(folder: Path, work: Work) -> list[tuple[str, int]]:
    """Return the finished batches in a work's journals: a line each, below a head line; one a chunk of a pool."""
    stem = work.name.replace(" ", "-")
    names = ((path, path.name.partition(".")[0]) for path in folder.rglob("*.jsonl"))
    journals = [path for path, name in names if name == stem or name.startswith(f"{stem}-")]
    finished = sum(max(path.read_bytes().count(b"\n") - 1, 0) for path in journals)
    return [(work.name, finished)] if journals else []
