from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from p2d_cli.core.geometry import HeadGeometry, LayerHeads
from p2d_cli.core.head_layout import LayerLayout, ModelLayout, Projection
from p2d_cli.errors import ModelError
from p2d_cli.modeling.layouts import attention_parts, geometry, layer_weights, model_layout

UNCHANGED = 1e-5
CHANGED = 1e-3


def contexts(model: Any, layout: ModelLayout, ids: torch.Tensor) -> dict[int, torch.Tensor]:
    """What each head hands to the output projection, by layer, [B, T, H, d]."""
    seen: dict[int, torch.Tensor] = {}
    with ExitStack() as hooks, torch.no_grad():
        for layer in layout:

            def see(_: Any, inputs: tuple[torch.Tensor, ...], layer: LayerLayout = layer) -> None:
                seen[layer.layer] = inputs[0].unflatten(-1, (layer.heads.num_heads, layer.heads.head_dim))

            hooks.enter_context(model.get_submodule(layer.o.module).register_forward_pre_hook(see))
        model(ids, use_cache=False)
    return seen


def rows_of(model: Any, projection: Projection) -> torch.Tensor:
    weight = model.get_parameter(projection.weight_name).data
    return weight.T if projection.transposed else weight


def roll_rows(model: Any, projection: Projection, unit: int) -> None:
    """Shift a unit's rows by one: this keeps the root mean square, by which OLMo 2 norms all heads together."""
    start, stop = projection.rows[unit]
    rows = rows_of(model, projection)
    rows[start:stop] = rows[start:stop].roll(1, dims=0).clone()


@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_rows_of_a_unit_change_its_heads_and_no_others(tiny_model, token_ids, any_family, part):
    ids = token_ids(2, 9)
    model = tiny_model(any_family)
    layout = model_layout(model)
    before = contexts(model, layout, ids)
    for where in layout:
        if (projection := where.projection(part)) is None:
            continue
        weight = model.get_parameter(projection.weight_name).data
        for unit in range(len(projection.rows)):
            original = weight.clone()
            roll_rows(model, projection, unit)
            moved_H = (contexts(model, layout, ids)[where.layer] - before[where.layer]).abs().amax(dim=(0, 1, 3))
            weight.copy_(original)
            owners = [head for head in range(where.heads.num_heads) if unit in where.units(part, [head])]
            for head in range(where.heads.num_heads):
                assert moved_H[head] > CHANGED if head in owners else moved_H[head] < UNCHANGED, (unit, head, moved_H)


def test_a_gated_head_owns_its_query_and_its_gate(tiny_model, token_ids):
    ids = token_ids(2, 9)
    model = tiny_model("qwen3_next")
    layout = model_layout(model)
    layer = layout[1]
    assert layer.q.rows == ((0, 32), (32, 64), (64, 96), (96, 128))
    before = contexts(model, layout, ids)[1]
    for start, stop in ((32, 48), (48, 64)):  # the query, the gate
        weight = model.get_parameter(layer.q.weight_name).data
        original = weight.clone()
        weight[start:stop] = weight[start:stop].roll(1, dims=0).clone()
        moved_H = (contexts(model, layout, ids)[1] - before).abs().amax(dim=(0, 1, 3))
        weight.copy_(original)
        assert (moved_H > CHANGED).tolist() == [False, True, False, False]
    compared = layer_weights(layout, 1, model.get_parameter)
    torch.testing.assert_close(compared.q_HdD[1], model.get_parameter(layer.q.weight_name)[32:48])


SIZES = {  # heads, groups and size of each layer
    "gemma4": [(4, 2, 8), (4, 2, 16)] * 2,
    "gemma4-shared": [(4, 2, 8), (4, 2, 16)] * 2,
    "gemma4-keys-as-values": [(4, 2, 8), (4, 1, 16)] * 2,
    "qwen3_next": [(0, 0, 0), (4, 2, 16)],
    "lfm2": [(0, 0, 0), (4, 2, 8)],
    "jamba": [(0, 0, 0), (4, 2, 8)],
    "falcon_h1": [(4, 2, 8)] * 2,
    "mimo_v2_flash": [(4, 2, 8), (4, 4, 8)],
    "minimax": [(4, 2, 8), (0, 0, 0)],
    "recurrent_gemma": [(0, 0, 0), (0, 0, 0), (4, 2, 8)],
}


