"""Writing a plain Hugging Face model folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from p2d_cli.modeling.loading import quiet_transformers, require_finite_weights
from p2d_cli.modeling.model_files import (
    TOKENIZER_FILES,
    WEIGHTS_INDEX,
    ModelFiles,
    stored_tensors,
    tensor_bytes,
    weight_files,
)
from p2d_cli.modeling.text_part import has_other_parts, is_of_text

if TYPE_CHECKING:
    import torch

GENERATION_CONFIG_NAME = "generation_config.json"
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)
"""How images and sound become inputs."""


def save_plain_model(
    model: Any,
    base: ModelFiles,
    folder: Path,
    state: dict[str, Any] | None = None,
    *,
    changed: Collection[str] = (),
) -> None:
    """Write weights and config of a model without adapter, and the other files of the base model that it came from.

    What is stored beside the text part, such as a vision tower, is copied from the base model's files, bit for bit.

    Args:
        model: what is saved.
        base: its tokenizer, chat template, processors and generation config are copied as they are.
        folder: where to; loads with transformers alone.
        state: the weights, if the model itself holds only a part of them.
        changed: names of weights beside the text part that are others than the base model's.

    Raises:
        NonFiniteError: a weight is NaN or infinite; nothing was written.
    """
    weights = model.named_parameters() if state is None else state.items()
    require_finite_weights(weights, "saving the model", hint="lower --lr, or try --dtype float32")
    if has_other_parts(model):
        whole = model.state_dict() if state is None else state
        own = {name for name, belongs in is_of_text(model, whole).items() if belongs or name in changed}
        _save_with_other_parts(model, base, folder, whole, own)
    else:
        _save_weights(model, folder, state)
    copy_tokenizer(base.folder, folder)
    for name in (GENERATION_CONFIG_NAME, *PROCESSOR_FILES):
        if (base.folder / name).is_file():
            shutil.copyfile(base.folder / name, folder / name)


def cast_weights(model: Any, dtype: torch.dtype) -> Any:
    """Cast a model to a precision, in place, and return it; `model.to` would make complex numbers real (Llama 4)."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return model


def _save_weights(model: Any, folder: Path, state: dict[str, Any] | None) -> None:
    with quiet_transformers():
        model.save_pretrained(folder, state_dict=state)


def _save_with_other_parts(
    model: Any, base: ModelFiles, folder: Path, state: dict[str, Any], own: Collection[str]
) -> None:
    """Write the weights of a model that are its own, and beside them all that the base model's files hold more.

    transformers writes tensors under the names that the base model's files have, so that those which are not written
    are those of the other parts, or of heads that it does not know (Qwen3.5's `mtp`).
    """
    _save_weights(model, folder, {name: tensor for name, tensor in state.items() if name in own})
    stored, written = set(stored_tensors(base.weights)), set(stored_tensors(weight_files(folder)))
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    if all(_is_one_of(name, {*ties, *ties.values()}) for name in written - stored):
        # Of tied weights one is written, and the other as it is stored would be an old one.
        _add_tensors(base.weights, {name for name in stored - written if not _is_one_of(name, ties)}, folder)
    else:
        # Where the text part has other names than in the base model's files, the rest cannot be told from it.
        for path in (*weight_files(folder), folder / WEIGHTS_INDEX):
            path.unlink(missing_ok=True)
        _save_weights(model, folder, state)


def _is_one_of(name: str, others: Collection[str]) -> bool:
    """Say whether a weight has the name of one of the others, whatever modules they lie in."""
    return name.split(".")[-2:] in [other.split(".")[-2:] for other in others]


def _add_tensors(sources: Sequence[Path], names: Collection[str], folder: Path) -> None:
    """Copy these tensors of weight files into files of their own beside those of a folder, and index them all."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    parts = [*weight_files(folder)]
    for source in sources:
        with safe_open(str(source), framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys() if name in names}  # noqa: SIM118
        if tensors:
            parts.append(folder / f"added-{len(parts)}.safetensors")
            save_file(tensors, parts[-1], metadata={"format": "pt"})
    if len(parts) == len(weight_files(folder)):
        return
    (folder / WEIGHTS_INDEX).unlink(missing_ok=True)
    shards = [folder / f"model-{number:05}-of-{len(parts):05}.safetensors" for number in range(1, len(parts) + 1)]
    for part, shard in zip(parts, shards, strict=True):
        part.rename(shard)
    index = {
        "metadata": {"total_size": sum(map(tensor_bytes, shards))},
        "weight_map": {name: shard.name for shard in shards for name in stored_tensors([shard])},
    }
    (folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def add_ends_of_turns(folder: Path, tokens: Sequence[int]) -> None:
    """Add to the generation config of a saved model the ids of the tokens with which its chat template ends a turn."""
    path = folder / GENERATION_CONFIG_NAME
    settings = json.loads(path.read_bytes()) if path.is_file() else {}
    if (known := settings.get("eos_token_id")) is None:
        known = json.loads((folder / "config.json").read_bytes()).get("eos_token_id")
    ends = known if isinstance(known, list) else [known] if known is not None else []
    if set(tokens) - set(ends):
        settings["eos_token_id"] = list(dict.fromkeys([*ends, *tokens]))
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the files of a tokenizer, its chat template among them, as they are."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
