"""How much a task moves an attention head: parameter alignment distributions, and the Taylor effect of removal.

Axes: B batch, T tokens, H query heads of a layer, G key/value groups, D hidden size, d head dimension,
n flattened entries of one head's map. Weights are stored as in `nn.Linear`, `[out, in]`.

Everything runs in float64. A fine-tuned model differs so little from its base that the scores live near 1e-7
and their squares, which KL and JS are made of, below 1e-14: the formulas here never subtract two numbers of
order one to get a number of that size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from p2d_cli.errors import UsageError

HeadWeights = Literal["product", "qkv"]
Distance = Literal["w1", "kl", "js", "cosine", "l2", "relative-l2"]

_CHUNK_ENTRIES = 1 << 17  # entries of head maps compared at once: 1 MiB a temporary, which stays in a core's cache
_CHUNK_ENTRIES_DEVICE = 1 << 24  # on an accelerator few large kernels are faster
_SERIES_BELOW = 1e-2  # below this size the series of `_entropy_excess` beats its closed form


@dataclass(frozen=True)
class LayerWeights:
    """The projections of one attention layer, cut into heads; any floating dtype, any one device."""

    q_HdD: Tensor
    """Query rows of each head."""
    k_GdD: Tensor
    """Key rows of each key/value group."""
    v_GdD: Tensor
    """Value rows of each key/value group."""

    @property
    def num_heads(self) -> int:
        """Number of query heads."""
        return int(self.q_HdD.shape[0])

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the three tensors, in the order q, k, v."""
        return tuple(self.q_HdD.shape), tuple(self.k_GdD.shape), tuple(self.v_GdD.shape)


def alignment_logits(w_q_dD: Tensor, w_k_dD: Tensor, w_v_dD: Tensor, weights: HeadWeights = "product") -> Tensor:
    """Return the numbers whose softmax is the parameter alignment distribution of one head.

    `product` is the head's map `W_o(h) = W_qᵀ W_k W_vᵀ` as `[D, d]`, row by row (ALPS, arXiv:2505.18799, eq. 5,
    with `nn.Linear` weights). It is computed as `W_qᵀ (W_k W_vᵀ)`, which never forms a `D x D` matrix. `qkv` is
    the three projections, flattened one after the other: what the public ALPS code measures.

    Returns:
        float64 [n], with `n = D * d` (product) or `3 * d * D` (qkv).
    """
    layer = LayerWeights(w_q_dD[None], w_k_dD[None], w_v_dD[None])
    return _head_logits(layer, range(1), weights)[0]


def alignment_distance(
    base_logits: Tensor, task_logits: Tensor, *, distance: Distance = "w1", temperature: float = 1.0
) -> float:
    """Return how far the task model's head lies from the base model's.

    With `P = softmax(logits / temperature)` (ALPS eq. 6):

    - `w1`: Wasserstein-1 between `P_base` and `P_task` over `n` positions evenly on [0, 1] (ALPS eq. 7), that is
      `sum |cumsum(P_base - P_task)[:n-1]| / (n - 1)`;
    - `kl`: `KL(P_task || P_base)` in nats; `js`: the Jensen-Shannon divergence in nats (not its root);
    - `cosine`: 1 - cosine similarity of the raw logits; `l2`: norm of their difference; `relative-l2`: that over
      the norm of the base logits. These three ignore the temperature.

    Args:
        base_logits: [n], as `alignment_logits` gives them.
        task_logits: [n], likewise.
        distance: Which distance.
        temperature: Divides the logits before the softmax; above 0.

    Returns:
        A number >= 0, in float64 precision; nan if a logit is not finite.
    """
    scores = _compare(base_logits.double()[None], task_logits.double()[None], distance, temperature)
    return float(scores[0])


