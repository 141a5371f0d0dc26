"""Hugging Face's Trainer, with logits and loss on completion tokens only, and a say for its user after each update.

Legend: B batch, T tokens, n completion tokens of a batch.
"""

from __future__ import annotations

import errno
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Sampler
from transformers import PrinterCallback, Trainer

from p2d_cli.errors import InterruptedEarlyError, NonFiniteError, StoppedEarlyError
from p2d_cli.modeling.frozen_layers import FrozenLayers
from p2d_cli.modeling.gradients import IGNORED_LABEL
from p2d_cli.modeling.likelihood import answer_logits_only
from p2d_cli.modeling.ranks import Ranks
from p2d_cli.modeling.training_batches import Batch, LengthGrouped, RankBatches, TrainingRow


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
    go_on: str = "run the same command again to go on"
    """What a user is told to do behind such a stop."""
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

    @torch.no_grad()
    def require_finite(self, rows: Sequence[TrainingRow]) -> None:
        """Refuse the model that the last update left if its loss on these rows is not finite.

        Raises:
            NonFiniteError: it is not.
        """
        collator: Any = self.data_collator
        with self.compute_loss_context_manager():
            total, _, _ = self._completion_loss(self.model, self._prepare_inputs(collator(rows)))
        losses = self.ranks.exchange(total.item())
        if not all(map(math.isfinite, losses)):
            raise NonFiniteError(
                f"after the last update the loss of {rows[0].name} is {losses[0]}; nothing was written",
                hint="lower --lr, or look at the rows",
            )

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
        raise _stopped(name, f"after update {done} of {updates}, which is kept; {self.hooks.go_on}")

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
