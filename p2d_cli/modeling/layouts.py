"""Which weight rows belong to which attention head.

Axes: L layers, H query heads, G key/value groups, d head_dim, D hidden size. A weight is said to have "rows" (outputs)
and "columns" (inputs) as in `nn.Linear`, `[out, in]`; GPT-2's Conv1D stores the transpose, as `Projection.transposed`
says, so that everyone else may think in rows.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn

import torch
from torch import nn

from p2d_cli.core.geometry import HeadGeometry
from p2d_cli.core.head_importance import LayerWeights
from p2d_cli.errors import ModelError

ProjectionName = Literal["q", "k", "v", "o"]
PROJECTIONS: tuple[ProjectionName, ...] = ("q", "k", "v", "o")

Range = tuple[int, int]

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
_LATENT_MODULES = ("kv_a_proj_with_mqa", "kv_a_proj", "kv_b_proj", "q_a_proj")
_OUTPUT_NAMES = ("o_proj", "out_proj", "dense")
# The fused projection of q, k and v, and the output projection.
_FUSED = {"phi3": ("qkv_proj", "o_proj"), "gpt2": ("c_attn", "c_proj"), "gpt_neox": ("query_key_value", "dense")}
# What a layer may have in place of attention, by the names of its classes in transformers.
_MIXERS = {
    "linear attention": re.compile(r"Delta(Net|Attention)|Lightning|LinearAttention|Retention|Rwkv", re.IGNORECASE),
    "a state-space model": re.compile(r"Mamba|BambaMixer|FalconH1Mixer", re.IGNORECASE),
    "a short convolution": re.compile(r"ShortConv"),
    "a recurrence": re.compile(r"Recurrent(Block|Layer)|RgLru|[ms]LSTM", re.IGNORECASE),
    "cross-attention": re.compile(r"CrossAttention"),
}


@dataclass(frozen=True)
class Projection:
    """One of a layer's q, k, v, o: a module and the ranges that its heads (q, o) or groups (k, v) own."""

    module: str
    """Full dotted name in the plain model; fused families repeat it for q, k and v."""
    rows: tuple[Range, ...]
    """(start, stop) of each head or group: output rows for q, k, v, and input columns for o."""
    transposed: bool = False
    """Whether the weight is stored `[in, out]` (Conv1D)."""

    @property
    def weight_name(self) -> str:
        """Name of the weight among the model's parameters."""
        return f"{self.module}.weight"

    def indices(self, units: Iterable[int]) -> tuple[int, ...]:
        """Rows (for o: columns) of these heads or groups, ascending, each once."""
        return tuple(sorted({row for unit in units for row in range(*self.rows[unit])}))


@dataclass(frozen=True)
class LayerLayout:
    """The attention of one layer."""

    layer: int
    module: str
    """Full dotted name of the attention module."""
    num_heads: int
    num_groups: int
    head_dim: int
    hidden_size: int
    q: Projection
    k: Projection
    v: Projection
    o: Projection

    def projection(self, name: ProjectionName) -> Projection:
        """Return the projection of this name."""
        found: Projection = getattr(self, name)
        return found

    def group_of(self, head: int) -> int:
        """Return the key/value group that a query head reads."""
        return head * self.num_groups // self.num_heads

    def units(self, name: ProjectionName, heads: Iterable[int]) -> tuple[int, ...]:
        """Return what these query heads own of a projection: themselves for q and o, their groups for k and v."""
        chosen = heads if name in ("q", "o") else (self.group_of(head) for head in heads)
        return tuple(sorted(set(chosen)))


