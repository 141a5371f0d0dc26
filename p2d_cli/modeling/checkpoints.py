"""Weights of a checkpoint one tensor at a time, so that comparing two models needs neither of them in memory."""

from __future__ import annotations

import json
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from p2d_cli.core.head_importance import LayerWeights
from p2d_cli.core.head_layout import ModelLayout
from p2d_cli.errors import ArtifactError, ModelError, UnavailableError, first_line
from p2d_cli.modeling.attention_kernels import refusal, require_taken
from p2d_cli.modeling.layouts import layer_weights
from p2d_cli.modeling.loading import (
    UNFIT_VALUES,
    attention_kernel,
    quiet_transformers,
    read_config,
    require_finite_weights,
    require_model_class,
)
from p2d_cli.modeling.model_files import ModelFiles, locate_model

_TEXT_MODELS = frozenset({"model", "language_model", "text_model"})


class CheckpointReader:
    """Reads single tensors of a safetensors checkpoint, whole or in shards, by parameter name.

    Some checkpoints were saved from the bare decoder (`h.0.attn...`), others with a head (`transformer.h.0.attn...`);
    a name is found in spite of a prefix that is missing or too much. In models of text and images the text model has
    several (`model.language_model.layers...`, stored as `language_model.model.layers...` or `model.layers...`).

    Raises:
        UnavailableError, DataError: see `locate_model`.
        ArtifactError: a weight file is damaged.
    """

    def __init__(self, path: Path | str) -> None:
        files = locate_model(str(path))
        self.spec = files.spec
        self._file_of: dict[str, Path] = {}
        for file in files.weights:
            with _open(file) as stored:
                self._file_of |= dict.fromkeys(stored.keys(), file)

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor to the CPU in its stored dtype.

        Raises:
            ArtifactError: the checkpoint has no such tensor, or cannot be read.
            NonFiniteError: it holds NaN or infinity.
        """
        stored = self._stored_name(name)
        try:
            with _open(self._file_of[stored]) as file:
                tensor: torch.Tensor = file.get_tensor(stored)
        except SafetensorError as problem:
            raise ArtifactError(f"reading {stored} of {self.spec} failed: {problem}") from problem
        require_finite_weights([(stored, tensor)], f"reading {self.spec}", hint="copy or download it again")
        return tensor

    def _stored_name(self, name: str) -> str:
        for candidate in (name, name.partition(".")[2]):
            if candidate in self._file_of:
                return candidate
        longer = [stored for stored in self._file_of if stored.endswith(f".{name}")]
        longer = longer or [stored for stored in self._file_of if _inside(stored) == _inside(name)]
        if len(longer) == 1:
            return longer[0]
        raise ArtifactError(
            f"{self.spec} has no tensor {name}" if not longer else f"{self.spec} has several {name}: {longer}",
            hint="the checkpoint must be of the same architecture as the base model",
        )


def _inside(name: str) -> str:
    """Return a tensor's name without the modules that hold a text model; other parts are called otherwise."""
    return ".".join(part for part in name.split(".") if part not in _TEXT_MODELS)


def _open(file: Path) -> Any:
    """Open a safetensors file for a moment: while it is open, every page that was read counts as this process's own."""
    try:
        return safe_open(str(file), framework="pt")
    except (SafetensorError, OSError) as problem:
        raise ArtifactError(
            f"{file} is not a readable safetensors file: {problem}", hint="copy or download it again"
        ) from problem


def skeleton(model: Path | str | ModelFiles) -> Any:
    """Build a model, given by folder, hub id or files, on the meta device from its config alone, without weights.

    Raises:
        UnavailableError, DataError, ModelError: see `locate_model` and `read_config`.
        ModelError: transformers cannot build what the config describes.
    """
    files = model if isinstance(model, ModelFiles) else locate_model(str(model))
    return _built(files.spec, files.folder, files.config_path.read_bytes())


@lru_cache(maxsize=2)
def _built(spec: str, folder: Path, config_json: bytes) -> Any:
    """Build a skeleton once for all that look at it, which leave it as it is."""
    described = ModelFiles(spec, folder, revision=None, weights=(), tokenizer=(), config=json.loads(config_json))
    config = read_config(described)
    found = require_model_class(config)
    try:
        with quiet_transformers(), torch.device("meta"):
            return found.auto.from_config(config, attn_implementation=attention_kernel(config, found.built))
    except ImportError as missing:
        raise UnavailableError(f"{described.spec} cannot be built: {first_line(missing)}") from missing
    except UNFIT_VALUES as problem:
        raise ModelError(
            f"transformers cannot build the model that {described.config_path} describes: {problem!r:.200}",
            hint="check config.json, or update transformers",
        ) from problem


def require_attention(files: ModelFiles, asked: str) -> None:
    """Refuse an attention implementation that transformers does not give to a model, without reading its weights.

    Raises:
        UnavailableError: telling why, or what transformers would take in its place.
        DataError, ModelError: see `skeleton`.
    """
    skeleton(files)  # says first what is wrong with the model itself
    config = read_config(files)
    try:
        with quiet_transformers(), torch.device("meta"):
            model = require_model_class(config).auto.from_config(config, attn_implementation=asked)
    except (ImportError, *UNFIT_VALUES) as problem:
        raise refusal(asked, files.model_type, problem) from problem
    require_taken(model, asked)


def read_layer_weights(checkpoint: CheckpointReader, layout: ModelLayout, layer: int) -> LayerWeights:
    """Read the q, k and v weights of one layer, cut into heads; see `layer_weights`.

    Raises:
        ArtifactError: the checkpoint lacks them, or is of another shape than the layout.
    """
    try:
        # A fused projection is asked for three times.
        return layer_weights(layout, layer, cache(checkpoint.tensor))
    except (RuntimeError, IndexError) as problem:
        raise ArtifactError(
            f"the attention of layer {layer} in {checkpoint.spec} has another shape than the base model's: {problem}",
            hint="compare a model with a fine-tuned copy of itself",
        ) from problem
