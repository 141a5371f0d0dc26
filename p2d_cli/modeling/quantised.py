"""Checkpoints whose weights are stored in fewer bits: which of them p2d reads, for what, and how large they are.

Weights in mxfp4 are plain once they are loaded. Weights of bitsandbytes stay packed: such a model is read, and is the
frozen base of an adapter, but nothing can move its weights or take them apart. Every other method is refused by name.
Imports no torch.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
from dataclasses import dataclass
from typing import Any, Literal

from p2d_cli.errors import DataError, ModelError, UnavailableError
from p2d_cli.modeling.model_files import ModelFiles, StoredTensor, stored_tensors

_PACKED_HINT = "; a checkpoint of bitsandbytes, in 4 or 8 bits, can be read, and trained with --scope heads or lora"
_UNQUANTISED = "use the unquantised checkpoint that it was made from"
_RELEASED_BF16 = "use its BF16 release, often of the same name without FP8"

# What `quant_method` of a config is usually called, and what to take in its place.
_REFUSED: dict[str, tuple[str, str]] = {
    "aqlm": ("AQLM", _UNQUANTISED),
    "auto-round": ("AutoRound", _UNQUANTISED),
    "awq": ("AWQ", _UNQUANTISED),
    "bitnet": ("BitNet", _UNQUANTISED),
    "compressed-tensors": ("compressed-tensors", _UNQUANTISED),
    "eetq": ("EETQ", _UNQUANTISED),
    "fbgemm_fp8": ("FP8 of FBGEMM", _RELEASED_BF16),
    "fp8": ("FP8", _RELEASED_BF16),
    "fp_quant": ("FP-Quant", _UNQUANTISED),
    "gptq": ("GPTQ", _UNQUANTISED),
    "higgs": ("HIGGS", _UNQUANTISED),
    "hqq": ("HQQ", _UNQUANTISED),
    "modelopt": ("ModelOpt", _UNQUANTISED),
    "mxfp8": ("MXFP8", _RELEASED_BF16),
    "nvfp4": ("NVFP4", _UNQUANTISED),
    "quanto": ("Quanto", _UNQUANTISED),
    "quark": ("Quark", _UNQUANTISED),
    "spqr": ("SpQR", _UNQUANTISED),
    "torchao": ("torchao", _UNQUANTISED),
    "vptq": ("VPTQ", _UNQUANTISED),
}
# What stands beside a packed weight: scales of its blocks, tables, and how it is packed.
_BESIDE_WEIGHT = re.compile(r"\.weight\.(?:(?:nested_)?(?:absmax|quant_map)|quant_state\..+)$|\.(?:SCB|weight_format)$")
_QUANT_STATE = re.compile(r"(.+\.weight)\.quant_state\.bitsandbytes__\w+")
_COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
_MXFP4_BLOCKS, _MXFP4_SCALES = "_blocks", "_scales"
_MXFP4_PER_BYTE = 2


@dataclass(frozen=True)
class Quantisation:
    """How the weights of a checkpoint are stored."""

    method: str
    """`quant_method`, as transformers calls it."""
    name: str
    """As the field calls it."""
    becomes: Literal["plain", "packed", "unusable"]
    """What the weights are once they are loaded."""
    instead: str = _UNQUANTISED
    shards: bool = True
    """Whether FSDP2 takes a model with such weights; what stays packed in 4 bits is whole on every rank."""


def quantisation_of(files: ModelFiles) -> Quantisation | None:
    """Return how the weights are quantised by the config, or by that of a multimodal model's text part; or None."""
    parts = (files.config, *(part for part in files.config.values() if isinstance(part, dict)))
    settings = next((found for part in parts if (found := part.get("quantization_config")) is not None), None)
    if settings is None:
        return None
    told: dict[str, Any] = settings if isinstance(settings, dict) else {}
    method = str(told.get("quant_method") or "unknown method")
    if told.get("load_in_4bit") or told.get("load_in_8bit"):
        bits = 4 if told.get("load_in_4bit") else 8
        return Quantisation("bitsandbytes", f"bitsandbytes, {bits} bits", "packed", shards=bits == 4)
    if method == "mxfp4":
        return Quantisation(method, "MXFP4", "plain")
    if method == "bitsandbytes":
        return Quantisation(method, "bitsandbytes, without load_in_4bit or load_in_8bit", "unusable")
    name, instead = _REFUSED.get(method, (method, _UNQUANTISED))
    if method == "compressed-tensors" and "float" in str(told.get("format")):
        name, instead = "FP8 of compressed-tensors", _RELEASED_BF16
    return Quantisation(method, name, "unusable", instead)


