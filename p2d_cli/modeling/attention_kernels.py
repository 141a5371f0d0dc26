"""Attention that was asked for by name: whether this machine has it, and whether a model computes the same with it.

Where a kernel is missing, transformers takes another one with a warning. p2d takes the one that was asked for, or none.

Axes: B batch, H heads, T tokens, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_flash_attention_utils import (
    FLASH_ATTENTION_COMPATIBILITY_MATRIX,
    FLASH_ATTN_KERNEL_DEVICES,
    FLASH_ATTN_KERNEL_FALLBACK,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.import_utils import KERNELS_MAX_VERSION, KERNELS_MIN_VERSION, is_kernels_available

from p2d_cli.errors import UnavailableError, first_line, is_out_of_memory

TORCH_KERNELS = frozenset({"sdpa", "eager"})
"""They are part of torch and transformers, run on every device, and take a mask for each pair of tokens."""
LEAVE_OUT = "leave out --attn-implementation, or give sdpa or eager"
_FLASH = "flash_attention_"
_PACKAGES = {2: "flash-attn", 3: "flash-attn-3", 4: "flash-attn-4"}
_PROBED_TOKENS = 8
SHORT_TOKENS = 128
"""Up to this length torch's attention learns faster in float32 than in bfloat16 on a CPU: 7 times at 16 tokens, 2.1
times at 128; at 512 it is slower (`tests/benchmarks/attention.py`)."""
_FAR_APART = 0.25
"""A difference of logits, as a share of their norm, that rounding to 16 bits does not make, even in deep models."""


def require_installed(asked: str, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse an attention that does not run on a device, in a precision, or without a package that is missing.

    Raises:
        UnavailableError: naming what is missing.
    """
    if asked in TORCH_KERNELS:
        return
    told, kinds = f"--attn-implementation {asked}", _devices(asked)
    if not _runs_on(asked, device):
        raise UnavailableError(f"{told} runs on {' or '.join(kinds)}, and this run is on {device.type}", hint=LEAVE_OUT)
    if "flash" in asked and dtype == torch.float32:
        raise UnavailableError(
            f"{told} computes in 16 bits, and the precision of this run is float32",
            hint=f"give --dtype bfloat16; or {LEAVE_OUT}",
        )
    if asked.startswith(_FLASH):
        _require_package(asked)
    elif not is_kernels_available():
        raise UnavailableError(
            f"{told} needs the package kernels, {KERNELS_MIN_VERSION} or newer and below {KERNELS_MAX_VERSION}",
            hint=f"pip install 'kernels>={KERNELS_MIN_VERSION},<{KERNELS_MAX_VERSION}'",
        )


def _require_package(asked: str) -> None:
    """Refuse FlashAttention that is not installed; transformers would download a kernel in its place, if it can."""
    version = int(asked.removeprefix(_FLASH))
    known, package = FLASH_ATTENTION_COMPATIBILITY_MATRIX[version], _PACKAGES[version]
    if known["general_availability_check"]():
        return
    fallback = FLASH_ATTN_KERNEL_FALLBACK[asked]
    missing = not known["pkg_availability_check"]()
    found = "is not installed" if missing else "is installed, but of no use to transformers with this torch and GPU"
    raise UnavailableError(
        f"--attn-implementation {asked} needs the package {package}, which {found}",
        hint=f"pip install {package}; or pip install kernels, and give --attn-implementation {fallback}",
    )


def _devices(asked: str) -> tuple[str, ...]:
    """Return the kinds of devices that a kernel runs on, as torch calls them; none if that is not known."""
    if asked in TORCH_KERNELS:
        return ()
    if asked.startswith(_FLASH):
        named: tuple[str, ...] = ("cuda",)
    else:
        named = FLASH_ATTN_KERNEL_DEVICES.get(asked.partition("@")[0].partition(":")[0], ())
    # torch calls AMD's GPUs cuda too.
    return tuple(dict.fromkeys("cuda" if name == "rocm" else name for name in named))


