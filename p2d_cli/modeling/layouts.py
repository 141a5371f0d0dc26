"""Reading from a model's modules which weight rows belong to which attention head, and which modules its attention has.

Axes: L layers, H query heads, G key/value groups, d head dimension, D hidden size. A weight is said to have "rows"
(outputs) and "columns" (inputs) as in `nn.Linear`, see `p2d_cli.core.head_layout`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

import torch
from torch import nn

from p2d_cli.core.geometry import HeadGeometry, LayerHeads
from p2d_cli.core.head_importance import LayerWeights
from p2d_cli.core.head_layout import PROJECTIONS, LayerLayout, ModelLayout, Projection, ProjectionName
from p2d_cli.errors import ModelError, UsageError

_OWN_ATTENTION = "its attention does not run through transformers' attention interface"
_REFUSED = {
    "falcon": _OWN_ATTENTION,
    "bloom": _OWN_ATTENTION,
    "mpt": _OWN_ATTENTION,
    "gptj": "p2d was never verified on its attention",
    "gpt_neo": _OWN_ATTENTION,
    "gpt_neox_japanese": _OWN_ATTENTION,
    "xglm": _OWN_ATTENTION,
    "diffllama": "its heads are differences of two attentions, so none stands alone",
}
_LATENT = re.compile(r"(q|k|v|kv)_[ab]_proj")
_OUTPUT_NAMES = ("o_proj", "out_proj", "dense")
# The fused projection of q, k and v, and the output projection.
_FUSED = {"phi3": ("qkv_proj", "o_proj"), "gpt2": ("c_attn", "c_proj"), "gpt_neox": ("query_key_value", "dense")}
# Families whose query projection puts a gate behind the query of each head.
_GATED = ("qwen3_next", "qwen3_5", "qwen4_exp")
# What parts of an attention are called, whether or not its heads can be told apart.
_PARTS: dict[ProjectionName, re.Pattern[str]] = {
    "q": re.compile(r"q(_[ab])?_proj|query|c_attn|qkv_proj|query_key_value|Wqkv|q_attn"),
    "k": re.compile(r"k(_b)?_proj|key|kv(_[ab])?_proj(_with_mqa)?|c_attn|qkv_proj|query_key_value|Wqkv"),
    "v": re.compile(r"v(_b)?_proj|value|kv(_[ab])?_proj(_with_mqa)?|c_attn|qkv_proj|query_key_value|Wqkv"),
    "o": re.compile(r"o_proj|out_proj|dense|c_proj"),
}
# What a layer may have in place of attention, by the names of its classes in transformers.
_MIXERS = {
    "linear attention": re.compile(r"Delta(Net|Attention)|Lightning|LinearAttention|Retention|Rwkv", re.IGNORECASE),
    "a state-space model": re.compile(r"Mamba|BambaMixer|FalconH1Mixer", re.IGNORECASE),
    "a short convolution": re.compile(r"ShortConv"),
    "a recurrence": re.compile(r"Recurrent(Block|Layer)|RgLru|[ms]LSTM", re.IGNORECASE),
    "cross-attention": re.compile(r"CrossAttention"),
}
_NO_ATTENTION = "no attention at all"
# Linear layers that choose or weigh others; transformers has some of them return more than a tensor (Llama 4, Phi-MoE).
_ROUTERS = re.compile(r"router|\bgate\.wg$|\bshared_expert_gate$|\baltup\.\w+_coefs$")


def plain_model(model: Any) -> Any:
    """Return the Hugging Face model inside a PEFT model, adapter layers in place; another model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def model_layout(model: Any) -> ModelLayout:
    """Read from a model's modules where each head's weights are, layer by layer.

    Sizes come from the modules themselves (head_dim is not hidden/heads in Gemma or Qwen3). The model may be on the
    meta device, and may be a PeftModel; names are always those of the plain model. Layers may have no attention, but
    one that p2d does not know is not taken for none.

    Raises:
        ModelError: the model's attention is not of a kind whose heads p2d can tell apart, with the reason.
    """
    model = plain_model(model)
    config = model.config.get_text_config()
    for model_type in (model.config.model_type, config.model_type):
        if model_type in _REFUSED:
            _refuse(model_type, _REFUSED[model_type])
    found = sorted(_attention_modules(model, config), key=lambda item: item[0])
    layers, total = [layer for layer, _, _ in found], config.num_hidden_layers
    if (why := _why_unknown(_decoder(model, config), total, layers)) is not None:
        _refuse(config.model_type, why)
    sources: dict[Any, int] = {}
    layout = tuple(_layer_layout(layer, name, module, config, sources) for layer, name, module in found)
    return ModelLayout(num_layers=total, hidden_size=layout[0].o.width, layers=layout)


