"""The one reader: it shows rows to a model, and reads passes over them. Imports torch only to do so.

It encodes rows, batches them, keeps finished batches in a journal, reads a batch in halves where memory is short,
checks that what it read is finite, counts tokens, shares the work between ranks, and hands each batch to whoever asked
for it.

Legend: B batch, T tokens, K selected heads in (layer, head) order, S demos.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import cached_property, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from p2d_cli.artifacts.journal import Entry, Journal
from p2d_cli.config import RowOptions
from p2d_cli.core.geometry import HeadGeometry
from p2d_cli.core.head_layout import ModelLayout
from p2d_cli.core.turns import TurnFrame
from p2d_cli.data.batching import pad_mask
from p2d_cli.data.episodes import EncodedEpisode, encode_episode
from p2d_cli.data.prompts import EncodedExample, LossOn, PromptTemplate
from p2d_cli.data.records import Record
from p2d_cli.engine.passes import Arrays, Pass, Steps
from p2d_cli.engine.prompts import context_length, open_prompts
from p2d_cli.engine.stage_run import StageRun
from p2d_cli.errors import (
    LESS_MEMORY,
    NOT_FINITE_HINT,
    MemoryExhaustedError,
    NonFiniteError,
    UsageError,
    first_line,
    is_out_of_memory,
)
from p2d_cli.modeling.model_files import ModelFiles
from p2d_cli.modeling.suitability import read_layout
from p2d_cli.modeling.token_ids import KnownIds
from p2d_cli.runtime import distributed, signals

if TYPE_CHECKING:
    import torch


Item = TypeVar("Item")
Encoded = TypeVar("Encoded")
Completion = tuple[Sequence[int], int]
"""Token ids of prompt and completion, and how many of them stand before the answer."""
ROWS_NAMED = 3
"""How many rows of a batch an error names."""


class Reader:
    """How a stage shows rows to a model: its tokenizer, its template and its limits.

    Encoding and reading are charged to the two `phases`.
    """

    def __init__(
        self, job: StageRun[Any], files: ModelFiles, *, light: bool, phases: tuple[str, str] = ("prepare", "score")
    ) -> None:
        self.job = job
        self.files = files
        self.config: RowOptions = job.config
        self.max_length = context_length(self.config.max_length, files.config)
        self.token_budget = self.config.token_budget
        self._light = light
        self._prepare, self._phase = phases

    @cached_property
    def _prompts(self) -> tuple[Any, PromptTemplate]:
        with self.job.timer.phase("load"):
            return open_prompts(self.job, self.files, light=self._light)

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self._prompts[0]

    @property
    def template(self) -> PromptTemplate:
        """How a row becomes text."""
        return self._prompts[1]

    @cached_property
    def known_ids(self) -> KnownIds:
        """What refuses tokens that the model has no embedding for."""
        count = self.job.num_embeddings
        return KnownIds(self.tokenizer, sys.maxsize if count is None else count)

    @property
    def hidden_size(self) -> int:
        """Width of the model's hidden states, also of a model whose heads cannot be told apart."""
        return self.files.hidden_size

    @property
    def shape(self) -> HeadGeometry:
        """How many heads the model has."""
        raise NotImplementedError

    @property
    def precision(self) -> str:
        """The model's precision."""
        raise NotImplementedError

    def shape_without_weights(self) -> HeadGeometry:
        """Return how many heads the model has, found from its config alone."""
        with self.job.timer.phase("load"):
            return read_layout(self.files).geometry

    def examples(self, records: Sequence[Record], loss_on: LossOn = "last") -> list[EncodedExample]:
        """Tokenize rows as prompt and completion."""

        def encode(record: Record) -> EncodedExample:
            encoded = self.template.encode_example(self.tokenizer, record, self.max_length, loss_on=loss_on)
            self.known_ids.require(record.where, encoded.input_ids)
            return encoded

        return self._each(f"examples {loss_on}", records, encode)

    def completions(self, records: Sequence[Record]) -> list[Completion]:
        """Tokenize rows whose answers are to be weighed."""
        return [(example.input_ids, example.answer_start) for example in self.examples(records)]

    def prompts(self, records: Sequence[Record], room: int) -> list[list[int]]:
        """Tokenize rows up to where the model is to answer, each in at most `room` tokens."""

        def encode(record: Record) -> list[int]:
            ids = self.template.encode_prompt(self.tokenizer, record, room)
            self.known_ids.require(record.where, ids)
            return ids

        return self._each("prompts", records, encode)

    def frames(self, records: Sequence[Record]) -> list[TurnFrame]:
        """Return what stands around the answer to each row."""
        return self._each("frames", records, lambda record: self.template.frame(self.tokenizer, record))

    def reference_lengths(self, records: Sequence[Record]) -> list[int]:
        """Return the tokens of each row's answer, its end included, where a plan needs them."""
        del records
        return []

    def can_pack(self, longest: int) -> bool:
        """Say whether the model reads several answers to so long a prompt as one sequence; a plan assumes so.

        That takes a mask for each pair of tokens, which flash attention does not.
        """
        del longest
        return not self.config.asks_for_flash

    def episodes(self, shown: Sequence[tuple[Sequence[Record], Sequence[Record]]]) -> list[EncodedEpisode]:
        """Tokenize demos followed by queries with their reference answers."""

        def encode(episode: tuple[Sequence[Record], Sequence[Record]]) -> EncodedEpisode:
            demos, queries = episode
            encoded = encode_episode(self.template, self.tokenizer, demos, queries, max_length=self.max_length)
            self.known_ids.require(f"{(*demos, *queries)[0].where} and others", encoded.input_ids)
            return encoded

        return self._each("episodes", shown, encode)

    def _each(self, what: str, items: Sequence[Item], encode: Callable[[Item], Encoded]) -> list[Encoded]:
        del what
        with self.job.timer.phase(self._prepare):
            return [encode(item) for item in items]

    def run(self, passes: Iterable[Pass | Steps]) -> None:
        """Do passes, one after the other; a pass is made when its turn has come."""
        raise NotImplementedError