def test_layers_may_differ_and_have_no_attention(tiny_model, uneven_family):
    expected = tuple(LayerHeads(*sizes) for sizes in SIZES[uneven_family])
    assert geometry(tiny_model(uneven_family)) == HeadGeometry(expected, hidden_size=32)


def test_layers_that_share_keys_and_values_own_none_and_read_those_of_their_kind(tiny_model):
    layout = model_layout(tiny_model("gemma4-shared"))
    assert [layer.k is None for layer in layout] == [layer.v is None for layer in layout] == [False] * 2 + [True] * 2
    assert [layer.kv_layer for layer in layout] == [0, 1, 0, 1]
    every = np.ones((4, 4), dtype=bool)
    assert {name.split(".")[2] for name in layout.placements(every, ("k", "v"))} == {"0", "1"}
    assert {name.split(".")[2] for name in layout.placements(every, ("q", "o"))} == {"0", "1", "2", "3"}


def test_keys_serve_as_values_where_there_are_no_others(tiny_model):
    model = tiny_model("gemma4-keys-as-values")
    layout = model_layout(model)
    assert [layer.v is None for layer in layout] == [False, True, False, True]
    weights = layer_weights(layout, 1, model.get_parameter)
    assert torch.equal(weights.k_GdD, weights.v_GdD)


def test_the_parts_of_an_attention_are_those_that_heads_own_rows_of(tiny_model, any_family):
    model = tiny_model(any_family)
    by_name, layout = attention_parts(model), model_layout(model)
    for name in ("q", "k", "v", "o"):
        owned = (part.module for layer in layout if (part := layer.projection(name)) is not None)
        assert by_name[name] == tuple(owned)


def test_zero_output_columns_remove_exactly_that_head(tiny_model, token_ids, family):
    ids = token_ids(2, 9)
    for head in range(4):
        model = tiny_model(family)
        layer = model_layout(model)[1]
        start, stop = layer.o.rows[head]

        def without_head(_, inputs, bounds=(start, stop)):
            context = inputs[0].clone()
            context[..., slice(*bounds)] = 0
            return (context, *inputs[1:])

        with torch.no_grad():
            intact = model(ids).logits
            with model.get_submodule(layer.o.module).register_forward_pre_hook(without_head):
                expected = model(ids).logits
            rows_of(model, layer.o)[:, start:stop] = 0
            actual = model(ids).logits
        torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)
        assert (actual - intact).abs().max() > CHANGED


def test_units_cover_the_projections_without_overlap(tiny_model, family):
    model = tiny_model(family)
    for layer in model_layout(model):
        rows_by_module: dict[str, list[int]] = {}
        for name in ("q", "k", "v"):
            part = layer.projection(name)
            rows_by_module.setdefault(part.module, []).extend(part.indices(range(len(part.rows))))
        for name, rows in rows_by_module.items():
            module = model.get_submodule(name)
            out_features = module.weight.shape[1 if layer.q.transposed else 0]
            assert sorted(rows) == list(range(out_features))


def test_row_order_of_each_kind_of_projection(tiny_model):
    llama = model_layout(tiny_model("llama"))[1]
    assert (llama.q.module, llama.q.rows[3]) == ("model.layers.1.self_attn.q_proj", (24, 32))
    assert (llama.k.module, llama.k.rows) == ("model.layers.1.self_attn.k_proj", ((0, 8), (8, 16)))
    phi3 = model_layout(tiny_model("phi3"))[0]
    assert phi3.q.module == phi3.k.module == phi3.v.module == "model.layers.0.self_attn.qkv_proj"
    assert (phi3.q.rows[1], phi3.k.rows, phi3.v.rows) == ((8, 16), ((32, 40), (40, 48)), ((48, 56), (56, 64)))
    gpt2 = model_layout(tiny_model("gpt2"))[0]
    assert gpt2.q.transposed
    assert gpt2.o.transposed
    assert (gpt2.q.rows[1], gpt2.k.rows[1], gpt2.v.rows[1]) == ((8, 16), (40, 48), (72, 80))
    neox = model_layout(tiny_model("gpt_neox"))[0]
    assert (neox.q.rows[1], neox.k.rows[1], neox.v.rows[1]) == ((24, 32), (32, 40), (40, 48))
    assert neox.o.module == "gpt_neox.layers.0.attention.dense"


