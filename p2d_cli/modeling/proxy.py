"""The proxy: a quick attention-only fine-tuning that shows which heads a task moves (DESIGN section 3, `pad`).

The task's weights are compared with the base's; ALPS (arXiv:2505.18799) takes a fully fine-tuned task model there, p2d
trains the attention on about a hundred rows instead, and charges it to the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from p2d_cli.core.head_importance import LayerWeights
from p2d_cli.core.head_layout import ModelLayout, ProjectionName
from p2d_cli.errors import NonFiniteError, UsageError, is_out_of_memory
from p2d_cli.modeling.gradients import Batch, example_losses, require_finite, scored_tokens, trainable_only
from p2d_cli.modeling.layouts import layer_weights
from p2d_cli.modeling.memory import release_memory


class AttentionProxy:
    """AdamW on the attention weights of a model, with fp32 masters.

    A step of 1e-4 is below bfloat16's resolution for most weights, so updates made in the weights themselves would be
    rounded away. The optimizer therefore works on fp32 copies, and the model only holds their rounding.

    Invariant: the model's weights are the rounded masters while it trains, and bit-identical to the base after
    `restore`. The base is kept aside in its own dtype; memory beside the model is the base and four fp32 copies
    (master, gradient, two moments) of the attention weights.

    Args:
        model: without adapter. Its `requires_grad` flags are left as they were.
        layout: its layout.
        lr: AdamW's learning rate, constant, without weight decay, which would move every head alike.
        projections: what is trained, of q, k, v, o; in fused modules too, only their rows.
        max_grad_norm: gradients are clipped to this norm; None for no clipping.
        sum_over_ranks: adds up tensors over the processes that share the rows of each step, in place. They all take
            the step that one process would take with all of its rows.

    Raises:
        UsageError: some of these weights wait on the disk or in main memory for their turn (`--device-map`).
    """

    def __init__(
        self,
        model: Any,
        layout: ModelLayout,
        *,
        lr: float,
        projections: Sequence[ProjectionName] = ("q", "k", "v"),
        max_grad_norm: float | None = 1.0,
        sum_over_ranks: Callable[[Sequence[torch.Tensor]], None] = lambda _: None,
    ) -> None:
        self._model = model
        self._layout = layout
        self._max_grad_norm = max_grad_norm
        self._sum_over_ranks = sum_over_ranks
        self.parts = 1
        """How many parts a batch is read in; more once it did not fit into memory."""
        parts = [part for layer in layout for name, part in layer.projections.items() if name in projections]
        names = dict.fromkeys(part.weight_name for part in parts)
        self._live = {name: model.get_parameter(name) for name in names}
        if any(weight.is_meta for weight in self._live.values()):
            raise UsageError(
                "--method pad tunes the model's attention, and --device-map has put some of it aside, on disk or in"
                " main memory",
                hint="use --method readout, contrast or taylor, which only read; or pad with --task-model",
            )
        self._base = {name: weight.detach().clone() for name, weight in self._live.items()}
        self._masters = {
            name: torch.nn.Parameter(weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True))
            for name, weight in self._base.items()
        }
        self._frozen_rows = _frozen_rows(self._layout, projections, self._base)
        self._optimizer = torch.optim.AdamW(self._masters.values(), lr=lr, weight_decay=0.0)

    def steps(self, batches: Iterable[Batch | None]) -> Iterator[float]:
        """Take one optimizer step for each batch.

        Args:
            batches: this process's rows of each step, see `p2d_cli.modeling.gradients`; None where it has none.

        Yields:
            The mean loss of the step's completion tokens before it.

        Raises:
            NonFiniteError: a loss is not finite; the model has been restored.
        """
        for number, batch in enumerate(batches, start=1):
            try:
                with trainable_only(self._model, self._live.values()):
                    loss, gradients = self._differentiate(batch, f"proxy training, step {number}")
            except NonFiniteError:
                self.restore()
                raise
            self._update(gradients)
            yield loss

    def _differentiate(self, batch: Batch | None, doing: str) -> tuple[float, list[torch.Tensor]]:
        """Return the mean loss of a step over all processes, and this process's share of its gradient."""
        weights = list(self._live.values())
        count = torch.zeros((), dtype=torch.int64, device=weights[0].device)
        count += 0 if batch is None else scored_tokens(batch).to(count)
        self._sum_over_ranks([count])
        if batch is None:
            found, gradients = 0.0, [torch.zeros_like(weight) for weight in weights]
        else:
            found, gradients = self._within_memory(batch, count, doing)
        loss = torch.tensor(found, dtype=torch.float32, device=weights[0].device)
        self._sum_over_ranks([loss])
        require_finite(loss, doing)
        return loss.item(), gradients

    def _within_memory(self, batch: Batch, count: torch.Tensor, doing: str) -> tuple[float, list[torch.Tensor]]:
        """Return loss and gradient of a batch; in parts, if it does not fit into memory as a whole."""
        while True:
            at_a_time = max(1, len(batch["input_ids"]) // self.parts)
            try:
                return self._sum_over_parts(batch, at_a_time, count, doing)
            except Exception as problem:
                if not is_out_of_memory(problem) or at_a_time == 1:
                    raise
            self.parts *= 2
            release_memory(cycles=False)

    def _sum_over_parts(
        self, batch: Batch, at_a_time: int, count: torch.Tensor, doing: str
    ) -> tuple[float, list[torch.Tensor]]:
        weights = list(self._live.values())
        total, gradients = 0.0, list[torch.Tensor]()
        for start in range(0, len(batch["input_ids"]), at_a_time):
            sums_B, _ = example_losses(
                self._model, {name: tensor[start : start + at_a_time] for name, tensor in batch.items()}
            )
            loss = sums_B.sum() / count
            require_finite(loss, doing)
            found = torch.autograd.grad(loss, weights)
            gradients = [one + other for one, other in zip(gradients, found, strict=True)] if gradients else [*found]
            total += loss.item()
        return total, gradients

    def base_weights(self, layer: int) -> LayerWeights:
        """Return the q, k, v weights of a layer as they were, in the model's dtype."""
        return self._weights(layer, self._base)

    def task_weights(self, layer: int) -> LayerWeights:
        """Return the q, k, v weights of a layer as trained, in fp32; they stay available after `restore`."""
        return self._weights(layer, self._masters)

    def restore(self) -> None:
        """Put the base weights back into the model, bit for bit."""
        with torch.no_grad():
            for name, weight in self._live.items():
                weight.copy_(self._base[name])

    def _weights(self, layer: int, tensors: Mapping[str, torch.Tensor]) -> LayerWeights:
        def find(name: str) -> torch.Tensor:
            found: torch.Tensor = tensors[name] if name in tensors else self._model.get_parameter(name)
            return found

        return layer_weights(self._layout, layer, find)

    def _update(self, gradients: Sequence[torch.Tensor]) -> None:
        with torch.no_grad():
            for (name, master), gradient in zip(self._masters.items(), gradients, strict=True):
                master.grad = gradient.to(master.dtype)
                if name in self._frozen_rows:
                    master.grad[self._frozen_rows[name]] = 0
            self._sum_over_ranks([master.grad for master in self._masters.values() if master.grad is not None])
            if self._max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(self._masters.values(), self._max_grad_norm)
            self._optimizer.step()
            self._optimizer.zero_grad()
            for name, weight in self._live.items():
                weight.copy_(self._masters[name])


def _frozen_rows(
    layout: ModelLayout, projections: Sequence[ProjectionName], weights: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """For fused modules of which only a part is trained: a mask of the rest, in the weight's stored shape."""
    masks: dict[str, torch.Tensor] = {}
    for layer in layout:
        for part in (part for name, part in layer.projections.items() if name in projections and name != "o"):
            weight = weights[part.weight_name]
            mask = masks.setdefault(part.weight_name, torch.ones_like(weight, dtype=torch.bool))
            rows = mask.T if part.transposed else mask
            for start, stop in part.rows:
                rows[start:stop] = False
    return {name: mask for name, mask in masks.items() if bool(mask.any())}