def require_usable_weights(files: ModelFiles, *, plain: str = "", quantise: bool = False) -> None:
    """Refuse a checkpoint whose quantised weights cannot be used, before they are read.

    Args:
        files: the model.
        plain: what moves weights or takes them apart, as the user asked for it; empty if they are only multiplied.
        quantise: whether its weights are to be quantised when they are loaded (`--base-quantization`).

    Raises:
        ModelError: they are quantised by a method that p2d does not read, or that rules out what is asked.
        UnavailableError: it takes bitsandbytes, which is not installed.
    """
    found = quantisation_of(files)
    if found is not None:
        what = f"the weights of {files.spec} are quantised ({found.name})"
        if found.becomes == "unusable":
            raise ModelError(
                f"{what}; p2d reads plain weights, MXFP4, and 4 or 8 bits of bitsandbytes",
                hint=f"{found.instead}{_PACKED_HINT}",
            )
        if found.becomes == "packed" and (problem := _why_not_packed(files)):
            raise ModelError(f"{files.spec}: {problem}", hint="copy or download it again, or remove the setting")
        if quantise:
            raise ModelError(
                f"{what}, and --base-quantization is for plain weights",
                hint="leave it out" if found.becomes == "packed" else f"leave it out, or {_UNQUANTISED}",
            )
        if plain and found.becomes == "packed":
            raise ModelError(
                f"{what}, and {plain} takes plain weights",
                hint=f"{_UNQUANTISED}, which train can keep in 4 bits (--base-quantization 4bit); on this one, score"
                " heads with readout, contrast or taylor, train with --scope heads or lora, and serve the adapter as it"
                " is",
            )
    is_packed = quantise or (found is not None and found.becomes == "packed")
    if is_packed and importlib.util.find_spec("bitsandbytes") is None:
        whose = "4-bit weights need" if quantise else f"the weights of {files.spec} are quantised by"
        raise UnavailableError(f"{whose} bitsandbytes, which is not installed", hint="pip install bitsandbytes")


def _why_not_packed(files: ModelFiles) -> str:
    """Say why weights are not what a config of bitsandbytes says of them; empty if they may be."""
    parts = (files.config, *(part for part in files.config.values() if isinstance(part, dict)))
    settings = next(found for part in parts if (found := part.get("quantization_config")) is not None)
    dtype = settings.get("bnb_4bit_compute_dtype")
    if dtype is not None and str(dtype).removeprefix("torch.") not in _COMPUTE_DTYPES:
        return f"its bnb_4bit_compute_dtype is {dtype!r}, expected one of {', '.join(_COMPUTE_DTYPES)}"
    if files.weights and not any(_BESIDE_WEIGHT.search(name) for name in stored_tensors(files.weights)):
        return "its config says that bitsandbytes quantised the weights, and they are plain"
    return ""


# --- sizes


@dataclass(frozen=True)
class PackedWeights:
    """The weights that stay packed in memory."""

    parameters: int
    num_bytes: int
    """What they take, with all that stands beside them."""


def tensor_shapes(files: ModelFiles) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of the model, by name, from the headers of the weight files alone.

    A packed weight has the shape that it has once it is unpacked; what stands beside it is left out.

    Raises:
        DataError: a file is damaged.
    """
    stored, found = stored_tensors(files.weights), quantisation_of(files)
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    if found is None:
        return shapes
    if found.method == "mxfp4":
        return {
            name.removesuffix(_MXFP4_BLOCKS): _unpacked_mxfp4(name, shape)
            for name, shape in shapes.items()
            if not name.endswith(_MXFP4_SCALES)
        }
    packed = {match[1]: _packed_shape(tensor) for name, tensor in stored.items() if (match := _QUANT_STATE.match(name))}
    return {name: shape for name, shape in (shapes | packed).items() if not _BESIDE_WEIGHT.search(name)}


def packed_weights(files: ModelFiles) -> PackedWeights:
    """Return how many weights stay packed, and what they take; none of a plain checkpoint, or of one in mxfp4.

    Raises:
        DataError: a file is damaged.
    """
    found = quantisation_of(files)
    if found is None or found.becomes != "packed":
        return PackedWeights(0, 0)
    stored, shapes = stored_tensors(files.weights), tensor_shapes(files)
    beside = [name for name in stored if _BESIDE_WEIGHT.search(name)]
    weights = {name.partition(".weight.")[0].removesuffix(".SCB").removesuffix(".weight_format") for name in beside}
    names = [f"{name}.weight" for name in sorted(weights)]
    return PackedWeights(
        parameters=sum(math.prod(shapes[name]) for name in names if name in shapes),
        num_bytes=sum(stored[name].num_bytes for name in (*names, *beside) if name in stored),
    )


def _unpacked_mxfp4(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return `[experts, in, out]` of blocks `[experts, out, blocks, bytes]`; of any other tensor its own shape."""
    if not name.endswith(_MXFP4_BLOCKS) or len(shape) < len(("out", "blocks", "bytes")):
        return shape
    *experts, rows, blocks, size = shape
    return (*experts, blocks * size * _MXFP4_PER_BYTE, rows)


def _packed_shape(quant_state: StoredTensor) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in json.loads(quant_state.read())["shape"])
    except (ValueError, KeyError, TypeError, OverflowError) as problem:
        raise DataError(
            f"{quant_state.path} does not say how its weights are packed: {problem!r}", hint="copy or download it again"
        ) from None
