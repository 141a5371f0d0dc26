"""What is trained: the rows of selected heads as an exact LoRA, all attention, a plain LoRA, or everything.

A change of some rows of a weight, `ΔW[rows] = A`, is the LoRA product `B A` with `B` the frozen 0/1 matrix that places
row i of `A` at row `rows[i]`; with `r = alpha = len(rows)` the scaling is 1, so the adapter is exact without an SVD.
For columns of the output projection the factors swap: `ΔW[:, columns] = B`, and `A` places. So an adapter of p2d is an
ordinary PEFT folder that any tool can load or merge.

While it is trained, each module has the rank of its own rows. When it is saved, rows and columns of zeros bring all
modules to one rank (see `p2d_cli.core.adapter_rank`), which changes no product.

Only weights are trained: where projections have biases (Qwen2, GPT-2), these stay as they are.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from p2d_cli.core.adapter_rank import common_rank
from p2d_cli.core.head_layout import PROJECTIONS, Placement, ProjectionName
from p2d_cli.errors import ArtifactError, UsageError, is_out_of_memory
from p2d_cli.modeling.channels import channel_outputs, placed_rows
from p2d_cli.modeling.layouts import attention_parts, is_transposed, linear_modules, model_layout, plain_model
from p2d_cli.modeling.loading import require_finite_weights, working_device
from p2d_cli.modeling.text_part import text_parameters

ADAPTER_NAME = "default"
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_LONGEST_REASON = 500
_PEFT_PROBLEMS = (RuntimeError, ValueError, LookupError, TypeError, AttributeError, ImportError)
"""What PEFT raises, depending on the kind of adapter, where an adapter does not fit its model."""


@dataclass(frozen=True)
class TrainableShare:
    """How much of a model is trained."""

    trained: int
    """Parameters that are trained."""
    total: int
    """Parameters of the base model, tied ones once."""

    @property
    def share(self) -> float:
        """Trained parameters over the base model's."""
        return self.trained / self.total


def attach_heads(
    model: Any, selected_LH: NDArray[np.bool_], projections: Sequence[ProjectionName], channels: float = 0.0
) -> Any:
    """Make the selected heads, bool `[L, H]`, trainable, and nothing else; the model's modules are replaced in place.

    With `channels`, this share of the channels of the MLPs from the lowest selected head's layer on is trained beside
    them, or without projections alone.

    A head's `q` rows and `o` columns are its own, those of a gate beside its query among them. Its `k` and `v` rows are
    its group's: training them changes every head of the group, also in later layers that take them over. Where a layer
    takes keys and values from another, its heads have `q` and `o` alone. Modules without a selected head are not
    touched, and so no gradient is computed below the lowest one that has any.

    Returns:
        A PeftModel whose trained factors are zeros in fp32 (in float64 for such a model), so that it equals the base.

    Raises:
        UsageError: no head or no projection is selected.
        ModelError: the attention, or with `channels` an MLP, is of an unsupported kind.
        ArtifactError: the heads are of a model of another shape.
    """
    if projections or not channels:
        _check_projections(projections)
    return attach_rows(model, placed_rows(model, selected_LH, projections, channels))


def attach_rows(model: Any, placed: Mapping[str, Placement]) -> Any:
    """Make these rows and columns of modules trainable, by the modules' names, and nothing else; see `attach_heads`."""
    counts = {name: len(place.rows) for name, place in placed.items()}
    first = next(iter(counts.values()))
    # PEFT reads the names as patterns; a dot that matches anything confuses no two modules of one model.
    peft_model = _attach(model, placed, r=first, lora_alpha=first, rank_pattern=counts, alpha_pattern={**counts})
    for name, place in placed.items():
        module = peft_model.get_base_model().get_submodule(name)
        if module.scaling[ADAPTER_NAME] != 1.0 or module.r[ADAPTER_NAME] != len(place.rows):
            raise AssertionError(f"PEFT gave rank {module.r} and scaling {module.scaling} for {len(place.rows)} rows")
        trained, placing = _factors(module, on_input=place.on_input)
        placing.requires_grad_(False)
        with torch.no_grad():
            trained.zero_()
            placing.zero_()
            (placing.T if place.on_input else placing)[list(place.rows), range(len(place.rows))] = 1
    return peft_model


