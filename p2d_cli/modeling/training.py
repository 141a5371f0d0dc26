"""The training loop: Hugging Face Trainer, with logits and loss on completion tokens only.

A fused loss such as Liger's, which holds no logits at all, is left out. It takes the place of the model's own forward,
where these are gathered, and needs Triton. By `p2d_cli.engine.cost.learn_bytes` logits take 0.01 (8B) to 0.07 (1B) of
the memory for answers of 8 tokens in rows of 64, 0.19 to 0.50 for 512 in 1,024; `--accumulation` lowers them as well.

Legend: B batch, T tokens, n completion tokens of a batch, V vocabulary.
"""

from __future__ import annotations

import errno
import math
import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Sampler
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainingArguments

from p2d_cli.core.batches import MEGABATCHES
from p2d_cli.errors import (
    ArtifactError,
    InterruptedEarlyError,
    NonFiniteError,
    P2DError,
    StoppedEarlyError,
    UsageError,
    first_line,
)
from p2d_cli.modeling.frozen_layers import FrozenLayers, frozen_layers
from p2d_cli.modeling.gradients import IGNORED_LABEL
from p2d_cli.modeling.head_adapter import enable_checkpointing
from p2d_cli.modeling.hidden_store import HiddenStates, KeptWhere, Tokens, place_for
from p2d_cli.modeling.likelihood import answer_logits_only, are_alike, padded
from p2d_cli.modeling.loading import attention_that_runs, input_device, quiet_transformers

Batch = dict[str, Any]
_CHECKPOINTS_KEPT = 2
_PROBED_TOKENS = 8


@dataclass(frozen=True)
class TrainingRow:
    """One row as tokens."""

    name: str
    """What messages call it."""
    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    """The ids of the tokens to learn, -100 elsewhere; not shifted."""


@dataclass(frozen=True)
class TrainingPlan:
    """How to train; see `p2d_cli.config.TrainConfig` for the meaning of the fields."""

    epochs: float
    max_steps: int | None
    learning_rate: float
    batch_size: int
    accumulation: int
    schedule: str
    warmup_ratio: float
    weight_decay: float
    max_grad_norm: float
    autocast: str
    """Precision of the forward and backward pass; trained weights and their moments are float32."""
    device: str
    seed: int
    checkpointing: bool
    trackers: tuple[str, ...]
    eval_steps: int | None = None
    patience: int | None = None
    checkpoint_minutes: float = math.inf
    packing: bool = False
    cache_frozen: bool = True
    frozen_memory: int = 2**30
    """Bytes of memory that the outputs of frozen layers may take."""
    keeps_best: bool = True
    """Whether the weights of the lowest held-out loss are kept, rather than the last ones."""

    @property
    def micro_batch(self) -> int:
        """Rows of one forward and backward pass."""
        return self.batch_size // self.accumulation


@dataclass(frozen=True)
class TrainingRecord:
    """What a training did."""

    log: list[dict[str, float]]
    """An entry an update (`loss`) and one a look at held-out rows (`eval_loss`)."""
    steps_done: int
    steps_planned: int
    """Updates that all epochs would take; more than `steps_done` when it was cut short."""
    tokens: int
    """Tokens that were read, padding included, to learn from them; those of held-out rows do not count."""
    tokens_planned: int | None
    """Those that all epochs would read, where it was cut short; None if there were held-out rows."""
    final_loss: float
    best_step: int | None = None
    """The update whose weights were kept, where there were held-out rows."""
    best_eval_loss: float | None = None
    frozen_layers: int = 0
    """The layers below the trained ones that were computed once a row."""
    kept: KeptWhere | None = None
    """Where their outputs were kept."""
    untrained_eval_loss: float | None = None
    """The loss on held-out rows before the first update."""
    full_state: dict[str, torch.Tensor] | None = None
    """Where the model is sharded over ranks: what was trained, whole and on the CPU of rank 0; empty elsewhere."""


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint to go on from."""

    folder: Path
    tokens: int
    """Tokens that were read up to there."""


def _raise(problem: P2DError | None) -> None:
    if problem is not None:
        raise problem


@dataclass(frozen=True)
class Ranks:
    """The processes that share a training, and how they agree; by default there is one, which agrees with itself."""

    rank: int = 0
    size: int = 1
    exchange: Callable[[Any], list[Any]] = lambda value: [value]
    """Tells all ranks a value, and returns what all told, by rank."""
    raise_together: Callable[[P2DError | None], None] = _raise
    """Raises on all ranks the error that one of them has."""


@dataclass(frozen=True)
class UpdateDone:
    """How an update went."""

    count: int
    """Updates done since the last call: more than one where an interrupted training goes on."""
    loss: float
    learning_rate: float
    tokens: int
    """Tokens that all ranks read in it, padding included."""
    seconds: float
    """What it took, from its first micro-batch on."""


@dataclass(frozen=True)
class TrainingHooks:
    """Who wants to know how the training goes."""

    on_step: Callable[[UpdateDone], None] = lambda _: None
    """Called behind each update."""
    on_look: Callable[[float], None] = lambda _: None
    """Called with the loss on held-out rows when it was measured."""
    on_checkpoint: Callable[[Path, int], None] = lambda _folder, _tokens: None
    """Called when a checkpoint has been written, with the tokens read so far."""
    should_stop: Callable[[], str | None] = lambda: None
    """Asked after each update whether to stop there, with a checkpoint to go on from: returns the name of the signal
    that wants it, the same one on all ranks."""
    tell: Callable[[str], None] = lambda _: None
    """Told what the user should know beforehand."""
    after_loading: Callable[[Any], None] = lambda _: None
    """Called with the model after a checkpoint's weights were put into it."""


