"""How much a task moves an attention head: parameter alignment distributions, and the Taylor effect of removal.

Axes: B batch, T tokens, H query heads of a layer, G key/value groups, D hidden size, d head dimension,
n flattened entries of one head's map. Weights are stored as in `nn.Linear`, `[out, in]`.

Everything runs in float64. A fine-tuned model differs so little from its base that the scores live near 1e-7
and their squares, which KL and JS are made of, below 1e-14: the formulas here never subtract two numbers of
order one to get a number of that size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
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
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the three tensors, in the order q, k, v."""
        return tuple(self.q_HdD.shape), tuple(self.k_GdD.shape), tuple(self.v_GdD.shape)


def score_layer(
    base: LayerWeights,
    task: LayerWeights,
    *,
    weights: HeadWeights = "product",
    distance: Distance = "w1",
    temperature: float = 1.0,
) -> Tensor:
    """Return how far each query head `h` of a layer, with its key/value group `floor(h * G / H)`, was moved.

    What is compared is each head's map, flattened to n `logits`. `product`: `W_o(h) = W_qᵀ W_k W_vᵀ` as `[D, d]`, row
    by row (ALPS, arXiv:2505.18799, eq. 5, with `nn.Linear` weights), computed as `W_qᵀ (W_k W_vᵀ)`, which never forms a
    `D x D` matrix. `qkv`: the three projections, one after the other, as the public ALPS code measures.

    With `P = softmax(logits / temperature)` (ALPS eq. 6), the distance is:

    - `w1`: Wasserstein-1 between `P_base` and `P_task` over `n` positions evenly on [0, 1] (ALPS eq. 7), that is
      `sum |cumsum(P_base - P_task)[:n-1]| / (n - 1)`;
    - `kl`: `KL(P_task || P_base)` in nats; `js`: the Jensen-Shannon divergence in nats (not its root);
    - `cosine`: 1 - cosine similarity of the raw logits; `l2`: norm of their difference; `relative-l2`: that over
      the norm of the base logits. These three ignore the temperature.

    Args:
        base: the layer of the base model.
        task: the same layer of the task model.
        weights: what of a head is compared.
        distance: which distance.
        temperature: divides the logits before the softmax; above 0.

    Returns:
        float64 [H] on the CPU; a head with a weight that is not finite scores nan.

    Raises:
        UsageError: the two layers have different shapes, or the temperature is not above 0.
    """
    if not temperature > 0:
        raise UsageError(f"the softmax temperature must be above 0, found {temperature}")
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
class _Pair:
    """A head's flattened map in both models, or a stretch of it, and what the distances need, each computed once.

    Heads of a group share the stretches of keys and values.
    """

    base_n: Tensor
    """The logits, float64."""
    task_n: Tensor
    temperature: float

    @cached_property
    def sums(self) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """`w`, `u` and the sum of each; None where a logit or a change is large, or not finite.

        Where none is large, the softmax of the whole map needs only sums over its stretches: with `w = exp(base)` and
        `u = w expm1(change)`, `P_base = w / sum w` and `P_task = (w + u) / sum (w + u)`.
        """
        weight_n, change_n = self.base_n / self.temperature, self.task_n - self.base_n
        change_n /= self.temperature
        bounds = zip((weight_n, change_n), (_NEAR_LOGIT, _NEAR_CHANGE), strict=True)
        if not all(bool((torch.stack(values.aminmax()).abs() < limit).all()) for values, limit in bounds):
            return None
        weight_n.exp_()
        gain_n = change_n.expm1_().mul_(weight_n)
        return weight_n, gain_n, weight_n.sum(), gain_n.sum()

    @cached_property
    def change_n(self) -> Tensor:
        """Difference of the raw logits."""
        return self.task_n - self.base_n

    @cached_property
    def log_p_base_n(self) -> Tensor:
        return torch.log_softmax(self.base_n / self.temperature, dim=0)

    @cached_property
    def p_base_n(self) -> Tensor:
        return self.log_p_base_n.exp()

    @cached_property
    def log_ratio_n(self) -> Tensor:
        """`log(P_task / P_base)`, accurate relative to its own size however small it is.

        With the logits' difference `c`, the ratio is `c - log(sum P_base e^c)`. For a small change that logarithm
        is taken as `log1p(sum P_base expm1(c))`, around the largest `c` so that nothing overflows.
        """
        change_n = self.change_n / self.temperature
        largest = change_n.amax()
        shortfall = (self.p_base_n * torch.expm1(change_n - largest)).sum()
        if bool(shortfall > -0.5):
            return change_n - (largest + torch.log1p(shortfall))
        return change_n - torch.logsumexp(self.log_p_base_n + change_n, dim=0)

    @cached_property
    def log_p_task_n(self) -> Tensor:
        return self.log_p_base_n + self.log_ratio_n

    def pick(self, near_n: Tensor, far: Callable[[], Tensor]) -> Tensor:
        """Take `near_n` where the probability changed by less than a factor of e, and `far()` elsewhere, if at all."""
        is_near_n = self.log_ratio_n.abs() < 1.0
        return near_n if bool(is_near_n.all()) else torch.where(is_near_n, near_n, far())


