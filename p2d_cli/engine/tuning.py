"""How a model is trained within the memory there is, and taken up again where it was interrupted.

Legend: L layers, H query heads a layer.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from p2d_cli.artifacts.checkpoints import Checkpoint, discard_newer, newest_checkpoint, seal_checkpoint, updates_of
from p2d_cli.artifacts.unfinished import RATES_FOLDER
from p2d_cli.config import TrainConfig
from p2d_cli.core.geometry import SelectedHeads
from p2d_cli.core.head_layout import PROJECTIONS, Placement, weights_of
from p2d_cli.data.prompts import EncodedExample, encoding_notes
from p2d_cli.data.records import Record
from p2d_cli.engine.rate_probe import PROBED_FACTORS, TOO_FEW_ROWS, RateProbe, lent, probed
from p2d_cli.engine.reader import Reader
from p2d_cli.engine.stage_run import StageRun
from p2d_cli.engine.training_defaults import batch_size_for, default_learning_rate
from p2d_cli.errors import (
    DataError,
    MemoryExhaustedError,
    NonFiniteError,
    StoppedEarlyError,
    UsageError,
    first_line,
    is_out_of_memory,
)
from p2d_cli.modeling.model_files import ModelFiles
from p2d_cli.modeling.quantised import quantisation_of
from p2d_cli.modeling.ranks import Ranks
from p2d_cli.modeling.suitability import read_placed_rows
from p2d_cli.runtime import distributed, signals
from p2d_cli.runtime.hardware import available_bytes
from p2d_cli.runtime.progress import Advance
from p2d_cli.runtime.seeding import derive_seed, seed_everything
from p2d_cli.runtime.timing import Throughput

if TYPE_CHECKING:
    import torch

    from p2d_cli.modeling.completion_trainer import UpdateDone
    from p2d_cli.modeling.training import TrainingPlan, TrainingRecord
    from p2d_cli.modeling.training_batches import TrainingRow

T = TypeVar("T")
TRAIN_WITH_LESS = "lower --max-length, give --checkpointing, train less with --scope heads, or take a larger device"
FROZEN_SHARE = 0.25
"""How much of the memory that is available the outputs of frozen layers may take."""


@dataclass(frozen=True)
class TokenizedRows:
    """Rows to learn from, or to look at."""

    records: tuple[Record, ...]
    """Those whose completion is not cut away as a whole."""
    examples: tuple[EncodedExample, ...]
    truncated: int
    notes: tuple[str, ...]

    @classmethod
    def read(cls, reader: Reader, records: Sequence[Record]) -> TokenizedRows:
        """Tokenize rows.

        Raises:
            DataError: truncation left nothing to learn from.
        """
        examples = reader.examples(records, reader.job.config.loss_on)
        pairs = [pair for pair in zip(records, examples, strict=True) if len(pair[1].input_ids) > pair[1].answer_start]
        if not pairs:
            raise DataError(
                f"--max-length {reader.max_length} cuts off the completions of all {len(records)} rows: nothing to"
                " learn from",
                hint="raise --max-length",
            )
        return cls(
            records=tuple(record for record, _ in pairs),
            examples=tuple(example for _, example in pairs),
            truncated=sum(example.truncated > 0 for example in examples),
            notes=encoding_notes(examples, reader.max_length),
        )

    def only(self, places: Sequence[int]) -> TokenizedRows:
        """Return the rows at some places."""
        chosen = ((self.records[place], self.examples[place]) for place in places)
        records, examples = zip(*chosen, strict=True)
        return replace(self, records=records, examples=examples)

    @cached_property
    def sizes(self) -> list[tuple[int, int]]:
        """Return the tokens of each row, and those of them that are learnt."""
        return [(len(example.input_ids), sum(example.label_mask)) for example in self.examples]

    def to_training(self) -> list[TrainingRow]:
        """Return the rows as a training takes them."""
        from p2d_cli.modeling.gradients import IGNORED_LABEL
        from p2d_cli.modeling.training_batches import TrainingRow

        return [
            TrainingRow(record.where, example.input_ids, tuple(example.labels(IGNORED_LABEL)))
            for record, example in zip(self.records, self.examples, strict=True)
        ]


def is_sharded() -> bool:
    """Say whether `accelerate launch` was told to shard the model over the ranks."""
    return distributed.world_size() > 1 and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


class _Figures:
    """What the bar of a training says: how the last update went, and the last loss on held-out rows."""

    def __init__(self, advance: Advance) -> None:
        self._advance = advance
        self._tokens = Throughput()
        self._update: list[str] = []
        self._held_out: list[str] = []

    def update(self, done: UpdateDone) -> None:
        """Count an update."""
        speed = self._tokens.add(done.tokens, done.seconds)
        self._update = [f"loss {done.loss:.3f}", f"lr {done.learning_rate:.1e}", f"{speed:,.0f} tokens/s"]
        self._advance(done.count, self._text())

    def look(self, loss: float) -> None:
        """Say what was found on held-out rows."""
        self._held_out = [f"held-out {loss:.3f}"]
        self._advance(0, self._text(), at_once=True)

    def _text(self) -> str:
        return " · ".join(self._update + self._held_out)


class Tuning:
    """One training of a model: with scope heads, of the heads `heads`.

    Raises:
        UsageError: it is to be sharded, and its weights cannot be.
    """

    def __init__(self, job: StageRun[TrainConfig], files: ModelFiles, heads: SelectedHeads | None) -> None:
        self._job = job
        self.config = job.config
        self.files = files
        self.heads = heads
        self.probe: RateProbe | None = None
        """The rates that were tried beforehand."""
        self.warnings: list[str] = []
        """What a user should know of the result, a sentence each."""
        self._kept = 0
        """The update behind which the newest checkpoint was written; 0 if there is none."""
        quantised = quantisation_of(files)
        if quantised is not None and not quantised.shards and is_sharded():
            raise UsageError(
                f"the weights of {files.spec} are quantised ({quantised.name}), which FSDP2 cannot shard",
                hint="start it with torchrun or a config without FSDP, so that every process holds the whole model",
            )

    @cached_property
    def device(self) -> str:
        """The device to train on."""
        from p2d_cli.modeling.loading import resolve_device

        device = str(resolve_device(distributed.own_device(self.config.device)))
        self._job.use_device(device)
        return device

    @cached_property
    def dtype(self) -> torch.dtype:
        """The precision of the frozen part, and of the computation."""
        from p2d_cli.modeling.loading import resolve_dtype

        return resolve_dtype(self.config.dtype, self.device)

    def batch_size(self, rows: int) -> int:
        """Return the rows of an update, out of so many; `auto` does not depend on the number of processes."""
        config = self.config
        if config.batch_size != "auto":
            return config.batch_size
        return batch_size_for(rows, config.epochs, config.accumulation)

    @cached_property
    def placed(self) -> dict[str, Placement]:
        """The weight rows and columns that are trained, by module, where they are those of heads."""
        if self.heads is None:
            return {}
        return read_placed_rows(self.files, self.heads.selected_LH, self.config.projections, self.config.channels)

    @cached_property
    def default_rate(self) -> float:
        """The peak learning rate where none is named; channels count as heads of so many weights."""
        share = None if self.heads is None else self.heads.share
        if self.heads is not None and self.config.channels:
            projections = self.config.projections or PROJECTIONS
            alone = read_placed_rows(self.files, self.heads.selected_LH, projections, 0.0)
            share = self.heads.share * weights_of(self.placed) / weights_of(alone)
        return default_learning_rate(self.config.resolved_scope, self.files.hidden_size, share)

    @property
    def rate(self) -> float:
        """The peak learning rate, as long as none was probed."""
        return self.default_rate if self.config.lr in (None, "probe") else float(self.config.lr)

    def settings(self, rows: int) -> TrainingPlan:
        """Return how so many rows are trained on."""
        from p2d_cli.modeling.training import TrainingPlan

        config = self.config
        names = {one.name for one in fields(TrainingPlan)}
        alike = {name: value for name, value in config if name in names}
        return TrainingPlan(
            **alike
            | {
                "learning_rate": self.rate,
                "batch_size": self.batch_size(rows),
                "autocast": str(self.dtype).removeprefix("torch."),
                "device": self.device,
                "seed": derive_seed(config.seed, "train"),
                "trackers": config.tracker,
                "packing": config.tries_packing,
                "frozen_memory": int(FROZEN_SHARE * available_bytes()),
            }
        )

    def build(self) -> tuple[Any, bool]:
        """Load the model and prepare it for training, each time from the same random numbers; say if it packs rows."""
        from p2d_cli.modeling.head_adapter import (
            attach_heads,
            attach_lora,
            prepare_full,
            rank_stabilized,
            unfreeze_attention,
        )
        from p2d_cli.modeling.loading import load_model

        config, scope = self.config, self.config.resolved_scope
        with self._job.timer.phase("load"):
            seed_everything(derive_seed(config.seed, "train"))
            four_bit = config.base_quantization == "4bit"
            # A model that is to be sharded may not fit where it goes as a whole.
            place = "cpu" if is_sharded() else self.device
            model = load_model(
                self.files.folder,
                dtype=self.dtype,
                device=place,
                four_bit=four_bit,
                attention=config.attn_implementation,
            )
        packs = self._packs(model)
        with self._job.timer.phase("prepare"):
            if scope == "heads" and self.heads is not None:
                model = attach_heads(model, self.heads.selected_LH, config.projections, config.channels)
            elif scope == "lora":
                rank, alpha = config.lora_rank, config.lora_alpha
                scaled = alpha if config.lora_scaling == "plain" else rank_stabilized(alpha, rank)
                model = attach_lora(model, rank, scaled, config.resolved_lora_targets, config.lora_dropout)
            elif scope == "attention":
                unfreeze_attention(model)
            else:
                prepare_full(model)
        return model, packs

    def _packs(self, model: Any) -> bool:
        """Say whether rows are packed; a model that mixes packed rows pads them, or is refused if it was to pack."""
        from p2d_cli.modeling.training_batches import keeps_rows_apart, require_packing

        if self.config.packing:
            require_packing(model)
        elif self.config.tries_packing:
            # All ranks do the same, though one of them may round otherwise.
            return all(distributed.exchange(keeps_rows_apart(model)))
        return self.config.tries_packing

    # --- training

    def train(
        self, rows: Sequence[TrainingRow], eval_rows: Sequence[TrainingRow], pad_id: int
    ) -> tuple[Any, TrainingPlan, TrainingRecord]:
        """Train with the largest micro-batch that fits into memory, none larger than the settings say.

        A training that runs out of memory is begun anew with a smaller one, from the weights that it began with: it
        ends with the very numbers that it would have had with the smaller one in the first place.
        """
        plan = self.settings(len(rows))
        if self.config.lr == "probe":
            plan = replace(plan, learning_rate=self._probe(plan, rows, eval_rows, pad_id))

        def work(model: Any, plan: TrainingPlan) -> tuple[Any, TrainingPlan, TrainingRecord]:
            return model, plan, self._train(model, rows, eval_rows, plan, pad_id)

        return self._fitting(self._as_far_as_known(plan), work)

    def _fitting(self, plan: TrainingPlan, work: Callable[[Any, TrainingPlan], T]) -> T:
        """Do work that trains a fresh model, anew with smaller micro-batches where it runs out of memory."""
        from p2d_cli.modeling.memory import release_memory

        while True:
            model, packs = self.build()
            plan = replace(plan, packing=packs)
            try:
                return work(model, plan)
            except StoppedEarlyError as stopped:
                # All ranks stop here; saying it once is enough.
                distributed.raise_together(stopped)
                raise
            except Exception as problem:
                if not is_out_of_memory(problem):
                    raise
                found = first_line(problem)
            del model
            release_memory(cycles=True)
            plan = self._smaller(plan, found)

    def _probe(
        self, plan: TrainingPlan, rows: Sequence[TrainingRow], eval_rows: Sequence[TrainingRow], pad_id: int
    ) -> float:
        """Return the rate that leaves the lowest loss on held-out rows behind a few updates, and note what each left.

        What an interrupted run has tried is not tried again.
        """
        learnt, looked_at = lent(rows, eval_rows, self.config.seed)
        if not looked_at:
            self.warnings.append(TOO_FEW_ROWS)
            return plan.learning_rate
        updates = self._updates(len(rows), plan)
        folder = self._job.scratch(RATES_FOLDER)
        done = distributed.from_main(lambda: RateProbe.load(folder))
        self._job.timer.charge("probe", done.seconds)
        with self._job.timer.phase("probe"):
            for rate in (float(f"{plan.learning_rate * factor:.2g}") for factor in PROBED_FACTORS):
                if rate not in done.losses:
                    started = time.perf_counter()
                    tried = probed(plan, rate, len(learnt), updates)
                    loss, tokens = self._fitting(tried, partial(self._try, learnt, looked_at, pad_id))
                    done = done.adding(rate, loss, tokens, time.perf_counter() - started)
                    if self._job.is_main:
                        done.save(folder)
                    if distributed.world_size() > 1:
                        distributed.stop_together(signals.stop_requested(), self._job.kept)
        self._job.progress.note(f"--lr probe: held-out loss {done.described()}: {done.best:g} is taken")
        self.probe = done
        return done.best

    def _try(
        self,
        rows: Sequence[TrainingRow],
        held_out: Sequence[TrainingRow],
        pad_id: int,
        model: Any,
        plan: TrainingPlan,
    ) -> tuple[float, int]:
        """Return the loss of held-out rows behind a short training, and the tokens it read; inf if it diverged."""
        from p2d_cli.modeling.completion_trainer import TrainingHooks
        from p2d_cli.modeling.training import train

        scratch, label = self._job.scratch(RATES_FOLDER), f"try rate {plan.learning_rate:g}"
        with self._job.progress.task(label, self._updates(len(rows), plan)) as advance:
            figures = _Figures(advance)
            try:
                record = train(
                    model,
                    rows,
                    plan,
                    pad_id=pad_id,
                    scratch=scratch,
                    eval_rows=held_out,
                    ranks=self._ranks(),
                    hooks=TrainingHooks(on_step=figures.update, on_look=figures.look),
                )
            except NonFiniteError:
                return math.inf, 0
        loss = record.log[-1]["eval_loss"]
        return loss if math.isfinite(loss) else math.inf, record.tokens

    @staticmethod
    def _updates(rows: int, plan: TrainingPlan) -> int:
        from p2d_cli.modeling.training import planned_updates

        return min(planned_updates(rows, plan), plan.max_steps or sys.maxsize)

    @staticmethod
    def _ranks() -> Ranks:
        return Ranks(
            distributed.rank(),
            distributed.world_size(),
            exchange=distributed.exchange,
            raise_together=distributed.raise_together,
        )

    def _promise(self) -> str:
        if not self._kept:
            return "no update is kept yet, the same command begins the training anew"
        return f"update {self._kept} is the last that is kept, {self._job.options.go_on} there"

    def _notice(self) -> None:
        self._job.progress.note("finishing what has begun, to keep it; Ctrl-C again does not wait for it")

    def _as_far_as_known(self, plan: TrainingPlan) -> TrainingPlan:
        """Begin with the micro-batch that an interrupted run had come down to; several processes keep to theirs."""
        if distributed.world_size() > 1:
            return plan
        tried = self._job.scratch("checkpoints").glob("micro-batch-*")
        smallest = min([plan.micro_batch, *(int(folder.name.rpartition("-")[2]) for folder in tried)])
        return replace(plan, accumulation=plan.batch_size // smallest)

    def _smaller(self, plan: TrainingPlan, found: str) -> TrainingPlan:
        """Return the plan with half the micro-batch, or the next smaller one that divides the batch.

        Raises:
            MemoryExhaustedError: it is a single row already, or other processes would go on with theirs.
        """
        if distributed.world_size() > 1:
            raise MemoryExhaustedError(
                f"training: out of memory with micro-batches of {plan.micro_batch} rows: {found}",
                hint=f"--accumulation {2 * plan.accumulation}, or {TRAIN_WITH_LESS}",
            )
        if plan.micro_batch == 1:
            raise MemoryExhaustedError(f"training: out of memory with a single row: {found}", hint=TRAIN_WITH_LESS)
        sizes = range(1, plan.micro_batch // 2 + 1)
        size = max(size for size in sizes if plan.batch_size % size == 0)
        self._job.progress.note(
            f"out of memory with micro-batches of {plan.micro_batch} rows: beginning anew with {size}, "
            f"{plan.batch_size // size} of them an update"
        )
        self._kept = 0
        shutil.rmtree(self._checkpoints(plan))
        return replace(plan, accumulation=plan.batch_size // size)

    def _checkpoints(self, plan: TrainingPlan) -> Path:
        return self._job.scratch(f"checkpoints/micro-batch-{plan.micro_batch}")

    def _train(
        self,
        model: Any,
        rows: Sequence[TrainingRow],
        eval_rows: Sequence[TrainingRow],
        plan: TrainingPlan,
        pad_id: int,
    ) -> TrainingRecord:
        """Train, from the newest checkpoint of an interrupted run if there is one, charging what that run spent."""
        from p2d_cli.modeling.completion_trainer import TrainingHooks
        from p2d_cli.modeling.head_adapter import freeze_placing
        from p2d_cli.modeling.training import ResumePoint, train

        job, scratch = self._job, self._checkpoints(plan)
        earlier = distributed.from_main(lambda: self._earlier(scratch))
        job.timer.charge("train", earlier.progress["seconds"] if earlier else 0.0)
        spent, started = job.timer.seconds["train"], time.perf_counter()
        updates = self._updates(len(rows), plan)
        self._kept = found = earlier.updates if earlier else 0
        job.promise = self._promise
        job.until_committed(signals.courteous(self._notice))
        with (
            job.timer.phase("train"),
            job.progress.task(f"train ({self.config.resolved_scope})", updates, found=found) as advance,
            # An update is worth finishing; behind the last one there is nothing left but to write the result.
            signals.deferred(),
        ):
            figures = _Figures(advance)

            def seal(folder: Path, tokens: int) -> None:
                seconds = spent + time.perf_counter() - started
                if job.is_main:
                    seal_checkpoint(folder, {"seconds": seconds, "tokens": tokens, "work": job.key})
                self._kept = updates_of(folder)

            record = train(
                model,
                rows,
                plan,
                pad_id=pad_id,
                scratch=scratch,
                eval_rows=eval_rows,
                ranks=self._ranks(),
                resume=ResumePoint(earlier.folder, earlier.progress["tokens"]) if earlier else None,
                hooks=TrainingHooks(
                    on_step=figures.update,
                    on_look=figures.look,
                    on_checkpoint=seal,
                    tell=job.progress.note,
                    go_on=job.options.go_on,
                    should_stop=lambda: next(filter(None, distributed.exchange(signals.stop_requested())), None),
                    after_loading=freeze_placing if self.config.resolved_scope == "heads" else lambda _: None,
                ),
            )
            job.see_through()
            return record

    def _earlier(self, scratch: Path) -> Checkpoint | None:
        checkpoint, problems = newest_checkpoint(scratch, work=self._job.key)
        for problem in problems:
            self._job.progress.note(f"not going on from {problem}")
        if checkpoint is not None:
            self._job.progress.note(f"going on from {checkpoint.folder.name} of the interrupted run")
        discard_newer(scratch, checkpoint)
        return checkpoint
