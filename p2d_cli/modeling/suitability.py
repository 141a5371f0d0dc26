"""Whether a model can do what a stage asks of it, found out before its weights are read. Imports torch only at need.

A model is judged by its modules, built on the meta device from the config alone. For a few ordinary families config and
the headers of the weight files prove the same, so that a plan of them needs no torch.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2d_cli.core.geometry import LayerHeads
from p2d_cli.core.head_layout import LayerLayout, ModelLayout, Placement, Projection, ProjectionName
from p2d_cli.errors import DataError, ModelError
from p2d_cli.modeling.model_files import ModelFiles, require_tokenizer
from p2d_cli.modeling.quantised import require_usable_weights, tensor_shapes
from p2d_cli.modeling.token_ids import count_embeddings

_ORDINARY = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Families with separate q, k, v and o in every layer."""
_SIZES = ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size")


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What is asked of a model."""

    tokenizer: bool = False
    """Whether rows are shown to it."""
    weights: bool = True
    """Whether its weights are read at all."""
    plain: str = ""
    """What needs plain weights, see `require_usable_weights`."""
    quantise: bool = False
    """Whether they are to be quantised when they are loaded."""
    heads: bool = False
    """Whether it matters which weights belong to which attention head."""
    parts: bool = False
    """Whether the projections of its attention are trained as a whole."""
    linear: bool = False
    """Whether its linear layers are, by a LoRA."""
    attention: bool = False
    """Whether the attention of heads is watched."""
    logits: bool = False
    """Whether it predicts tokens."""


def require(files: ModelFiles, needs: Needs) -> int:
    """Refuse a model that has not what is needed, with the reason; return the number of its input embeddings.

    Raises:
        ModelError: it is not a causal language model, or its attention, or how its weights are quantised, rules this
            out.
        UsageError: no linear layer of it can be adapted.
        DataError, UnavailableError: see `require_tokenizer`, `read_config` and `skeleton`.
    """
    if needs.tokenizer:
        require_tokenizer(files)
    if needs.weights:
        require_usable_weights(files, plain=needs.plain, quantise=needs.quantise)
    if _ordinary_layout(files) is not None:
        return int(files.config["vocab_size"])
    from p2d_cli.modeling.attention_capture import require_capturable
    from p2d_cli.modeling.checkpoints import skeleton
    from p2d_cli.modeling.layouts import attention_parts, linear_modules, model_layout
    from p2d_cli.modeling.likelihood import output_embedding

    model = skeleton(files)
    parts = (model_layout, needs.heads), (attention_parts, needs.parts), (linear_modules, needs.linear)
    for check, is_needed in (*parts, (require_capturable, needs.attention), (output_embedding, needs.logits)):
        if is_needed:
            check(model)
    if (count := count_embeddings(model)) is None:
        raise ModelError(f"{files.spec} has no embedding of tokens", hint="p2d adapts language models of text")
    return count


def read_layout(files: ModelFiles) -> ModelLayout:
    """Return where each head's weights are, found without reading any; see `p2d_cli.modeling.layouts.model_layout`."""
    if (layout := _ordinary_layout(files)) is not None:
        return layout
    from p2d_cli.modeling.checkpoints import skeleton
    from p2d_cli.modeling.layouts import model_layout

    return model_layout(skeleton(files))


def read_placed_rows(
    files: ModelFiles, selected_LH: NDArray[np.bool_], projections: Collection[ProjectionName], channels: float
) -> dict[str, Placement]:
    """Return which weight rows and columns are trained, without reading any; see `p2d_cli.modeling.channels`."""
    if not channels:
        return read_layout(files).placements(selected_LH, projections)
    from p2d_cli.modeling.channels import placed_rows
    from p2d_cli.modeling.checkpoints import skeleton

    return placed_rows(skeleton(files), selected_LH, projections, channels)


def attention_sizes(
    files: ModelFiles, projections: Collection[ProjectionName], *, once: bool = False
) -> dict[str, tuple[int, int]]:
    """Return the two sizes of each module that makes up these projections of a model's attention, by name.

    With `once`, modules that share a weight count once.

    Raises:
        ModelError: the model has no attention.
    """
    if (layout := _ordinary_layout(files)) is not None:
        named = (part for layer in layout for name, part in layer.projections.items() if name in projections)
        return {part.module: (part.width, part.size) for part in named}
    from p2d_cli.modeling.checkpoints import skeleton
    from p2d_cli.modeling.layouts import attention_parts

    model = skeleton(files)
    modules = [module for name, found in attention_parts(model).items() if name in projections for module in found]
    weights = {module: model.get_submodule(module).weight for module in modules}
    if once:
        last_of = {weight: module for module, weight in weights.items()}
        weights = {module: weight for weight, module in last_of.items()}
    return {module: (int(weight.shape[0]), int(weight.shape[1])) for module, weight in weights.items()}


