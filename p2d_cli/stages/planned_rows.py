"""Rows before any model is loaded: how many there are, and how many tokens each is. Imports no torch.

A file of up to `EXACT_ROWS` rows is read and tokenized as the stage itself would do it. Of a larger one so many rows,
evenly spread over the first `READ_ROWS`, stand for all.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from p2d_cli.config import RowOptions
from p2d_cli.core.cost import BatchShape
from p2d_cli.data.batching import token_batches
from p2d_cli.data.episodes import EncodedEpisode, encode_episode
from p2d_cli.data.prompts import EncodedExample, LossOn
from p2d_cli.data.raw_rows import RowSource
from p2d_cli.data.records import Record
from p2d_cli.data.sources import scan_rows
from p2d_cli.modeling.model_files import ModelFiles
from p2d_cli.modeling.token_ids import KnownIds
from p2d_cli.stages.execution import StageRun
from p2d_cli.stages.showing import open_prompts
from p2d_cli.stages.templates import context_length

EXACT_ROWS = 2000
READ_ROWS = 50_000

Item = TypeVar("Item")


@dataclass(frozen=True)
class Sample:
    """Rows that stand for all rows of a source."""

    records: tuple[Record, ...]
    total: int
    """Number of rows that there are."""
    stored_bytes: int = 0
    """Size of the files."""
    is_stand_in: bool = False
    """Whether it will be other rows of the same kind."""

    @property
    def is_whole(self) -> bool:
        """Whether these are all the rows, and the very ones."""
        return len(self.records) == self.total and not self.is_stand_in

    def reduced_to(self, count: int) -> Sample:
        """Return what stands for `count` of the rows, whichever they will be."""
        share = count / max(self.total, 1)
        kept = evenly(self.records, count)
        return Sample(tuple(kept), count, round(self.stored_bytes * share), self.is_stand_in or count != self.total)


def read_sample(job: StageRun[Any], source: RowSource, *, limit: int | None = None) -> Sample:
    """Read the first rows of a source, and count the others."""
    most = READ_ROWS if limit is None else min(limit, READ_ROWS)
    records = job.inputs.read(source, limit=most).records
    if len(records) < READ_ROWS or limit == READ_ROWS:
        total = len(records)
    else:
        total = _count_rows(source) if limit is None else min(_count_rows(source), limit)
    return Sample(records, max(total, len(records)), sum(path.stat().st_size for path in source.files))


def _count_rows(source: RowSource) -> int:
    if source.format == "parquet" and source.files:
        import pyarrow.parquet as pq

        return sum(pq.read_metadata(path).num_rows for path in source.files)
    if source.format == "jsonl" and all(path.suffix != ".gz" for path in source.files) and source.files:
        return sum(_count_lines(path) for path in source.files)
    return sum(1 for _ in scan_rows(source))


def _count_lines(path: Path) -> int:
    with path.open("rb") as stream:
        return sum(part.count(b"\n") for part in iter(lambda: stream.read(2**20), b""))


def evenly(items: Sequence[Item], count: int) -> list[Item]:
    """Return at most `count` of the items, evenly spread."""
    if len(items) <= count:
        return list(items)
    return [items[index * len(items) // count] for index in range(count)]


def stretch(items: Sequence[Item], count: int) -> list[Item]:
    """Return `count` items, each of the given ones about equally often; themselves if there are so many."""
    return [items[index * len(items) // count] for index in range(count)] if items else []


class RowCounter:
    """Turns rows into numbers of tokens, as the stage would.

    Args:
        job: the stage that is planned.
        files: the model whose tokenizer counts.
        config: how rows are shown.
    """

    def __init__(self, job: StageRun[Any], files: ModelFiles, config: RowOptions) -> None:
        self.tokenizer, self.template = open_prompts(job, files, config, light=True)
        self._known_ids = KnownIds(self.tokenizer, sys.maxsize if job.num_embeddings is None else job.num_embeddings)
        self.max_length = context_length(config.max_length, files.config)
        self.token_budget = config.token_budget
        self.is_exact = True
        """Whether all rows asked for were tokenized so far."""
        self.seconds = 0.0
        """What tokenizing all rows would take, extrapolated from those that were."""

    def examples(self, records: Sequence[Record], total: int, loss_on: LossOn = "last") -> list[EncodedExample]:
        """Return `total` examples; where these are more than were read or may be tokenized, some stand for others."""
        chosen = evenly(records, EXACT_ROWS)
        started = time.perf_counter()
        encoded = [
            self.template.encode_example(self.tokenizer, record, self.max_length, loss_on=loss_on) for record in chosen
        ]
        self._known_ids.require_all((row.where, ids.input_ids) for row, ids in zip(chosen, encoded, strict=True))
        return self._all(encoded, total, started)

    def prompts(self, records: Sequence[Record], total: int, room: int) -> list[tuple[int, int]]:
        """Return the length of each prompt and of its reference answer."""
        chosen = evenly(records, EXACT_ROWS)
        started = time.perf_counter()
        asked = [self.template.encode_prompt(self.tokenizer, record, room) for record in chosen]
        self._known_ids.require_all((row.where, ids) for row, ids in zip(chosen, asked, strict=True))
        references = [self.template.reference(self.tokenizer, record) for record in chosen]
        lengths = [
            (len(ids), len(self.tokenizer(reference, add_special_tokens=False)["input_ids"]) + 1)
            for reference, ids in zip(references, asked, strict=True)
        ]
        return self._all(lengths, total, started)

    def episodes(self, plan: Sequence[tuple[Sequence[Record], Sequence[Record]]], total: int) -> list[EncodedEpisode]:
        """Return `total` episodes, of demos and queries each."""
        chosen = evenly(plan, EXACT_ROWS)
        started = time.perf_counter()
        encoded = [
            encode_episode(self.template, self.tokenizer, demos, queries, max_length=self.max_length)
            for demos, queries in chosen
        ]
        places = (demos[0].where if demos else queries[0].where for demos, queries in chosen)
        self._known_ids.require_all(
            (f"{place} and others", ids.input_ids) for place, ids in zip(places, encoded, strict=True)
        )
        return self._all(encoded, total, started)

    def shapes(self, sizes: Sequence[tuple[int, int]]) -> list[BatchShape]:
        """Return the batches of sequences of these `(length, logits)` under the token budget."""
        batches = token_batches([length for length, _ in sizes], token_budget=self.token_budget)
        return [
            BatchShape(len(batch), sizes[batch[0]][0], sum(sizes[index][1] for index in batch)) for batch in batches
        ]

    def _all(self, encoded: list[Item], total: int, started: float) -> list[Item]:
        self.seconds += (time.perf_counter() - started) * total / max(len(encoded), 1)
        if len(encoded) == total:
            return encoded
        self.is_exact = False
        return stretch(encoded, total)