def _heads_by_group(
    base: LayerWeights, task: LayerWeights, weights: HeadWeights, temperature: float
) -> Iterator[list[_Pair]]:
    """Give each query head's map, in order; what heads of a group share is converted, and its softmax taken, once."""
    num_heads, num_groups = len(base.q_HdD), len(base.k_GdD)
    for group, heads in groupby(range(num_heads), lambda head: head * num_groups // num_heads):
        k_base, k_task, v_base, v_task = (
            weight_GdD[group].double() for weight_GdD in (base.k_GdD, task.k_GdD, base.v_GdD, task.v_GdD)
        )
        if weights == "qkv":
            shared = [_Pair(b.flatten(), t.flatten(), temperature) for b, t in ((k_base, k_task), (v_base, v_task))]
        else:
            inner_base, inner_task = k_base @ v_base.T, k_task @ v_task.T
        for head in heads:
            q_base, q_task = base.q_HdD[head].double(), task.q_HdD[head].double()
            if weights == "qkv":
                yield [_Pair(q_base.flatten(), q_task.flatten(), temperature), *shared]
            else:
                yield [_Pair((q_base.T @ inner_base).flatten(), (q_task.T @ inner_task).flatten(), temperature)]


def _compare(stretches: list[_Pair], distance: Distance) -> Tensor:
    """Return the distance between the two models' maps of one head, a float64 scalar."""
    near = [stretch.sums for stretch in stretches] if distance == "w1" else [None]
    if all(sums is not None for sums in near):
        return _wasserstein_1_near([sums for sums in near if sums is not None])
    base_n, task_n = (torch.cat([getattr(part, name) for part in stretches]) for name in ("base_n", "task_n"))
    return _DISTANCES[distance](_Pair(base_n, task_n, stretches[0].temperature))


def _wasserstein_1_near(stretches: list[tuple[Tensor, Tensor, Tensor, Tensor]]) -> Tensor:
    """Sum `|cumsum(P_base - P_task)|` over stretches, given as `_Pair.sums`.

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
    blocks = (values_n[:whole].view(-1, _BLOCK_ENTRIES), values_n[whole:][None])
    yield from (block for block in blocks if block.numel())


def _entropy_excess(x: Tensor) -> Tensor:
    """Return `(1 + x) log(1 + x) - x` for `x > -1`, by its series near 0 where the closed form cancels."""
    series = x * x * (1 / 2 - x * (1 / 6 - x * (1 / 12 - x * (1 / 20 - x * (1 / 30 - x / 42)))))
    is_small = x.abs() < _SERIES_BELOW
    return series if bool(is_small.all()) else torch.where(is_small, series, (1 + x) * torch.log1p(x) - x)


def _wasserstein_1(pair: _Pair) -> Tensor:
    near_n = -pair.p_base_n * torch.expm1(pair.log_ratio_n)
    difference_n = pair.pick(near_n, lambda: pair.p_base_n - pair.log_p_task_n.exp())
    return difference_n.cumsum(0)[:-1].abs().sum() / max(len(difference_n) - 1, 1)


def _kl_divergence(pair: _Pair) -> Tensor:
    # Bregman form, sum P_base ((1+u) log(1+u) - u) with u = P_task/P_base - 1: every term is >= 0.
    def far() -> Tensor:
        p_task_n = pair.log_p_task_n.exp()
        return p_task_n * pair.log_ratio_n - p_task_n + pair.p_base_n

    near_n = pair.p_base_n * _entropy_excess(torch.expm1(pair.log_ratio_n))
    return pair.pick(near_n, far).sum()


def _js_divergence(pair: _Pair) -> Tensor:
    # The same form towards the mixture: sum P_base (g(u) - 2 g(u/2)) / 2 with g the excess above.
    def far() -> Tensor:
        log_mixture_n = torch.logaddexp(pair.log_p_base_n, pair.log_p_task_n) - math.log(2.0)
        from_base_n = pair.p_base_n * (pair.log_p_base_n - log_mixture_n)
        return (from_base_n + pair.log_p_task_n.exp() * (pair.log_p_task_n - log_mixture_n)) / 2

    growth_n = torch.expm1(pair.log_ratio_n)
    near_n = pair.p_base_n * (_entropy_excess(growth_n) / 2 - _entropy_excess(growth_n / 2))
    return pair.pick(near_n, far).sum()


def _norm(values_n: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(values_n)
    return norm


def _cosine_distance(pair: _Pair) -> Tensor:
    # 1 - cos = sin² / (1 + cos), with the sine from the part of the change that is orthogonal to the base.
    base_norm, task_norm = _norm(pair.base_n), _norm(pair.task_n)
    if base_norm == 0 or task_norm == 0:
        # A head of zeros has no direction: the same as another head of zeros, unlike any other.
        return (base_norm != task_norm).double()
    unit_n = pair.base_n / base_norm
    along = (unit_n * pair.change_n).sum()
    across = _norm(pair.change_n - along * unit_n)
    cosine = ((base_norm + along) / task_norm).clamp(-1.0, 1.0)
    return (across / task_norm) ** 2 / (1 + cosine) if cosine > 0 else 1 - cosine


def _relative_l2_distance(pair: _Pair) -> Tensor:
    change = _norm(pair.change_n)
    return change if change == 0 else change / _norm(pair.base_n)


_DISTANCES: dict[Distance, Callable[[_Pair], Tensor]] = {
    "w1": _wasserstein_1,
    "kl": _kl_divergence,
    "js": _js_divergence,
    "cosine": _cosine_distance,
    "l2": lambda pair: _norm(pair.change_n),
    "relative-l2": _relative_l2_distance,
}
