"""Head outputs against eager attention matrices times values, for every family, padded on either side."""

import pytest
import torch

from p2d_cli.modeling.head_outputs import mean_head_outputs
from p2d_cli.modeling.layouts import model_layout
from p2d_cli.modeling.likelihood import forward_inputs

B, T = 3, 9


@pytest.fixture(params=["none", "left", "right"])
def mask(request):
    """`[B, T]`, rows of 9, 6 and 1 tokens where there is padding."""
    mask = torch.ones(B, T, dtype=torch.long)
    if request.param != "none":
        for row, padding in ((1, 3), (2, 8)):
            mask[row, slice(0, padding) if request.param == "left" else slice(T - padding, T)] = 0
    return mask


def eager_outputs(model, layout, ids, mask, tokens_BT):
    """`[B, L * H, d]` from the attention matrices that eager attention returns, token by token."""
    values = {}
    handles = [
        model.get_submodule(layer.v.module).register_forward_hook(
            lambda _module, _inputs, output, layer=layer: values.__setitem__(layer.layer, output)
        )
        for layer in layout
    ]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(**forward_inputs(ids, mask), output_attentions=True).attentions
    for handle in handles:
        handle.remove()
    rows = []
    for example in range(len(ids)):
        tokens = tokens_BT[example].nonzero()[:, 0].tolist()
        outputs = []
        for layer, matrix_BHTT in zip(layout, attentions, strict=True):
            for head in range(layer.heads.num_heads):
                start, stop = layer.v.rows[layer.heads.group_of(head)]
                value_Td = values[layer.layer][example, :, start:stop]
                outputs.append(sum(matrix_BHTT[example, head, token] @ value_Td for token in tokens) / len(tokens))
        rows.append(torch.stack(outputs))
    return torch.stack(rows)


def answers(model, layout, heads, ids, mask, tokens):
    """Outputs at a single place, `[B, K, d]`."""
    return mean_head_outputs(model, layout, heads, ids, mask, tokens[:, None])[:, :, 0]


def test_outputs_are_attention_times_values(tiny_model, token_ids, family, mask):
    model, ids = tiny_model(family), token_ids(B, T) * mask
    layout = model_layout(model)
    heads = {layer.layer: range(layer.heads.num_heads) for layer in layout}
    tokens = mask * (token_ids(B, T, seed=1) % 2) | (mask.sum(dim=1, keepdim=True) == 1) * mask
    everything = torch.ones_like(tokens)
    both = mean_head_outputs(model, layout, heads, ids, mask, torch.stack([tokens, everything], dim=1))
    found = both[:, :, 0]
    alone = answers(model, layout, heads, ids, mask, everything)
    torch.testing.assert_close(both[:, :, 1], alone, atol=1e-6, rtol=1e-6)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, eager_outputs(model, layout, ids, mask, tokens), atol=1e-5, rtol=1e-5)


def test_a_row_without_tokens_to_average_is_zero(tiny_model, token_ids):
    model, ids = tiny_model("llama"), token_ids(2, T)
    tokens = torch.stack([torch.ones(T), torch.zeros(T)]).long()
    found = answers(model, model_layout(model), {0: (0,)}, ids, torch.ones_like(ids), tokens)
    assert found[0].any()
    assert not found[1].any()


def test_padding_on_the_right_needs_no_attention_mask(tiny_model, token_ids, family):
    model, ids = tiny_model(family), token_ids(B, T)
    layout, heads = model_layout(model), {0: (0, 2), 1: (1,)}
    mask = (torch.arange(T) < torch.tensor([[9], [6], [1]])).long()
    masked = answers(model, layout, heads, ids, mask, mask)
    unmasked = answers(model, layout, heads, ids, torch.ones_like(ids), mask)
    torch.testing.assert_close(unmasked, masked, atol=1e-5, rtol=1e-5)


def test_bfloat16_is_the_rounding(tiny_model, token_ids, family):
    model, ids = tiny_model(family), token_ids(B, T)
    layout, heads, ones = model_layout(model), {0: (1, 3), 1: (0,)}, torch.ones(B, T, dtype=torch.long)
    exact = answers(model, layout, heads, ids, ones, ones)
    rounded = answers(model.to(torch.bfloat16), layout, heads, ids, ones, ones)
    assert (rounded - exact).norm() < 0.03 * exact.norm()


def test_chosen_heads_come_in_order_and_nothing_runs_behind_them(tiny_model, token_ids, family):
    model, ids = tiny_model(family, **({"n_layer": 3} if family == "gpt2" else layers(family))), token_ids(B, T)
    layout, ones = model_layout(model), torch.ones(B, T, dtype=torch.long)
    everything = answers(model, layout, {layer: range(4) for layer in range(3)}, ids, ones, ones)
    ran = []
    for layer in layout:
        model.get_submodule(layer.module).register_forward_hook(lambda *_, layer=layer: ran.append(layer.layer))
    some = answers(model, layout, {1: (3, 0), 0: (2,), 2: ()}, ids, ones, ones)
    assert torch.equal(some, everything[:, [2, 4, 7]])
    assert ran == [0]  # layer 1 was left in front of its output projection
    model(ids)
    assert ran == [0, 0, 1, 2]


def layers(family):
    kinds = {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}
    return {"num_hidden_layers": 3} | (kinds if family == "gemma3_text" else {})
