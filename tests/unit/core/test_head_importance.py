from __future__ import annotations

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
import scipy.spatial.distance
import scipy.special
import scipy.stats
import torch
from torch import Tensor

from p2d_cli.core import head_importance
from p2d_cli.core.head_importance import LayerWeights, _compare, _Pair, removal_effect, score_layer
from p2d_cli.errors import UsageError

DISTANCES = ["w1", "kl", "js", "cosine", "l2", "relative-l2"]


def _logits(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _layer(heads: int, groups: int, head_dim: int = 3, hidden: int = 5, seed: int = 0) -> LayerWeights:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(heads, head_dim, hidden), (groups, head_dim, hidden), (groups, head_dim, hidden)]
    return LayerWeights(*(torch.randn(shape, generator=generator) for shape in shapes))


def _nudged(layer: LayerWeights, size: float, seed: int = 1) -> LayerWeights:
    generator = torch.Generator().manual_seed(seed)
    return LayerWeights(
        *(w + size * torch.randn(w.shape, generator=generator) for w in (layer.q_HdD, layer.k_GdD, layer.v_GdD))
    )


def alignment_distance(base: Tensor, task: Tensor, *, distance: str = "w1", temperature: float = 1.0) -> float:
    """The distance of one head whose map is given."""
    return float(_compare([_Pair(base.double(), task.double(), temperature)], distance))


def alignment_logits(w_q: Tensor, w_k: Tensor, w_v: Tensor, weights: str) -> Tensor:
    """The map of one head, by its definition."""
    if weights == "qkv":
        return torch.cat([w.double().flatten() for w in (w_q, w_k, w_v)])
    return torch.einsum("id,im,jm->dj", w_q.double(), w_k.double(), w_v.double()).flatten()


def _exact(base: Tensor, task: Tensor, distance: str, temperature: float) -> float:
    """The definitions, word by word, in 60 decimal digits."""
    with localcontext() as context:
        context.prec = 60
        x, y = ([Decimal(value) for value in logits.tolist()] for logits in (base, task))
        difference = [b - a for a, b in zip(x, y, strict=True)]
        norm_x, norm_y, norm_d = (sum(v * v for v in values).sqrt() for values in (x, y, difference))
        if distance == "cosine":
            return float(1 - sum(a * b for a, b in zip(x, y, strict=True)) / norm_x / norm_y)
        if distance in ("l2", "relative-l2"):
            return float(norm_d / (norm_x if distance == "relative-l2" else 1))
        tau = Decimal(temperature)
        e_x, e_y = ([(v / tau).exp() for v in values] for values in (x, y))
        p, q = [v / sum(e_x) for v in e_x], [v / sum(e_y) for v in e_y]
        if distance == "w1":
            return float(sum(abs(sum(p[: i + 1]) - sum(q[: i + 1])) for i in range(len(p) - 1)) / (len(p) - 1))
        if distance == "kl":
            return float(sum(b * (b / a).ln() for a, b in zip(p, q, strict=True)))
        mixture = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
        return float(
            sum(a * (a / m).ln() + b * (b / m).ln() for a, b, m in zip(p, q, mixture, strict=True)) / Decimal(2)
        )


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("size", [1e-11, 1e-7, 4e-3, 0.3, 3.0, 40.0])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_every_distance_is_accurate_for_changes_of_any_size(distance: str, size: float, temperature: float):
    base = _logits(24)
    task = base + size * _logits(24, seed=1)
    found = alignment_distance(base, task, distance=distance, temperature=temperature)
    expected = _exact(base, task, distance, temperature)
    assert expected > 0
    # The scores of the smallest change lie below 1e-22 (KL, JS, cosine): no naive formula has a digit of them.
    assert found == pytest.approx(expected, rel=1e-11, abs=0)


def test_w1_is_scipys_wasserstein_distance_over_positions():
    base, n = 0.05 * _logits(4000), 4000
    task = base + 1e-5 * _logits(4000, seed=1)
    p, q = (torch.softmax(x, 0).numpy() for x in (base, task))
    positions = np.arange(n) / (n - 1)
    expected = scipy.stats.wasserstein_distance(positions, positions, u_weights=p, v_weights=q)
    assert expected < 1e-6
    assert alignment_distance(base, task, distance="w1") == pytest.approx(expected, rel=1e-6, abs=0)