def linear_sizes(files: ModelFiles) -> dict[str, tuple[int, int]]:
    """Return the two sizes of each linear layer that a LoRA adapts, by name; see `linear_modules`.

    Raises:
        UsageError: there is none.
    """
    if _ordinary_layout(files) is not None:
        shapes = {name.removesuffix(".weight"): shape for name, shape in tensor_shapes(files).items()}
        return {name: (shape[0], shape[1]) for name, shape in shapes.items() if ".layers." in name and len(shape) > 1}
    from p2d_cli.modeling.checkpoints import skeleton
    from p2d_cli.modeling.layouts import linear_modules

    model = skeleton(files)
    weights = {name: model.get_submodule(name).weight for name in linear_modules(model)}
    return {name: (int(weight.shape[0]), int(weight.shape[1])) for name, weight in weights.items()}


def full_config(files: ModelFiles) -> dict[str, Any]:
    """Return a model's config with the values that `config.json` leaves at their defaults, such as Gemma 3's heads."""
    if _ordinary_layout(files) is not None:
        return files.config
    from p2d_cli.modeling.checkpoints import skeleton

    config: dict[str, Any] = skeleton(files).config.to_dict()
    return config


def count_parameters(files: ModelFiles) -> tuple[int, int] | None:
    """Return how many parameters a model has and how many its text part, tied ones once; None if all that is stored."""
    if _ordinary_layout(files) is not None:
        return None
    from p2d_cli.modeling.checkpoints import skeleton
    from p2d_cli.modeling.text_part import text_parameters

    model = skeleton(files)
    of_text = sum(parameter.numel() for parameter in text_parameters(model))
    return sum(parameter.numel() for parameter in model.parameters()), of_text


def _ordinary_layout(files: ModelFiles) -> ModelLayout | None:
    """Return the layout of a model that is surely of an ordinary family; None if there is any doubt."""
    config = files.config
    if files.model_type not in _ORDINARY or not _has_ordinary_settings(config):
        return None
    count, heads, hidden, vocabulary = (config[name] for name in _SIZES)
    groups = config.get("num_key_value_heads", heads)
    head_dim = config.get("head_dim", hidden // heads)
    if not (_is_size(groups) and _is_size(head_dim)) or heads % groups or hidden % heads:
        return None
    try:
        found = tensor_shapes(files)
    except DataError:
        return None
    layers = tuple(_ordinary_layer(layer, LayerHeads(heads, groups, head_dim), hidden) for layer in range(count))
    expected = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for part in (part for layer in layers for part in layer.projections.values()):
        is_output = part.module.endswith("o_proj")
        expected[part.weight_name] = (part.width, part.size) if is_output else (part.size, part.width)
    if any(found.get(name) != shape for name, shape in expected.items()):
        return None
    return ModelLayout(count, hidden, layers)


def _ordinary_layer(layer: int, heads: LayerHeads, hidden: int) -> LayerLayout:
    module = f"model.layers.{layer}.self_attn"

    def projection(name: str, units: int) -> Projection:
        rows = tuple((unit * heads.head_dim, (unit + 1) * heads.head_dim) for unit in range(units))
        return Projection(f"{module}.{name}_proj", rows, width=hidden, size=units * heads.head_dim)

    q, o = projection("q", heads.num_heads), projection("o", heads.num_heads)
    k, v = projection("k", heads.num_groups), projection("v", heads.num_groups)
    return LayerLayout(layer, module, heads, heads.head_dim, q, k, v, o, kv_layer=layer)


def _has_ordinary_settings(config: dict[str, Any]) -> bool:
    """Say whether a config's values are those that models of the ordinary families have."""
    rope = config.get("rope_parameters", config.get("rope_scaling")) or {}
    return (
        all(_is_size(config.get(name)) for name in _SIZES)
        and config.get("hidden_act", "silu") == "silu"
        and str(config.get("dtype", config.get("torch_dtype"))) in {"float32", "bfloat16", "float16"}
        and isinstance(rope, dict)
        and rope.get("rope_type", rope.get("type", "default")) == "default"
        and "layer_types" not in config
    )


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
