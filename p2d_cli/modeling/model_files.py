"""Where a model's files are: a local folder, or a hub id resolved to its local snapshot. Imports no torch."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from p2d_cli.errors import DataError, UnavailableError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_SNAPSHOT_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True)
class ModelFiles:
    """The files of one model folder."""

    spec: str
    folder: Path
    revision: str | None
    """Commit of a hub snapshot."""
    weights: tuple[Path, ...]
    tokenizer: tuple[Path, ...]
    config: dict[str, Any]

    @property
    def config_path(self) -> Path:
        """Path of `config.json`."""
        return self.folder / "config.json"

    @property
    def model_type(self) -> str:
        """The architecture's name in transformers, as `llama`."""
        return str(self.config.get("model_type", "unknown"))


def locate_model(spec: str) -> ModelFiles:
    """Find a model's folder; a hub id is taken from the cache or downloaded.

    Args:
        spec: a folder, or `owner/name[@revision]`.

    Raises:
        UnavailableError: neither a folder nor a snapshot that can be had.
        DataError: the folder is not a model, or its weights are not in safetensors.
    """
    path = Path(spec).expanduser()
    if path.is_dir():
        return _describe(spec, path, revision=None)
    if path.exists():
        raise DataError(
            f"expected a model folder at {spec}, found a file", hint="give the folder that holds config.json"
        )
    if not _HUB_ID.fullmatch(spec) or spec.startswith((".", "/", "~")):
        raise UnavailableError(
            f"no model at {spec}: there is no such folder, and it is not a hub id",
            hint="give a folder, or owner/name[@revision]",
        )
    folder = _snapshot(spec)
    return _describe(spec, folder, revision=folder.name)


def _snapshot(spec: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    name, _, revision = spec.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=_SNAPSHOT_PATTERNS))
    except RepositoryNotFoundError:
        raise UnavailableError(
            f"the hub has no model {spec}, or it is private", hint="check the name, or set HF_TOKEN"
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as problem:
        reason = str(problem).split("\n", 1)[0]
        raise UnavailableError(
            f"model {spec} is neither a folder here nor in the local hub cache, and the hub was not reached: {reason}",
            hint="check the path, or download it where there is a network: hf download " + name,
        ) from None


def _describe(spec: str, folder: Path, *, revision: str | None) -> ModelFiles:
    config_path = folder / "config.json"
    if not config_path.is_file():
        hint = "give the folder that holds config.json"
        if (folder / "adapter_config.json").is_file():
            hint = "this is an adapter: give its base model, and this folder as --adapter"
        raise DataError(f"{spec} is not a model folder: it has no config.json", hint=hint)
    try:
        config = json.loads(config_path.read_bytes())
    except (ValueError, RecursionError) as problem:
        raise DataError(f"{config_path} is not valid JSON: {problem}") from None
    if not isinstance(config, dict):
        raise DataError(f"{config_path} is not the config of a model: it holds no JSON object")
    return ModelFiles(
        spec=spec,
        folder=folder,
        revision=revision,
        weights=_weight_files(folder, spec),
        tokenizer=tuple(folder / name for name in TOKENIZER_FILES if (folder / name).is_file()),
        config=config,
    )


def _weight_files(folder: Path, spec: str) -> tuple[Path, ...]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as problem:
            raise DataError(f"{index} is not a valid index: {problem}") from None
        if wrong := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
            raise DataError(f"{index} is not a valid index: {wrong[0]!r:.80} is no file name")
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise DataError(f"{spec} is incomplete: {missing[0]} is missing", hint="copy or download it again")
        return tuple(folder / name for name in names)
    if (single := folder / "model.safetensors").is_file():
        return (single,)
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickled:
        raise DataError(
            f"{spec} has its weights in {pickled[0]}, a pickle file, which p2d does not load: it could run code",
            hint="convert it to safetensors: load it with transformers where you trust it, and save_pretrained",
        )
    raise DataError(f"{spec} has no model.safetensors", hint="give a folder with weights in safetensors")