def geometry(model: Any) -> HeadGeometry:
    """Return the geometry of a model, or raise as `model_layout` does."""
    return model_layout(model).geometry


def attention_parts(model: Any) -> dict[ProjectionName, tuple[str, ...]]:
    """Return the modules that make up each projection of a model's attention, in all layers, by their full names.

    They are known by name alone, so this goes for families whose heads cannot be told apart as well: with latent
    attention, `k` and `v` are the projections down to the latent and up from it. A fused module is part of each.

    Raises:
        ModelError: the model has no attention.
    """
    model = plain_model(model)
    config = model.config.get_text_config()
    found: dict[ProjectionName, list[str]] = {name: [] for name in PROJECTIONS}
    for name, module in _decoder_modules(model, config):
        if _is_mixer(module):
            continue
        parts = [part for part, child in module.named_children() if _is_linear(child)]
        # What reads queries, keys or values; an MLP may call its own parts c_proj or dense.
        if not any(_PARTS[name].fullmatch(part) for name in ("q", "k", "v") for part in parts):
            continue
        for projection, pattern in _PARTS.items():
            found[projection] += [f"{name}.{part}" for part in parts if pattern.fullmatch(part)]
    if not any(found.values()):
        raise ModelError(
            f"{config.model_type} has no attention: none of its {config.num_hidden_layers} layers has queries, keys or"
            " values that LoRA or scope attention could train",
            hint="train it with --scope full",
        )
    return {name: tuple(modules) for name, modules in found.items()}


def is_recurrent(model: Any) -> bool:
    """Say whether a token knows more of its past than attention shows it: by a state, or a convolution.

    transformers marks only some of these models.
    """
    model = plain_model(model)
    modules = (module for _, module in _decoder_modules(model, model.config.get_text_config()))
    return bool(getattr(model, "_is_stateful", False)) or any(map(_is_mixer, modules))


def is_transposed(module: Any) -> bool:
    """Say whether a linear layer stores its weight `[in, out]`."""
    return linear_features(module)[2]


def layer_weights(layout: ModelLayout, layer: int, tensors: Callable[[str], torch.Tensor]) -> LayerWeights:
    """Cut the q, k and v weights that a layer reads with into heads; of a query with a gate, the query alone.

    `tensors` gives the parameter of a name, as `model.get_parameter` or `CheckpointReader.tensor`. Returns q
    `[H, d, D]`, k and v `[G, d, D]`, copies in the dtype and on the device of the parameters.
    """
    own, source = layout[layer], layout[layout[layer].kv_layer]
    assert source.k is not None, "a layer's keys come from one that has some"

    def cut(projection: Projection, most: int | None = None) -> torch.Tensor:
        weight = tensors(projection.weight_name).detach()
        weight = weight.T if projection.transposed else weight
        # narrow, unlike a slice, refuses a range that the weight does not have.
        return torch.stack([weight.narrow(0, start, most or stop - start) for start, stop in projection.rows])

    # Keys serve as values where there are no others.
    return LayerWeights(cut(own.q, own.query_dim), cut(source.k), cut(source.v or source.k))


