"""Sizes from stored shapes, and what follows from them."""

import numpy as np
import pytest

from p2d_cli.core.geometry import HeadGeometry, LayerHeads
from p2d_cli.core.head_layout import LayerLayout, ModelLayout, Projection
from p2d_cli.engine.cost import (
    BatchShape,
    assumed_heads,
    backward_flops,
    cache_bytes,
    forward_flops,
    lora_trained,
    model_size,
    rows_trained,
)

CONFIG = {
    "model_type": "llama",
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 16,
    "vocab_size": 10,
    "tie_word_embeddings": True,
}
LAYER = {
    "self_attn.q_proj.weight": (8, 8),
    "self_attn.k_proj.weight": (4, 8),
    "self_attn.v_proj.weight": (4, 8),
    "self_attn.o_proj.weight": (8, 8),
    "mlp.gate_proj.weight": (16, 8),
    "mlp.up_proj.weight": (16, 8),
    "mlp.down_proj.weight": (8, 16),
    "input_layernorm.weight": (8,),
}
TENSORS = {"model.embed_tokens.weight": (10, 8), "lm_head.weight": (10, 8), "model.norm.weight": (8,)} | {
    f"model.layers.{layer}.{name}": shape for layer in range(2) for name, shape in LAYER.items()
}
IN_LAYER = 2 * 64 + 2 * 32 + 3 * 128


def projection(module, units, width):
    rows = tuple((2 * unit, 2 * unit + 2) for unit in range(units))
    return Projection(module, rows, width=width, size=2 * units)


HEADS = LayerHeads(4, 2, 2)


def layer_layout(layer):
    """Return the layout of a layer whose heads are of size 2."""
    q, o = (projection(f"{layer}.{name}", HEADS.num_heads, 8) for name in "qo")
    k, v = (projection(f"{layer}.{name}", HEADS.num_groups, 8) for name in "kv")
    return LayerLayout(layer, str(layer), HEADS, 2, q, k, v, o, kv_layer=layer)


LAYOUT = ModelLayout(2, 8, (layer_layout(0), layer_layout(1)))


@pytest.fixture
def size():
    return model_size(CONFIG, TENSORS)


def test_tied_weights_count_once_and_vectors_multiply_nothing(size):
    assert [layer.weights for layer in size.layers] == [IN_LAYER, IN_LAYER]
    assert size.parameters == 80 + 8 + 2 * (IN_LAYER + 8)
    assert model_size(CONFIG | {"tie_word_embeddings": False}, TENSORS).parameters == size.parameters + 80
    assert (size.queries, size.keys) == (8, 4)


def test_buffers_are_no_parameters_and_a_token_visits_few_experts(size):
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": (1,), "h.0.attn.bias": (1, 1, 9, 9)}
    assert model_size(CONFIG, TENSORS | extra).parameters == size.parameters
    experts = {f"model.layers.{layer}.mlp.experts.{e}.up_proj.weight": (4, 8) for layer in range(2) for e in range(4)}
    sparse = model_size(CONFIG | {"num_local_experts": 4, "num_experts_per_tok": 1}, TENSORS | experts)
    assert sparse.layers[0].weights == IN_LAYER + 32
    assert sparse.parameters == size.parameters + 8 * 32


def test_operations_are_two_a_weight_and_token(size):
    shape = BatchShape(rows=3, length=5, logits=4)
    attention = 2 * 8 * 15 * 5
    assert forward_flops(size, shape) == 2 * (2 * IN_LAYER * 15 + attention) + 2 * 8 * 10 * 4
    assert forward_flops(size, shape, layers=1) == 2 * IN_LAYER * 15 + attention + 2 * 8 * 10 * 4
    frozen = backward_flops(size, shape, layers=1)
    assert backward_flops(size, shape, layers=1, trained=7) == frozen + 2 * 7 * 15
    assert backward_flops(size, shape) > frozen


def test_heads_of_one_group_train_its_keys_once(size):
    heads_LH = np.zeros((2, 4), dtype=bool)
    heads_LH[1, :2] = True
    trained = rows_trained(LAYOUT.placements(heads_LH, ("q", "k", "v", "o")), 1)
    assert trained.parameters == 8 * (2 * 2 + 2 + 2 + 2 * 2)
    assert trained.placing == 4 * 8 + 2 * 4 + 2 * 4 + 4 * 8
    assert trained.layers == 1
    assert trained.optimizer_bytes == 8 * trained.parameters
    # Padded to rank 8: q [4 -> 8] and o [4 -> 8] of 8 + 8, k and v [2 -> 8] of 8 + 4.
    assert trained.saved == 8 * (16 + 12 + 12 + 16)


def test_a_lora_adds_both_ends_of_each_projection(size):
    assert lora_trained([(8, 8), (8, 4)] * 2, 3, 2).parameters == 2 * 3 * ((8 + 8) + (8 + 4))


def test_the_cache_holds_keys_and_values(size):
    assert cache_bytes(size, rows=3, length=7, itemsize=2) == 2 * 2 * 4 * 3 * 7 * 2


def test_layers_without_attention_take_no_attention():
    shape = HeadGeometry((LayerHeads(), LayerHeads(4, 2, 2)), hidden_size=8)
    size, batch = model_size(CONFIG, TENSORS, shape), BatchShape(rows=3, length=5, logits=0)
    assert forward_flops(size, batch, layers=1) == 2 * IN_LAYER * 15
    assert forward_flops(size, batch) == 2 * (2 * IN_LAYER * 15) + 2 * 8 * 15 * 5
    assert cache_bytes(size, rows=3, length=7, itemsize=2) == 2 * 4 * 3 * 7 * 2


def test_only_the_text_decoder_is_a_layer_and_vision_only_a_weight():
    vision = {f"vision_tower.encoder.layers.{layer}.mlp.weight": (50, 50) for layer in range(2)}
    size = model_size(CONFIG, TENSORS | vision)
    assert [layer.weights for layer in size.layers] == [IN_LAYER, IN_LAYER]
    assert size.parameters == model_size(CONFIG, TENSORS).parameters + 2 * 2500


def test_heads_to_be_selected_are_assumed_among_those_that_there_are():
    shape = HeadGeometry((LayerHeads(2, 1, 8), LayerHeads(), LayerHeads(4, 2, 8)), hidden_size=8)
    heads_LH = assumed_heads(shape, 0.5)
    assert heads_LH.sum() == 3
    assert not (heads_LH & ~shape.exists_LH).any()
    assert heads_LH[2, 3]