def attach_lora(model: Any, rank: int, alpha: float, targets: Collection[str], dropout: float = 0.0) -> Any:
    """Attach an ordinary LoRA to whole modules of every layer (Hu et al., arXiv:2106.09685), in place.

    Args:
        model: without adapter.
        rank: r.
        alpha: the scaling is `alpha / rank`; see `rank_stabilized` for that of rsLoRA.
        targets: `all-linear` for the linear layers of the text decoder (see `linear_modules`), or some of q, k, v, o; a
            fused module is adapted as a whole, and of latent attention the parts that make them.
        dropout: on the inputs of the adapter, in [0, 1).

    Raises:
        UsageError: an unknown target, or one that the model has not.
        ModelError: the model has no attention.
    """
    if tuple(targets) == ("all-linear",):
        return _attach(model, linear_modules(model), r=rank, lora_alpha=alpha, lora_dropout=dropout)
    _check_projections(targets)
    parts = attention_parts(model)
    modules = dict.fromkeys(module for name in PROJECTIONS if name in targets for module in parts[name])
    if not modules:
        there = [name for name in PROJECTIONS if parts[name]]
        raise UsageError(
            f"--lora-targets {','.join(targets)}: the attention of this model has no linear layer for any of them",
            hint=f"train --lora-targets {','.join(there)}",
        )
    return _attach(model, modules, r=rank, lora_alpha=alpha, lora_dropout=dropout)


def rank_stabilized(alpha: float, rank: int) -> float:
    """Return the alpha of a plain LoRA that is scaled as rsLoRA is, by `alpha / sqrt(rank)` (arXiv:2312.03732).

    PEFT has a flag for it, `use_rslora`, which llama.cpp and others do not read.
    """
    plain = alpha * math.sqrt(rank)
    return int(plain) if plain.is_integer() else plain


def _attach(model: Any, modules: Collection[str], **settings: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=list(modules),
        fan_in_fan_out=is_transposed(model.get_submodule(next(iter(modules)))),
        bias="none",
        **settings,
    )
    with known_warnings_silenced():
        peft_model = get_peft_model(model, config, adapter_name=ADAPTER_NAME)
    # A path of this machine says nothing elsewhere; a hub id may stay.
    saved = peft_model.peft_config[ADAPTER_NAME]
    if (name := saved.base_model_name_or_path) and Path(name).expanduser().exists():
        saved.base_model_name_or_path = None
    return peft_model


def saved_rank(model: Any) -> int:
    """Return the rank that all modules of a PeftModel's adapter have once it is saved."""
    config = model.peft_config[ADAPTER_NAME]
    return common_rank(config.rank_pattern.values()) if config.rank_pattern else int(config.r)


def freeze_placing(model: Any) -> None:
    """Freeze the placing factors of a head adapter again, which PEFT unfreezes whenever it loads one to train on.

    The zeros that a saved adapter was padded with stay zeros: neither of the two factors that multiply them gets a
    gradient.

    Raises:
        ArtifactError: a factor does not place rows: its columns (rows, where it places columns) are not unit vectors,
            all different, and padding.
    """
    base = model.get_base_model()
    output_names = {layer.o.module for layer in model_layout(base)} | channel_outputs(base)
    for name, module in _lora_modules(base):
        _, placing = _factors(module, on_input=name in output_names)
        ones = placing == 1
        counts = torch.cat([ones.sum(dim=0), ones.sum(dim=1)])
        if counts.max() != 1 or ones.sum() != placing.count_nonzero():
            raise ArtifactError(
                f"the adapter's factor for {name} does not place rows: it is not a head adapter of p2d",
                hint="continue it with --scope lora, or start a new one",
            )
        placing.requires_grad_(False)


def trainable_share(model: Any) -> TrainableShare:
    """Count what is trained; frozen placing factors count on neither side."""
    trained = total = 0
    for name, parameter in model.named_parameters():
        trained += parameter.numel() if parameter.requires_grad else 0
        # The values of 4-bit weights are packed.
        state = getattr(parameter, "quant_state", None)
        size = parameter.numel() if state is None else math.prod(state.shape)
        total += 0 if ".lora_" in name else size
    return TrainableShare(trained=trained, total=total)


