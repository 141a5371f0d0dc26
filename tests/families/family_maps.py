"""Which weights belong to which head, worked out from a config and from how transformers' modeling files use it.

Nothing here comes from p2d: its own layouts are what this is held against.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

PARTS = ("q", "k", "v", "o")

# Where the module of a layer's attention is, by the type of the whole config; elsewhere as in Llama.
_MODULES = {
    "gpt2": "transformer.h.{}.attn",
    "gpt_neox": "gpt_neox.layers.{}.attention",
    "opt": "model.decoder.layers.{}.self_attn",
    "biogpt": "biogpt.layers.{}.self_attn",
    "nemotron_h": "model.layers.{}.mixer",
    "recurrent_gemma": "model.layers.{}.temporal_block",
    "llama4": "language_model.model.layers.{}.self_attn",
    "idefics3": "model.text_model.layers.{}.self_attn",
    "smolvlm": "model.text_model.layers.{}.self_attn",
}
# What the modules of q, k, v and o are called, by the type of the text config.
_FUSED = {"gpt2": "c_attn", "gpt_neox": "query_key_value", "phi3": "qkv_proj"}
_OUTPUTS = {"gpt2": "c_proj", "gpt_neox": "dense", "phi": "dense", "opt": "out_proj", "biogpt": "out_proj",
            "lfm2": "out_proj", "lfm2_moe": "out_proj"}  # fmt: skip
_UNGROUPED = {"gpt2", "gpt_neox", "opt", "biogpt"}
_GATED = {"qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"}
"""`q_proj` makes query and gate of a head side by side."""


@dataclass(frozen=True)
class Attention:
    """The attention of a layer."""

    layer: int
    module: str
    heads: int
    groups: int
    head_dim: int
    value_dim: int
    has_keys: bool
    """False where the keys and values are those of an earlier layer."""
    has_values: bool
    """False where there is no projection of values, either because the keys serve as values or because of the above."""


@dataclass(frozen=True)
class Rows:
    """A part of a weight: indices along one of its dimensions, as it is stored."""

    weight: str
    dim: int
    indices: frozenset[int]


def attentions(config: Any) -> list[Attention]:
    """The layers that have an attention of queries, keys and values, from the first to the last."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    images = getattr(text, "cross_attention_layers", None) or ()  # these look at images alone
    return [
        _attention(config, text, layer, kind)
        for layer, kind in enumerate(kinds)
        if layer not in images and (kind == "hybrid" or kind.endswith("attention")) and kind != "linear_attention"
    ]


def _attention(config: Any, text: Any, layer: int, kind: str) -> Attention:
    values = text.to_dict()  # where layers differ in it, asking the config itself for a value is an error
    heads = values["num_attention_heads"] if "num_attention_heads" in values else values["n_head"]
    groups = heads if text.model_type in _UNGROUPED else values["num_key_value_heads"]
    hidden = values.get("hidden_size") or values["n_embd"]
    head_dim = values.get("head_dim") or hidden // heads
    has_keys = layer < text.num_hidden_layers - (values.get("num_kv_shared_layers") or 0)
    has_values = has_keys
    if text.model_type == "laguna":
        heads = values["num_attention_heads_per_layer"][layer]
    if text.model_type in {"gemma4_text", "gemma4_unified_text"}:
        own = text.per_layer_config[layer]
        head_dim, groups = own.head_dim, own.num_key_value_heads
        has_values = has_values and not (text.attention_k_eq_v and kind == "full_attention")
    if text.model_type == "mimo_v2_flash" and kind == "sliding_attention":
        groups *= 2
    prefix = "model.layers.{}.self_attn" if text is config else "model.language_model.layers.{}.self_attn"
    module = _MODULES.get(config.model_type, prefix).format(layer)
    return Attention(layer, module, heads, groups, head_dim, _value_dim(text, head_dim), has_keys, has_values)


def _value_dim(text: Any, head_dim: int) -> int:
    return text.v_head_dim if text.model_type == "mimo_v2_flash" else head_dim


def rows_of(config: Any, layer: int, head: int) -> dict[str, Rows]:
    """What a head has of q, k, v and o: of k and v what its group has, nothing of what the layer does not have.

    The keys that serve as values are its group's for k and for v.
    """
    text = config.get_text_config()
    attention = next(found for found in attentions(config) if found.layer == layer)
    owned = _fused_rows(text, attention, head) if text.model_type in _FUSED else _own_rows(text, attention, head)
    columns = _span(head, attention.value_dim)
    output = f"{attention.module}.{_OUTPUTS.get(text.model_type, 'o_proj')}.weight"
    # GPT-2's weights are stored as [in, out].
    return owned | {"o": Rows(output, 0 if text.model_type == "gpt2" else 1, columns)}


def _own_rows(text: Any, attention: Attention, head: int) -> dict[str, Rows]:
    group = head * attention.groups // attention.heads
    query_dim = attention.head_dim * (2 if text.model_type in _GATED else 1)
    owned = {"q": Rows(f"{attention.module}.q_proj.weight", 0, _span(head, query_dim))}
    if attention.has_keys:
        owned["k"] = owned["v"] = Rows(f"{attention.module}.k_proj.weight", 0, _span(group, attention.head_dim))
    if attention.has_values:
        owned["v"] = Rows(f"{attention.module}.v_proj.weight", 0, _span(group, attention.value_dim))
    return owned


def _fused_rows(text: Any, attention: Attention, head: int) -> dict[str, Rows]:
    """Blocks of q, k and v one after the other; in gpt_neox q, k and v of the first head, then of the second."""
    heads, groups = attention.heads, attention.groups
    group = head * groups // heads
    places = (head, heads + group, heads + groups + group)
    if text.model_type == "gpt_neox":
        places = (3 * head, 3 * head + 1, 3 * head + 2)
    weight, dim = f"{attention.module}.{_FUSED[text.model_type]}.weight", 1 if text.model_type == "gpt2" else 0
    return {
        part: Rows(weight, dim, _span(place, attention.head_dim)) for part, place in zip("qkv", places, strict=True)
    }


def _span(place: int, size: int) -> frozenset[int]:
    return frozenset(range(place * size, (place + 1) * size))


def owned_by(
    config: Any, heads: Iterable[tuple[int, int]], parts: Iterable[str] = PARTS
) -> dict[str, dict[int, set[int]]]:
    """Weight -> dimension -> the indices along it that belong to any of these heads, each a layer and a head of it."""
    parts = tuple(parts)
    owned: dict[str, dict[int, set[int]]] = {}
    for layer, head in heads:
        for part, rows in rows_of(config, layer, head).items():
            if part in parts:
                owned.setdefault(rows.weight, {}).setdefault(rows.dim, set()).update(rows.indices)
    return owned


def all_heads(config: Any) -> list[tuple[int, int]]:
    """Every head that exists, as layer and number in it."""
    return [(attention.layer, head) for attention in attentions(config) for head in range(attention.heads)]