def plain_model(model: Any) -> Any:
    """Return the Hugging Face model inside a PEFT model, adapter layers in place; another model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def model_layout(model: Any) -> tuple[LayerLayout, ...]:
    """Read from a model's modules where each head's weights are, layer by layer.

    Sizes come from the modules themselves (head_dim is not hidden/heads in Gemma or Qwen3). The model may be on the
    meta device, and may be a PeftModel; names are always those of the plain model.

    Raises:
        ModelError: the model's attention is not of a kind whose heads p2d can tell apart, with the reason.
    """
    model = plain_model(model)
    config = model.config.get_text_config()
    for model_type in (model.config.model_type, config.model_type):
        if model_type in _REFUSED:
            _refuse(model_type, _REFUSED[model_type])
    if shared := getattr(config, "num_kv_shared_layers", 0):
        _refuse(
            config.model_type,
            f"{shared} of its {config.num_hidden_layers} layers take their keys and values from other layers",
        )
    found = sorted(_attention_modules(model, config), key=lambda item: item[0])
    layers = [layer for layer, _, _ in found]
    if layers != list(range(config.num_hidden_layers)):
        _refuse(config.model_type, _why_incomplete(_decoder(model, config), config.num_hidden_layers, layers))
    layout = tuple(_layer_layout(layer, name, module, config) for layer, name, module in found)
    shapes = {(item.num_heads, item.num_groups, item.head_dim, item.hidden_size) for item in layout}
    if len(shapes) > 1:
        _refuse(config.model_type, f"its layers differ in (heads, groups, head_dim, hidden size): {sorted(shapes)}")
    if min(map(min, shapes), default=0) < 1:
        _refuse(config.model_type, f"expected layers with heads, found {len(layout)} layers of {sorted(shapes)}")
    return layout


def geometry(model: Any) -> HeadGeometry:
    """Return the geometry of a model, or raise as `model_layout` does."""
    return layout_geometry(model_layout(model))


def layout_geometry(layout: tuple[LayerLayout, ...]) -> HeadGeometry:
    """Return the numbers and sizes of layers, heads and groups."""
    first = layout[0]
    return HeadGeometry(
        num_layers=len(layout),
        num_heads=first.num_heads,
        num_groups=first.num_groups,
        head_dim=first.head_dim,
        hidden_size=first.hidden_size,
    )


def layer_weights(layer: LayerLayout, tensors: Callable[[str], torch.Tensor]) -> LayerWeights:
    """Cut a layer's q, k and v weights into heads.

    `tensors` gives the parameter of a name, as `model.get_parameter` or `CheckpointReader.tensor`. Returns q
    `[H, d, D]`, k and v `[G, d, D]`, copies in the dtype and on the device of the parameters.
    """

    def cut(projection: Projection) -> torch.Tensor:
        weight = tensors(projection.weight_name).detach()
        weight = weight.T if projection.transposed else weight
        # narrow, unlike a slice, refuses a range that the weight does not have.
        return torch.stack([weight.narrow(0, start, stop - start) for start, stop in projection.rows])

    return LayerWeights(q_HdD=cut(layer.q), k_GdD=cut(layer.k), v_GdD=cut(layer.v))


def _why_incomplete(decoder: Any, total: int, layers: Sequence[int]) -> str:
    """Say what a model has where not every layer has one attention of its own; `layers` are those of the attentions."""
    blocks = _blocks_of(decoder, total) or ()
    kinds = Counter(_kind(block) for index, block in enumerate(blocks) if index not in layers)
    if not kinds:
        several = sorted(layer for layer, count in Counter(layers).items() if count > 1)
        found = f"several in layer {several[0]}" if several else f"them in layers {list(layers)}"
        return f"expected one attention in each of its {total} layers, found {found}"
    lacking = sum(kinds.values())
    share = f"none of its {total} layers has" if lacking == total else f"{lacking} of its {total} layers do not have"
    found = ", ".join(f"{kind} in {count}" if len(kinds) > 1 else kind for kind, count in kinds.items())
    return f"{share} attention heads with queries, keys and values of their own, but {found}"


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
    parts = [module for module in block.modules() if hasattr(module, "q_proj") and hasattr(module, "k_proj")]
    if any(getattr(part, "v_proj", None) is None for part in parts):
        return "keys that serve as values as well"
    attention = next((name for name in names if "Attention" in name), None)
    return "no attention at all" if attention is None else f"{attention}, which p2d does not know"


def _decoder(model: Any, config: Any) -> Any:
    """Return a model's text decoder; some families call their output head so (ModernBERT)."""
    decoder = model.get_decoder()
    return model.base_model if _blocks_of(decoder, config.num_hidden_layers) is None else decoder