def unfreeze_attention(model: Any) -> None:
    """Make the q, k, v, o weights of all layers trainable, in fp32, and freeze everything else.

    A weight that several layers share stays shared. A 16-bit model must then run under autocast, as its activations
    keep their dtype.

    Raises:
        ModelError: the model has no attention.
    """
    parts = attention_parts(model)
    model.requires_grad_(False)
    trained: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
    for name in dict.fromkeys(module for modules in parts.values() for module in modules):
        module = model.get_submodule(name)
        if module.weight not in trained:
            trained[module.weight] = torch.nn.Parameter(_at_least_float32(module.weight.data))
        module.weight = trained[module.weight]


def prepare_full(model: Any) -> None:
    """Make every parameter of the text part trainable, in fp32; a 16-bit forward is autocast's business."""
    model.requires_grad_(False)
    for parameter in text_parameters(model):
        parameter.data = _at_least_float32(parameter.data)
        parameter.requires_grad_(True)


def enable_checkpointing(model: Any) -> None:
    """Recompute activations in the backward pass of a model whose trained parameters have been chosen.

    transformers makes the embeddings' output require a gradient along with it, which reentrant checkpointing needs
    and which would carry the backward pass through every frozen layer; without reentrance it is not needed.
    """
    base = plain_model(model)
    base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    base.disable_input_require_grads()