@pytest.mark.parametrize(
    ("name", "groups", "head_dim"),
    [("llama-mha", 4, 8), ("llama-mqa", 1, 8), ("qwen3", 2, 16), ("gemma2", 2, 16), ("gpt2", 4, 8)],
)
def test_geometry_is_read_from_the_modules(tiny_model, name, groups, head_dim):
    expected = HeadGeometry.even(2, num_heads=4, num_groups=groups, head_dim=head_dim, hidden_size=32)
    assert geometry(tiny_model(name)) == expected


def test_layer_weights_are_the_named_rows(tiny_model, family):
    model = tiny_model(family)
    layer = model_layout(model)[1]
    weights = layer_weights(model_layout(model), 1, model.get_parameter)
    for part, tensor in (("q", weights.q_HdD), ("k", weights.k_GdD), ("v", weights.v_GdD)):
        projection = layer.projection(part)
        assert tensor.shape == (len(projection.rows), layer.heads.head_dim, projection.width)
        for unit, (start, stop) in enumerate(projection.rows):
            torch.testing.assert_close(tensor[unit], rows_of(model, projection)[start:stop], rtol=0, atol=0)
    before = weights.q_HdD.clone()
    rows_of(model, layer.q).zero_()
    torch.testing.assert_close(weights.q_HdD, before)


def test_units_of_heads_that_share_a_group_come_once(tiny_model):
    layer = model_layout(tiny_model("llama"))[0]
    assert [layer.heads.group_of(head) for head in range(4)] == [0, 0, 1, 1]
    assert layer.units("k", [3, 2]) == (1,)
    assert layer.units("q", [3, 2]) == (2, 3)
    assert layer.k.indices([1, 1]) == tuple(range(8, 16))
    assert layer.q.indices([1, 0]) == tuple(range(16))


def test_a_model_on_the_meta_device_has_the_same_layout(tiny_model, tiny_config, family):
    with torch.device("meta"):
        bare = transformers.AutoModelForCausalLM.from_config(tiny_config(family))
    assert model_layout(bare) == model_layout(tiny_model(family))


def test_only_the_text_decoder_of_a_multimodal_model_is_read():
    text = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    layout = model_layout(model)
    assert len(layout) == 2
    assert all("language_model" in layer.module for layer in layout)


SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GPTJ_LIKE = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64}
REFUSED = {
    "falcon": ("FalconConfig", SMALL, "falcon.*attention interface"),
    "bloom": ("BloomConfig", {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}, "bloom"),
    "mpt": ("MptConfig", {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4}, "mpt"),
    "gptj": ("GPTJConfig", GPTJ_LIKE, "gptj"),
    "codegen": ("CodeGenConfig", GPTJ_LIKE, "codegen.*row order of the fused projection in transformer.h.0.attn"),
    "gpt_bigcode": (
        "GPTBigCodeConfig",
        {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        "gpt_bigcode.*fused projection",
    ),
    "deepseek_v2": (
        "DeepseekV2Config",
        SMALL
        | {
            "num_key_value_heads": 4,
            "intermediate_size": 32,
            "first_k_dense_replace": 2,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
        },
        "deepseek_v2.*MLA",
    ),
    "mamba": (
        "MambaConfig",
        {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
        r"none of its 2 layers has attention heads .* but a state-space model \(MambaMixer\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_attention_without_separable_heads_is_refused_by_name(name):
    class_name, values, message = REFUSED[name]
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, class_name)(**values))
    with pytest.raises(ModelError, match=message):
        model_layout(model)


@pytest.mark.parametrize("part", ["k_proj", "v_proj"])
def test_keys_and_values_that_are_called_otherwise_are_not_taken_for_those_of_another_layer(tiny_model, part):
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn.kv_proj = getattr(layer.self_attn, part)
        delattr(layer.self_attn, part)
    with pytest.raises(ModelError, match=r"where model\.layers\.0\.self_attn takes its keys and values from"):
        model_layout(model)