def test_kl_js_and_cosine_are_scipys():
    base, task = _logits(300), _logits(300, seed=1)
    for temperature in (1.0, 2.5):
        p, q = (scipy.special.softmax(x.numpy() / temperature) for x in (base, task))
        kl = alignment_distance(base, task, distance="kl", temperature=temperature)
        js = alignment_distance(base, task, distance="js", temperature=temperature)
        assert kl == pytest.approx(scipy.stats.entropy(q, p), rel=1e-10)
        assert js == pytest.approx(scipy.spatial.distance.jensenshannon(p, q) ** 2, rel=1e-10)
    cosine = alignment_distance(base, task, distance="cosine")
    assert cosine == pytest.approx(scipy.spatial.distance.cosine(base.numpy(), task.numpy()), rel=1e-10)


def test_w1_of_all_mass_moving_from_one_end_to_the_other_is_one():
    base, task = torch.zeros(11), torch.zeros(11)
    base[0], task[-1] = 2000.0, 2000.0
    assert alignment_distance(base, task, distance="w1") == pytest.approx(1.0, rel=1e-12)
    assert alignment_distance(base, task, distance="js") == pytest.approx(math.log(2), rel=1e-12)
    assert alignment_distance(base, task, distance="kl") == pytest.approx(2000.0, rel=1e-12)


@pytest.mark.parametrize("distance", ["w1", "kl", "js"])
def test_distances_of_distributions_ignore_a_shift_of_all_logits(distance: str):
    base = _logits(50)
    assert alignment_distance(base, base + 64.0, distance=distance) == pytest.approx(0.0, abs=1e-14)
    task = base + 0.01 * _logits(50, seed=1)
    plain = alignment_distance(base, task, distance=distance)
    assert alignment_distance(base, task + 64.0, distance=distance) == pytest.approx(plain, rel=1e-9, abs=0)


@pytest.mark.parametrize("distance", DISTANCES)
def test_equal_heads_are_at_distance_zero_and_a_nan_is_not_hidden(distance: str):
    base = _logits(50)
    assert alignment_distance(base, base.clone(), distance=distance) == 0.0
    for bad in (math.nan, math.inf):
        task = base.clone()
        task[7] = bad
        assert not math.isfinite(alignment_distance(base, task, distance=distance))


def test_heads_of_zeros_have_no_direction():
    zeros, ones = torch.zeros(4), torch.ones(4)
    assert alignment_distance(zeros, zeros, distance="cosine") == 0.0
    assert (
        alignment_distance(zeros, ones, distance="cosine") == alignment_distance(ones, zeros, distance="cosine") == 1.0
    )
    assert alignment_distance(ones, -ones, distance="cosine") == pytest.approx(2.0)
    assert alignment_distance(zeros, zeros, distance="relative-l2") == 0.0
    assert alignment_distance(zeros, ones, distance="relative-l2") == math.inf


def test_the_temperature_must_be_positive():
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(UsageError, match="temperature must be above 0"):
            score_layer(_layer(2, 1), _layer(2, 1), temperature=temperature)