def save_adapter(
    model: Any,
    folder: Path,
    base_model: str | None,
    state: dict[str, torch.Tensor] | None = None,
    *,
    revision: str | None = None,
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, and nothing else, the same bytes each time.

    All modules of a head adapter are saved with one rank, which is alpha too.

    Args:
        model: a PeftModel.
        folder: where to; created if need be.
        base_model: the config's `base_model_name_or_path`, such as a hub id.
        state: the adapter's weights under the model's names, if the model itself holds only a part of them.
        revision: that of the base model on its hub.

    Raises:
        NonFiniteError: it holds NaN or infinity; nothing was written.
    """
    factors = state
    if factors is None:
        factors = {name: weight for name, weight in model.named_parameters() if "lora_" in name}
    require_finite_weights(factors.items(), "saving the adapter", hint="lower --lr, or try --dtype float32")
    saved = model.peft_config[ADAPTER_NAME]
    saved.base_model_name_or_path, saved.revision = base_model, revision
    rank = saved_rank(model)
    if is_of_heads := bool(saved.rank_pattern):  # the ranks of its modules while it is trained
        factors = {name: _padded(name, factor, rank) for name, factor in factors.items()}
    # "auto" would look for the base model on the hub, to see whether its vocabulary was resized.
    model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=factors)
    (folder / "README.md").unlink(missing_ok=True)
    config = json.loads((folder / CONFIG_FILE).read_bytes())
    if is_of_heads:
        config |= {"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}}
    # PEFT keeps the targets as a set, whose order differs from process to process.
    config["target_modules"] = sorted(config["target_modules"])
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")


def load_adapter(model: Any, path: Path | str) -> Any:
    """Put a saved PEFT adapter on its base model, in place and for inference; the model may be divided over devices.

    Raises:
        ArtifactError: not such a folder, damaged, or made for another model.
        NonFiniteError: it holds NaN or infinity.
    """
    from safetensors import SafetensorError

    folder = Path(path)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise ArtifactError(f"{folder} is not an adapter: it has no {name}", hint="give the folder p2d train wrote")
    # PEFT would place a divided model anew; the adapter is small and follows the modules that it belongs to instead.
    places = vars(model).pop("hf_device_map", None)
    try:
        adapted, unused = _from_folder(model, folder, empty=places is not None)
    except (*_PEFT_PROBLEMS, UserWarning, SafetensorError) as problem:
        if is_out_of_memory(problem):
            raise
        raise ArtifactError(
            f"the adapter in {folder} does not fit this model: {shorten(str(problem), _LONGEST_REASON)}",
            hint="load it on the base model that it was trained on; if tokens were added to that, on a copy of it "
            "with resize_token_embeddings",
        ) from problem
    if places is not None:
        model.hf_device_map = places
        unused = _fill_divided(adapted.get_base_model(), folder)
    if unused:
        whole = "on a divided model p2d takes a plain LoRA only: leave out --device-map"
        raise ArtifactError(
            f"the adapter in {folder} does not fit this model: {len(unused)} of its tensors belong nowhere, the first "
            f"is {unused[0]}",
            hint="load it on the base model that it was trained on" if places is None else whole,
        )
    return adapted.eval()


def _from_folder(model: Any, folder: Path, *, empty: bool) -> tuple[Any, list[str]]:
    """Return the adapted model, and the names of tensors in the file that PEFT found no place for.

    With `empty`, the factors stay without values, for `_fill_divided` to give them.
    """
    from peft import PeftModel
    from safetensors import safe_open

    with safe_open(str(folder / WEIGHTS_FILE), framework="pt") as file:
        named = ((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118 - not a dictionary
        require_finite_weights(named, f"loading the adapter in {folder}", hint="train it again")
    with known_warnings_silenced():
        # PEFT only warns when the file lacks some of the factors, and would go on with random ones.
        warnings.filterwarnings("error", message="Found missing adapter keys")
        adapted = PeftModel.from_pretrained(
            model, str(folder), adapter_name=ADAPTER_NAME, is_trainable=False, low_cpu_mem_usage=empty
        )
        if empty:
            return adapted, []
        # It says nothing at all of those that the file has too many of, unless it is asked a second time.
        device = str(working_device(adapted.get_input_embeddings()))
        result = adapted.load_adapter(str(folder), ADAPTER_NAME, torch_device=device)
    return adapted, list(result.unexpected_keys)


def _fill_divided(base: Any, folder: Path) -> list[str]:
    """Put each factor where the module that it changes computes; PEFT leaves it, empty, where that module waits.

    Returns the names of tensors in the file that are no factors of it.
    """
    from safetensors.torch import load_file

    stored = load_file(folder / WEIGHTS_FILE)
    for name, module in _lora_modules(base):
        device = working_device(module.base_layer)
        for letter, factors in (("A", module.lora_A), ("B", module.lora_B)):
            factor = factors[ADAPTER_NAME]
            weight = stored.pop(f"base_model.model.{name}.lora_{letter}.weight").to(device, factor.weight.dtype)
            factor.weight = torch.nn.Parameter(weight, requires_grad=False)
    return sorted(stored)


@contextmanager
def known_warnings_silenced() -> Iterator[None]:
    """Silence what PEFT 0.21 provokes in transformers 5 by itself, or what p2d sees to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        # `p2d_cli.modeling.merging` parts the embeddings before it merges.
        warnings.filterwarnings("ignore", message="Model (has|with) `tie_word_embeddings=True`")
        warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
        yield


def _check_projections(projections: Collection[str]) -> None:
    unknown = sorted(set(projections) - set(PROJECTIONS))
    if unknown or not projections:
        found = f"found {', '.join(unknown)}" if unknown else "found none"
        raise UsageError(f"choosing what to train: expected some of {', '.join(PROJECTIONS)}, {found}")


def _padded(name: str, factor: torch.Tensor, rank: int) -> torch.Tensor:
    """Return a factor with zeros up to `rank`: rows of A `[r, in]`, columns of B `[out, r]`."""
    missing = (0, 0, 0, rank - factor.shape[0]) if ".lora_A." in name else (0, rank - factor.shape[1])
    return functional.pad(factor.detach(), missing)


def _factors(module: Any, *, on_input: bool) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    """Return the trained and the placing factor of a LoRA layer."""
    a, b = module.lora_A[ADAPTER_NAME].weight, module.lora_B[ADAPTER_NAME].weight
    return (b, a) if on_input else (a, b)


def _lora_modules(base: Any) -> Iterator[tuple[str, Any]]:
    for name, module in base.named_modules():
        if ADAPTER_NAME in getattr(module, "lora_A", ()):
            yield name, module


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