def _why_unknown(decoder: Any, total: int, layers: Sequence[int]) -> str | None:
    """Say what keeps heads from being told apart in the layers of a model, whose attentions are those of `layers`."""
    if any(not 0 <= layer < total for layer in layers):
        return "its attention is shared by several layers, so that a head belongs to no layer"
    if several := sorted(layer for layer, count in Counter(layers).items() if count > 1):
        return f"expected one attention a layer, found several in layer {several[0]}"
    blocks = _blocks_of(decoder, total) or ()
    kinds = Counter(_kind(block) for index, block in enumerate(blocks) if index not in layers)
    unknown = [kind for kind in kinds if not kind.startswith((*_MIXERS, _NO_ATTENTION))]
    if layers and not unknown and sum(kinds.values()) == total - len(layers):
        return None
    if not kinds:
        return f"expected an attention in each of its {total} layers, found them in layers {list(layers)}"
    lacking = sum(kinds.values())
    share = f"none of its {total} layers has" if lacking == total else f"{lacking} of its {total} layers do not have"
    found = ", ".join(f"{kind} in {count}" if len(kinds) > 1 else kind for kind, count in kinds.items())
    return f"{share} attention heads with queries, keys and values of their own, but {found}"


def linear_modules(model: Any) -> tuple[str, ...]:
    """Return the linear layers of a model's text decoder that a LoRA adapts, by their full names.

    Left out are the output embedding, routers, gates of experts and AltUp's coefficients (Gemma 3n), all of them tiny,
    and what PEFT does not take: modules whose names it takes for those of experts, whose weights are fused, those that
    it would look for under another name when it loads the adapter, and the output of a Mamba layer in some families.

    Raises:
        UsageError: nothing is left.
    """
    model = plain_model(model)
    output, family = model.get_output_embeddings(), model.config.model_type
    found = _decoder_modules(model, model.config.get_text_config())
    linear = [name for name, module in found if _is_linear(module) and module is not output]
    taken, is_loaded = _names_of_experts(family), _finds_again(model)
    left = [name for name in linear if not _ROUTERS.search(name) and _last_part(name) not in taken and is_loaded(name)]
    refused = {part for part in map(_last_part, left) if _is_refused_by_peft(model, part)}
    if not (adapted := tuple(name for name in left if _last_part(name) not in refused)):
        raise UsageError(f"{family} has no linear layer that a LoRA could adapt", hint="train it with --scope full")
    return adapted


