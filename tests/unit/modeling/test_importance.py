from __future__ import annotations

import pytest
import torch

from p2d_cli.errors import NonFiniteError
from p2d_cli.modeling.importance import taylor_scores
from p2d_cli.modeling.layouts import model_layout


@pytest.fixture
def batch(token_ids):
    """Left-padded rows of different lengths, with prompts."""
    ids = token_ids(3, 10)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    mask[2, :1] = 0
    labels = ids.clone()
    labels[:, :6] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def explicit_scores(model, layout, batch):
    """|sum(grad * weight)| over the columns of the output projection, one example at a time."""
    scores = torch.zeros(len(batch["input_ids"]), len(layout), layout.layers[0].heads.num_heads, dtype=torch.float64)
    for row in range(len(scores)):
        keep = batch["attention_mask"][row].bool()
        model.zero_grad()
        model(**{name: tensor[row : row + 1, keep] for name, tensor in batch.items()}).loss.backward()
        for layer in layout:
            weight = model.get_parameter(layer.o.weight_name)
            product = weight.grad.double() * weight.detach().double()
            columns = product.T if layer.o.transposed else product
            for head, (start, stop) in enumerate(layer.o.rows):
                scores[row, layer.layer, head] = columns[:, start:stop].sum().abs()
    return scores.flatten(start_dim=1)


def test_scores_equal_gradient_times_weight_of_each_example(tiny_model, family, batch):
    model = tiny_model(family)
    layout = model_layout(model)
    (scores,) = taylor_scores(model, layout, [batch])
    assert scores.dtype == torch.float64
    expected = explicit_scores(tiny_model(family), layout, batch)
    assert expected.min() > 0
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-3)


def test_a_head_without_output_weights_has_no_effect(tiny_model, batch):
    model = tiny_model("llama")
    layout = model_layout(model)
    with torch.no_grad():
        model.get_parameter(layout[0].o.weight_name)[:, 8:16] = 0
    (scores,) = taylor_scores(model, layout, [batch])
    assert (scores[:, 1] == 0).all()
    assert (scores[:, [0, 2, 3]] > 0).all()


def test_scores_are_the_slope_of_the_loss_in_the_size_of_a_head(tiny_model, batch):
    model = tiny_model("llama")
    layout = model_layout(model)
    (scores,) = taylor_scores(model, layout, [batch])
    columns = model.get_parameter(layout[1].o.weight_name).data[:, 16:24]
    full = columns.clone()
    losses = {}
    for size in (0.95, 1.05):
        columns.copy_(full * size)
        with torch.no_grad():
            losses[size] = model(**{name: tensor[:1] for name, tensor in batch.items()}).loss.item()
    assert abs(losses[1.05] - losses[0.95]) / 0.1 == pytest.approx(scores[0, 4 + 2].item(), rel=1e-2)


def test_batches_come_one_by_one_and_the_model_is_left_as_it_was(tiny_model, batch):
    model = tiny_model("llama").train()
    model.requires_grad_(False)
    with torch.no_grad():
        scores = list(taylor_scores(model, model_layout(model), iter([batch, batch])))
    assert len(scores) == 2
    torch.testing.assert_close(scores[0], scores[1])
    assert model.training
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_an_example_without_completion_scores_zero(tiny_model, batch):
    batch["labels"][1] = -100
    model = tiny_model("llama")
    (scores,) = taylor_scores(model, model_layout(model), [batch])
    assert (scores[1] == 0).all()
    assert (scores[0] > 0).all()


def test_a_bf16_model_gives_nearly_the_same_scores(tiny_model, batch):
    layout = model_layout(tiny_model("llama"))
    (exact,) = taylor_scores(tiny_model("llama"), layout, [batch])
    (rounded,) = taylor_scores(tiny_model("llama").to(torch.bfloat16), layout, [batch])
    torch.testing.assert_close(rounded, exact, atol=0.05 * exact.max().item(), rtol=0)


def test_a_loss_that_is_not_finite_is_refused(tiny_model, batch):
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = float("nan")
    with pytest.raises(NonFiniteError, match="taylor scores: the loss"):
        list(taylor_scores(model, model_layout(model), [batch]))
