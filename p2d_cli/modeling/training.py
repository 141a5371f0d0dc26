"""The training loop: Hugging Face Trainer, with logits and loss on completion tokens only.

Legend: B batch, T tokens, n completion tokens of a batch, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from p2d_cli.errors import NonFiniteError
from p2d_cli.modeling.answers import answer_logits_only
from p2d_cli.modeling.gradients import IGNORED_LABEL
from p2d_cli.modeling.head_adapter import enable_checkpointing


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


@dataclass(frozen=True)
class TrainingRecord:
    """What a training did."""

    log: list[dict[str, float]]
    steps_done: int
    steps_planned: int
    """Updates that all epochs would take; more than `steps_done` when `max_steps` cut the run short."""
    tokens: int
    final_loss: float


class CompletionTrainer(Trainer):
    """Trainer whose loss is the mean negative log-likelihood of the completion tokens of an update.

    The mean is over all completion tokens of the update, across micro-batches and ranks, so that accumulation does not
    change the gradient.
    """

    tokens_seen = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # makes Trainer count the labels of an update and not rescale the loss

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the loss of one micro-batch.

        Raises:
            NonFiniteError: the loss is not finite; no update was made with it.
        """
        labels_BT = inputs["labels"]
        self.tokens_seen += labels_BT.numel()
        predicts_BT = torch.zeros_like(labels_BT, dtype=torch.bool)
        predicts_BT[:, :-1] = labels_BT[:, 1:] != IGNORED_LABEL
        with answer_logits_only(self.accelerator.unwrap_model(model), predicts_BT):
            outputs = model(input_ids=inputs["input_ids"], use_cache=False)
        targets_n = labels_BT[:, 1:][predicts_BT[:, :-1]]
        total = torch.nn.functional.cross_entropy(outputs.logits[0].float(), targets_n, reduction="sum")
        count = targets_n.numel() if num_items_in_batch is None else num_items_in_batch
        loss = total / count
        if not torch.isfinite(loss):
            raise NonFiniteError(
                f"the loss of update {self.state.global_step + 1} is {loss.item()}; training stopped before the update",
                hint="lower --lr, or try --dtype float32",
            )
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss


class _Watcher(TrainerCallback):
    """Pass each update on, and keep the log."""

    def __init__(self, on_step: Callable[[], None]) -> None:
        self.log: list[dict[str, float]] = []
        self._on_step = on_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        del args, state, control, kwargs
        self._on_step()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        del args, control, kwargs
        if logs and "loss" in logs:
            entry = {"step": state.global_step, "epoch": logs.get("epoch", 0.0), "loss": logs["loss"]}
            self.log.append(entry | {key: logs[key] for key in ("learning_rate", "grad_norm") if key in logs})


def train(
    model: Any,
    rows: Sequence[dict[str, list[int]]],
    plan: TrainingPlan,
    *,
    pad_id: int,
    scratch: Path,
    on_step: Callable[[], None],
) -> TrainingRecord:
    """Train the parameters of `model` that require a gradient.

    Args:
        model: prepared by `p2d_cli.modeling.head_adapter`.
        rows: `input_ids` and `labels` of every example.
        plan: optimisation settings.
        pad_id: token to pad with.
        scratch: folder for Trainer's own files.
        on_step: called after each update.

    Returns:
        The log and the number of updates.
    """
    if plan.checkpointing:
        enable_checkpointing(model)
    watcher = _Watcher(on_step)
    planned = planned_updates(len(rows), plan)
    trainer = CompletionTrainer(
        model=model,
        args=_arguments(plan, planned, scratch),
        train_dataset=list(rows),
        data_collator=lambda batch: collate(batch, pad_id),
        callbacks=[watcher],
    )
    trainer.remove_callback(PrinterCallback)
    result = trainer.train()
    return TrainingRecord(
        log=watcher.log,
        steps_done=trainer.state.global_step,
        steps_planned=planned,
        tokens=trainer.tokens_seen,
        final_loss=watcher.log[-1]["loss"] if watcher.log else result.training_loss,
    )


def planned_updates(num_rows: int, plan: TrainingPlan) -> int:
    """Return the number of updates that all epochs take."""
    return math.ceil(plan.epochs * math.ceil(num_rows / plan.batch_size))


def collate(batch: Sequence[dict[str, list[int]]], pad_id: int) -> dict[str, torch.Tensor]:
    """Pad on the right, without a mask: under causal attention no real token looks at the padding."""
    longest = max(len(row["input_ids"]) for row in batch)
    input_ids = [row["input_ids"] + [pad_id] * (longest - len(row["input_ids"])) for row in batch]
    labels = [row["labels"] + [IGNORED_LABEL] * (longest - len(row["labels"])) for row in batch]
    return {"input_ids": torch.tensor(input_ids), "labels": torch.tensor(labels)}


def _arguments(plan: TrainingPlan, planned: int, scratch: Path) -> TrainingArguments:
    steps = min(planned, plan.max_steps) if plan.max_steps else planned
    return TrainingArguments(
        output_dir=str(scratch),
        max_steps=steps,
        learning_rate=plan.learning_rate,
        per_device_train_batch_size=plan.batch_size // plan.accumulation,
        gradient_accumulation_steps=plan.accumulation,
        # A run that is cut short follows the schedule of the whole one, so that its steps are like the whole one's.
        lr_scheduler_type={"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}[plan.schedule],
        warmup_steps=math.ceil(plan.warmup_ratio * planned),
        weight_decay=plan.weight_decay,
        max_grad_norm=plan.max_grad_norm,
        bf16=plan.autocast == "bfloat16",
        fp16=plan.autocast == "float16",
        use_cpu=plan.device == "cpu",
        seed=plan.seed,
        data_seed=plan.seed,
        train_sampling_strategy="group_by_length",
        remove_unused_columns=False,
        save_strategy="no",
        logging_strategy="steps",
        logging_steps=max(1, steps // 200),
        logging_nan_inf_filter=False,
        report_to=list(plan.trackers),
        disable_tqdm=True,
        dataloader_pin_memory=plan.device != "cpu",
    )
