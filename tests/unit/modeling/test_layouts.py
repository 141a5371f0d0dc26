from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
import transformers

from p2d_cli.core.geometry import HeadGeometry
from p2d_cli.errors import ModelError
from p2d_cli.modeling.layouts import LayerLayout, Projection, geometry, layer_weights, model_layout

UNCHANGED = 1e-5
CHANGED = 1e-3


def contexts(model: Any, layout: tuple[LayerLayout, ...], ids: torch.Tensor) -> torch.Tensor:
    """What each head hands to the output projection, [L, B, T, H, d]."""
    seen: list[torch.Tensor] = []
    with ExitStack() as hooks, torch.no_grad():
        for layer in layout:
            module = model.get_submodule(layer.o.module)
            hooks.enter_context(module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])))
        model(ids, use_cache=False)
    first = layout[0]
    return torch.stack([item.unflatten(-1, (first.num_heads, first.head_dim)) for item in seen])


def rows_of(model: Any, projection: Projection) -> torch.Tensor:
    weight = model.get_parameter(projection.weight_name).data
    return weight.T if projection.transposed else weight


def roll_rows(model: Any, projection: Projection, unit: int) -> None:
    """Shift a unit's rows by one: this keeps the root mean square, by which OLMo 2 norms all heads together."""
    start, stop = projection.rows[unit]
    rows = rows_of(model, projection)
    rows[start:stop] = rows[start:stop].roll(1, dims=0).clone()


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_rows_of_a_unit_change_its_heads_and_no_others(tiny_model, token_ids, family, layer, part):
    ids = token_ids(2, 9)
    model = tiny_model(family)
    layout = model_layout(model)
    before = contexts(model, layout, ids)
    where = layout[layer]
    projection = where.projection(part)
    for unit in range(len(projection.rows)):
        model = tiny_model(family)
        roll_rows(model, projection, unit)
        moved_H = (contexts(model, layout, ids) - before)[layer].abs().amax(dim=(0, 1, 3))
        owners = [head for head in range(where.num_heads) if unit in where.units(part, [head])]
        for head in range(where.num_heads):
            assert moved_H[head] > CHANGED if head in owners else moved_H[head] < UNCHANGED, (unit, head, moved_H)


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
    expected = HeadGeometry(num_layers=2, num_heads=4, num_groups=groups, head_dim=head_dim, hidden_size=32)
    assert geometry(tiny_model(name)) == expected


def test_layer_weights_are_the_named_rows(tiny_model, family):
    model = tiny_model(family)
    layer = model_layout(model)[1]
    weights = layer_weights(layer, model.get_parameter)
    for part, tensor in (("q", weights.q_HdD), ("k", weights.k_GdD), ("v", weights.v_GdD)):
        projection = layer.projection(part)
        assert tensor.shape == (len(projection.rows), layer.head_dim, layer.hidden_size)
        for unit, (start, stop) in enumerate(projection.rows):
            torch.testing.assert_close(tensor[unit], rows_of(model, projection)[start:stop], rtol=0, atol=0)
    before = weights.q_HdD.clone()
    rows_of(model, layer.q).zero_()
    torch.testing.assert_close(weights.q_HdD, before)


def test_units_of_heads_that_share_a_group_come_once(tiny_model):
    layer = model_layout(tiny_model("llama"))[0]
    assert [layer.group_of(head) for head in range(4)] == [0, 0, 1, 1]
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
GROUPED = SMALL | {"num_key_value_heads": 2, "intermediate_size": 32}
QWEN3_NEXT = GROUPED | {"head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1}
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
    "qwen3_next": (
        "Qwen3NextConfig",
        QWEN3_NEXT | {"layer_types": ["full_attention", "full_attention"]},
        "qwen3_next.*gate",
    ),
    "lfm2": (
        "Lfm2Config",
        SMALL | {"num_key_value_heads": 2, "intermediate_size": 32, "layer_types": ["conv", "full_attention"]},
        r"1 of its 2 layers do not have attention heads .* but a short convolution \(Lfm2ShortConv\)",
    ),
    "qwen3_next-hybrid": (
        "Qwen3NextConfig",
        QWEN3_NEXT | {"layer_types": ["linear_attention", "full_attention"]},
        r"1 of its 2 layers do not have .* but linear attention \(Qwen3NextGatedDeltaNet\)",
    ),
    "jamba": (
        "JambaConfig",
        GROUPED | {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "use_mamba_kernels": False},
        r"1 of its 2 layers do not have .* but a state-space model \(JambaMambaMixer\)",
    ),
    "bamba": (
        "BambaConfig",
        GROUPED | {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8},
        r"a state-space model \(BambaMixer\)",
    ),
    "mamba": (
        "MambaConfig",
        {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
        r"none of its 2 layers has attention heads .* but a state-space model \(MambaMixer\)",
    ),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        GROUPED | {"num_hidden_layers": 3, "lru_width": 32},
        r"2 of its 3 layers do not have .* but a recurrence \(RecurrentGemma",
    ),
    "minimax": (
        "MiniMaxConfig",
        GROUPED | {"layer_types": ["full_attention", "linear_attention"], "num_local_experts": 2},
        r"1 of its 2 layers do not have .* but linear attention \(MiniMaxLightningAttention\)",
    ),
    "gemma3n": (
        "Gemma3nTextConfig",
        GROUPED
        | {
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "intermediate_size": [32] * 4,
            "activation_sparsity_pattern": [0.0] * 4,
            "vocab_size_per_layer_input": 64,
            "hidden_size_per_layer_input": 8,
        },
        "2 of its 4 layers take their keys and values from other layers",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_attention_without_separable_heads_is_refused_by_name(name):
    class_name, values, message = REFUSED[name]
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, class_name)(**values))
    with pytest.raises(ModelError, match=message):
        model_layout(model)


GEMMA4 = GROUPED | {
    "head_dim": 8,
    "global_head_dim": 8,
    "layer_types": ["sliding_attention", "full_attention"],
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
}


@pytest.mark.skipif(not hasattr(transformers, "Gemma4TextConfig"), reason="this transformers has no Gemma 4")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_head_dim": 16}, r"its layers differ in \(heads, groups, head_dim, hidden size\)"),
        (
            {"attention_k_eq_v": True, "num_global_key_value_heads": 2},
            "1 of its 2 layers do not have .* but keys that serve as values as well",
        ),
    ],
)
def test_gemma_4_is_refused_for_what_its_layers_are(changes, message):
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.Gemma4TextConfig(**(GEMMA4 | changes)))
    with pytest.raises(ModelError, match=message):
        model_layout(model)