def _runs_on(asked: str, device: torch.device) -> bool:
    kinds = _devices(asked)
    return not kinds or device.type in kinds


def require_taken(model: Any, asked: str) -> None:
    """Refuse a model that transformers has given another attention than the one that was asked for.

    Raises:
        UnavailableError: naming both.
    """
    for config in (model.config, model.config.get_text_config()):
        taken = config._attn_implementation
        if taken != asked:
            raise UnavailableError(
                f"--attn-implementation {asked}: {model.config.model_type} does not run with it, and transformers would"
                f" take {taken}",
                hint=f"give --attn-implementation {taken}, or leave it out",
            )


def refusal(asked: str, model_type: str, problem: BaseException) -> UnavailableError:
    """Return the error for an attention that transformers does not give a model, with the first that it says of it."""
    said = first_line(problem).partition(". ")[0].removesuffix(".")
    return UnavailableError(f"--attn-implementation {asked} cannot be used for {model_type}: {said}", hint=LEAVE_OUT)


@contextmanager
def torch_attention(model: Any, usual: str) -> Iterator[None]:
    """Let a model attend by a kernel of torch's within the block."""
    asked = model.config._attn_implementation
    model.set_attn_implementation(usual)
    try:
        yield
    finally:
        model.set_attn_implementation(asked)


@contextmanager
def short_rows_in_float32() -> Iterator[None]:
    """Have `sdpa` attend to short rows in float32 within the block, on a CPU whose rows are in 16 bits otherwise.

    The backward pass of torch's kernel is slow there in 16 bits.
    """
    usual = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(module: Any, query_BHTD: Tensor, key_BHTD: Tensor, value_BHTD: Tensor, *rest: Any, **named: Any) -> Any:
        is_lowered = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if is_lowered else query_BHTD.dtype
        is_short = key_BHTD.shape[2] <= SHORT_TOKENS
        if query_BHTD.device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16) or not is_short:
            return usual(module, query_BHTD, key_BHTD, value_BHTD, *rest, **named)
        rest = tuple(map(_widened, rest))
        named = {name: _widened(value) for name, value in named.items()}
        with torch.autocast("cpu", enabled=False):
            attended, weights = usual(module, query_BHTD.float(), key_BHTD.float(), value_BHTD.float(), *rest, **named)
        return attended.to(dtype), weights

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = usual


def _widened(value: Any) -> Any:
    """Return a mask or bias that is added in float32, and all else as it is."""
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def computes_on(model: Any, device: torch.device) -> bool:
    """Say whether the model's attention runs on a device; a model that is to be sharded waits on the CPU before."""
    return _runs_on(model.config._attn_implementation, device)


@torch.no_grad()
def require_alike(model: Any, usual: str, device: torch.device) -> None:
    """Have a model read two short rows with its attention and with torch's, and refuse one that fails or differs.

    Kernels are built for some GPUs, head sizes and families; what they cannot do some of them refuse, and some ignore.

    Args:
        model: in eval mode.
        usual: `sdpa` or `eager`, whichever the model usually runs with.
        device: where it takes its tokens.

    Raises:
        UnavailableError: telling what went wrong.
    """
    asked, count = model.config._attn_implementation, model.get_input_embeddings().num_embeddings
    ids_2T = torch.arange(2 * _PROBED_TOKENS, device=device).reshape(2, -1) % count
    try:
        found_2TV = model(input_ids=ids_2T, use_cache=False).logits.float()
    except Exception as problem:
        if is_out_of_memory(problem):
            raise
        raise refusal(asked, model.config.model_type, problem) from problem
    with torch_attention(model, usual):
        expected_2TV = model(input_ids=ids_2T, use_cache=False).logits.float()
    apart = float((found_2TV - expected_2TV).norm() / expected_2TV.norm())
    if not apart <= _FAR_APART:
        raise UnavailableError(
            f"--attn-implementation {asked} computes something else than {usual} for {model.config.model_type}: the"
            f" logits of two short rows differ by {apart:.0%} of their norm",
            hint=LEAVE_OUT,
        )