def _last_part(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _is_refused_by_peft(model: Any, part: str) -> bool:
    """Say whether PEFT refuses to adapt modules that are called so in this model: its check for Mamba's kernels."""
    from peft import LoraConfig
    from peft.tuners import tuners_utils

    check = vars(tuners_utils).get("_check_lora_target_modules_mamba", lambda *_: None)
    try:
        check(LoraConfig(), model, part)
    except ValueError:
        return True
    return False


def _finds_again(model: Any) -> Callable[[str], bool]:
    """Return whether a saved module's name is kept by transformers' renamings, which PEFT applies when it loads.

    Prefixes may change. For Laguna `shared_expert.` becomes `shared_experts.`, and what is called so already is lost.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [one for one in get_model_conversion_mapping(model) if isinstance(one, WeightRenaming)]
    return lambda name: rename_source_key(name, renamings, [])[0].split(".")[-2:] == name.split(".")[-2:]


def _names_of_experts(family: str) -> Collection[str]:
    """Return what PEFT takes for the names of a family's experts; none for a family without them."""
    from peft.utils import transformers_weight_conversion as conversion

    tables = vars(conversion)
    names: dict[str, str] = tables["_MOE_TARGET_MODULE_MAPPING"].get(
        tables["_MODEL_TO_CONVERSION_PATTERN"].get(family), {}
    )
    return names.keys()


def decoder_blocks(model: Any) -> list[Any]:
    """Return the layers of a plain model's text decoder in order; none where they are not one stack."""
    config = model.config.get_text_config()
    return list(_blocks_of(_decoder(model, config), config.num_hidden_layers) or ())


def _blocks_of(decoder: Any, total: int) -> nn.ModuleList | None:
    """Return the decoder's stack of layers."""
    stacks = (module for module in decoder.modules() if isinstance(module, nn.ModuleList) and len(module) == total)
    return next(stacks, None)


def _kind(block: Any) -> str:
    """Say in a few words what a layer has in place of an attention whose heads p2d can tell apart."""
    names = [type(module).__name__ for module in block.modules()]
    # The mixer itself names it better than the layer around it.
    names.sort(key=lambda name: name.endswith(("Layer", "Block", "Norm")))
    for kind, pattern in _MIXERS.items():
        if (name := next(filter(pattern.search, names), None)) is not None:
            return f"{kind} ({name})"
    attention = next((name for name in names if "Attention" in name), None)
    return _NO_ATTENTION if attention is None else f"{attention}, which p2d does not know"


def _decoder(model: Any, config: Any) -> Any:
    """Return a model's text decoder; some families call their output head so (ModernBERT)."""
    decoder = model.get_decoder()
    return model.base_model if _blocks_of(decoder, config.num_hidden_layers) is None else decoder


def _decoder_modules(model: Any, config: Any) -> Iterator[tuple[str, Any]]:
    """Full name and module of all that the model's text decoder is made of."""
    decoder = set(_decoder(model, config).modules())
    return ((name, module) for name, module in model.named_modules() if module in decoder)


def _is_mixer(module: Any) -> bool:
    """Say whether a module is what a layer has in place of attention; its projections may be called the same."""
    # KimiLinearAttention is the latent attention of Kimi Linear.
    return not _is_latent(module) and any(pattern.search(type(module).__name__) for pattern in _MIXERS.values())


def _is_latent(module: Any) -> bool:
    """Say whether keys and values come out of a latent (MLA)."""
    return any(_LATENT.match(part) for part, _ in module.named_children())


def _attention_modules(model: Any, config: Any) -> list[tuple[int, str, Any]]:
    """Layer, full name and module of each attention in the model's text decoder."""
    found = []
    for name, module in _decoder_modules(model, config):
        if not isinstance(getattr(module, "layer_idx", None), int) or _is_mixer(module):
            continue
        children = [part for part, _ in module.named_children()]
        if _is_latent(module):
            _refuse(
                config.model_type,
                "its keys and values are compressed into a latent (MLA), so heads own no plain k and v",
            )
        fused = {"c_attn", "qkv_proj", "query_key_value"} & set(children)
        if fused or ("q_proj" in children and {*_OUTPUT_NAMES} & set(children)):
            found.append((module.layer_idx, name, module))
    return found


def _layer_layout(layer: int, name: str, module: Any, config: Any, sources: dict[Any, int]) -> LayerLayout:
    """Read where the heads of one attention are.

    `sources` has the last layer of each kind with keys and values of its own, which those after it may share.
    """
    query_dim = _head_dim(module, config)
    value_dim = getattr(module, "v_head_dim", query_dim)
    cut = partial(_projection, name, module)
    if hasattr(module, "q_proj"):
        o = _require(cut(next(part for part in _OUTPUT_NAMES if hasattr(module, part)), value_dim, on_input=True))
        q = _require(cut("q_proj", _query_rows(name, module, config, query_dim, len(o.rows))))
        k, v = cut("k_proj", query_dim), cut("v_proj", value_dim)
    elif config.model_type in _FUSED:
        part, output = _FUSED[config.model_type]
        o = _require(cut(output, value_dim, on_input=True))
        q, k, v = _fused(_require(cut(part, query_dim)), len(o.rows), is_interleaved=config.model_type == "gpt_neox")
    else:
        _refuse(config.model_type, f"p2d does not know the row order of the fused projection in {name}")
    heads = len(o.rows)
    groups = len(k.rows) if k is not None else heads // getattr(module, "num_key_value_groups", heads)
    counts = len(q.rows), groups, groups if v is None else len(v.rows), heads
    if counts != (heads, groups, groups, heads) or heads % groups or heads != _stated_heads(module, config):
        _refuse(
            config.model_type,
            f"{name} has {counts[0]} query, {counts[1]} key, {counts[2]} value and {counts[3]} output heads "
            f"where its config says {_stated_heads(module, config)} query heads",
        )
    kind = getattr(module, "layer_type", None)
    if k is not None:
        sources[kind] = layer
    # What is missing must be known to come from elsewhere: it may as well be called by another name.
    if kind not in sources or (k is not None and v is None and not getattr(config, "attention_k_eq_v", False)):
        _refuse(config.model_type, f"p2d does not know where {name} takes its keys and values from")
    size = LayerHeads(heads, groups, value_dim)
    return LayerLayout(layer, name, size, query_dim, q, k, v, o, kv_layer=sources[kind])


def _query_rows(name: str, module: Any, config: Any, query_dim: int, heads: int) -> int:
    """Return how many rows of the query projection a head owns: twice its size where they include a gate."""
    _, rows, _ = linear_features(module.q_proj)
    if rows != 2 * heads * query_dim:
        return query_dim
    if not config.model_type.startswith(_GATED):
        _refuse(config.model_type, f"p2d does not know what the query projection in {name} makes besides queries")
    return 2 * query_dim


def _fused(whole: Projection, heads: int, *, is_interleaved: bool) -> tuple[Projection, ...]:
    """Part a fused projection: all of q, then all of k, then all of v; or q, k and v of a head, then of the next."""
    groups = (len(whole.rows) - heads) // 2
    pieces = [slice(heads), slice(heads, heads + groups), slice(heads + groups, None)]
    if is_interleaved:
        pieces = [slice(offset, None, 3) for offset in range(3)]
    return tuple(replace(whole, rows=whole.rows[piece]) for piece in pieces)


def _stated_heads(module: Any, config: Any) -> int:
    """Return how many query heads a layer says that it has, or else the config."""
    stated = getattr(module, "num_heads", None)
    return int(stated if isinstance(stated, int) else config.num_attention_heads)


def _head_dim(module: Any, config: Any) -> int:
    # One at a time: where layers differ in it, the config refuses to say any (Gemma 4).
    stated = (
        getattr(owner, name, None)
        for owner, name in ((module, "head_dim"), (module, "head_size"), (config, "head_dim"))
    )
    head_dim = next((value for value in stated if isinstance(value, int)), None)
    if head_dim is None:
        _refuse(config.model_type, f"{type(module).__name__} does not say its head_dim")
    return head_dim


def _projection(name: str, module: Any, part: str, unit: int, *, on_input: bool = False) -> Projection | None:
    """Cut all output rows of a part of an attention module (`on_input`: its input columns) into units of a size.

    Returns None if the module has no such part.
    """
    if (child := getattr(module, part, None)) is None:
        return None
    in_features, out_features, transposed = linear_features(child)
    size, width = (in_features, out_features) if on_input else (out_features, in_features)
    rows = tuple((start, start + unit) for start in range(0, size, unit))
    return Projection(f"{name}.{part}", rows, width, size, transposed)


def _require(projection: Projection | None) -> Projection:
    """Return a projection that is surely there: its attention was found by it."""
    assert projection is not None, "an attention without its projection"
    return projection


def _is_linear(module: Any) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(getattr(module, "base_layer", module), Conv1D | nn.Linear)


def linear_features(module: Any) -> tuple[int, int, bool]:
    """Input and output features, and whether the weight is stored `[in, out]`."""
    from transformers.pytorch_utils import Conv1D

    own = getattr(module, "base_layer", module)  # inside the LoRA layer that PEFT may have put around it
    return (own.nx, own.nf, True) if isinstance(own, Conv1D) else (own.in_features, own.out_features, False)


def _refuse(model_type: str, reason: str) -> NoReturn:
    raise ModelError(
        f"p2d cannot tell the attention heads of {model_type} apart: {reason}",
        hint="what needs no heads works: train --scope lora, attention or full; mine-data --method lexical, embedding,"
        " loss, ifd, random",
    )