def _attention_modules(model: Any, config: Any) -> list[tuple[int, str, Any]]:
    """Layer, full name and module of each attention in the model's text decoder."""
    decoder = set(_decoder(model, config).modules())
    model_type = config.model_type
    found = []
    for name, module in model.named_modules():
        if module not in decoder or not isinstance(getattr(module, "layer_idx", None), int):
            continue
        # A mixer may call its projections as an attention does.
        if any(pattern.search(type(module).__name__) for pattern in _MIXERS.values()):
            continue
        if any(hasattr(module, latent) for latent in _LATENT_MODULES):
            _refuse(model_type, "its keys and values are compressed into a latent (MLA), so heads own no plain k and v")
        fused = hasattr(module, "c_attn") or hasattr(module, "qkv_proj") or hasattr(module, "query_key_value")
        if fused or all(getattr(module, part, None) is not None for part in ("q_proj", "k_proj", "v_proj")):
            found.append((module.layer_idx, name, module))
    return found


def _layer_layout(layer: int, name: str, module: Any, config: Any) -> LayerLayout:
    head_dim, heads = _head_dim(module, config), config.num_attention_heads
    if hasattr(module, "q_proj"):
        output = next((part for part in _OUTPUT_NAMES if hasattr(module, part)), "")
        if not output:
            _refuse(config.model_type, f"{name} has no output projection named {' or '.join(_OUTPUT_NAMES)}")
        q, k, v = (_projection(name, module, f"{part}_proj", head_dim) for part in ("q", "k", "v"))
    elif config.model_type in _FUSED:
        part, output = _FUSED[config.model_type]
        fused = _projection(name, module, part, head_dim)
        groups = (len(fused.rows) - heads) // 2
        # All of q, then all of k, then all of v; in gpt_neox q, k and v of the first head, then of the second.
        pieces = [slice(heads), slice(heads, heads + groups), slice(heads + groups, None)]
        if config.model_type == "gpt_neox":
            pieces = [slice(offset, None, 3) for offset in range(3)]
        q, k, v = (replace(fused, rows=fused.rows[piece]) for piece in pieces)
    else:
        _refuse(config.model_type, f"p2d does not know the row order of the fused projection in {name}")
    o = _projection(name, module, output, head_dim, on_input=True)
    if (v_head_dim := getattr(module, "v_head_dim", head_dim)) != head_dim:
        _refuse(config.model_type, f"its values are of size {v_head_dim} a head, its queries and keys of {head_dim}")
    if len(q.rows) == 2 * heads and len(o.rows) == heads:
        _refuse(config.model_type, "its query projection also makes an output gate")
    groups = len(k.rows)
    if len(q.rows) != heads or len(o.rows) != heads or len(v.rows) != groups or heads % groups:
        _refuse(
            config.model_type,
            f"{name} has {len(q.rows)} query, {groups} key, {len(v.rows)} value and {len(o.rows)} output heads "
            f"where its config says {heads} query heads",
        )
    hidden_size, _, _ = _features(module.get_submodule(q.module.rpartition(".")[2]))
    return LayerLayout(layer, name, heads, groups, head_dim, hidden_size, q, k, v, o)


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


def _projection(name: str, module: Any, part: str, head_dim: int, *, on_input: bool = False) -> Projection:
    """Cut all output rows of a part of an attention module (`on_input`: its input columns) into heads."""
    in_features, out_features, transposed = _features(getattr(module, part))
    starts = range(0, in_features if on_input else out_features, head_dim)
    return Projection(f"{name}.{part}", tuple((start, start + head_dim) for start in starts), transposed)


def _features(module: Any) -> tuple[int, int, bool]:
    """Input and output features, and whether the weight is stored `[in, out]`."""
    from transformers.pytorch_utils import Conv1D

    own = getattr(module, "base_layer", module)  # inside the LoRA layer that PEFT may have put around it
    return (own.nx, own.nf, True) if isinstance(own, Conv1D) else (own.in_features, own.out_features, False)


def _refuse(model_type: str, reason: str) -> NoReturn:
    raise ModelError(
        f"p2d does not support the attention of {model_type}: {reason}",
        hint="use a model such as llama, mistral, qwen2, qwen3, gemma2, gemma3, phi3, gpt2, gpt_neox or olmo2",
    )
