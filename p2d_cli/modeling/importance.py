"""Taylor scores: how much the loss would change, to first order, if a head were removed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from p2d_cli.core.head_importance import removal_effect
from p2d_cli.core.head_layout import LayerLayout, ModelLayout
from p2d_cli.modeling.gradients import Batch, example_losses, require_finite, trainable_only


def taylor_scores(model: Any, layout: ModelLayout, batches: Iterable[Batch]) -> Iterator[torch.Tensor]:
    """First-order effect of removing each head, example by example (Michel et al. 2019, eq. 5).

    Removing a head means zeroing its columns of the output projection, so the effect is `|sum(grad * weight)|` over
    these columns. That sum equals `sum(context * grad_context)` over tokens and head_dim, which needs no weight
    gradient and comes apart by example: the graph begins at the lowest layer's context, and no parameter takes part.
    An example counts with the mean loss of its completion tokens.

    Yields:
        Scores `[B, K]` of all heads, in (layer, head) order, for each batch; float64 on the CPU.

    Raises:
        NonFiniteError: the loss of a batch is not finite.
    """
    for batch in batches:
        contexts: list[torch.Tensor] = []
        """The inputs of the output projections, `[B, T, H*d]` by layer, as nodes of the graph."""
        with trainable_only(model, ()), ExitStack() as hooks:
            for layer in layout:
                hook = partial(_collect, contexts)
                hooks.enter_context(model.get_submodule(layer.o.module).register_forward_pre_hook(hook))
            sums_B, counts_B = example_losses(model, batch)
            loss = (sums_B / counts_B.clamp(min=1)).sum()
            require_finite(loss, "taylor scores")
            gradients = torch.autograd.grad(loss, contexts)
        scores = [
            removal_effect(_by_head(context, layer), _by_head(gradient, layer)).double().cpu()
            for layer, context, gradient in zip(layout, contexts, gradients, strict=True)
        ]
        yield torch.cat(scores, dim=1)


def _collect(contexts: list[torch.Tensor], _module: Any, arguments: tuple[torch.Tensor, ...]) -> tuple[Any, ...]:
    context, *rest = arguments
    if not context.requires_grad:
        context = context.detach().requires_grad_(True)
    contexts.append(context)
    return (context, *rest)


def _by_head(tensor: torch.Tensor, layer: LayerLayout) -> torch.Tensor:
    return tensor.detach().reshape(*tensor.shape[:-1], layer.heads.num_heads, layer.heads.head_dim)