def score_layer(
    base: LayerWeights,
    task: LayerWeights,
    *,
    weights: HeadWeights = "product",
    distance: Distance = "w1",
    temperature: float = 1.0,
) -> Tensor:
    """Return the alignment distance of every query head of a layer.

    Query head `h` is paired with key/value group `floor(h * G / H)`.

    Returns:
        float64 [H] on the CPU; a head with a weight that is not finite scores nan.

    Raises:
        UsageError: the two layers have different shapes.
    """
    if base.shapes != task.shapes:
        raise UsageError(
            f"comparing heads of two models: expected q, k, v of shapes {base.shapes}, found {task.shapes}",
            hint="the task model must be a fine-tuned copy of the base model",
        )
    entries = max(base.q_HdD[0].numel(), 1)
    limit = _CHUNK_ENTRIES if base.q_HdD.device.type == "cpu" else _CHUNK_ENTRIES_DEVICE
    step = max(1, limit // entries)
    scores = []
    for start in range(0, base.num_heads, step):
        heads = range(start, min(start + step, base.num_heads))
        base_logits_Hn, task_logits_Hn = _head_logits(base, heads, weights), _head_logits(task, heads, weights)
        scores.append(_compare(base_logits_Hn, task_logits_Hn, distance, temperature))
    return torch.cat(scores).cpu()


def removal_effect(context_BTHd: Tensor, grad_BTHd: Tensor) -> Tensor:
    """Return the first-order change of each example's loss when a head's output is removed.

    `|sum over t, d of context * gradient|` (Michel et al. 2019, arXiv:1905.10650, eq. 4, for one example). With
    `y = W x` it equals `|sum(dL/dW * W)|` over the head's columns of the output projection, without a weight
    gradient for each example.

    Args:
        context_BTHd: Input of the output projection, cut into heads.
        grad_BTHd: Gradient of the summed example losses with respect to it; zero at padding.

    Returns:
        float64 [B, H], >= 0.
    """
    return torch.einsum("bthd,bthd->bh", context_BTHd.double(), grad_BTHd.double()).abs()


def _head_logits(layer: LayerWeights, heads: range, weights: HeadWeights) -> Tensor:
    """Return the flattened float64 maps [len(heads), n] of some heads of a layer."""
    num_groups = layer.k_GdD.shape[0]
    group_of = [head * num_groups // layer.num_heads for head in heads]
    first, last = group_of[0], group_of[-1]
    q_HdD = layer.q_HdD[heads.start : heads.stop].double()
    k_GdD, v_GdD = (tensor[first : last + 1].double() for tensor in (layer.k_GdD, layer.v_GdD))
    groups = [group - first for group in group_of]
    if weights == "qkv":
        return torch.cat([q_HdD.flatten(1), k_GdD.flatten(1)[groups], v_GdD.flatten(1)[groups]], dim=1)
    k_v_Gdd = k_GdD @ v_GdD.mT
    return (q_HdD.mT @ k_v_Gdd[groups]).flatten(1)


def _compare(base_Hn: Tensor, task_Hn: Tensor, distance: Distance, temperature: float) -> Tensor:
    if not temperature > 0:
        raise UsageError(f"the softmax temperature must be above 0, found {temperature}")
    return _DISTANCES[distance](_Pair(base_Hn, task_Hn, temperature))


@dataclass(frozen=True)
class _Pair:
    """Base and task logits of the same heads, and what the distances need of them, each computed once."""

    base_Hn: Tensor
    task_Hn: Tensor
    temperature: float

    @cached_property
    def change_Hn(self) -> Tensor:
        """Difference of the raw logits."""
        return self.task_Hn - self.base_Hn

    @cached_property
    def log_p_base_Hn(self) -> Tensor:
        return torch.log_softmax(self.base_Hn / self.temperature, dim=1)

    @cached_property
    def p_base_Hn(self) -> Tensor:
        return self.log_p_base_Hn.exp()

    @cached_property
    def log_ratio_Hn(self) -> Tensor:
        """`log(P_task / P_base)`, accurate relative to its own size however small it is.

        With the logits' difference `c`, the ratio is `c - log(sum P_base e^c)`. For a small change that logarithm
        is taken as `log1p(sum P_base expm1(c))`, around the largest `c` so that nothing overflows.
        """
        change_Hn = self.change_Hn / self.temperature
        largest_H1 = change_Hn.amax(dim=1, keepdim=True)
        shortfall_H1 = (self.p_base_Hn * torch.expm1(change_Hn - largest_H1)).sum(dim=1, keepdim=True)
        near_H1 = largest_H1 + torch.log1p(shortfall_H1.clamp(min=-0.5))
        if bool((shortfall_H1 > -0.5).all()):
            return change_Hn - near_H1
        far_H1 = torch.logsumexp(self.log_p_base_Hn + change_Hn, dim=1, keepdim=True)
        return change_Hn - torch.where(shortfall_H1 > -0.5, near_H1, far_H1)

    @cached_property
    def is_near_Hn(self) -> Tensor:
        """Entries whose probability changed by less than a factor of e: the small-change formulas hold."""
        return self.log_ratio_Hn.abs() < 1.0

    @cached_property
    def log_p_task_Hn(self) -> Tensor:
        return self.log_p_base_Hn + self.log_ratio_Hn

    def pick(self, near_Hn: Tensor, far: Callable[[], Tensor]) -> Tensor:
        """Take `near_Hn` where the change is small, and `far()` elsewhere, if there is an elsewhere."""
        return near_Hn if bool(self.is_near_Hn.all()) else torch.where(self.is_near_Hn, near_Hn, far())


def _entropy_excess(x: Tensor) -> Tensor:
    """Return `(1 + x) log(1 + x) - x` for `x > -1`, by its series near 0 where the closed form cancels."""
    series = x * x * (1 / 2 - x * (1 / 6 - x * (1 / 12 - x * (1 / 20 - x * (1 / 30 - x / 42)))))
    is_small = x.abs() < _SERIES_BELOW
    return series if bool(is_small.all()) else torch.where(is_small, series, (1 + x) * torch.log1p(x) - x)


def _wasserstein_1(pair: _Pair) -> Tensor:
    near_Hn = -pair.p_base_Hn * torch.expm1(pair.log_ratio_Hn)
    difference_Hn = pair.pick(near_Hn, lambda: pair.p_base_Hn - pair.log_p_task_Hn.exp())
    steps = max(difference_Hn.shape[1] - 1, 1)
    return difference_Hn.cumsum(dim=1)[:, :-1].abs().sum(dim=1) / steps


def _kl_divergence(pair: _Pair) -> Tensor:
    # Bregman form, sum P_base ((1+u) log(1+u) - u) with u = P_task/P_base - 1: every term is >= 0.
    def far() -> Tensor:
        p_task_Hn = pair.log_p_task_Hn.exp()
        return p_task_Hn * pair.log_ratio_Hn - p_task_Hn + pair.p_base_Hn

    near_Hn = pair.p_base_Hn * _entropy_excess(torch.expm1(pair.log_ratio_Hn))
    return pair.pick(near_Hn, far).sum(dim=1)


def _js_divergence(pair: _Pair) -> Tensor:
    # The same form towards the mixture: sum P_base (g(u) - 2 g(u/2)) / 2 with g the excess above.
    def far() -> Tensor:
        log_p_base_Hn, log_p_task_Hn = pair.log_p_base_Hn, pair.log_p_task_Hn
        log_mixture_Hn = torch.logaddexp(log_p_base_Hn, log_p_task_Hn) - math.log(2.0)
        from_base_Hn = pair.p_base_Hn * (log_p_base_Hn - log_mixture_Hn)
        return (from_base_Hn + log_p_task_Hn.exp() * (log_p_task_Hn - log_mixture_Hn)) / 2

    growth_Hn = torch.expm1(pair.log_ratio_Hn)
    near_Hn = pair.p_base_Hn * (_entropy_excess(growth_Hn) / 2 - _entropy_excess(growth_Hn / 2))
    return pair.pick(near_Hn, far).sum(dim=1)


def _cosine_distance(pair: _Pair) -> Tensor:
    # 1 - cos = sin² / (1 + cos), with the sine from the part of the change that is orthogonal to the base.
    base_norm_H, task_norm_H = pair.base_Hn.norm(dim=1), pair.task_Hn.norm(dim=1)
    unit_Hn = pair.base_Hn / base_norm_H.clamp(min=torch.finfo(torch.float64).tiny)[:, None]
    along_H = (unit_Hn * pair.change_Hn).sum(dim=1)
    across_H = (pair.change_Hn - along_H[:, None] * unit_Hn).norm(dim=1)
    cosine_H = ((base_norm_H + along_H) / task_norm_H).clamp(-1.0, 1.0)
    distance_H = torch.where(cosine_H > 0, (across_H / task_norm_H) ** 2 / (1 + cosine_H), 1 - cosine_H)
    # A head of zeros has no direction: the same as another head of zeros, unlike any other.
    empty = (base_norm_H == 0) | (task_norm_H == 0)
    return torch.where(empty, (base_norm_H != task_norm_H).double(), distance_H)


def _l2_distance(pair: _Pair) -> Tensor:
    distance_H: Tensor = pair.change_Hn.norm(dim=1)
    return distance_H


def _relative_l2_distance(pair: _Pair) -> Tensor:
    change_H = pair.change_Hn.norm(dim=1)
    return torch.where(change_H == 0, change_H, change_H / pair.base_Hn.norm(dim=1))


_DISTANCES: dict[Distance, Callable[[_Pair], Tensor]] = {
    "w1": _wasserstein_1,
    "kl": _kl_divergence,
    "js": _js_divergence,
    "cosine": _cosine_distance,
    "l2": _l2_distance,
    "relative-l2": _relative_l2_distance,
}