@pytest.mark.parametrize("groups", [4, 2, 1], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("weights", ["product", "qkv"])
@pytest.mark.parametrize("block", [1, 4, 1 << 12], ids=["blocks-of-1", "blocks-of-4-and-a-rest", "one-block"])
@pytest.mark.parametrize("change", [1e-3, 5.0], ids=["near", "far"])
def test_score_layer_is_the_distance_of_each_head_with_its_group(
    monkeypatch: pytest.MonkeyPatch, groups: int, weights: str, block: int, change: float
):
    base = _layer(4, groups)
    task = _nudged(base, change)
    for distance in DISTANCES:
        monkeypatch.setattr(head_importance, "_BLOCK_ENTRIES", block)
        scores = score_layer(base, task, weights=weights, distance=distance, temperature=1.5)
        assert scores.shape == (4,)
        assert scores.dtype == torch.float64
        for head in range(4):
            group = head // (4 // groups)
            base_logits, task_logits = (
                alignment_logits(w.q_HdD[head], w.k_GdD[group], w.v_GdD[group], weights) for w in (base, task)
            )
            with monkeypatch.context() as patch:
                patch.setattr(head_importance, "_NEAR_CHANGE", 0.0)  # the general formulas
                one = alignment_distance(base_logits, task_logits, distance=distance, temperature=1.5)
            assert scores[head].item() == pytest.approx(one, rel=1e-9, abs=0)


def test_only_the_changed_head_scores_and_a_shared_group_moves_all_its_heads():
    base = _layer(4, 2)
    q, k = base.q_HdD.clone(), base.k_GdD.clone()
    q[2] += 0.1
    scores = score_layer(base, LayerWeights(q, base.k_GdD, base.v_GdD))
    assert (scores > 0).tolist() == [False, False, True, False]
    k[0] += 0.1
    scores = score_layer(base, LayerWeights(base.q_HdD, k, base.v_GdD))
    assert (scores > 0).tolist() == [True, True, False, False]


def test_scores_follow_a_permutation_of_the_heads():
    base = _layer(4, 4)
    task = _nudged(base, 1e-2)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = [LayerWeights(w.q_HdD[order], w.k_GdD[order], w.v_GdD[order]) for w in (base, task)]
    torch.testing.assert_close(score_layer(*shuffled), score_layer(base, task)[order], rtol=1e-9, atol=0)


def test_bfloat16_weights_are_compared_in_float64():
    layer = _layer(2, 1)
    base = LayerWeights(*(w.bfloat16() for w in (layer.q_HdD, layer.k_GdD, layer.v_GdD)))
    task = _nudged(LayerWeights(*(w.float() for w in (base.q_HdD, base.k_GdD, base.v_GdD))), 1e-6)
    wide = LayerWeights(*(w.double() for w in (base.q_HdD, base.k_GdD, base.v_GdD)))
    torch.testing.assert_close(score_layer(base, task), score_layer(wide, task), rtol=0, atol=0)


def test_a_weight_that_is_not_finite_shows_in_the_score_of_its_head_alone():
    base = _layer(3, 3)
    q = base.q_HdD.clone()
    q[1, 0, 0] = math.nan
    scores = score_layer(base, LayerWeights(q, base.k_GdD, base.v_GdD))
    assert scores.isnan().tolist() == [False, True, False]


def test_models_of_other_shapes_are_not_compared():
    with pytest.raises(UsageError, match=r"expected q, k, v of shapes .*, found") as caught:
        score_layer(_layer(4, 2), _layer(4, 4))
    assert caught.value.hint is not None
    assert "fine-tuned copy" in caught.value.hint


def test_removal_effect_is_the_gradient_times_the_output_columns_of_each_example():
    batch, tokens, heads, head_dim, hidden = 3, 4, 2, 3, 5
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(batch, tokens, heads, head_dim, generator=generator).double().requires_grad_()
    target = torch.randn(batch, tokens, hidden, generator=generator).double()
    weight = torch.randn(hidden, heads * head_dim, generator=generator).double().requires_grad_()

    def losses(inputs: Tensor) -> Tensor:
        return ((torch.tanh(inputs.flatten(2) @ weight.T) - target) ** 2).sum(dim=(1, 2))

    (grad,) = torch.autograd.grad(losses(context).sum(), context)
    found = removal_effect(context.detach(), grad)
    assert found.shape == (batch, heads)
    for example in range(batch):
        (grad_weight,) = torch.autograd.grad(losses(context)[example], weight, retain_graph=True)
        columns = (grad_weight * weight).detach().reshape(hidden, heads, head_dim)
        torch.testing.assert_close(found[example], columns.sum(dim=(0, 2)).abs())


def test_removal_effect_predicts_the_loss_of_a_slightly_weakened_head():
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(1, 4, 2, 3, generator=generator).double().requires_grad_()
    weight = torch.randn(5, 6, generator=generator).double()

    def loss(inputs: Tensor) -> Tensor:
        return torch.tanh(inputs.flatten(2) @ weight.T).pow(3).sum()

    (grad,) = torch.autograd.grad(loss(context), context)
    weakened = context.detach().clone()
    weakened[:, :, 1] *= 1 - 1e-6
    slope = (loss(weakened) - loss(context)).abs().item() / 1e-6
    assert removal_effect(context.detach(), grad)[0, 1].item() == pytest.approx(slope, rel=1e-3)
