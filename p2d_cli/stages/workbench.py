"""A loaded model with its tokenizer and prompt template, as the stages that read rows use it.

Legend: B batch, T tokens, K selected heads in (layer, head) order, S demos.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from p2d_cli.artifacts.journal import Entry, Journal
from p2d_cli.config import RowOptions
from p2d_cli.data.batching import pad_mask, pad_right, token_batches
from p2d_cli.data.episodes import EncodedEpisode, encode_episode
from p2d_cli.data.prompts import EncodedExample, PromptTemplate
from p2d_cli.data.records import Record
from p2d_cli.errors import UsageError
from p2d_cli.modeling.attention_capture import run_captured
from p2d_cli.modeling.gradients import IGNORED_LABEL
from p2d_cli.modeling.head_outputs import mean_head_outputs
from p2d_cli.modeling.layouts import LayerLayout, model_layout
from p2d_cli.modeling.loading import (
    input_device,
    load_model,
    placed_on,
    resolve_device,
    resolve_dtype,
)
from p2d_cli.modeling.model_files import ModelFiles
from p2d_cli.modeling.token_ids import KnownIds, count_embeddings
from p2d_cli.runtime import distributed, signals
from p2d_cli.stages.batch_reading import BatchReader
from p2d_cli.stages.execution import StageRun
from p2d_cli.stages.showing import open_prompts
from p2d_cli.stages.templates import context_length


@dataclass
class Workbench:
    """A model at rest, and the ways of showing rows to it.

    Sequences are padded on the right and passed with a mask of ones: under causal attention nothing real looks at
    the padding, and the attention kernel is free to take its fast causal path.
    """

    model: Any
    tokenizer: Any
    template: PromptTemplate
    device: str
    precision: str
    max_length: int
    token_budget: int
    tokens: int = field(default=0)
    """Tokens read so far, padding included."""

    def encode_examples(self, records: Sequence[Record]) -> list[EncodedExample]:
        """Tokenize rows as prompt and completion."""
        encoded = [self.template.encode_example(self.tokenizer, record, self.max_length) for record in records]
        self.known_ids.require_all((row.where, ids.input_ids) for row, ids in zip(records, encoded, strict=True))
        return encoded

    def encode_prompts(self, records: Sequence[Record], room: int) -> list[list[int]]:
        """Tokenize rows up to where the model is to answer, each in at most `room` tokens."""
        encoded = [self.template.encode_prompt(self.tokenizer, record, room) for record in records]
        self.known_ids.require_all((row.where, ids) for row, ids in zip(records, encoded, strict=True))
        return encoded

    def encode_episode(self, demos: Sequence[Record], queries: Sequence[Record]) -> EncodedEpisode:
        """Tokenize demos followed by queries with their reference answers."""
        encoded = encode_episode(self.template, self.tokenizer, demos, queries, max_length=self.max_length)
        self.known_ids.require(f"{(*demos, *queries)[0].where} and others", encoded.input_ids)
        return encoded

    def batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Group sequences of similar length under the token budget."""
        return token_batches(lengths, token_budget=self.token_budget)

    def pad(self, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return the sequences as `[B, T]`, padded on the right, on the model's device."""
        input_ids_BT, _ = pad_right(sequences, self.tokenizer.pad_token_id)
        self.tokens += input_ids_BT.numel()
        return input_ids_BT.to(self.device)

    def training_batch(self, examples: Sequence[EncodedExample]) -> dict[str, torch.Tensor]:
        """Return `input_ids` and `labels` `[B, T]`; only completion tokens carry a label."""
        labels = [
            [IGNORED_LABEL] * example.prompt_length + list(example.input_ids[example.prompt_length :])
            for example in examples
        ]
        return {
            "input_ids": self.pad([example.input_ids for example in examples]),
            "labels": pad_mask(labels, IGNORED_LABEL).to(self.device),
        }

    def watch(
        self, chosen: Sequence[EncodedEpisode], heads_LH: NDArray[np.bool_], *, num_segments: int
    ) -> NDArray[np.float64]:
        """Read a batch of episodes; the mean attention of the heads from query tokens to each demo's, `[B, K, S]`.

        The forward pass ends at the deepest layer that has one of these heads.
        """
        query_mask_BT, segment_BT = self.episode_masks(chosen)
        input_ids_BT = self.pad([episode.input_ids for episode in chosen])
        batch = {"input_ids": input_ids_BT, "attention_mask": torch.ones_like(input_ids_BT)}
        heads = heads_by_layer(heads_LH)
        attention_BKS = run_captured(self.model, batch, heads, query_mask_BT, segment_BT, num_segments)
        return attention_BKS.double().cpu().numpy()

    @cached_property
    def known_ids(self) -> KnownIds:
        """What refuses tokens that the model has no embedding for."""
        return KnownIds(self.tokenizer, count_embeddings(self.model) or 0)

    @cached_property
    def layout(self) -> tuple[LayerLayout, ...]:
        """Where each head's weights are."""
        return model_layout(self.model)

    def head_outputs(self, chosen: Sequence[EncodedExample], heads_LH: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Read a batch of rows; the mean output of the heads over each answer's tokens, float32 `[B, K, d]`.

        There the heads relate answer to prompt, which tells tasks apart whose prompts look alike. The forward pass
        ends at the deepest layer that has one of these heads.
        """
        input_ids_BT = self.pad([example.input_ids for example in chosen])
        token_mask_BT = pad_mask([_answer_mask(example) for example in chosen], 0).to(self.device)
        outputs_BKd = mean_head_outputs(
            self.model,
            self.layout,
            heads_by_layer(heads_LH),
            input_ids_BT,
            torch.ones_like(input_ids_BT),
            token_mask_BT,
        )
        found: NDArray[np.float32] = outputs_BKd.numpy()
        return found

    def episode_masks(self, episodes: Sequence[EncodedEpisode]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which tokens are a query's `[B, T]` bool, and which demo each token belongs to `[B, T]`, else -1."""
        query_mask_BT = pad_mask([episode.query_mask for episode in episodes], False)
        segment_BT = pad_mask([episode.segment_ids for episode in episodes], -1)
        return query_mask_BT.to(self.device), segment_BT.to(self.device)


def _answer_mask(example: EncodedExample) -> list[int]:
    # Of an answer that was cut away as a whole, what leads up to it stands for it.
    start = min(example.answer_start, len(example.input_ids) - 1)
    return [0] * start + [1] * (len(example.input_ids) - start)


def finish_batches(
    job: StageRun[Any],
    bench: Workbench,
    label: str,
    batches: Sequence[list[int]],
    compute: Callable[[list[int]], Mapping[str, NDArray[Any]]],
    *,
    phase: str = "score",
    **options: Any,
) -> Iterator[tuple[list[int], Mapping[str, NDArray[Any]]]]:
    """Compute batch after batch, each once: those that an interrupted run had finished are taken from its journal.

    The seconds and tokens that they cost then are charged now. Several ranks take turns: in each round they compute one
    batch each, and tell each other what came out, so that all of them see all batches.

    Args:
        job: the running stage.
        bench: counts the tokens.
        label: shown beside the bar.
        batches: row indices of each batch, and no row in two of them.
        compute: turns a batch into arrays.
        phase: what the seconds are charged to.
        options: how to read a batch that does not fit into memory, and what to make of values that are not finite; see
            `p2d_cli.stages.batch_reading.BatchReader`.

    Yields:
        Each batch with its arrays, in order, on every rank.

    Raises:
        NonFiniteError, MemoryExhaustedError: see `BatchReader`; the batches before this one are kept.
        StoppedEarlyError: one of several ranks was asked to stop; what they had begun is finished and kept.
        P2DError: what `compute` raises on another rank.
    """
    compute = BatchReader(job, bench, label, batches, compute, **options)
    with (
        job.timer.phase(phase),
        _FinishedBatches(job, bench, label, batches, phase) as finished,
        # Batches fill the same number of tokens, so their count tells the time that is left; that of rows does not.
        job.progress.task(f"{label}, batches", len(batches), found=finished.found) as advance,
    ):
        for start in range(0, len(batches), distributed.world_size()):
            with signals.deferred():
                entries = finished.round(start, compute)
            for position, entry in entries:
                advance(1)
                yield batches[position], entry.arrays


class _FinishedBatches:
    """The rounds of `finish_batches`. Rank 0 keeps the journal."""

    def __init__(
        self, job: StageRun[Any], bench: Workbench, label: str, batches: Sequence[list[int]], phase: str
    ) -> None:
        self._job, self._bench, self._batches, self._phase = job, bench, batches, phase
        self._label = label
        self._journal: Journal | None = None
        self._known: frozenset[int] = frozenset()

    @property
    def found(self) -> int:
        """How many batches an interrupted run has finished."""
        return len(self._known)

    def __enter__(self) -> _FinishedBatches:
        self._known = distributed.from_main(self._open)
        if self.found:
            self._job.progress.note(f"{self._label}: {self.found} of {len(self._batches)} batches were finished before")
        return self

    def __exit__(self, *raised: Any) -> None:
        if self._journal is not None:
            self._journal.__exit__(*raised)

    def _open(self) -> frozenset[int]:
        self._journal = self._job.journal(self._label, self._batches)
        return frozenset(self._journal.finished)

    def round(self, start: int, compute: Callable[[list[int]], Mapping[str, NDArray[Any]]]) -> list[tuple[int, Entry]]:
        """Compute the batches from `start` on, one a rank, and return them with those that were finished before."""
        mine = start + distributed.rank()
        positions = range(start, min(start + distributed.world_size(), len(self._batches)))
        is_new = mine in positions and mine not in self._known
        tokens = self._bench.tokens
        told = distributed.exchange_results(lambda: self._work(positions, mine if is_new else None, compute))
        self._bench.tokens = tokens
        found = told[0].before | {part.position: part.entry for part in told if part.entry is not None}
        fresh = [position for position in positions if position not in self._known]
        for position in positions:
            entry = found[position]
            if position in self._known:
                self._job.timer.charge(self._phase, entry.seconds)
            elif self._journal is not None:
                # The ranks worked side by side: their seconds together are those of the slowest.
                seconds = max(found[other].seconds for other in fresh) / len(fresh)
                self._journal.add(position, entry.arrays, seconds=seconds, tokens=entry.tokens)
            self._bench.tokens += entry.tokens
        if distributed.world_size() > 1 and (name := next((part.stopped_by for part in told if part.stopped_by), None)):
            distributed.stop_together(name)
        return [(position, found[position]) for position in positions]

    def _work(
        self,
        positions: range,
        mine: int | None,
        compute: Callable[[list[int]], Mapping[str, NDArray[Any]]],
    ) -> _Part:
        """Compute this rank's batch, if it has one; rank 0 brings what the journal has of the others."""
        entry = None
        if mine is not None:
            started, tokens = time.perf_counter(), self._bench.tokens
            arrays = dict(compute(self._batches[mine]))
            entry = Entry(arrays, time.perf_counter() - started, self._bench.tokens - tokens)
        journal = self._journal
        before = (
            {} if journal is None else {place: journal.finished[place] for place in positions if place in self._known}
        )
        return _Part(-1 if mine is None else mine, entry, before, signals.stop_requested())


@dataclass(frozen=True)
class _Part:
    """What a rank brings to a round."""

    position: int
    """Of its batch; -1 for none."""
    entry: Entry | None
    before: dict[int, Entry]
    """What the journal has of this round (rank 0 only)."""
    stopped_by: str | None


def heads_by_layer(heads_LH: NDArray[np.bool_]) -> dict[int, tuple[int, ...]]:
    """Return the heads of each layer that has some."""
    return {layer: tuple(np.flatnonzero(row).tolist()) for layer, row in enumerate(heads_LH) if row.any()}


def open_workbench(job: StageRun[Any], files: ModelFiles, config: RowOptions) -> Workbench:
    """Load a model for reading rows.

    Args:
        job: the running stage; loading is charged to its `load` phase.
        files: the model.
        config: precision, device, template and limits.

    Raises:
        UsageError: the model is to be divided by `--device-map` in each of several processes.
    """
    if config.device_map is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            f"--device-map {config.device_map} divides one model over all devices, and there are"
            f" {os.environ['WORLD_SIZE']} processes that each want one",
            hint="start a single process, or leave out --device-map where a model fits on one device",
        )
    with job.timer.phase("load"):
        device = str(resolve_device(distributed.own_device(config.device)))
        job.use_device(device)
        dtype = resolve_dtype(config.dtype, device)
        tokenizer, template = open_prompts(job, files, config)
        model = load_model(files.folder, dtype=dtype, device=device, device_map=config.device_map)
        if config.device_map is not None:
            device = str(input_device(model))
            job.use_device(device)
            job.devices = placed_on(model)
            job.facts["device_map"] = job.devices
    return Workbench(
        model=model,
        tokenizer=tokenizer,
        template=template,
        device=device,
        precision=str(dtype).removeprefix("torch."),
        max_length=context_length(config.max_length, files.config),
        token_budget=config.token_budget,
    )
