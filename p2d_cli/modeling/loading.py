"""Models and tokenizers from local folders or hub snapshots: safetensors only, and never code from the checkpoint."""

from __future__ import annotations

import logging as std_logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from p2d_cli.errors import (
    DataError,
    ModelError,
    NonFiniteError,
    UnavailableError,
    UsageError,
    first_line,
    is_out_of_memory,
)
from p2d_cli.modeling.attention_kernels import (
    TORCH_KERNELS,
    computes_on,
    refusal,
    require_alike,
    require_taken,
    torch_attention,
)
from p2d_cli.modeling.light_tokenizer import ensure_pad_token as ensure_pad_token
from p2d_cli.modeling.light_tokenizer import read_tokenizer
from p2d_cli.modeling.model_class import ModelClass, model_class, why_not_causal
from p2d_cli.modeling.model_files import ModelFiles, locate_model, require_tokenizer
from p2d_cli.modeling.quantised import Quantisation, quantisation_of, require_usable_weights

DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_MOST_LAYERS = 10_000

# What configs and models of transformers raise where a config's values are of no use, or do not fit together.
UNFIT_VALUES = (ValueError, TypeError, KeyError, AttributeError, RuntimeError, IndexError, ArithmeticError)


def load_tokenizer(path: Path | str) -> Any:
    """Load the fast tokenizer of a model, given by folder or hub id.

    Raises:
        UnavailableError: the model is neither on disk nor reachable, or a package that reads its tokenizer is missing.
        DataError: the folder has no usable tokenizer, or only one that cannot give character offsets.
    """
    from transformers import AutoTokenizer

    files = locate_model(str(path))
    require_tokenizer(files)
    with quiet_transformers():
        tokenizer = read_tokenizer(AutoTokenizer, files, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise DataError(
            f"the tokenizer of {files.spec} is {type(tokenizer).__name__}, which gives no character offsets",
            hint="p2d finds demos by offset: convert the tokenizer to tokenizer.json and load the model from there",
        )
    return tokenizer


def load_model(
    path: Path | str,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    four_bit: bool = False,
    device_map: str | Mapping[str, str] | None = None,
    attention: str = "auto",
) -> Any:
    """Load a causal language model in eval mode, with all of its parts: those of images and sound stay unused.

    Weights in mxfp4 are dequantised to `dtype`; those of bitsandbytes stay as they are, and are multiplied as the
    checkpoint says.

    Args:
        path: model folder, or hub id with an optional `@revision`.
        dtype: of all weights that are not quantised.
        device: where the model goes.
        four_bit: quantise the linear layers to 4 bits (NF4 with quantised constants, as QLoRA, arXiv:2305.14314, does);
            they are multiplied in `dtype`.
        device_map: `auto` divides the model over all devices, then main memory, then the disk; or a device (`disk` is
            one) for each module. Inputs then belong on `input_device`; accelerate moves what goes from part to part.
        attention: as for `--attn-implementation`, see `attention_kernel`. One that is not torch's is tried out.

    Returns:
        The model. Its `name_or_path`, which adapters saved from it repeat, is the hub id, or empty for a folder.

    Raises:
        UnavailableError: the model is neither on disk nor reachable, bitsandbytes is wanted and not installed, or the
            attention is not there, or does not fit the model.
        DataError: the weights are damaged, incomplete, or pickle files, or the model needs code from its checkpoint.
        NonFiniteError: a weight is NaN or infinite.
        ModelError: the model cannot be used: quantised by a method that is not read, not a causal language model.
    """
    files = locate_model(str(path))
    config = read_config(files)
    require_usable_weights(files, quantise=four_bit)
    device, quantised = torch.device(device), quantisation_of(files)
    # Without a place, bitsandbytes takes whatever accelerator there is.
    is_packed = four_bit or (quantised is not None and quantised.becomes == "packed")
    whole = None if device.type == "cpu" and not is_packed else {"": device}
    found = require_model_class(config)
    kernel = attention_kernel(config, found.built, attention)
    model = _from_pretrained(
        files,
        found.auto,
        config=config,
        dtype=dtype,
        attn_implementation=kernel,
        device_map=device_map or whole,
        quantization_config=_four_bits(dtype) if four_bit else _dequantised(quantised),
    )
    require_finite_weights(
        model.named_parameters(),
        f"loading the weights of {files.spec}",
        hint="copy or download it again"
        + ("; if it is whole, float16 cannot hold it: give --dtype float32" if dtype == torch.float16 else ""),
    )
    model.name_or_path = model.config.name_or_path = "" if files.revision is None else files.name
    _mend(model)
    model.eval()
    if attention != "auto":
        require_taken(model, attention)
    place = input_device(model)
    # The weights of a model that is to be sharded wait on the CPU, where its kernel may not run.
    if kernel not in TORCH_KERNELS and computes_on(model, place):
        require_alike(model, attention_kernel(config, found.built), place)
    return model


def attention_kernel(config: Any, built: Any, asked: str = "auto") -> str:
    """Return the attention that was asked for.

    `auto` is torch's own kernel, or a family's eager attention where it cannot use that (Gemma 2, for soft-capping).
    """
    if asked != "auto":
        return asked
    from transformers import MODEL_MAPPING

    text = type(config.get_text_config())
    parts = [built, *([MODEL_MAPPING[text]] if text in MODEL_MAPPING else [])]
    return "sdpa" if all(part._supports_sdpa for part in parts) else "eager"


def attention_that_runs(model: Any) -> AbstractContextManager[None]:
    """Let a model that waits on the CPU to be sharded attend by torch's kernel, if its own does not run there."""
    if computes_on(model, input_device(model)):
        return nullcontext()
    return torch_attention(model, attention_kernel(model.config, type(model)))


def require_model_class(config: Any) -> ModelClass:
    """Return the class of a config that `read_config` let through."""
    found = model_class(config)
    if found is None:
        raise AssertionError(f"{type(config).__name__} has no language model, and was let through")
    return found


def auto_model_name(model: Any) -> str:
    """Return the name of the auto class of transformers that loads a model, or that of the model inside a PeftModel."""
    return str(require_model_class(model.config).auto.__name__)


def _mend(model: Any) -> None:
    """Make up for what transformers 5.24 does wrong, where it does."""
    # Llama 4 looks for images in the output of its text model, which has no such field, and fails on every row.
    if type(model).__name__ == "Llama4ForConditionalGeneration":
        model.language_model.register_forward_hook(_add_no_images)


def _add_no_images(_module: Any, _inputs: Any, output: Any) -> None:
    if not hasattr(output, "image_outputs"):
        output.image_outputs = None


def _from_pretrained(files: ModelFiles, auto_model: Any, **options: Any) -> Any:
    """Return the model from local safetensors alone, with all of its tensors."""
    from safetensors import SafetensorError

    try:
        with quiet_transformers():
            model, report = auto_model.from_pretrained(
                str(files.folder),
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                **options,
            )
    except ImportError as problem:
        if (kernel := options["attn_implementation"]) not in TORCH_KERNELS:
            raise refusal(kernel, files.model_type, problem) from problem
        # An installed bitsandbytes may be too old for the installed transformers.
        raise UnavailableError(
            f"loading the weights of {files.spec} failed: {first_line(problem)}", hint="pip install -U bitsandbytes"
        ) from problem
    except (OSError, RuntimeError, ValueError, SafetensorError) as problem:
        if is_out_of_memory(problem):
            raise
        raise DataError(
            f"loading the weights of {files.spec} failed: {first_line(problem)}", hint="copy or download it again"
        ) from problem
    if missing := sorted(str(name) for name in report.get("missing_keys", ())):
        # transformers would go on with random values in their place.
        raise DataError(
            f"{files.spec} lacks {len(missing)} of the model's tensors, the first is {missing[0]}",
            hint="the checkpoint is incomplete or of another architecture; copy or download it again",
        )
    return model


def require_finite_weights(named: Iterable[tuple[str, torch.Tensor]], doing: str, *, hint: str) -> None:
    """Refuse floating-point weights of which one is not finite; quantised layers have integers.

    Args:
        named: name and tensor.
        doing: what the message begins with.
        hint: what to do next.

    Raises:
        NonFiniteError: naming the first tensor.
    """
    for name, tensor in named:
        if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.is_meta:
            continue
        # Both are NaN if one value is; unlike `isfinite`, it needs no memory and takes a thirtieth of the time.
        low, high = torch.aminmax(tensor.detach())
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise NonFiniteError(f"{doing}: {name} holds values that are not finite", hint=hint)


def input_device(model: Any) -> torch.device:
    """Return the device that a model takes its tokens on; `model.device` is `meta` if its embeddings wait on disk."""
    return working_device(model.get_input_embeddings())


def working_device(module: Any) -> torch.device:
    """Return the device that a module computes on, wherever accelerate's dispatch keeps its weight meanwhile."""
    hook: Any = getattr(module, "_hf_hook", None)
    for part in getattr(hook, "hooks", (hook,)):
        device = getattr(part, "execution_device", None)
        if device is not None:
            return torch.device(device)
    found: torch.device = module.weight.device
    return found


def placed_on(model: Any) -> dict[str, int]:
    """Return on which devices a divided model lies (`disk` is one), each with its number of modules; empty if whole."""
    placed: dict[Any, Any] = getattr(model, "hf_device_map", None) or {}
    names = (device if device == "disk" else str(torch.device(device)) for device in placed.values())
    return dict(sorted(Counter(names).items()))


def resolve_device(name: str) -> torch.device:
    """Turn `auto`, `cpu`, `cuda`, `cuda:0` or `mps` into a device that is there; auto prefers CUDA, then MPS.

    Raises:
        UsageError: no such device name.
        UnavailableError: this machine has no such device.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda", "mps"):
        raise UsageError(f"unknown device {name!r}", hint="use auto, cpu, cuda, cuda:0 or mps")
    missing_cuda = device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    if missing_cuda or (device.type == "mps" and not torch.backends.mps.is_available()):
        raise UnavailableError(f"device {name} was asked for, but torch finds no such device", hint="use auto or cpu")
    return device


def resolve_dtype(name: str, device: torch.device | str) -> torch.dtype:
    """Turn `auto`, `float32`, `bfloat16` or `float16` into a dtype.

    Auto is bfloat16 where the hardware multiplies it natively (CUDA from Ampere on; CPUs with AMX or AVX-512 BF16),
    and float32 everywhere else, since emulated bfloat16 is slower than float32.

    Raises:
        UsageError: no such dtype.
    """
    if name == "auto":
        return torch.bfloat16 if _has_native_bfloat16(torch.device(device)) else torch.float32
    if name not in DTYPES:
        raise UsageError(f"unknown dtype {name!r}", hint="use auto, " + ", ".join(DTYPES))
    return DTYPES[name]


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the progress bars and advice of transformers inside the block; errors still come as exceptions."""
    import transformers

    logging: Any = transformers.utils.logging
    verbosity = logging.get_verbosity()
    had_bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # PEFT imports it wherever it is installed, and it then recommends packages that p2d can do without.
    std_logging.getLogger("bitsandbytes").setLevel(std_logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()


def read_config(files: ModelFiles) -> Any:
    """Read a model's config, and make sure that transformers itself can build a causal model of it.

    Raises:
        DataError: it is damaged, or needs code from its own checkpoint.
        ModelError: it is of an unknown type, or is not a causal language model.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoConfig

    if files.model_type not in CONFIG_MAPPING:
        if "auto_map" in files.config:
            raise DataError(
                f"{files.spec} needs code from its own checkpoint (auto_map), which p2d does not run",
                hint="use a model that transformers itself supports",
            )
        raise ModelError(
            f"{files.spec} is of type {files.model_type!r}, which the installed transformers does not know",
            hint="check model_type in config.json, or update transformers",
        )
    layers = files.config.get("text_config", files.config).get("num_hidden_layers", 0)
    if isinstance(layers, int) and not 0 <= layers <= _MOST_LAYERS:
        # transformers would describe each of them.
        raise DataError(f"{files.config_path} is not a valid model config: num_hidden_layers is {layers}")
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(str(files.folder), trust_remote_code=False, local_files_only=True)
    except (OSError, StrictDataclassError, *UNFIT_VALUES) as problem:
        found = first_line(problem.__cause__ or problem)
        raise DataError(f"{files.config_path} is not a valid model config: {found}") from problem
    if (reason := why_not_causal(config)) is not None:
        raise ModelError(
            f"{files.spec} is of type {files.model_type!r}, which is not a causal language model: {reason}",
            hint="p2d adapts decoder-only language models",
        )
    return config


def _four_bits(dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _dequantised(quantised: Quantisation | None) -> Any:
    """Return the setting that makes plain weights of quantised ones while they are loaded, if these can be."""
    from transformers.utils.quantization_config import Mxfp4Config

    if quantised is None or quantised.becomes != "plain":
        return None
    return Mxfp4Config(dequantize=True)


def _has_native_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    features: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(features.get("amx_bf16") or features.get("avx512_bf16"))
