"""Log-likelihood of answer tokens, with logits for the positions that predict them and for no others.

A vocabulary is 50 to 500 times as wide as a hidden state, so logits are what a forward spends its memory on; only a few
positions of a few-shot prompt need them.

Everywhere in `p2d_cli.modeling`, `model` is a Hugging Face causal LM or a PEFT model around one, `input_ids_BT` is
padded on either side, and `attention_mask_BT` is 1 for tokens and 0 for padding.

Axes: B batch, T tokens, D hidden size, V vocabulary, n kept positions in (row, position) order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from p2d_cli.errors import NOT_FINITE_HINT, ModelError, NonFiniteError

_ROWS_IN_FP32 = 512  # rows of logits that are upcast at a time


_ALIKE = {True: 1e-3, False: 0.03}
"""By how much logits of the same tokens may differ, as a share of their norm, in float32 and in 16 bits."""


class ForwardStopped(Exception):
    """Raised by a hook that has read the deepest layer it needs: nothing reads the rest of the forward."""


def padded(rows: Sequence[Sequence[int]], fill: int, side: Literal["left", "right"] = "right") -> Tensor:
    """Return rows of numbers as int64 `[B, T]`, filled up to the longest."""
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=fill, padding_side=side)


def forward_inputs(input_ids_BT: Tensor, attention_mask_BT: Tensor) -> dict[str, Any]:
    """Return the arguments of a forward without cache whose rows do not depend on the side or amount of padding.

    Without `position_ids`, models with learned positions would count a row's left padding.
    """
    return {
        "input_ids": input_ids_BT,
        "attention_mask": attention_mask_BT,
        "position_ids": (attention_mask_BT.long().cumsum(dim=1) - 1).clamp(min=0),
        "use_cache": False,
    }


def output_embedding(model: Any) -> nn.Module:
    """Return the module that maps hidden states to logits.

    Raises:
        ModelError: the model has none; so do all functions that need logits.
    """
    module = model.get_output_embeddings()
    if not isinstance(module, nn.Module):
        raise ModelError(
            f"{model.config.model_type} has no output embedding: expected a causal language model",
            hint="give a model with a language-modelling head",
        )
    return module


@contextmanager
def answer_logits_only(model: Any, keep_mask_BT: Tensor) -> Iterator[None]:
    """Make the forwards of the `with` block return logits `[1, n, V]` of the n positions that are true in the mask.

    The hidden states are gathered in front of the model's own output embedding, so that its head, a bias and a final
    soft cap are all the model's own.
    """

    def gather(_module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_BTD, *rest = arguments
        return (hidden_BTD[keep_mask_BT.to(device=hidden_BTD.device, dtype=torch.bool)][None], *rest)

    with output_embedding(model).register_forward_pre_hook(gather):
        yield


@contextmanager
def finite_logits(model: Any, names: Sequence[str]) -> Iterator[None]:
    """Apply `require_finite_logits` to the last logits of each forward of the `with` block."""

    def check(_module: nn.Module, _inputs: Any, logits_BTV: Tensor) -> None:
        require_finite_logits(logits_BTV[:, -1:], names)

    with output_embedding(model).register_forward_hook(check):
        yield


def require_finite_logits(logits_BTV: Tensor, names: Sequence[str] = ()) -> None:
    """Refuse NaN and infinity, of which the largest would be taken for the most likely token all the same.

    Raises:
        NonFiniteError: for the first row, by its name or else its number.
    """
    # The largest of some values is NaN if one of them is; it needs no second tensor of that size.
    rows = (~logits_BTV.detach().amax(dim=(1, 2)).isfinite()).nonzero().flatten().tolist()
    if rows:
        named = names[rows[0]] if names else f"row {rows[0] + 1} of {len(logits_BTV)}"
        raise NonFiniteError(f"the logits of {named} are not finite; nothing was written", hint=NOT_FINITE_HINT)


def are_alike(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Say whether logits of the same tokens, computed in two ways in this precision, differ by rounding alone."""
    return bool((found - expected).norm() <= _ALIKE[dtype == torch.float32] * expected.norm())


def scored_positions(attention_mask_BT: Tensor, answer_mask_BT: Tensor) -> Tensor:
    """Return which answer tokens are scored, bool `[B, T]`: all but the first token of a row, which has no past."""
    is_token_BT = attention_mask_BT.bool()
    scored_BT = answer_mask_BT.to(device=is_token_BT.device, dtype=torch.bool) & is_token_BT
    return functional.pad(scored_BT[:, 1:] & is_token_BT[:, :-1], (1, 0))


def answer_token_logprobs(
    model: Any, input_ids_BT: Tensor, attention_mask_BT: Tensor, answer_mask_BT: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the log-probability of each answer token given all tokens before it, in the caller's gradient mode.

    `answer_mask_BT` is bool `[B, T]`. Returns `logprob_BT` float32 in nats, 0 where nothing is scored, and `scored_BT`
    bool, see `scored_positions`.
    """
    scored_BT = scored_positions(attention_mask_BT, answer_mask_BT)
    # The hidden state at t predicts token t + 1.
    with answer_logits_only(model, scored_BT.roll(-1, dims=1)):
        logits_nV = model(**forward_inputs(input_ids_BT, attention_mask_BT)).logits[0]
    targets_n = input_ids_BT[scored_BT].to(logits_nV.device)
    logprob_n = logits_nV.gather(1, targets_n[:, None])[:, 0].float() - log_normalizer(logits_nV)
    zeros_BT = logprob_n.new_zeros(input_ids_BT.shape)
    scored_BT = scored_BT.to(zeros_BT.device)
    return zeros_BT.masked_scatter(scored_BT, logprob_n), scored_BT


@torch.no_grad()
def completion_log_likelihood(
    model: Any, input_ids_BT: Tensor, attention_mask_BT: Tensor, answer_mask_BT: Tensor
) -> tuple[Tensor, Tensor]:
    """Sum up the log-probabilities of each row's answer tokens, without gradient; see `answer_token_logprobs`.

    Returns `sum_logprob_B` float32 in nats, and `count_B` int64, the tokens that were scored; both are 0 for a row
    without an answer.
    """
    logprob_BT, scored_BT = answer_token_logprobs(model, input_ids_BT, attention_mask_BT, answer_mask_BT)
    return logprob_BT.sum(dim=1), scored_BT.sum(dim=1)


def log_normalizer(logits_nV: Tensor) -> Tensor:
    """Return what to subtract from logits for log-probabilities, `[n]` float32, with few rows in fp32 at a time."""
    return torch.cat([logits.float().logsumexp(dim=1) for logits in torch.split(logits_nV, _ROWS_IN_FP32)])