class ModelReader(Reader):
    """Reads rows with the model, which is loaded for the first batch.

    Sequences are padded on the right and passed with a mask of ones: under causal attention nothing real looks at
    the padding, and the attention kernel is free to take its fast causal path.
    """

    def __init__(
        self,
        job: StageRun[Any],
        files: ModelFiles,
        *,
        adapter: Path | None = None,
        phases: tuple[str, str] = ("prepare", "score"),
    ) -> None:
        super().__init__(job, files, light=False, phases=phases)
        self.tokens = 0
        """Tokens read so far."""
        self._labels: set[str] = set()
        """Of the passes that were begun."""
        self._adapter = adapter
        self._cuts: dict[str, int] = {}
        """How often batches of a pass are cut in two, as memory has shown to ask for."""

    def import_libraries(self) -> None:
        """Import what reading takes; before anything is timed, since that is no part of the work."""
        from p2d_cli.modeling import attention_capture, generation, head_outputs, loading

        del attention_capture, generation, head_outputs, loading

    @cached_property
    def _loaded(self) -> tuple[Any, str, str]:
        """The model, with its adapter if it has one, its device and its precision.

        Raises:
            UsageError: it is to be divided by `--device-map` in each of several processes.
        """
        from p2d_cli.modeling.loading import input_device, load_model, placed_on, resolve_device, resolve_dtype

        job, divided = self.job, self.config.device_map
        if divided is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UsageError(
                f"--device-map {divided} divides one model over all devices, and there are"
                f" {os.environ['WORLD_SIZE']} processes that each want one",
                hint="start a single process, or leave out --device-map where a model fits on one device",
            )
        with job.timer.phase("load"):
            device = str(resolve_device(distributed.own_device(self.config.device)))
            job.use_device(device)
            dtype = resolve_dtype(self.config.dtype, device)
            attention = self.config.attn_implementation
            model = load_model(self.files.folder, dtype=dtype, device=device, device_map=divided, attention=attention)
            if divided is not None:
                device = str(input_device(model))
                job.use_device(device)
                job.devices = placed_on(model)
                job.facts["device_map"] = job.devices
            if self._adapter is not None:
                from p2d_cli.modeling.head_adapter import load_adapter

                model = load_adapter(model, self._adapter)
        return model, device, str(dtype).removeprefix("torch.")

    @property
    def model(self) -> Any:
        """The model, at rest; loaded when it is first asked for."""
        return self._loaded[0]

    @property
    def device(self) -> str:
        """The device that the model takes its tokens on."""
        return self._loaded[1]

    @property
    def precision(self) -> str:
        """The model's precision."""
        return self._loaded[2]

    @cached_property
    def layout(self) -> ModelLayout:
        """Where each head's weights are."""
        from p2d_cli.modeling.layouts import model_layout

        return model_layout(self.model)

    @property
    def shape(self) -> HeadGeometry:
        """How many heads the model has."""
        return self.layout.geometry

    def can_pack(self, longest: int) -> bool:
        """Say whether the model reads several answers to a prompt of so many tokens as one sequence."""
        from p2d_cli.modeling.choices import can_pack

        return can_pack(self.model, longest)

    # --- ways to read a batch

    def pad(self, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return the sequences as `[B, T]`, padded on the right, on the model's device."""
        return pad_mask(sequences, self.tokenizer.pad_token_id).to(self.device)

    def pad_flags(self, rows: Sequence[Sequence[Any]], fill: int | bool) -> torch.Tensor:
        """Return a mark for each token as `[B, T]`, `fill` for padding, on the model's device."""
        return pad_mask(rows, fill).to(self.device)

    def labelled(self, examples: Sequence[EncodedExample]) -> dict[str, torch.Tensor]:
        """Return `input_ids` and `labels` `[B, T]`; only completion tokens carry a label."""
        from p2d_cli.modeling.gradients import IGNORED_LABEL

        labels = [
            [IGNORED_LABEL] * example.prompt_length + list(example.input_ids[example.prompt_length :])
            for example in examples
        ]
        ids = self.pad([example.input_ids for example in examples])
        return {"input_ids": ids, "labels": self.pad_flags(labels, IGNORED_LABEL)}

    def completion_losses(self, examples: Sequence[Completion]) -> tuple[list[float], list[int]]:
        """Return each completion's log-likelihood, in nats, and its number of tokens; see `score_completions`."""
        from p2d_cli.modeling.generation import score_completions

        return score_completions(self.model, examples, self.tokenizer.pad_token_id)

    def attention(
        self, episodes: Sequence[EncodedEpisode], heads_LH: NDArray[np.bool_], num_segments: int
    ) -> NDArray[np.float64]:
        """Return the mean attention of the heads from query tokens to each demo's, `[B, K, S]`.

        The forward pass ends at the deepest layer that has one of these heads.
        """
        import torch

        from p2d_cli.modeling.attention_capture import run_captured

        query_mask_BT, segment_BT = self.episode_masks(episodes)
        input_ids_BT = self.pad([episode.input_ids for episode in episodes])
        batch = {"input_ids": input_ids_BT, "attention_mask": torch.ones_like(input_ids_BT)}
        attention_BKS = run_captured(
            self.model, batch, heads_by_layer(heads_LH), query_mask_BT, segment_BT, num_segments
        )
        return attention_BKS.double().cpu().numpy()

    def episode_masks(self, episodes: Sequence[EncodedEpisode]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which tokens are a query's `[B, T]` bool, and which demo each token belongs to `[B, T]`, else -1."""
        query_mask_BT = self.pad_flags([episode.query_mask for episode in episodes], False)
        return query_mask_BT, self.pad_flags([episode.segment_ids for episode in episodes], -1)

    def head_outputs(self, chosen: Sequence[EncodedExample], heads_LH: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Return the mean output of the heads over each answer's tokens, and over the prompt's, float32 `[B, K, 2, d]`.

        Behind the prompt the heads relate answer to prompt, which tells tasks apart whose prompts look alike. The
        forward pass ends at the deepest layer that has one of these heads.
        """
        import torch

        from p2d_cli.modeling.head_outputs import mean_head_outputs

        input_ids_BT = self.pad([example.input_ids for example in chosen])
        masks = [_answer_mask(example) for example in chosen]
        answer_BT = self.pad_flags(masks, 0)
        prompt_BT = self.pad_flags([[1 - is_answer for is_answer in mask] for mask in masks], 0)
        outputs_BKPd = mean_head_outputs(
            self.model,
            self.layout,
            heads_by_layer(heads_LH),
            input_ids_BT,
            torch.ones_like(input_ids_BT),
            torch.stack([answer_BT, prompt_BT], dim=1),
        )
        return np.asarray(outputs_BKPd)

    # --- passes

    def run(self, passes: Iterable[Pass | Steps]) -> None:
        """Do passes, one after the other; a pass is made when its turn has come.

        Raises:
            NonFiniteError: an array has a value that is not finite; the batch and its row are named.
            MemoryExhaustedError: a single row does not fit into memory.
            StoppedEarlyError: one of several ranks was asked to stop; what they had begun is finished and kept.
            P2DError: what a read raises on another rank.
        """
        for one in passes:
            if isinstance(one, Steps):
                one.run(self)
                continue
            if one.label in self._labels:
                raise ValueError(f"two passes are called '{one.label}': tell them apart by `work` or `part`")
            self._labels.add(one.label)
            self._loaded  # noqa: B018 - before anything is timed as reading
            for batch, arrays in self._finish(one):
                one.take(batch, arrays)

    def _finish(self, one: Pass) -> Iterator[tuple[list[int], Arrays]]:
        """Yield each batch with its arrays, in order, on every rank; each is computed once.

        Those that an interrupted run had finished are taken from its journal, and the seconds and tokens that they cost
        then are charged now. Several ranks take turns: in each round they compute one batch each, and tell each other
        what came out, so that all of them see all batches. Rank 0 keeps the journal.
        """
        batches, job, size = one.batches(self.token_budget), self.job, distributed.world_size()
        journals: list[Journal] = []

        def open_journal() -> frozenset[int]:
            plan = [[*batch, *(one.lengths[row] for row in batch)] for batch in batches] + [[one.content]]
            journals.append(held.enter_context(job.journal(one.label, plan)))
            return frozenset(journals[0].finished)

        with ExitStack() as held, job.timer.phase(self._phase):
            known = distributed.from_main(open_journal)
            if known:
                job.progress.note(f"{one.label}: {len(known)} of {len(batches)} batches were finished before")
            # Batches fill the same number of tokens, so their count tells the time that is left; that of rows does not.
            task = job.progress.task(f"{one.label}, batches", len(batches), found=len(known))
            advance = held.enter_context(task)
            for start in range(0, len(batches), size):
                places = range(start, min(start + size, len(batches)))
                with signals.deferred():
                    entries = self._round(one, batches, places, known, journals)
                for place, entry in zip(places, entries, strict=True):
                    advance(1)
                    yield batches[place], entry.arrays

    def _round(
        self, one: Pass, batches: Sequence[list[int]], places: range, known: frozenset[int], journals: Sequence[Journal]
    ) -> list[Entry]:
        """Compute the batches at these places, one a rank, and return them with those that were finished before.

        `known` are the places of the latter, which the journal has: rank 0's, the others have none.
        """
        mine = places.start + distributed.rank()

        def work() -> tuple[dict[int, Entry], str | None]:
            found = {place: journal.finished[place] for journal in journals for place in places if place in known}
            if mine in places and mine not in known:
                found[mine] = self._compute(one, batches[mine], f"{mine + 1} of {len(batches)}")
            return found, signals.stop_requested()

        told = distributed.exchange_results(work)
        found = {place: entry for part, _ in told for place, entry in part.items()}
        # The ranks worked side by side: their seconds together are those of the slowest.
        fresh = [found[place].seconds for place in places if place not in known]
        for place in places:
            entry = found[place]
            if place in known:
                self.job.timer.charge(self._phase, entry.seconds)
            for journal in journals if place not in known else ():
                journal.add(place, entry.arrays, seconds=max(fresh) / len(fresh), tokens=entry.tokens)
            self.tokens += entry.tokens
        if distributed.world_size() > 1 and (name := next((stopped for _, stopped in told if stopped), None)):
            distributed.stop_together(name, self.job.kept)
        return [found[place] for place in places]

    def _compute(self, one: Pass, batch: list[int], place: str) -> Entry:
        """Read a batch; in halves, or halves of halves, if it does not fit into memory.

        Later batches of the pass are cut as finely right away: they hold about as many tokens.
        """
        started, tokens = time.perf_counter(), self.tokens
        where = f"{one.label}, batch {place}"
        cuts = self._cuts.get(one.label, 0)
        try:
            arrays = reduce(one.join, (self._read(one, part, cuts) for part in _parts(batch, cuts)))
        except NonFiniteError as problem:
            raise NonFiniteError(f"{where}: {problem.message}", hint=problem.hint) from None
        arrays = arrays if one.keep is None else one.keep(arrays)
        _require_finite(one, batch, arrays, where)
        spent, self.tokens = self.tokens - tokens, tokens
        return Entry(dict(arrays), time.perf_counter() - started, spent)

    def _read(self, one: Pass, part: list[int], cuts: int) -> Arrays:
        from p2d_cli.modeling.memory import release_memory

        try:
            arrays = one.read(self, part)
        except Exception as problem:
            if not is_out_of_memory(problem):
                raise
            found = first_line(problem)
        else:
            self.tokens += one.tokens(part, arrays)
            return arrays
        release_memory(cycles=False)
        if len(part) == 1:
            raise MemoryExhaustedError(
                f"{one.label}: out of memory with {one.name(part[0])} alone: {found}", hint=LESS_MEMORY
            )
        facts = self.job.facts
        facts["out_of_memory"] = facts.get("out_of_memory", 0) + 1
        if cuts + 1 > self._cuts.get(one.label, 0):
            self._cuts[one.label] = cuts + 1
            pieces = 2 ** (cuts + 1)
            self.job.progress.note(f"{one.label}: out of memory; going on with batches cut into {pieces} parts")
        return reduce(one.join, (self._read(one, piece, cuts + 1) for piece in _parts(part, 1)))


def _parts(batch: list[int], cuts: int) -> list[list[int]]:
    """Cut a batch so many times, each part of more than one row in two."""
    parts = [batch]
    for _ in range(cuts):
        halves = ((part[: len(part) // 2], part[len(part) // 2 :]) for part in parts)
        parts = [half for pair in halves for half in pair if half]
    return parts


def _require_finite(one: Pass, batch: list[int], arrays: Arrays, where: str) -> None:
    for name, array in arrays.items():
        if name in one.unchecked or not np.issubdtype(array.dtype, np.floating) or np.isfinite(array).all():
            continue
        rows = np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(axis=1))
        names = [one.name(row) for row in ([batch[row] for row in rows] if len(array) == len(batch) else batch)]
        more = f" and {len(names) - ROWS_NAMED} more" if len(names) > ROWS_NAMED else ""
        raise NonFiniteError(
            f"{where}: {name} of {', '.join(names[:ROWS_NAMED])}{more} is not finite; nothing was written",
            hint=NOT_FINITE_HINT,
        )


def _answer_mask(example: EncodedExample) -> list[int]:
    # Of an answer that was cut away as a whole, what leads up to it stands for it.
    start = min(example.answer_start, len(example.input_ids) - 1)
    return [0] * start + [1] * (len(example.input_ids) - start)


def heads_by_layer(heads_LH: NDArray[np.bool_]) -> dict[int, tuple[int, ...]]:
    """Return the heads of each layer that has some."""
    return {layer: tuple(np.flatnonzero(row).tolist()) for layer, row in enumerate(heads_LH) if row.any()}
