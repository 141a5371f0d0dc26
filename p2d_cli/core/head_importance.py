"""How much a task moves an attention head: parameter alignment distributions, and the Taylor effect of removal.

Axes: B batch, T tokens, H query heads of a layer, G key/value groups, D hidden size, d head dimension,
n flattened entries of one head's map. Weights are stored as in `nn.Linear`, `[out, in]`.

Everything runs in float64. A fine-tuned model differs so little from its base that the scores live near 1e-7
and their squares, which KL and JS are made of, below 1e-14: the formulas here never subtract two numbers of
order one to get a number of that size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from p2d_cli.errors import UsageError

HeadWeights = Literal["product", "qkv"]
Distance = Literal["w1", "kl", "js", "cosine", "l2", "relative-l2"]

_NEAR_LOGIT, _NEAR_CHANGE = 4.0, 1.0  # below these no probability stands out, and none changes by a factor of e
_BLOCK_ENTRIES = 1 << 12  # entries summed up in one go; several blocks of one head run side by side
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
    q_dD, k_dD, v_dD = w_q_dD.double(), w_k_dD.double(), w_v_dD.double()
    if weights == "qkv":
        return torch.cat([q_dD.flatten(), k_dD.flatten(), v_dD.flatten()])
    return (q_dD.T @ (k_dD @ v_dD.T)).flatten()


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
    stretch = _Stretch(base_logits.double(), task_logits.double(), temperature)
    return float(_compare([stretch], distance))


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
    heads = _heads_by_group(base, task, weights, temperature)
    return torch.stack([_compare(stretches, distance) for stretches in heads]).cpu()


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


# --- one head's map in both models


@dataclass(frozen=True)
class _Stretch:
    """A stretch of a head's flattened map in both models, float64 [n]; heads of a group share those of keys and values.

    Where no logit and no change of one is large, the softmax of the whole map needs only sums over the stretches:
    with `w = exp(base)` and `u = w expm1(change)`, `P_base = w / sum w` and `P_task = (w + u) / sum (w + u)`.
    """

    base_n: Tensor
    task_n: Tensor
    temperature: float

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UsageError(f"the softmax temperature must be above 0, found {self.temperature}")

    @cached_property
    def sums(self) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """`w`, `u` and the sum of each; None where a logit or a change is large, or not finite."""
        weight_n, change_n = self.base_n / self.temperature, self.task_n - self.base_n
        change_n /= self.temperature
        bounds = zip((weight_n, change_n), (_NEAR_LOGIT, _NEAR_CHANGE), strict=True)
        if not all(bool((torch.stack(values.aminmax()).abs() < limit).all()) for values, limit in bounds):
            return None
        weight_n.exp_()
        gain_n = change_n.expm1_().mul_(weight_n)
        return weight_n, gain_n, weight_n.sum(), gain_n.sum()


def _heads_by_group(
    base: LayerWeights, task: LayerWeights, weights: HeadWeights, temperature: float
) -> Iterator[list[_Stretch]]:
    """Give each query head's map, in order; what heads of a group share is converted, and its softmax taken, once."""
    models = (base, task)
    num_groups = int(base.k_GdD.shape[0])
    for group in range(num_groups):
        keys, values = ([getattr(model, name)[group].double() for model in models] for name in ("k_GdD", "v_GdD"))
        if weights == "qkv":
            shared = [_stretch(pair, temperature) for pair in (keys, values)]
        else:
            inner_dd = [key_dD @ value_dD.T for key_dD, value_dD in zip(keys, values, strict=True)]
        for head in range(base.num_heads):
            if head * num_groups // base.num_heads != group:
                continue
            queries = [model.q_HdD[head].double() for model in models]
            if weights == "qkv":
                yield [_stretch(queries, temperature), *shared]
            else:
                maps = [query_dD.T @ map_dd for query_dD, map_dd in zip(queries, inner_dd, strict=True)]
                yield [_stretch(maps, temperature)]


def _stretch(pair: Sequence[Tensor], temperature: float) -> _Stretch:
    base, task = pair
    return _Stretch(base.flatten(), task.flatten(), temperature)


def _compare(stretches: list[_Stretch], distance: Distance) -> Tensor:
    """Return the distance between the two models' maps of one head, a float64 scalar."""
    near = [stretch.sums for stretch in stretches] if distance == "w1" else [None]
    if all(sums is not None for sums in near):
        return _wasserstein_1_near([sums for sums in near if sums is not None])
    base_n, task_n = (torch.cat(parts) for parts in zip(*((s.base_n, s.task_n) for s in stretches), strict=True))
    return _DISTANCES[distance](_Pair(base_n[None], task_n[None], stretches[0].temperature))[0]


def _wasserstein_1_near(stretches: list[tuple[Tensor, Tensor, Tensor, Tensor]]) -> Tensor:
    """Sum `|cumsum(P_base - P_task)|` over stretches, given as `_Stretch.sums`.

    The difference is `(w U/W - u) / (W + U)` with the sums `W` of `w` and `U` of `u`. It is summed up in blocks, side
    by side, and what comes before a block is added afterwards.
    """
    weight_sum, gain_sum = (torch.stack([sums[place] for sums in stretches]).sum() for place in (2, 3))
    before = torch.zeros_like(weight_sum)
    total = torch.zeros_like(weight_sum)
    entries = 0
    for weight_n, gain_n, *_ in stretches:
        difference_n = torch.addcmul(gain_n, weight_n, gain_sum / weight_sum, value=-1)
        for blocks_Bn in _blocks(difference_n):
            torch.cumsum(blocks_Bn, dim=1, out=blocks_Bn)
            ends_B = blocks_Bn[:, -1].cumsum(0)
            blocks_Bn += (before + ends_B - blocks_Bn[:, -1])[:, None]
            before = before + ends_B[-1]
            total = total + torch.linalg.vector_norm(blocks_Bn, 1)
        entries += len(difference_n)
    return total / (weight_sum + gain_sum) / max(entries - 1, 1)


def _blocks(values_n: Tensor) -> Iterator[Tensor]:
    """Cut a vector into rows of `_BLOCK_ENTRIES`, then what is left over."""
    whole = len(values_n) // _BLOCK_ENTRIES * _BLOCK_ENTRIES
    if whole:
        yield values_n[:whole].view(-1, _BLOCK_ENTRIES)
    if whole < len(values_n):
        yield values_n[whole:][None]


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
