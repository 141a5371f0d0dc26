"""What the proxy and the taylor scores share: a loss on completion tokens, and gradients only where they are needed.

Axes: B batch, T tokens. A batch is a mapping with `input_ids`, `labels` and, if it is padded on the left,
`attention_mask`, all `[B, T]` int64; labels are the ids of completion tokens and -100 everywhere else (prompt,
padding), not yet shifted, as transformers has them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from p2d_cli.errors import NonFiniteError
from p2d_cli.modeling.likelihood import answer_token_logprobs, scored_positions
from p2d_cli.modeling.loading import input_device

IGNORED_LABEL = -100

Batch = Mapping[str, torch.Tensor]


def example_losses(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of each example's completion, with logits for its tokens only; the batch is moved to the model.

    Returns:
        Sum over each completion's tokens `[B]`, float32 and differentiable, and their number `[B]`, int64.
    """
    device = input_device(model)
    input_ids_BT, labels_BT = batch["input_ids"].to(device), batch["labels"].to(device)
    attention_mask_BT = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).to(device)
    logprob_BT, scored_BT = answer_token_logprobs(model, input_ids_BT, attention_mask_BT, labels_BT != IGNORED_LABEL)
    return -logprob_BT.sum(dim=1), scored_BT.sum(dim=1)


def scored_tokens(batch: Batch) -> torch.Tensor:
    """Return how many tokens `example_losses` scores in all rows of a batch, int64, without reading it."""
    attention_mask_BT = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    return scored_positions(attention_mask_BT, batch["labels"] != IGNORED_LABEL).sum()


def require_finite(loss: torch.Tensor, doing: str) -> None:
    """Raise NonFiniteError, naming what was being done, for a loss that is not a number."""
    if not torch.isfinite(loss):
        raise NonFiniteError(
            f"{doing}: the loss is {loss.item()}",
            hint="check the rows for empty completions; lower the learning rate, or use float32 instead of float16",
        )


@contextmanager
def trainable_only(model: Any, parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """Let only these parameters require gradients inside the block, with dropout off; both are restored after it."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    was_training = model.training
    model.eval()
    model.requires_grad_(False)
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        model.train(was_training)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
