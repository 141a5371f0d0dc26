"""How much chosen heads attend from chosen query tokens to segments of the context, beside the model's own kernel.

A model that runs with the attention implementation `p2d_capture` computes its outputs as with `sdpa`. While a capture
is active, each captured layer also runs its chosen heads' query rows, and nothing else, through a second call of the
fused kernel, whose "values" are the one-hot segments of the tokens: its output is the attention mass on every segment.
So the attention of a head is never held as a matrix, and its softmax is the kernel's own, accumulated in fp32.

Axes: B batch, T tokens, H query heads, G key/value groups, d head_dim, K captured heads, R query rows, S segments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from p2d_cli.errors import ModelError
from p2d_cli.modeling.likelihood import ForwardStopped, forward_inputs

CAPTURE_ATTENTION = "p2d_capture"

# What some families hand to their attention and `sdpa` ignores, or adds to the scores behind the capture's back.
_UNSUPPORTED_ARGUMENTS = {"s_aux": "attention sinks", "position_bias": "a learned position bias"}


class _Request:
    """What is captured, prepared for one device, dtype and head_dim."""

    def __init__(self, query_mask_BT: Tensor, segment_BT: Tensor, num_segments: int, like: Tensor) -> None:
        query_mask_BT = query_mask_BT.to(device=like.device, dtype=torch.bool)
        count_B = query_mask_BT.sum(dim=1)
        longest = max(int(count_B.max()), 1)
        # The query rows of each example, filled up with others to the longest count.
        self.rows_BR = query_mask_BT.int().argsort(dim=1, descending=True, stable=True)[:, :longest]
        self.is_row_BR = torch.arange(longest, device=like.device) < count_B[:, None]
        self.row_count_B1 = count_B.clamp(min=1)[:, None].float()
        is_in_BTS = segment_BT.to(like.device)[:, :, None] == torch.arange(num_segments, device=like.device)
        self.segments_BTS = is_in_BTS.to(like.dtype)
        self.segment_size_BS = is_in_BTS.sum(dim=1).clamp(min=1).float()


class SegmentAttention:
    """What one forward under `capture_segments` is asked for, and what it has delivered."""

    def __init__(
        self,
        heads: Mapping[int, Sequence[int]],
        query_mask_BT: Tensor,
        segment_BT: Tensor,
        num_segments: int,
        *,
        stop_after_last: bool,
    ) -> None:
        self._heads = {layer: tuple(sorted(heads[layer])) for layer in sorted(heads) if heads[layer]}
        self._query_mask_BT = query_mask_BT
        self._segment_BT = segment_BT
        self._num_segments = num_segments
        self._stop_after = max(self._heads, default=None) if stop_after_last else None
        self._shares: dict[int, Tensor | None] = dict.fromkeys(self._heads)
        self._requests: dict[torch.device, _Request] = {}
        # Layers share their masks: the rows of each are gathered once. The mask is kept so that its id stays its own.
        self._mask_rows: dict[tuple[int, torch.device], tuple[Tensor | None, Tensor | None]] = {}

    @property
    def attention_BKS(self) -> Tensor:
        """Mean attention over query rows x tokens of a segment, `[B, K, S]` float32 on the CPU, in (layer, head) order.

        An example without query rows and a segment without tokens have 0.

        Raises:
            RuntimeError: the forward has not run, or it ended before a captured layer.
        """
        missing = [layer for layer, share in self._shares.items() if share is None]
        if missing:
            raise RuntimeError(f"no forward of the model has reached the captured layers {missing} yet")
        return torch.cat([cast(Tensor, share).cpu() for share in self._shares.values()], dim=1)

    @torch.no_grad()
    def take(
        self,
        layer: int | None,
        query_BHTd: Tensor,
        key_BGTd: Tensor,
        mask: Tensor | None,
        is_causal: bool,
        scaling: float,
        softcap: float | None,
    ) -> None:
        """Capture a layer, if it is asked for."""
        if layer not in self._heads:
            return
        self._check(layer, query_BHTd, key_BGTd)
        if (device := query_BHTd.device) not in self._requests:
            self._requests[device] = _Request(self._query_mask_BT, self._segment_BT, self._num_segments, query_BHTd)
        request, key = self._requests[device], (id(mask), device)
        if key not in self._mask_rows:
            self._mask_rows[key] = (mask, _bias_rows(mask, is_causal, request.rows_BR, query_BHTd))
        query_BKRd, key_BKTd = _chosen(query_BHTd, key_BGTd, self._heads[layer], request.rows_BR)
        bias = self._mask_rows[key][1]
        mass_BKRS = _segment_mass(query_BKRd, key_BKTd, request.segments_BTS, bias, scaling, softcap)
        # The rows that fill up are no queries: they may be padding.
        mass_BKRS = mass_BKRS.float().masked_fill(~request.is_row_BR[:, None, :, None], 0.0)
        mean_BKS = mass_BKRS.sum(dim=2) / request.row_count_B1[:, :, None]
        self._shares[layer] = mean_BKS / request.segment_size_BS[:, None]
        if layer == self._stop_after:
            raise ForwardStopped

    def _check(self, layer: int, query_BHTd: Tensor, key_BGTd: Tensor) -> None:
        batch, num_heads, length, _ = query_BHTd.shape
        if (batch, length) != self._query_mask_BT.shape or key_BGTd.shape[2] != length:
            raise ValueError(
                f"the capture is for a batch of shape {tuple(self._query_mask_BT.shape)} without past, "
                f"but the forward has {batch} x {length} queries and {key_BGTd.shape[2]} keys"
            )
        if (head := self._heads[layer][-1]) >= num_heads:
            raise ValueError(f"layer {layer} has {num_heads} heads, but head {head} is to be captured")
        if self._shares[layer] is not None:
            raise RuntimeError("a capture takes one forward of the model, but a second one has begun")


_ACTIVE: ContextVar[SegmentAttention | None] = ContextVar("p2d_active_capture", default=None)


def register_capture() -> None:
    """Make `p2d_capture` known to transformers, with the masks of `sdpa`; calling it again changes nothing."""
    AttentionInterface.register(CAPTURE_ATTENTION, _capturing_attention)
    # Without a mask function of that name the mask would be None, and padding would be attended to.
    AttentionMaskInterface.register(CAPTURE_ATTENTION, sdpa_mask)


@contextmanager
def capture_segments(
    model: Any,
    heads: Mapping[int, Sequence[int]],
    query_mask_BT: Tensor,
    segment_BT: Tensor,
    num_segments: int,
    *,
    stop_after_last: bool = False,
) -> Iterator[SegmentAttention]:
    """Capture, in the one forward of the `with` block, the attention of chosen heads from query tokens to segments.

    The model is switched to `p2d_capture` and back. Its outputs are those of `sdpa` (for soft-capped scores, which
    `sdpa` does not know, those of `eager`). No gradient flows through the capture.

    Args:
        model: see `p2d_cli.modeling.likelihood`.
        heads: layer -> its heads to capture, of K heads in all.
        query_mask_BT: `[B, T]`, true where a token is a query row. Padding is never one.
        segment_BT: `[B, T]` integers in `[-1, num_segments)`: the segment of each token, -1 for none.
        num_segments: S.
        stop_after_last: end the `with` block once the deepest layer has been captured; nothing behind the forward runs.

    Yields:
        The result, to be read once the forward has run.

    Raises:
        ModelError: the attention does not go through transformers' interface, or adds more to its scores than a mask.
        ValueError: the forward has another batch shape than the masks, or a head does not exist.
        RuntimeError: a second forward begins in the block.
    """
    capture = SegmentAttention(heads, query_mask_BT, segment_BT, num_segments, stop_after_last=stop_after_last)
    with _capturing_model(model):
        token = _ACTIVE.set(capture)
        try:
            with suppress(ForwardStopped):
                yield capture
        finally:
            _ACTIVE.reset(token)


@torch.no_grad()
def run_captured(
    model: Any,
    batch: Mapping[str, Tensor],
    heads: Mapping[int, Sequence[int]],
    query_mask_BT: Tensor,
    segment_BT: Tensor,
    num_segments: int,
) -> Tensor:
    """Run the model on `input_ids` and `attention_mask` up to the deepest layer of `heads`, without gradient.

    The other arguments and what is raised are as for `capture_segments`.

    Returns:
        `[B, K, S]` float32 on the CPU, as `SegmentAttention.attention_BKS`.
    """
    with capture_segments(model, heads, query_mask_BT, segment_BT, num_segments, stop_after_last=True) as attention:
        model(**forward_inputs(batch["input_ids"], batch["attention_mask"]))
    return attention.attention_BKS


def require_capturable(model: Any) -> None:
    """Refuse a model whose attention cannot be captured, without running it; it may be on the meta device.

    Raises:
        ModelError: see `capture_segments`.
    """
    with _capturing_model(model):
        for module in model.modules():
            if getattr(module, "sinks", None) is not None:
                _refuse_argument(module, "s_aux")


@contextmanager
def _capturing_model(model: Any) -> Iterator[None]:
    register_capture()
    previous = model.config._attn_implementation
    model.set_attn_implementation(CAPTURE_ATTENTION)
    try:
        if model.config._attn_implementation != CAPTURE_ATTENTION:
            raise ModelError(
                f"the attention of {model.config.model_type} cannot be captured: expected a model whose attention goes "
                "through transformers' attention interface",
                hint="methods that read head outputs in its place may work: --method readout, --affinity readout",
            )
        yield
    finally:
        model.set_attn_implementation(previous)


def _capturing_attention(
    module: nn.Module,
    query_BHTd: Tensor,
    key_BGTd: Tensor,
    value_BGTd: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute the output `[B, T, H, d]` as `sdpa` does, and the capture on the way."""
    for name in _UNSUPPORTED_ARGUMENTS:
        if kwargs.get(name) is not None:
            _refuse_argument(module, name)
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    scaling = query_BHTd.shape[-1] ** -0.5 if scaling is None else scaling
    if (capture := _ACTIVE.get()) is not None:
        layer = getattr(module, "layer_idx", None)
        capture.take(layer, query_BHTd, key_BGTd, attention_mask, causal, scaling, softcap)
    if softcap is not None:
        # As the family's own `eager` attention computes it; with a past, the queries are the last rows.
        if attention_mask is None and causal:
            length, num_keys = query_BHTd.shape[2], key_BGTd.shape[2]
            visible = torch.ones(length, num_keys, dtype=torch.bool, device=query_BHTd.device)
            attention_mask = visible.tril(diagonal=num_keys - length)[None, None]
        bias, repeats = _additive(attention_mask, query_BHTd), query_BHTd.shape[1] // key_BGTd.shape[1]
        weights_BHTT = _softcapped_weights(query_BHTd, repeat_kv(key_BGTd, repeats), bias, scaling, softcap)
        weights_BHTT = functional.dropout(weights_BHTT.to(query_BHTd.dtype), p=dropout, training=dropout > 0)
        return (weights_BHTT @ repeat_kv(value_BGTd, repeats)).transpose(1, 2).contiguous(), None
    attend = cast(Callable[..., tuple[Tensor, None]], sdpa_attention_forward)
    kwargs |= {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
    return attend(module, query_BHTd, key_BGTd, value_BGTd, attention_mask, **kwargs)


def _refuse_argument(attention: nn.Module, name: str) -> NoReturn:
    raise ModelError(
        f"the attention of {type(attention).__name__} cannot be captured: it uses {_UNSUPPORTED_ARGUMENTS[name]} "
        f"({name})",
        hint="methods that read head outputs in its place work: --method readout, --affinity readout",
    )


def _chosen(query_BHTd: Tensor, key_BGTd: Tensor, heads: tuple[int, ...], rows_BR: Tensor) -> tuple[Tensor, Tensor]:
    """Pick the query rows of the chosen heads, `[B, K, R, d]`, and the keys that each reads, `[B, K, T, d]`."""
    batch, num_heads, _, _ = query_BHTd.shape
    heads_K = torch.tensor(heads, device=query_BHTd.device)
    examples_B = torch.arange(batch, device=query_BHTd.device)
    query_BKRd = query_BHTd[examples_B[:, None, None], heads_K[None, :, None], rows_BR[:, None, :]]
    groups = [head * key_BGTd.shape[1] // num_heads for head in heads]
    if groups == list(range(key_BGTd.shape[1])):
        return query_BKRd, key_BGTd
    return query_BKRd, key_BGTd[:, torch.tensor(groups, device=key_BGTd.device)]


def _segment_mass(
    query_BKRd: Tensor,
    key_BKTd: Tensor,
    segments_BTS: Tensor,
    bias: Tensor | None,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    """Sum each query row's attention over each segment, `[B, K, R, S]`: the kernel with one-hot segments as values."""
    if softcap is not None:  # which the fused kernels do not offer
        weights_BKRT = _softcapped_weights(query_BKRd, key_BKTd, bias, scaling, softcap)
        return weights_BKRT @ segments_BTS[:, None].float()
    width, num_heads = query_BKRd.shape[-1], query_BKRd.shape[1]
    masses = []
    # The fused kernels want values as wide as the keys, and not all of them take a stride of zero.
    for part_BTs in torch.split(segments_BTS, width, dim=-1):
        values_BTd = functional.pad(part_BTs, (0, width - part_BTs.shape[-1]))
        values_BKTd = values_BTd[:, None].repeat(1, num_heads, 1, 1)
        mass_BKRd = functional.scaled_dot_product_attention(
            query_BKRd, key_BKTd, values_BKTd, attn_mask=bias, scale=scaling
        )
        masses.append(mass_BKRd[..., : part_BTs.shape[-1]])
    return torch.cat(masses, dim=-1)


def _softcapped_weights(query: Tensor, key: Tensor, bias: Tensor | None, scaling: float, softcap: float) -> Tensor:
    """Softmax weights in fp32; the scores are capped in the model's dtype, as Gemma 2's own attention does."""
    scores = torch.tanh(query @ key.transpose(2, 3) * scaling / softcap) * softcap
    scores = scores if bias is None else scores + bias
    return scores.softmax(dim=-1, dtype=torch.float32)


def _bias_rows(mask: Tensor | None, is_causal: bool, rows_BR: Tensor, like: Tensor) -> Tensor | None:
    """Make the additive mask of the query rows, `[B, 1, R, T]`, or None where every token sees all."""
    batch, length = like.shape[0], like.shape[2]
    if mask is not None:
        examples_B = torch.arange(batch, device=like.device)
        mask = mask.expand(batch, -1, -1, -1)[examples_B[:, None], 0, rows_BR][:, None]
    elif is_causal:
        # No mask means no padding, and a sequence shorter than any sliding window: sdpa_mask builds one otherwise.
        mask = (torch.arange(length, device=like.device) <= rows_BR[:, :, None])[:, None]
    return _additive(mask, like)


def _additive(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """Turn a bool mask (true: visible) into zeros and the lowest number; an additive one stays as it is."""
    if mask is None or mask.dtype != torch.bool:
        return None if mask is None else mask.to(like.dtype)
    lowest = torch.finfo(like.dtype).min
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(~mask, lowest)
