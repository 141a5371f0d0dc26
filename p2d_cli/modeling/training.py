"""A training from its plan to its record.

A fused loss such as Liger's, which holds no logits at all, is left out. It takes the place of the model's own forward,
where these are gathered, and needs Triton. By `p2d_cli.engine.cost.learn_bytes` logits take 0.01 (8B) to 0.07 (1B) of
the memory for answers of 8 tokens in rows of 64, 0.19 to 0.50 for 512 in 1,024; `--accumulation` lowers them as well.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from transformers import EarlyStoppingCallback, TrainingArguments

from p2d_cli.errors import ArtifactError, NonFiniteError, first_line
from p2d_cli.modeling.attention_kernels import short_rows_in_float32
from p2d_cli.modeling.completion_trainer import CompletionTrainer, TrainingHooks
from p2d_cli.modeling.frozen_layers import frozen_layers
from p2d_cli.modeling.head_adapter import enable_checkpointing
from p2d_cli.modeling.hidden_store import HiddenStates, KeptWhere, Tokens, place_for
from p2d_cli.modeling.loading import quiet_transformers
from p2d_cli.modeling.ranks import Ranks
from p2d_cli.modeling.training_batches import LengthGrouped, RankBatches, TrainingRow, collate_or_none

_CHECKPOINTS_KEPT = 2
_EPOCHS_COUNTED = 8


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
    looks_first: bool = True
    """Whether held-out rows are looked at before the first update, too."""

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
        NonFiniteError: a loss or gradient is not finite, and the rows of its batch are named; or the loss behind the
            last update is not.
        ArtifactError: the checkpoint to go on from holds pickled objects other than tensors.
        StoppedEarlyError: `hooks.should_stop` said so; there is a checkpoint behind the last update that was made.
    """
    ranks = ranks or Ranks()
    if plan.checkpointing:
        enable_checkpointing(model)
    trainer = _trainer(model, rows, plan, pad_id, scratch, eval_rows, resume, hooks or TrainingHooks(), ranks)
    kept = None
    with short_rows_in_float32():
        if trainer.args.max_steps > updates_per_epoch(len(rows), plan) and not trainer.is_fsdp_enabled:
            kept = _begin_above(trainer, [row.input_ids for row in (*rows, *eval_rows)], plan, pad_id, scratch)
        _run(trainer, resume)
        if eval_rows:
            _require_a_finite_look(trainer)
        else:
            trainer.require_finite([min(rows, key=lambda row: len(row.input_ids))])
    return _record(trainer, plan, planned_updates(len(rows), plan), kept, evaluates=bool(eval_rows))


def _trainer(
    model: Any,
    rows: Sequence[TrainingRow],
    plan: TrainingPlan,
    pad_id: int,
    scratch: Path,
    eval_rows: Sequence[TrainingRow],
    resume: ResumePoint | None,
    hooks: TrainingHooks,
    ranks: Ranks,
) -> CompletionTrainer:
    """Return what makes the updates; see `train` for the arguments."""
    planned, patience = planned_updates(len(rows), plan), plan.patience
    # A training that is cut short warms up as the whole one does, so that its updates are like the whole one's.
    updates, warmup = min(planned, plan.max_steps or planned), math.ceil(plan.warmup_ratio * planned)
    return CompletionTrainer(
        model=model,
        args=_arguments(
            plan,
            updates,
            warmup,
            scratch,
            num_rows=len(rows),
            evaluates=bool(eval_rows),
            begins=resume is None,
            size=ranks.size,
        ),
        train_dataset=list(rows),
        order=LengthGrouped([len(row.input_ids) for row in rows], plan.batch_size, plan.seed),
        rate=lambda done: rate_share(plan.schedule, done, warmup, updates),
        eval_dataset=list(eval_rows) or None,
        data_collator=lambda batch: collate_or_none(batch, pad_id, packing=plan.packing),
        callbacks=[] if patience is None else [EarlyStoppingCallback(early_stopping_patience=patience)],
        hooks=hooks,
        tokens_seen=resume.tokens if resume and ranks.rank == 0 else 0,
        ranks=ranks,
        checkpoint_minutes=plan.checkpoint_minutes,
        packing=plan.packing,
    )


def _run(trainer: CompletionTrainer, resume: ResumePoint | None) -> None:
    try:
        with quiet_transformers():
            trainer.train(resume_from_checkpoint=str(resume.folder) if resume else None)
    except UnpicklingError as problem:
        # Trainer loads with weights_only, which refuses whatever is more than tensors and numbers before it runs.
        raise ArtifactError(
            f"a file of the checkpoint {resume.folder if resume else ''} holds more than tensors, and could run code; "
            f"nothing was run: {first_line(problem)}",
            hint="find out who wrote there" + (f"; to start anew, remove {resume.folder.parent}" if resume else ""),
        ) from problem


def _require_a_finite_look(trainer: CompletionTrainer) -> None:
    """Refuse weights of which no look at held-out rows found a finite loss; the best ones are kept, if any look did."""
    looks = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry and entry["step"]]
    if not any(map(math.isfinite, looks)):
        raise NonFiniteError(
            f"after update {trainer.state.global_step} the held-out loss is {looks[-1]}; nothing was written",
            hint="lower --lr, or look at the rows",
        )


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
    """Return the tokens, padding included, that `size` ranks read in all epochs.

    The first `_EPOCHS_COUNTED` epochs are counted batch by batch, and later updates take as many tokens as their mean.
    `order` is left at the last epoch that was counted.
    """
    updates, an_epoch, tokens = planned_updates(len(order), plan), updates_per_epoch(len(order), plan), 0
    counted = min(updates, _EPOCHS_COUNTED * an_epoch)
    shares = [RankBatches(order, plan.accumulation, Ranks(rank, size)) for rank in range(size)]
    for epoch in range(math.ceil(counted / an_epoch)):
        order.set_epoch(epoch)
        left = counted - epoch * an_epoch
        for batch in chain.from_iterable(islice(share, left * plan.accumulation) for share in shares):
            lengths = [order.lengths[place] for place in batch]
            tokens += sum(lengths) if plan.packing else len(lengths) * max(lengths, default=0)
    return tokens * updates // counted


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
    rows = max(1, plan.micro_batch // size)  # where there are more ranks than rows, some have none
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
        eval_on_start=evaluates and begins and plan.looks_first,
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
