"""What a stage would take, told before anything heavy is loaded: passes, tokens, memory, disk, unfinished work.

A dry run hands a stage's own passes (`p2d_cli.engine.passes`) to a reader that counts them, with a tokenizer that needs
no torch. `--time` has a batch of middling size of each work read by the model itself, and takes what it took per
operation for all batches of its work.

A file of up to `EXACT_ROWS` rows is read and tokenized as the stage itself would do it. Of a larger one so many rows,
evenly spread over the first `READ_ROWS`, stand for all, each for about as many others.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from p2d_cli.artifacts.checkpoints import newest_checkpoint
from p2d_cli.core.geometry import HeadGeometry
from p2d_cli.core.head_layout import ModelLayout
from p2d_cli.data.raw_rows import RowSource
from p2d_cli.data.records import Record
from p2d_cli.data.sources import scan_rows
from p2d_cli.engine.cost import ModelSize, StagePlan, Work, largest_of, model_size
from p2d_cli.engine.passes import Pass, Steps
from p2d_cli.engine.reader import Encoded, Item, ModelReader, Reader
from p2d_cli.engine.stage_run import StageRun
from p2d_cli.errors import ModelError
from p2d_cli.modeling.model_files import ModelFiles
from p2d_cli.modeling.quantised import packed_weights, tensor_shapes
from p2d_cli.modeling.suitability import count_parameters, full_config, read_layout
from p2d_cli.registry import ROW_METHODS
from p2d_cli.runtime.hardware import likely_dtype

EXACT_ROWS = 2000
READ_ROWS = 50_000
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
JOURNAL_OVERHEAD = 4 / 3
"""Arrays stand in journals as base64."""


class CountingReader(Reader):
    """Counts passes instead of doing them, and gathers what a stage would take.

    `unfinished` is where an interrupted run of the same work would have left what it had finished.
    """

    def __init__(self, job: StageRun[Any], files: ModelFiles, unfinished: Path | None) -> None:
        super().__init__(job, files, light=True)
        self.itemsize = ITEMSIZE[self.precision]
        self.rows: dict[str, int] = {}
        self.stored_bytes: dict[str, int] = {}
        """Size of the files of each source of rows."""
        self.memory: dict[str, int] = {}
        self.disk: dict[str, int] = {}
        self.notes: list[str] = []
        self.is_exact = True
        """Whether all rows that are counted were tokenized."""
        self._works: dict[str, Work] = {}
        self._timings: dict[str, Callable[[], float]] = {}
        self._batches: Counter[str] = Counter()
        """How many batches each work has."""
        self._longest: dict[str, int] = {}
        """Tokens of the longest answer of the works that generate."""
        self._other_seconds: dict[str, float] = {}
        self._known: dict[str, dict[int, tuple[Any, Any]]] = {}
        """What was encoded, by kind and identity, with the object itself, so that no other takes its identity."""
        self._tokenizing = 0.0
        self._unfinished = unfinished

    @property
    def precision(self) -> str:
        """The precision that the model is likely to be loaded in."""
        return likely_dtype(self.config.dtype, self.config.device)

    @cached_property
    def size(self) -> ModelSize:
        """What the model's costs follow from."""
        try:
            shape = self.shape
        except ModelError:  # its heads cannot be told apart
            shape = None
        counted = count_parameters(self.files)
        size, packed = model_size(full_config(self.files), tensor_shapes(self.files), shape), packed_weights(self.files)
        if counted is not None:
            size = replace(size, parameters=counted[0], text_parameters=counted[1])
        return replace(size, packed=packed.parameters, packed_bytes=packed.num_bytes)

    @cached_property
    def layout(self) -> ModelLayout:
        """Where each head's weights are."""
        return read_layout(self.files)

    @property
    def shape(self) -> HeadGeometry:
        """How many heads the model has."""
        return self.layout.geometry

    def shape_without_weights(self) -> HeadGeometry:
        """Return how many heads the model has."""
        return self.shape

    # --- rows

    def sample(self, name: str, source: RowSource | None, *, limit: int | None = None) -> tuple[Record, ...]:
        """Return rows that stand for all of a source: as many, of a large one some of them in several places.

        Its first rows are read, and the others counted; rows that are to be mined of it are some of them.
        """
        if source is None:
            return ()
        most = READ_ROWS if limit is None else min(limit, READ_ROWS)
        records = self.job.inputs.read(source, limit=most).records
        total = len(records)
        if total >= READ_ROWS and limit != READ_ROWS:
            total = max(_count_rows(source) if limit is None else min(_count_rows(source), limit), total)
        stored = sum(path.stat().st_size for path in source.files)
        mined = self.job.inputs.mined.get(source)
        if mined is not None:
            whole, total = total, ROW_METHODS[mined.method].count(mined, total)
            stored = round(stored * total / max(whole, 1))
        standing = total if total <= EXACT_ROWS else EXACT_ROWS
        is_whole = len(records) == total == standing
        self.rows[name], self.stored_bytes[name] = total, stored
        self.is_exact &= is_whole
        return tuple(stretch(evenly(records, standing), total))

    def reference_lengths(self, records: Sequence[Record]) -> list[int]:
        """Return the tokens of each row's answer, its end included."""

        def length(record: Record) -> int:
            reference = self.template.reference(self.tokenizer, record)
            return len(self.tokenizer(reference, add_special_tokens=False)["input_ids"]) + 1

        return self._each("references", records, length)

    def _each(self, what: str, items: Sequence[Item], encode: Callable[[Item], Encoded]) -> list[Encoded]:
        known = self._known.setdefault(what, {})
        new = {id(item): item for item in items if id(item) not in known}
        room = EXACT_ROWS - len(known)
        chosen = list(new.values()) if len(new) <= room else evenly(list(new.values()), room)
        started = time.perf_counter()
        for item in chosen:
            known[id(item)] = item, encode(item)
        self._tokenizing += (time.perf_counter() - started) * len(items) / max(len(chosen), 1) if chosen else 0.0
        if len(new) <= room:
            return [known[id(item)][1] for item in items]
        self.is_exact = False
        there = [known[id(item)][1] for item in items if id(item) in known] or [one for _, one in known.values()]
        return stretch(there, len(items))

    # --- counting

    def run(self, passes: Iterable[Pass | Steps]) -> None:
        """Count passes."""
        for one in passes:
            if isinstance(one, Steps):
                self._count(one)
            elif one.lengths:
                self._count(one.steps(self.token_budget))

    def _count(self, one: Steps) -> None:
        """Add a work, or more of one, and what it needs."""
        flops = [one.flops(self.size, shape) for shape in one.shapes]
        middle = int(np.argsort(flops)[len(flops) // 2])
        passes = round(len(flops) * one.times) if one.passes is None else one.passes
        padded = round(sum(shape.tokens for shape in one.shapes) * one.times)
        work = Work(
            name=one.work,
            kind=one.kind,
            rows=one.rows,
            passes=passes,
            backward_passes=passes if one.kind == "learn" else 0,
            tokens=padded if one.tokens is None else one.tokens,
            flops=sum(flops) * one.times,
            typical=one.shapes[middle],
            largest=largest_of(one.shapes),
            typical_flops=flops[middle],
            counted=one.counted,
        )
        if (earlier := self._works.get(work.name)) is None:
            self._works[work.name] = work
            self._timings[work.name] = lambda: one.seconds(lambda: self._model_reader, middle)
        else:
            summed = ("rows", "passes", "backward_passes", "tokens", "flops")
            totals = {name: getattr(earlier, name) + getattr(work, name) for name in summed}
            largest = largest_of([shape for shape in (earlier.largest, work.largest) if shape is not None])
            self._works[work.name] = replace(earlier, largest=largest, **totals)
        self._batches[work.name] += len(one.shapes)
        if one.longest:
            self._longest[work.name] = one.longest
        self.need(one.memory(self.size, self.itemsize))
        if one.kept_bytes:
            self.disk["journal"] = self.disk.get("journal", 0) + round(one.kept_bytes * JOURNAL_OVERHEAD)

    def need(self, memory: Mapping[str, int]) -> None:
        """Take parts of memory into account, each at its largest."""
        for part, size in memory.items():
            self.memory[part] = max(self.memory.get(part, 0), size)

    # --- the plan

    def plan(self) -> StagePlan:
        """Return what was gathered, timed if that was asked for."""
        works = list(self._works.values())
        if self.job.options.timed:
            works = [replace(work, seconds=self._rate(work) * work.flops) for work in works]
            if "_prompts" in vars(self):
                self._other_seconds["tokenize"] = self._tokenizing
        self.notes += [
            f"{name}: answers as long as the references, {self._works[name].passes:,} steps; at most"
            f" {self._batches[name] * longest:,} steps of {longest} new tokens"
            for name, longest in self._longest.items()
        ]
        if self.config.dtype == "auto" and self.memory:
            self.notes.append(f"precision taken as {self.precision}, as --dtype auto would choose here")
        return StagePlan(
            rows=self.rows,
            exact=self.is_exact or "_prompts" not in vars(self),
            works=tuple(works),
            memory={part: size for part, size in self.memory.items() if size},
            disk={part: size for part, size in self.disk.items() if size},
            other_seconds=self._other_seconds,
            resume=tuple(self._unfinished_work(works)),
            notes=tuple(dict.fromkeys(self.notes)),
        )

    @cached_property
    def _model_reader(self) -> ModelReader:
        return ModelReader(self.job, self.files)

    def starts_with(self, seconds: float) -> None:
        """Take into account what the stage takes before its first step."""
        self._other_seconds["start"] = seconds

    def _rate(self, work: Work) -> float:
        """Return the seconds of an operation of this work, from an earlier timing of its like if there was one."""
        config, shape = self.job.config, work.typical
        # Batches of about the same size run about equally fast.
        about = () if shape is None else (shape.tokens.bit_length(), shape.length.bit_length(), shape.logits > 0)
        trained = (getattr(config, "resolved_scope", ""), getattr(config, "accumulation", 0))
        named = work.name if work.kind == "learn" else ""
        model = (str(self.files.folder), config.dtype, config.device, config.attn_implementation)
        key = (*model, work.kind, named, *about, *trained)
        rates = self.job.options.rates
        if key not in rates:
            rates[key] = self._timings[work.name]() / work.typical_flops, self._other_seconds.get("start")
        rate, start = rates[key]
        if start is not None:
            self._other_seconds["start"] = start
        return rate

    def _unfinished_work(self, works: Sequence[Work]) -> list[str]:
        """Say what an interrupted run of this artifact has finished of each work."""
        if self._unfinished is None or not self._unfinished.is_dir():
            return []
        journals = list(self._unfinished.rglob("*.jsonl"))
        counts = ((work, _finished_batches(journals, work.name)) for work in works)
        found = [
            f"{work.name}: {done} of {self._batches[work.name]} batches" for work, done in counts if done is not None
        ]
        for place in sorted((self._unfinished / "checkpoints").glob("micro-batch-*")):
            checkpoint, problems = newest_checkpoint(place, work=self.job.key)
            found += [f"not from {problem}" for problem in problems]
            if checkpoint is not None:
                found.append(f"train: from update {checkpoint.folder.name.rpartition('-')[2]}")
        return found


def _finished_batches(journals: Iterable[Path], work: str) -> int | None:
    """Return the finished batches in a work's journals, a line each below a head line; None where there are none."""
    stem = work.replace(" ", "-")
    names = ((path, path.name.partition(".")[0]) for path in journals)
    own = [path for path, name in names if name == stem or name.startswith(f"{stem}-")]
    return sum(max(path.read_bytes().count(b"\n") - 1, 0) for path in own) if own else None


def _count_rows(source: RowSource) -> int:
    if source.format == "parquet" and source.files:
        import pyarrow.parquet as pq

        return sum(pq.read_metadata(path).num_rows for path in source.files)
    if source.format != "jsonl" or not source.files or any(path.suffix == ".gz" for path in source.files):
        return sum(1 for _ in scan_rows(source))
    lines = 0
    for path in source.files:
        with path.open("rb") as stream:
            lines += sum(part.count(b"\n") for part in iter(lambda: stream.read(2**20), b""))
    return lines


def evenly(items: Sequence[Item], count: int) -> list[Item]:
    """Return at most `count` of the items, evenly spread."""
    if len(items) <= count:
        return list(items)
    return [items[index * len(items) // count] for index in range(count)]


def stretch(items: Sequence[Item], count: int) -> list[Item]:
    """Return `count` items, each of the given ones about equally often; themselves if there are so many."""
    return [items[index * len(items) // count] for index in range(count)] if items else []
