from __future__ import annotations

from typing import Any

import pytest
import torch

from p2d_cli.core.head_importance import score_layer
from p2d_cli.errors import NonFiniteError
from p2d_cli.modeling.gradients import example_losses
from p2d_cli.modeling.layouts import model_layout
from p2d_cli.modeling.proxy import AttentionProxy

Batch = dict[str, torch.Tensor]
FAMILIES = (
    *("llama-mha", "llama-gqa", "llama-mqa", "mistral", "qwen2", "qwen3"),
    *("gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox", "olmo2"),
)


def batches(token_ids: Any, count: int = 4) -> list[Batch]:
    """Right-padded rows whose first tokens are a prompt."""
    made = []
    for number in range(count):
        ids = token_ids(3, 9, seed=number)
        mask = torch.ones_like(ids)
        mask[1, 6:] = 0
        labels = ids.clone()
        labels[:, :4] = -100
        labels[mask == 0] = -100
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


def snapshot(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def trained_masks(model: Any, projections: tuple[str, ...]) -> dict[str, torch.Tensor]:
    masks = {name: torch.zeros_like(weight, dtype=torch.bool) for name, weight in model.named_parameters()}
    for layer in model_layout(model):
        for name in projections:
            part = layer.projection(name)
            mask = masks[part.weight_name]
            for start, stop in part.rows:
                (mask.T if (name == "o") != part.transposed else mask)[start:stop] = True
    return masks


def run_plain_adamw(model: Any, rows: list[Batch], projections: tuple[str, ...], *, lr: float) -> list[float]:
    """The same training without any of the proxy's machinery."""
    masks = trained_masks(model, projections)
    weights = {name: weight for name, weight in model.named_parameters() if masks[name].any()}
    optimizer = torch.optim.AdamW(weights.values(), lr=lr, weight_decay=0.0)
    losses = []
    for batch in rows:
        model.zero_grad()
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        for name, weight in weights.items():
            weight.grad[~masks[name]] = 0
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_single_step_changes_the_weights(tiny_model, token_ids):
    """The proxy's rate is constant: no warm-up makes the only step of a small task an empty one."""
    model = tiny_model("llama")
    proxy = AttentionProxy(model, model_layout(model), lr=1e-2)
    list(proxy.steps(batches(token_ids, 1)))
    assert (proxy.task_weights(0).q_HdD - proxy.base_weights(0).q_HdD).abs().max() > 1e-3


PARTS = [("llama-gqa", ("v", "o")), ("phi3", ("q",)), ("gpt2", ("k",)), ("gpt2", ("v", "o")), ("gpt_neox", ("q",))]


@pytest.mark.parametrize(("family", "projections"), [*((name, ("q", "k", "v")) for name in FAMILIES), *PARTS])
def test_steps_equal_plain_adamw_on_an_fp32_model(tiny_model, token_ids, family, projections):
    reference = tiny_model(family)
    expected = run_plain_adamw(reference, batches(token_ids, 3), projections, lr=1e-2)
    model = tiny_model(family)
    proxy = AttentionProxy(model, model_layout(model), lr=1e-2, projections=projections)
    assert list(proxy.steps(batches(token_ids, 3))) == pytest.approx(expected, abs=1e-5)
    masks = trained_masks(model, projections)
    for name, weight in model.named_parameters():
        # Where a gradient is next to nothing, Adam makes much of its rounding: a thirtieth of the way of three steps.
        torch.testing.assert_close(weight, reference.get_parameter(name), atol=1e-3, rtol=0)
        untouched = tiny_model(family).get_parameter(name)[~masks[name]]
        assert torch.equal(weight[~masks[name]], untouched), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restore_gives_the_base_back_bit_for_bit_and_keeps_the_task_weights(tiny_model, token_ids, family, dtype):
    model = tiny_model(family).to(dtype)
    before = snapshot(model)
    proxy = AttentionProxy(model, model_layout(model), lr=1e-2)
    list(proxy.steps(batches(token_ids, 2)))
    assert any(not torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    trained = proxy.task_weights(1).q_HdD.clone()
    proxy.restore()
    for name, weight in model.named_parameters():
        assert weight.dtype == dtype
        assert torch.equal(weight.view(torch.int8), before[name].view(torch.int8)), name
    assert torch.equal(proxy.task_weights(1).q_HdD, trained)


def test_task_weights_differ_from_the_base_in_every_layer(tiny_model, token_ids, family):
    model = tiny_model(family)
    proxy = AttentionProxy(model, model_layout(model), lr=1e-2)
    start = {layer: proxy.base_weights(layer) for layer in range(2)}
    list(proxy.steps(batches(token_ids)))
    for layer in range(2):
        base, task = proxy.base_weights(layer), proxy.task_weights(layer)
        for name in ("q_HdD", "k_GdD", "v_GdD"):
            assert torch.equal(getattr(base, name), getattr(start[layer], name))
            moved = (getattr(task, name) - getattr(base, name)).abs().amax(dim=(1, 2))
            assert (moved > 1e-3).all(), (layer, name)
        scores = score_layer(base, task, weights="product", distance="w1", temperature=1.0)
        assert scores.shape == (4,)
        assert (scores > 0).all()


def test_fp32_masters_keep_updates_that_bf16_would_swallow(tiny_model, token_ids):
    model = tiny_model("llama").to(torch.bfloat16)
    before = snapshot(model)
    layer = model_layout(model)[0]
    proxy = AttentionProxy(model, model_layout(model), lr=1e-7)
    list(proxy.steps(batches(token_ids, 2)))
    name = layer.q.weight_name
    large = before[name].abs() > 0.01
    assert torch.equal(model.get_parameter(name)[large], before[name][large])
    task, base = proxy.task_weights(0), proxy.base_weights(0)
    assert (task.q_HdD.dtype, base.q_HdD.dtype) == (torch.float32, torch.bfloat16)
    moved = (task.q_HdD - base.q_HdD.float()).abs()
    assert moved.max() > 1e-8
    assert moved.max() < 1e-6


def test_the_bf16_model_is_the_rounding_of_the_masters(tiny_model, token_ids):
    model = tiny_model("llama").to(torch.bfloat16)
    layout = model_layout(model)
    proxy = AttentionProxy(model, layout, lr=1e-2)
    for _ in proxy.steps(batches(token_ids)):
        live = model.get_parameter(layout[1].k.weight_name).detach()
        assert torch.equal(live.view(2, 8, 32), proxy.task_weights(1).k_GdD.to(torch.bfloat16))


def test_training_lowers_the_loss(tiny_model, token_ids):
    model = tiny_model("llama")
    losses = list(AttentionProxy(model, model_layout(model), lr=1e-2).steps(batches(token_ids, 1) * 12))
    assert losses[-1] < losses[0] - 0.05


def test_flags_and_mode_of_the_model_are_left_alone(tiny_model, token_ids):
    model = tiny_model("llama").train()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 2 == 0)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    steps = AttentionProxy(model, model_layout(model), lr=1e-2).steps(batches(token_ids))
    with torch.no_grad():
        next(steps)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_are_clipped_only_if_asked_for(tiny_model, token_ids):
    moved = []
    for norm in (1e-12, None):
        model = tiny_model("llama")
        proxy = AttentionProxy(model, model_layout(model), lr=1e-2, max_grad_norm=norm)
        list(proxy.steps(batches(token_ids, 1)))
        moved.append((proxy.task_weights(0).q_HdD - proxy.base_weights(0).q_HdD).abs().max().item())
    # Adam's first step has the size of the learning rate whatever the gradient's, unless epsilon outweighs it.
    assert moved[0] < 1e-5
    assert moved[1] == pytest.approx(1e-2, rel=1e-2)


def test_a_loss_that_is_not_finite_restores_the_base(tiny_model, token_ids):
    model = tiny_model("llama")
    before = snapshot(model)
    rows = batches(token_ids, 2)
    rows[1]["labels"].fill_(-100)
    steps = AttentionProxy(model, model_layout(model), lr=1e-2).steps(rows)
    next(steps)
    with pytest.raises(NonFiniteError, match="step 2"):
        next(steps)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_example_losses_are_those_of_the_examples_alone(tiny_model, token_ids, family):
    model = tiny_model(family)
    batch = batches(token_ids, 1)[0]
    with torch.no_grad():
        sums_B, counts_B = example_losses(model, batch)
        for row in range(3):
            length = int(batch["attention_mask"][row].sum())
            alone = {name: tensor[row : row + 1, :length] for name, tensor in batch.items()}
            assert counts_B[row] == length - 4
            assert sums_B[row] / counts_B[row] == pytest.approx(model(**alone).loss.item(), abs=1e-5)


def test_the_mask_is_optional_with_padding_on_the_right(tiny_model, token_ids):
    model = tiny_model("llama")
    batch = batches(token_ids, 1)[0]
    with torch.no_grad():
        expected, _ = example_losses(model, batch)
        actual, _ = example_losses(model, {name: batch[name] for name in ("input_ids", "labels")})
    torch.testing.assert_close(actual, expected)