class CompletionTrainer(Trainer):
    """Trainer whose loss is the mean negative log-likelihood of the completion tokens of an update.

    The mean is over all completion tokens of the update, across micro-batches and ranks, so that accumulation does not
    change the gradient.
    """

    def __init__(
        self,
        *args: Any,
        order: LengthGrouped,
        rate: Callable[[int], float],
        hooks: TrainingHooks,
        tokens_seen: int,
        ranks: Ranks,
        checkpoint_minutes: float,
        packing: bool,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)
        self.order = order
        self.rate = rate
        """The learning rate of the update behind so many others, as a share of the peak."""
        self.ranks = ranks
        self.packing = packing
        self.model_accepts_loss_kwargs = True  # makes Trainer count the labels of an update and not rescale the loss
        self.hooks = hooks
        self.tokens_seen = tokens_seen
        self.frozen: FrozenLayers | None = None
        """The layers that are computed once a row."""
        self._reported = 0
        """The updates that `hooks.on_step` has been told."""
        self._began: float | None = None
        """When the first micro-batch of the update began that is being made."""
        self._tokens_before = self._tokens_behind = tokens_seen
        """Tokens that all ranks had read before the last update and behind it; only rank 0 knows of an earlier run."""
        self._saved_at: int | None = None
        """The update behind which the last checkpoint was written."""
        self._saved_time = time.monotonic()
        self._seconds_between = 60 * checkpoint_minutes
        self._clip = self.accelerator.clip_grad_norm_
        self.accelerator.clip_grad_norm_ = self._clip_finite

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Return a scheduler of p2d's own rates, since transformers' warm-up makes its first update at rate 0."""
        del num_training_steps
        if self.lr_scheduler is None:
            updated: Any = optimizer or self.optimizer
            self.lr_scheduler = LambdaLR(updated, self.rate)
        return self.lr_scheduler

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the loss of a micro-batch, or raise NonFiniteError before an update is made with it."""
        self.tokens_seen += inputs["labels"].numel() if inputs["names"] else 0
        total, count, outputs = self._completion_loss(model, inputs)
        problem, names = None, inputs["names"]
        if not torch.isfinite(total):
            listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            problem = NonFiniteError(
                f"the loss of update {self.state.global_step + 1} is {total.item()}; training stopped before it. "
                f"Its batch: {listed}",
                hint="look at these rows; lower --lr, or try --dtype float32",
            )
        self.ranks.raise_together(problem)
        loss = total / (count if num_items_in_batch is None else num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Note when an update begins, and do a micro-batch of it."""
        self._began = time.perf_counter() if self._began is None else self._began
        return super().training_step(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Keep an entry of the log, and tell what it says."""
        super().log(logs, start_time)
        if "eval_loss" in logs:
            self.hooks.on_look(logs["eval_loss"])
        if "loss" in logs:
            self._report(logs["loss"], logs["learning_rate"])

    def _report(self, loss: float, learning_rate: float) -> None:
        """Tell how the last update went."""
        done = UpdateDone(
            count=self.state.global_step - self._reported,
            loss=loss,
            learning_rate=learning_rate,
            tokens=self._tokens_behind - self._tokens_before,
            seconds=0.0 if self._began is None else time.perf_counter() - self._began,
        )
        self._reported, self._tokens_before, self._began = self.state.global_step, self._tokens_behind, None
        self.hooks.on_step(done)

    def tokens_of_all_ranks(self) -> int:
        """Return how many tokens all ranks have read; all of them have to ask."""
        return sum(self.ranks.exchange(self.tokens_seen))

    def get_train_dataloader(self) -> Any:
        """Return the micro-batches of this rank."""
        if self.ranks.size == 1:
            return super().get_train_dataloader()
        dataset: Any = self.train_dataset
        batches = RankBatches(self.order, self.args.gradient_accumulation_steps, self.ranks)
        return DataLoader(dataset, batch_sampler=batches, collate_fn=self.data_collator)

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """Return the mean loss of all completion tokens of the held-out rows, in nats."""
        found: list[tuple[float, int]] = []
        model: Any = self.model
        model.eval()
        # Batches draw a random number, shuffled or not: the first look must not change what dropout draws later.
        is_first = self.state.global_step == 0
        with torch.no_grad(), torch.random.fork_rng(devices=(), enabled=is_first):
            for batch in self._eval_batches():
                with self.compute_loss_context_manager():
                    loss, tokens, _ = self._completion_loss(model, batch)
                found += self.ranks.exchange((loss.item(), tokens))
                if is_first:
                    self._stop_before_the_first_update()
        model.train()
        losses, counts = zip(*found, strict=True)
        metrics = {f"{metric_key_prefix}_loss": sum(losses) / sum(counts)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _eval_batches(self) -> Iterator[Batch]:
        """Yield this rank's batches of held-out rows; all ranks have as many, some of them empty."""
        if self.ranks.size == 1:
            yield from self.get_eval_dataloader()
            return
        rows: Any = self.eval_dataset
        collator: Any = self.data_collator
        at_a_time = self.args.per_device_eval_batch_size
        for start in range(0, len(rows), at_a_time * self.ranks.size):
            mine = start + at_a_time * self.ranks.rank
            batch: Batch = self._prepare_inputs(collator(rows[mine : mine + at_a_time]))
            yield batch

    def _completion_loss(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, int, Any]:
        """Return the summed loss of the completion tokens, how many they are, and the model's outputs."""
        labels_BT = inputs["labels"]
        predicts_BT = torch.zeros_like(labels_BT, dtype=torch.bool)
        predicts_BT[:, :-1] = labels_BT[:, 1:] != IGNORED_LABEL
        with self._above_frozen(inputs["rows"]), answer_logits_only(self.accelerator.unwrap_model(model), predicts_BT):
            outputs = model(input_ids=inputs["input_ids"], position_ids=inputs.get("position_ids"), use_cache=False)
        targets_n = labels_BT[:, 1:][predicts_BT[:, :-1]]
        total = torch.nn.functional.cross_entropy(outputs.logits[0].float(), targets_n, reduction="sum")
        return total, targets_n.numel(), outputs

    def _above_frozen(self, rows: Sequence[TrainingRow]) -> AbstractContextManager[None]:
        if self.frozen is None:
            return nullcontext()
        return self.frozen.skipped([row.input_ids for row in rows], packing=self.packing)

    def _clip_finite(self, *args: Any, **kwargs: Any) -> Any:
        norm = self._clip(*args, **kwargs)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        # Under float16 the loss scaler looks for infinite gradients, and skips the update, itself.
        if norm is not None and not self.args.fp16 and not math.isfinite(float(norm)):
            raise NonFiniteError(
                f"the gradient of update {self.state.global_step + 1} is not finite; training stopped before it",
                hint="lower --lr, or try --dtype float32",
            )
        return norm

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Pass an update on, look at held-out rows and save where it is time to, and stop behind that if asked to."""
        done, updates = self.state.global_step, self.state.max_steps
        if done > self._reported:  # at the end of an epoch, Trainer comes here once more
            if done >= updates and self.args.eval_strategy != "no":
                self.control.should_evaluate = True
            is_old = time.monotonic() - self._saved_time >= self._seconds_between
            # Saving needs all ranks, and their clocks differ.
            told = self.ranks.exchange((is_old, self.tokens_seen))
            self._tokens_behind = sum(tokens for _, tokens in told)
            if done < updates and told[0][0]:
                self.control.should_save = True
        super()._maybe_log_save_evaluate(*args, **kwargs)
        # Behind the last update there is nothing left but to write the result.
        if done >= updates or self.control.should_training_stop or (name := self.hooks.should_stop()) is None:
            return
        if self._saved_at != done:
            self._save_checkpoint(self.model_wrapped, trial=None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        raise _stopped(name, f"after update {done} of {updates}, which is kept; run the same command again to go on")

    def _stop_before_the_first_update(self) -> None:
        """Stop if asked to while there is nothing to keep yet: in the look at held-out rows that comes first."""
        if (name := self.hooks.should_stop()) is not None:
            raise _stopped(name, "before the first update; run the same command again")

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._save_checkpoint(*args, **kwargs)
        except RuntimeError as problem:
            # All that torch.save says of a disk that is full.
            if "inline_container" not in str(problem):
                raise
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.args.output_dir)) from problem
        self._saved_at, self._saved_time = self.state.global_step, time.monotonic()
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        # Once all have told their tokens, all have written their part.
        self.hooks.on_checkpoint(folder, self.tokens_of_all_ranks())

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        del train_dataset
        return self.order

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_checkpoint(*args, **kwargs)
        self.hooks.after_loading(self.model)


def _stopped(name: str, where: str) -> StoppedEarlyError:
    """Return the error that a signal ends the training with."""
    if name == signal.SIGINT.name:
        return InterruptedEarlyError(f"interrupted {where}")
    return StoppedEarlyError(f"stopped {where}")


class LengthGrouped(Sampler[int]):
    """Rows in random order, those of an update of similar length; an epoch's order depends on seed and number alone."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = tuple(lengths)
        self.batch_size = batch_size
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that comes next; accelerate calls it."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = torch.Generator().manual_seed(self._seed + self._epoch)
        lengths = torch.tensor(self.lengths)
        order = torch.randperm(len(lengths), generator=rng)
        batches: list[torch.Tensor] = []
        for part in torch.split(order, MEGABATCHES * self.batch_size):
            by_length = part[torch.argsort(lengths[part], descending=True, stable=True)]
            batches.extend(torch.split(by_length, self.batch_size))
        # The batch that is not full, if any, stays last.
        full = len(batches) - (len(batches[-1]) < self.batch_size if batches else 0)
        for index in [*torch.randperm(full, generator=rng).tolist(), *range(full, len(batches))]:
            yield from batches[index].tolist()


class RankBatches(Sampler[list[int]]):
    """One rank's micro-batches: each of those of a single process, cut among the ranks row by row.

    All ranks have the same number of them; where an epoch ends, some may be empty.
    """

    def __init__(self, order: LengthGrouped, accumulation: int, ranks: Ranks) -> None:
        self.batch_sampler = order
        """Where Trainer looks for what has epochs."""
        self._rows = order.batch_size // accumulation
        self._ranks = ranks

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that comes next."""
        self.batch_sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return math.ceil(len(self.batch_sampler) / self._rows)

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self.batch_sampler)
        for start in range(0, len(order), self._rows):
            yield order[start : start + self._rows][self._ranks.rank :: self._ranks.size]


def train(
    model: Any,
    rows: Sequence[TrainingRow],
    plan: TrainingPlan,
    *,
    pad_id: int,
    scratch: Path,
    eval_rows: Sequence[TrainingRow] = (),
    resume: ResumePoint | None = None,
    hooks: TrainingHooks | None = None,
    ranks: Ranks | None = None,
) -> TrainingRecord:
    """Train the parameters of `model` that require a gradient.

    Args:
        model: prepared by `p2d_cli.modeling.head_adapter`. At the end it has the weights of the last update or, with
            held-out rows, those of the lowest loss on them.
        rows: what to learn.
        plan: optimisation settings.
        pad_id: token to pad with.
        scratch: folder for checkpoints.
        eval_rows: held-out rows, to choose the best weights by.
        resume: a checkpoint of the same training to go on from. On a CPU in float32 it ends with the same bits.
        hooks: who is told.
        ranks: the processes that share the training; each gets all rows, and they make the updates of a single one.

    Raises:
        NonFiniteError: a loss or gradient is not finite; the rows of its batch are named.
        ArtifactError: the checkpoint to go on from holds pickled objects other than tensors.
        StoppedEarlyError: `hooks.should_stop` said so; there is a checkpoint behind the last update that was made.
    """
    ranks = ranks or Ranks()
    if plan.checkpointing:
        enable_checkpointing(model)
    evaluates = bool(eval_rows)
    planned = planned_updates(len(rows), plan)
    # A training that is cut short warms up as the whole one does, so that its updates are like the whole one's.
    updates, warmup = min(planned, plan.max_steps or planned), math.ceil(plan.warmup_ratio * planned)
    patience = plan.patience
    trainer = CompletionTrainer(
        model=model,
        args=_arguments(
            plan,
            updates,
            warmup,
            scratch,
            num_rows=len(rows),
            evaluates=evaluates,
            begins=resume is None,
            size=ranks.size,
        ),
        train_dataset=list(rows),
        order=LengthGrouped([len(row.input_ids) for row in rows], plan.batch_size, plan.seed),
        rate=lambda done: rate_share(plan.schedule, done, warmup, updates),
        eval_dataset=list(eval_rows) or None,
        data_collator=lambda batch: collate_or_none(batch, pad_id, packing=plan.packing),
        callbacks=[] if patience is None else [EarlyStoppingCallback(early_stopping_patience=patience)],
        hooks=hooks or TrainingHooks(),
        tokens_seen=resume.tokens if resume and ranks.rank == 0 else 0,
        ranks=ranks,
        checkpoint_minutes=plan.checkpoint_minutes,
        packing=plan.packing,
    )
    kept = None
    if updates > updates_per_epoch(len(rows), plan) and not trainer.is_fsdp_enabled:
        kept = _begin_above(trainer, [row.input_ids for row in (*rows, *eval_rows)], plan, pad_id, scratch)
    _run(trainer, resume)
    return _record(trainer, plan, planned, kept, evaluates=evaluates)


def _run(trainer: CompletionTrainer, resume: ResumePoint | None) -> None:
    try:
        with quiet_transformers():
            trainer.train(resume_from_checkpoint=str(resume.folder) if resume else None)
    except UnpicklingError as problem:
        # Trainer loads with weights_only, which refuses whatever is more than tensors and numbers before it runs.
        raise ArtifactError(
            f"a file of the checkpoint {resume.folder if resume else ''} holds more than tensors, and could run code; "
            f"nothing was run: {first_line(problem)}",
            hint="start anew with --force, and find out who wrote there",
        ) from problem


def _begin_above(
    trainer: CompletionTrainer, rows: Sequence[Tokens], plan: TrainingPlan, pad_id: int, scratch: Path
) -> KeptWhere | None:
    """Have the layers below the lowest trained one computed once a row, and say where their outputs are kept."""
    model: Any = trainer.model
    ranks = trainer.ranks
    model.train()
    trainer.frozen = frozen_layers(model, pad_id=pad_id, autocast=getattr(torch, plan.autocast))
    if trainer.frozen is None or not plan.cache_frozen:
        return None
    states_TD = trainer.frozen.states(rows[:1])[0]
    scratch.mkdir(parents=True, exist_ok=True)
    kept = place_for(
        *(rows, states_TD.shape[1], states_TD.dtype.itemsize),
        memory=plan.frozen_memory,
        folder=scratch,
        shared=ranks.size > 1,
    )
    found: tuple[KeptWhere, str] = ranks.exchange((kept, f"hidden-states-{uuid.uuid4().hex}"))[0]
    kept, name = found
    store = None
    if kept.place != "nowhere":
        with suppress(OSError):  # no room for the file
            file = None if kept.place == "memory" else scratch / name
            store = HiddenStates(rows, states_TD.shape[1], states_TD.dtype, file)
    is_missing = any(ranks.exchange(store is None))  # behind it all ranks have opened the file
    if store is not None:
        store.hide()
    if is_missing:
        kept = replace(kept, place="nowhere")
    elif store is not None:
        trainer.frozen.keep(store)
    if kept.place != "memory":
        trainer.hooks.tell(f"the outputs of the first {trainer.frozen.depth} layers, which are frozen, are {kept}")
    return kept


def _record(
    trainer: CompletionTrainer, plan: TrainingPlan, planned: int, kept: KeptWhere | None, *, evaluates: bool
) -> TrainingRecord:
    state = trainer.state
    is_cut_short = not evaluates and state.global_step < planned
    keys = ("step", "epoch", "loss", "eval_loss", "learning_rate", "grad_norm")
    looks = [entry for entry in state.log_history if {"loss", "eval_loss"} & entry.keys()]
    log = [{key: entry[key] for key in keys if key in entry} for entry in looks]
    whole = None
    if trainer.is_fsdp_enabled:
        whole = full_state(trainer.model, trainer.ranks.rank, getattr(torch, plan.autocast))
    return TrainingRecord(
        log=log,
        steps_done=state.global_step,
        steps_planned=planned,
        tokens=trainer.tokens_of_all_ranks(),
        tokens_planned=planned_tokens(trainer.order, plan, trainer.ranks.size) if is_cut_short else None,
        final_loss=next(entry["loss"] for entry in reversed(log) if "loss" in entry),
        best_step=state.best_global_step or None,
        # Where no look found a number, none is the best.
        best_eval_loss=state.best_metric if state.best_global_step else None,
        untrained_eval_loss=next((entry["eval_loss"] for entry in log if entry["step"] == 0), None),
        frozen_layers=trainer.frozen.depth if trainer.frozen is not None else 0,
        kept=kept,
        full_state=whole,
    )


def rate_share(schedule: str, done: int, warmup: int, updates: int) -> float:
    """Return the learning rate of the update behind `done` others as a share of the peak, in (0, 1].

    It rises by equal steps to the peak, which it has after the warm-up, and falls towards 0, which it would have after
    the last update. transformers' schedules, the same behind the warm-up, begin at 0: their first update changes
    nothing, and a training of a single update nothing at all.
    """
    if done < warmup:
        return (done + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    left = max(1, updates - warmup)
    if schedule == "linear":
        return max(0.0, (updates - done) / left)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((done - warmup) / left))))


def planned_updates(num_rows: int, plan: TrainingPlan) -> int:
    """Return the number of updates that all epochs take."""
    return math.ceil(plan.epochs * updates_per_epoch(num_rows, plan))


def updates_per_epoch(num_rows: int, plan: TrainingPlan) -> int:
    """Return the number of updates that one epoch takes."""
    return math.ceil(num_rows / plan.batch_size)


def planned_tokens(order: LengthGrouped, plan: TrainingPlan, size: int = 1) -> int:
    """Return the tokens, padding included, that `size` ranks read in all epochs; `order` is left at the last one."""
    updates, tokens = planned_updates(len(order), plan), 0
    shares = [RankBatches(order, plan.accumulation, Ranks(rank, size)) for rank in range(size)]
    for epoch in range(math.ceil(plan.epochs)):
        order.set_epoch(epoch)
        left = updates - epoch * updates_per_epoch(len(order), plan)
        for batch in chain.from_iterable(islice(share, left * plan.accumulation) for share in shares):
            lengths = [order.lengths[place] for place in batch]
            tokens += sum(lengths) if plan.packing else len(lengths) * max(lengths, default=0)
    return tokens


def collate_or_none(batch: Sequence[TrainingRow], pad_id: int, *, packing: bool) -> Batch:
    """Return the rows as a batch; without rows, one token that is padding, as all ranks have to take part in a step."""
    found = batch or [TrainingRow("", (pad_id,), (IGNORED_LABEL,))]
    laid_out = pack(found) if packing else collate(found, pad_id)
    return laid_out | {"names": [row.name for row in batch], "rows": found}


def full_state(model: Any, rank: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Gather what was trained of a model that is sharded over ranks; all of them have to ask, and rank 0 is given it.

    For an adapter that is its factors, as they are; for a plain model all weights, in `dtype`. Tied weights stay one
    tensor.
    """
    is_adapter = hasattr(model, "peft_config")
    whole: dict[int, torch.Tensor] = {}
    state: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if is_adapter and ".lora_" not in name:
            continue
        if id(tensor) not in whole:
            gathered = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            kept = gathered.detach() if is_adapter else gathered.detach().to(dtype)
            whole[id(tensor)] = kept.cpu() if rank == 0 else torch.empty(0)
        state[name] = whole[id(tensor)]
    return state if rank == 0 else {}


def collate(batch: Sequence[TrainingRow], pad_id: int) -> dict[str, Any]:
    """Pad on the right, without a mask: under causal attention no real token looks at the padding."""
    input_ids = padded([row.input_ids for row in batch], pad_id)
    labels = padded([row.labels for row in batch], IGNORED_LABEL)
    return {"input_ids": input_ids, "labels": labels, "names": [row.name for row in batch]}


def pack(batch: Sequence[TrainingRow]) -> dict[str, Any]:
    """Lay the rows one after the other in a single sequence; positions that start anew keep them apart.

    transformers builds the attention mask, or the lengths for flash attention, from the positions.
    """
    columns = {
        "input_ids": [token for row in batch for token in row.input_ids],
        "labels": [label for row in batch for label in (IGNORED_LABEL, *row.labels[1:])],
        "position_ids": [position for row in batch for position in range(len(row.input_ids))],
    }
    return {name: torch.tensor([values]) for name, values in columns.items()} | {"names": [row.name for row in batch]}


@torch.no_grad()
def keeps_rows_apart(model: Any) -> bool:
    """Say whether a model keeps packed rows apart, by having it read two short ones packed and alone.

    Recurrent layers and short convolutions carry a row on into the next one, and some models of images (Qwen2-VL,
    GLM-4V) take the positions of packed rows for those of one row.

    Args:
        model: in eval mode, as it was loaded.
    """
    embeddings, length = model.get_input_embeddings(), _PROBED_TOKENS
    ids_2T = torch.arange(2 * length, device=input_device(model)).reshape(2, length) % embeddings.num_embeddings
    rows = [TrainingRow("", tuple(ids), tuple(ids)) for ids in ids_2T.tolist()]
    packed = {name: pack(rows)[name].to(ids_2T.device) for name in ("input_ids", "position_ids")}
    with attention_that_runs(model):
        alone_TV = model(input_ids=ids_2T[1:], use_cache=False).logits[0].float()
        behind_TV = model(**packed, use_cache=False).logits[0, length:].float()
    return are_alike(behind_TV, alone_TV, model.dtype)


def require_packing(model: Any) -> None:
    """Refuse a model that does not keep packed rows apart, see `keeps_rows_apart`.

    Raises:
        UsageError: it does not.
    """
    if not keeps_rows_apart(model):
        raise UsageError(
            f"--packing: {model.config.model_type} does not keep the rows of a packed sequence apart",
            hint="leave out --packing",
        )


def _arguments(
    plan: TrainingPlan,
    updates: int,
    warmup: int,
    scratch: Path,
    *,
    num_rows: int,
    evaluates: bool,
    begins: bool,
    size: int,
) -> TrainingArguments:
    """Return Trainer's settings.

    TF32 stays off. Where a GPU has it `--dtype auto` is bfloat16, so that float32 is what somebody asked for; torch's
    own variable TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 turns it on. `torch.compile` stays off: it compiled three times in
    the first four batches, as each has another shape, for 59 to 83 seconds (LoRA on the fixture model, one core), where
    an update takes 0.03; `tests/benchmarks/gpu.py` times it on a GPU.
    """
    rows = plan.micro_batch // size
    return TrainingArguments(
        output_dir=str(scratch),
        max_steps=updates,
        # The same updates in one kernel, and what transformers takes from torch 2.8 on.
        optim="adamw_torch_fused",
        learning_rate=plan.learning_rate,
        per_device_train_batch_size=rows,
        per_device_eval_batch_size=rows,
        gradient_accumulation_steps=plan.accumulation,
        # What trackers show; `rate_share` makes the rates.
        lr_scheduler_type={"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}[plan.schedule],
        warmup_steps=warmup,
        weight_decay=plan.weight_decay,
        max_grad_norm=plan.max_grad_norm,
        bf16=plan.autocast == "bfloat16",
        fp16=plan.autocast == "float16",
        use_cpu=plan.device == "cpu",
        seed=plan.seed,
        data_seed=plan.seed,
        remove_unused_columns=False,
        eval_strategy="steps" if evaluates else "no",
        # One that goes on knows from its checkpoint what was found before the first update.
        eval_on_start=evaluates and begins,
        eval_steps=plan.eval_steps or updates_per_epoch(num_rows, plan),
        load_best_model_at_end=evaluates and plan.keeps_best,
        metric_for_best_model="eval_loss" if evaluates else None,
        greater_is_better=False if evaluates else None,
        save_strategy="best" if evaluates and plan.keeps_best else "no",
        save_total_limit=_CHECKPOINTS_KEPT,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=list(plan.trackers),
        disable_tqdm=True,
        dataloader_pin_memory=plan.device != "cpu",
        ddp_find_unused_parameters=False,
    )
