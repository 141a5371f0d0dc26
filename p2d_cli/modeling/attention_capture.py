"""How much chosen heads attend from chosen query tokens to segments of the context, beside the model's own kernel.

A model that runs with the attention implementation `p2d_capture` computes its outputs as with `sdpa`, or with its
family's own `eager` attention if it ran with that, or if the kernel lacks what that does (soft caps, sinks). While a
capture is active, each captured layer also runs its chosen heads' query rows, and nothing else, through a second call
of the fused kernel, whose "values" are the one-hot segments of the tokens: its output is the attention mass on every
segment. So the attention of a head is never held as a matrix, and its softmax is the kernel's own, accumulated in fp32.

Axes: B batch, T tokens, H query heads, G key/value groups, d head_dim, K captured heads, R query rows, S segments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from sys import modules as imported
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from p2d_cli.errors import ModelError
from p2d_cli.modeling.likelihood import ForwardStopped, forward_inputs

CAPTURE_ATTENTION = "p2d_capture"

# A tensor that a family hands to its attention changes the scores, unless it is known to say only where tokens are. The
# capture knows how sinks and a position bias do; a model with any other one is refused.
_SCORING_TENSORS = frozenset({"s_aux", "sinks", "position_bias"})
_PLACING_TENSORS = frozenset({"position_ids", "cache_position", "cu_seq_lens_q", "cu_seq_lens_k"})
# Families whose layers attend several times in one forward, so that no head has one attention.
_ATTEND_AGAIN = {
    "diffllama": "its heads are differences of two attentions",
    "dory": "its layers run several times in one forward",
    "inkling2_loop_text": "its layers run several times in one forward",
}


@dataclass(frozen=True)
class _Scoring:
    """How a layer turns the products of its queries and keys into attention."""

    mask: Tensor | None
    """`[B, 1 or H, T, T]`: bool, true where visible, or additive."""
    is_causal: bool
    """What no mask means."""
    scaling: float
    softcap: float | None
    sinks: Tensor | None
    """Logits of a place that takes its share of the attention and has no value: `[H]`, or `[B, H, T, 1]`."""
    position_bias: Tensor | None
    """`[B, H, T, T]`, added to the scores."""


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
        self.runs_eager = False
        """Whether the model runs its family's eager attention anyway."""
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
    def take(self, layer: int | None, query_BHTd: Tensor, key_BGTd: Tensor, scoring: _Scoring) -> None:
        """Capture a layer, if it is asked for."""
        if layer not in self._heads:
            return
        self._check(layer, query_BHTd, key_BGTd)
        if (device := query_BHTd.device) not in self._requests:
            self._requests[device] = _Request(self._query_mask_BT, self._segment_BT, self._num_segments, query_BHTd)
        request, heads = self._requests[device], self._heads[layer]
        query_BKRd, key_BKTd = _chosen(query_BHTd, key_BGTd, heads, request.rows_BR)
        bias, segments_BTS = self._bias(scoring, heads, request, query_BHTd), request.segments_BTS
        if scoring.sinks is not None:
            sinks_BKR1 = _rows_of(scoring.sinks, heads, request.rows_BR, query_BHTd).to(query_BHTd.dtype)
            key_BKTd, segments_BTS, bias = _with_sink(key_BKTd, segments_BTS, bias, sinks_BKR1)
        mass_BKRS = _segment_mass(query_BKRd, key_BKTd, segments_BTS, bias, scoring.scaling, scoring.softcap)
        # The rows that fill up are no queries: they may be padding.
        mass_BKRS = mass_BKRS.float().masked_fill(~request.is_row_BR[:, None, :, None], 0.0)
        mean_BKS = mass_BKRS.sum(dim=2) / request.row_count_B1[:, :, None]
        self._shares[layer] = mean_BKS / request.segment_size_BS[:, None]
        if layer == self._stop_after:
            raise ForwardStopped

    def _bias(self, scoring: _Scoring, heads: tuple[int, ...], request: _Request, like: Tensor) -> Tensor | None:
        """Return what is added to the scores, `[B, 1 or K, R, T]`, sinks aside."""
        mask, key = scoring.mask, (id(scoring.mask), like.device)
        if mask is not None and mask.shape[1] > 1:
            # A mask that differs from head to head is a layer's own.
            bias = _additive(_rows_of(mask, heads, request.rows_BR, like), like)
        else:
            if key not in self._mask_rows:
                self._mask_rows[key] = (mask, _bias_rows(mask, scoring.is_causal, request.rows_BR, like))
            bias = self._mask_rows[key][1]
        if scoring.position_bias is None:
            return bias
        added = _rows_of(scoring.position_bias, heads, request.rows_BR, like).to(like.dtype)
        return added if bias is None else bias + added

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

    The model is switched to `p2d_capture` and back. Its outputs are those that it has with `sdpa` or `eager`, whichever
    it was loaded with. What a sink takes of the attention belongs to no segment. No gradient flows through the capture.

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
        ModelError: the attention does not go through transformers' interface, or its scores depend on more than masks,
            soft caps, sinks and position biases.
        ValueError: the forward has another batch shape than the masks, or a head does not exist.
        RuntimeError: a second forward begins in the block.
    """
    capture = SegmentAttention(heads, query_mask_BT, segment_BT, num_segments, stop_after_last=stop_after_last)
    with _capturing_model(model) as implementation:
        capture.runs_eager = implementation == "eager"
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
            if getattr(module, "indexer", None) is not None:
                _refuse(module, "it chooses the tokens that a query sees (indexer)")


@contextmanager
def _capturing_model(model: Any) -> Iterator[str]:
    """Switch the model to `p2d_capture` within the block, and yield the implementation that it had."""
    register_capture()
    if (reason := _ATTEND_AGAIN.get(model.config.get_text_config().model_type)) is not None:
        raise _not_capturable(f"the attention of {model.config.model_type}", reason)
    previous = model.config._attn_implementation
    model.set_attn_implementation(CAPTURE_ATTENTION)
    try:
        if model.config._attn_implementation != CAPTURE_ATTENTION:
            raise _not_capturable(
                f"the attention of {model.config.model_type}",
                "expected a model whose attention goes through transformers' attention interface",
            )
        yield previous
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
    for name, given in kwargs.items():
        if isinstance(given, Tensor) and name not in _SCORING_TENSORS | _PLACING_TENSORS:
            _refuse(module, f"its scores depend on {name}, which p2d does not know")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    scaling = query_BHTd.shape[-1] ** -0.5 if scaling is None else scaling
    sinks = kwargs.get("s_aux") if kwargs.get("s_aux") is not None else kwargs.get("sinks")
    if (capture := _ACTIVE.get()) is not None:
        scoring = _Scoring(attention_mask, causal, scaling, softcap, sinks, kwargs.get("position_bias"))
        capture.take(getattr(module, "layer_idx", None), query_BHTd, key_BGTd, scoring)
    kwargs |= {"dropout": dropout, "scaling": scaling}
    needs_own = softcap is not None or sinks is not None
    # The function that the module calls under `eager`, which stands beside its class.
    own: Any = getattr(imported[type(module).__module__], "eager_attention_forward", None)
    if own is None and needs_own:
        _refuse(module, "it has soft caps or sinks, and no eager attention of its own")
    if own is not None and (needs_own or (capture is not None and capture.runs_eager)):
        bias = _additive(_visible(attention_mask, causal, query_BHTd, key_BGTd), query_BHTd)
        kwargs |= {} if softcap is None else {"softcap": softcap}
        return own(module, query_BHTd, key_BGTd, value_BGTd, bias, **kwargs)[0], None
    attend = cast(Callable[..., tuple[Tensor, None]], sdpa_attention_forward)
    return attend(module, query_BHTd, key_BGTd, value_BGTd, attention_mask, is_causal=is_causal, **kwargs)


def _visible(mask: Tensor | None, is_causal: bool, query_BHTd: Tensor, key_BGTd: Tensor) -> Tensor | None:
    """Return the mask, made where a causal attention has none; with a past, the queries are the last rows."""
    if mask is not None or not is_causal:
        return mask
    length, num_keys = query_BHTd.shape[2], key_BGTd.shape[2]
    visible = torch.ones(length, num_keys, dtype=torch.bool, device=query_BHTd.device)
    return visible.tril(diagonal=num_keys - length)[None, None]


def _refuse(attention: nn.Module, reason: str) -> NoReturn:
    raise _not_capturable(f"the attention of {type(attention).__name__}", reason)


def _not_capturable(what: str, reason: str) -> ModelError:
    return ModelError(
        f"{what} cannot be captured: {reason}",
        hint="methods that read head outputs in its place may work: --method readout, --affinity readout",
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
    if mask is not None:
        mask = _rows_of(mask, (0,), rows_BR, like)
    elif is_causal:
        # No mask means no padding, and a sequence shorter than any sliding window: sdpa_mask builds one otherwise.
        mask = (torch.arange(like.shape[2], device=like.device) <= rows_BR[:, :, None])[:, None]
    return _additive(mask, like)


def _rows_of(values: Tensor, heads: tuple[int, ...], rows_BR: Tensor, like: Tensor) -> Tensor:
    """Pick the heads and query rows, `[B, K, R, x]`, of `[B, H, T, x]`, where B and T may be 1, or of `[H]`."""
    batch, _, length, _ = like.shape
    values_BHTx = (values[None, :, None, None] if values.dim() == 1 else values).expand(batch, -1, length, -1)
    heads_K, examples_B = torch.tensor(heads, device=like.device), torch.arange(batch, device=like.device)
    return values_BHTx[examples_B[:, None, None], heads_K[None, :, None], rows_BR[:, None, :]]


def _with_sink(
    key_BKTd: Tensor, segments_BTS: Tensor, bias: Tensor | None, sinks_BKR1: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Append a token whose key is zero, so that its score is the sink's logit alone, and which is of no segment."""
    batch, num_heads, rows, _ = sinks_BKR1.shape
    bias = sinks_BKR1.new_zeros(1, 1, 1, key_BKTd.shape[2]) if bias is None else bias
    bias_BKRT = torch.cat([bias.expand(batch, num_heads, rows, -1), sinks_BKR1], dim=-1)
    return functional.pad(key_BKTd, (0, 0, 0, 1)), functional.pad(segments_BTS, (0, 0, 0, 1)), bias_BKRT


def _additive(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """Turn a bool mask (true: visible) into zeros and the lowest number; an additive one stays as it is."""
    if mask is None or mask.dtype != torch.bool:
        return None if mask is None else mask.to(like.dtype)
    lowest = torch.finfo(like.dtype).min
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(~mask, lowest)
