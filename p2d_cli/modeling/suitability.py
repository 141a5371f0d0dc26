"""Whether a model can do what a stage asks of it, found out before its weights are read. Imports torch only at need.

A model is judged by its modules, built on the meta device from the config alone. For a few ordinary families config and
the headers of the weight files prove the same, so that a plan of them needs no torch.
"""

from __future__ import annotations

from typing import Any

from p2d_cli.errors import DataError, ModelError
from p2d_cli.modeling.model_files import ModelFiles, require_tokenizer
from p2d_cli.modeling.quantised import require_usable_weights, tensor_shapes
from p2d_cli.modeling.token_ids import count_embeddings

_ORDINARY = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Families with separate q, k, v and o in every layer."""
_SIZES = ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size")


def require_suitable(
    files: ModelFiles,
    *,
    heads: bool = False,
    attention: bool = False,
    logits: bool = False,
    weights: bool = True,
    plain: str = "",
    quantise: bool = False,
) -> int:
    """Refuse a model that could not do its work, with the reason; return the number of its input embeddings.

    Args:
        files: the model.
        heads: whether it matters which weights belong to which attention head.
        attention: whether the attention of heads is watched.
        logits: whether it predicts tokens.
        weights: whether its weights are read at all.
        plain: what needs plain weights, see `require_usable_weights`.
        quantise: whether they are to be quantised when they are loaded.

    Raises:
        ModelError: it is not a causal language model, or its attention, or how its weights are quantised, rules this
            out.
        DataError, UnavailableError: see `read_config` and `skeleton`.
    """
    if weights:
        require_usable_weights(files, plain=plain, quantise=quantise)
    if (count := _ordinary_embeddings(files)) is not None:
        return count
    from p2d_cli.modeling.attention_capture import require_capturable
    from p2d_cli.modeling.checkpoints import skeleton
    from p2d_cli.modeling.layouts import model_layout
    from p2d_cli.modeling.likelihood import output_embedding

    model = skeleton(files)
    if heads:
        model_layout(model)
    if attention:
        require_capturable(model)
    if logits:
        output_embedding(model)
    if (count := count_embeddings(model)) is None:
        raise ModelError(f"{files.spec} has no embedding of tokens", hint="p2d adapts language models of text")
    return count


def require_reader(
    files: ModelFiles,
    *,
    heads: bool = False,
    attention: bool = False,
    logits: bool = False,
    plain: str = "",
    quantise: bool = False,
) -> int:
    """Refuse a model that rows cannot be shown to, for want of a tokenizer or of what `require_suitable` asks for."""
    require_tokenizer(files)
    return require_suitable(files, heads=heads, attention=attention, logits=logits, plain=plain, quantise=quantise)


def _ordinary_embeddings(files: ModelFiles) -> int | None:
    """Return the number of embeddings of a model that is surely of an ordinary family; None if there is any doubt."""
    config = files.config
    if files.model_type not in _ORDINARY or not _has_ordinary_settings(config):
        return None
    layers, heads, hidden, vocabulary = (config[name] for name in _SIZES)
    groups = config.get("num_key_value_heads", heads)
    head_dim = config.get("head_dim", hidden // heads)
    if not (_is_size(groups) and _is_size(head_dim)) or heads % groups or hidden % heads:
        return None
    try:
        found = tensor_shapes(files)
    except DataError:
        return None
    expected = {"model.embed_tokens.weight": (vocabulary, hidden)}
    sizes = {"q": (heads * head_dim, hidden), "k": (groups * head_dim, hidden), "v": (groups * head_dim, hidden)}
    sizes["o"] = (hidden, heads * head_dim)
    for layer in range(layers):
        expected |= {f"model.layers.{layer}.self_attn.{part}_proj.weight": shape for part, shape in sizes.items()}
    return vocabulary if all(found.get(name) == shape for name, shape in expected.items()) else None


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
