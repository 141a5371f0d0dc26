"""Where a model's files are: a local folder, or a hub id resolved to its local snapshot. Imports no torch."""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from p2d_cli.errors import DataError, UnavailableError, first_line
from p2d_cli.hub import why_unreachable

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
WEIGHTS_INDEX = "model.safetensors.index.json"
_LENGTH_BYTES = 8
_PLAIN_NAME = re.compile(r"[^/\\\x00]+\.safetensors")
_GGUF_MAGIC = b"GGUF"
_GGUF_HINT = (
    "give the model's folder in the format of transformers, with weights in safetensors, which the GGUF was made from;"
    " on the hub it often has the same name without -GGUF"
)
_VOCABULARIES = ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken", "tekken.json")
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
_PRECISIONS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""By the names that safetensors has for them."""
_SNAPSHOT_PATTERNS = ["*.json", "*.model", "*.txt", "*.jinja"]


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
    def name(self) -> str:
        """The folder, or the hub id without its revision."""
        return self.spec if self.revision is None else self.spec.partition("@")[0]

    @property
    def name_elsewhere(self) -> str:
        """The hub id without its revision, or the folder's absolute path, which means the same in any other folder."""
        return self.name if self.revision is not None else str(self.folder.resolve())

    @property
    def asked_revision(self) -> str | None:
        """The revision of a hub id, as it was asked for."""
        return None if self.revision is None else self.spec.partition("@")[2] or None

    @property
    def config_path(self) -> Path:
        """Path of `config.json`."""
        return self.folder / "config.json"

    @property
    def model_type(self) -> str:
        """The architecture's name in transformers, as `llama`."""
        return str(self.config.get("model_type", "unknown"))

    @property
    def hidden_size(self) -> int:
        """Width of the text part's hidden states; 0 if the config does not say."""
        text = self.config.get("text_config", self.config)
        sizes = (text.get(name) for name in ("hidden_size", "n_embd", "d_model"))
        return int(next((size for size in sizes if isinstance(size, int)), 0))


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a weight file."""

    path: Path
    shape: tuple[int, ...]
    dtype: str
    """As safetensors names it, such as `BF16`."""
    start: int
    num_bytes: int

    def read(self) -> bytes:
        """Return its bytes."""
        with self.path.open("rb") as stream:
            stream.seek(self.start)
            return stream.read(self.num_bytes)


def stored_tensors(paths: Sequence[Path]) -> dict[str, StoredTensor]:
    """Return each stored tensor, by name, from the headers of weight files alone.

    Raises:
        DataError: a file is damaged.
    """
    stored: dict[str, StoredTensor] = {}
    for path in paths:
        try:
            with path.open("rb") as stream:
                length = _header_bytes(stream)
                header = json.loads(stream.read(length))
            for name, entry in header.items():
                if name != "__metadata__":
                    start, end = entry["data_offsets"]
                    shape = tuple(entry["shape"])
                    at = _LENGTH_BYTES + length + start
                    stored[name] = StoredTensor(path, shape, entry["dtype"], at, end - start)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError) as problem:
            raise DataError(
                f"{path} is not a readable safetensors file: {problem!r}", hint="copy or download it again"
            ) from None
    return stored


def stored_precision(files: ModelFiles) -> str:
    """Return the precision of a checkpoint as its config says, else that of most weights that are not quantised.

    Raises:
        DataError: a weight file is damaged.
    """
    parts = (files.config, files.config.get("text_config", {}))
    if told := next((found for part in parts if (found := part.get("dtype") or part.get("torch_dtype"))), None):
        return str(told)
    counts: Counter[str] = Counter()
    for tensor in stored_tensors(files.weights).values():
        counts[_PRECISIONS.get(tensor.dtype, "")] += tensor.num_bytes
    del counts[""]
    return counts.most_common(1)[0][0] if counts else "float32"


def tensor_bytes(path: Path) -> int:
    """Return the bytes of all tensors in a weight file."""
    with path.open("rb") as stream:
        return path.stat().st_size - _LENGTH_BYTES - _header_bytes(stream)


def _header_bytes(stream: BinaryIO) -> int:
    """Read the length of a safetensors header, which comes first."""
    return int.from_bytes(stream.read(_LENGTH_BYTES), "little")


def vocabulary(files: ModelFiles) -> dict[str, int] | None:
    """Return `vocabulary_in` a model's folder."""
    return vocabulary_in(files.folder)


def vocabulary_in(folder: Path) -> dict[str, int] | None:
    """Return the id of each token of the fast tokenizer in a folder, added ones included; None without tokenizer.json.

    Raises:
        DataError: the file is not what the tokenizers library writes.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        described = json.loads(path.read_bytes())
        listed = described["model"]["vocab"]
        # A Unigram model lists pairs of token and score, in the order of their ids.
        known = listed if isinstance(listed, dict) else {token: index for index, (token, _) in enumerate(listed)}
        return known | {token["content"]: token["id"] for token in described.get("added_tokens", ())}
    except (ValueError, KeyError, TypeError) as problem:
        raise DataError(f"{path} is not a valid tokenizer: {problem!r}", hint="copy or download it again") from None


def require_tokenizer(files: ModelFiles) -> None:
    """Refuse a folder without a tokenizer's vocabulary, or with one that a package is missing for.

    transformers makes an empty tokenizer of a folder that has only a `tokenizer_config.json`: it would turn every text
    into nothing.

    Raises:
        DataError: there is no vocabulary.
        UnavailableError: sentencepiece, protobuf or tiktoken is not installed, and it takes that to read the file.
    """
    found = [path for pattern in _VOCABULARIES for path in sorted(files.folder.glob(pattern))]
    if not found:
        raise DataError(
            f"{files.spec} has no tokenizer: there is no tokenizer.json, tokenizer.model or vocab.json",
            hint="the model folder needs tokenizer.json and tokenizer_config.json beside the weights",
        )
    if found[0].suffix not in {".model", ".tiktoken"}:
        return
    with found[0].open("rb") as stream:
        is_tiktoken = _TIKTOKEN_LINE.fullmatch(stream.readline(200)) is not None
    modules = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
    needed = {"tiktoken": "tiktoken"} if is_tiktoken else modules
    if missing := [package for package, module in needed.items() if not _is_installed(module)]:
        raise UnavailableError(
            f"{files.spec} has its tokenizer in {found[0].name}, without a tokenizer.json; reading it takes"
            f" {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed",
            hint=f"pip install {' '.join(missing)}",
        )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it lies in is missing too
        return False


def locate_model(spec: str, *, with_weights: bool = True) -> ModelFiles:
    """Find a model by its folder or hub id, `owner/name[@revision]`, which is taken from the cache or downloaded.

    Without weights, they may be missing, and are not downloaded.

    Raises:
        UnavailableError: neither a folder nor a snapshot that can be had.
        DataError: the folder is not a model, or its weights are not in safetensors.
    """
    path = Path(spec).expanduser()
    if path.is_dir():
        return _describe(spec, path, revision=None, with_weights=with_weights)
    if path.exists():
        _refuse_gguf(spec, path)
        raise DataError(
            f"expected a model folder at {spec}, found a file", hint="give the folder that holds config.json"
        )
    if not _HUB_ID.fullmatch(spec) or spec.startswith((".", "/", "~")):
        raise UnavailableError(
            f"no model at {spec}: there is no such folder, and it is not a hub id",
            hint="give a folder, or owner/name[@revision]",
        )
    folder = _snapshot(spec, with_weights=with_weights)
    return _describe(spec, folder, revision=folder.name, with_weights=with_weights)


def _snapshot(spec: str, *, with_weights: bool) -> Path:
    from huggingface_hub import constants, errors, snapshot_download

    name, _, revision = spec.partition("@")
    # The base of all errors of the hub's HTTP client, which was httpx at first and is httpx2 now.
    client_error: type[Exception] = getattr(errors, "HTTPError", OSError)
    unreachable = None if constants.HF_HUB_OFFLINE else why_unreachable(constants.ENDPOINT)
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision or None,
                allow_patterns=[*_SNAPSHOT_PATTERNS, *(["*.safetensors"] if with_weights else [])],
                # Offline, older clients look for a commit on the hub all the same, unless they are told not to.
                local_files_only=unreachable is not None or constants.HF_HUB_OFFLINE,
            )
        )
    except errors.RepositoryNotFoundError:
        raise UnavailableError(
            f"the hub has no model {spec}, or it is private", hint="check the name, or set HF_TOKEN"
        ) from None
    except (OSError, ValueError, client_error) as problem:
        reason = unreachable or first_line(problem)
        raise UnavailableError(
            f"model {spec} is neither a folder here nor in the local hub cache, and the hub was not reached: {reason}",
            hint="check the path, or download it where there is a network: hf download " + name,
        ) from None


def _describe(spec: str, folder: Path, *, revision: str | None, with_weights: bool) -> ModelFiles:
    config_path = folder / "config.json"
    if not config_path.is_file():
        _refuse_gguf(spec, *sorted(folder.glob("*.gguf")))
        hint = _GGUF_HINT if "gguf" in spec.lower() else "give the folder that holds config.json"
        if (folder / "adapter_config.json").is_file():
            hint = "this is an adapter: give its base model, and this folder as --adapter"
        raise DataError(f"{spec} is not a model folder: it has no config.json", hint=hint)
    if (folder / "adapter_config.json").is_file():
        # transformers would load the base model that the adapter names in place of the weights that lie here.
        raise DataError(
            f"{spec} holds both a model and an adapter (config.json and adapter_config.json)",
            hint="keep them in two folders: the model for --model, the adapter for --adapter",
        )
    try:
        config = json.loads(config_path.read_bytes())
    except (ValueError, RecursionError) as problem:
        raise DataError(f"{config_path} is not valid JSON: {problem}") from None
    if not isinstance(config, dict):
        raise DataError(f"{config_path} is not a model config: it holds no JSON object")
    if not isinstance(config.get("text_config", {}), dict):
        raise DataError(f"{config_path} is not a model config: its text_config is not a JSON object")
    try:
        weights = weight_files(folder, spec)
    except DataError:
        if with_weights:
            raise
        weights = ()
    return ModelFiles(
        spec=spec,
        folder=folder,
        revision=revision,
        weights=weights,
        tokenizer=tuple(folder / name for name in TOKENIZER_FILES if (folder / name).is_file()),
        config=config,
    )


def _refuse_gguf(spec: str, *paths: Path) -> None:
    """Say so where one of these files is a GGUF."""
    for path in filter(Path.is_file, paths):
        with path.open("rb") as stream:
            is_gguf = path.suffix.lower() == ".gguf" or stream.read(len(_GGUF_MAGIC)) == _GGUF_MAGIC
        if is_gguf:
            what = spec if path.name in spec else f"{spec} holds {path.name}, which"
            raise DataError(
                f"{what} is a GGUF file, the format of llama.cpp: p2d reads and trains weights in safetensors",
                hint=_GGUF_HINT,
            )


def find_pickled(folder: Path) -> str | None:
    """Return the name of a file with pickled weights in `folder`, if there is one."""
    patterns = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
    return next((path.name for pattern in patterns for path in sorted(folder.glob(pattern))), None)


def weight_files(folder: Path, spec: str | None = None) -> tuple[Path, ...]:
    """Return the files of a folder that hold its weights, in the order of their names.

    Raises:
        DataError: there are none in safetensors, or not all that the index names; `spec` is what messages call it.
    """
    spec = spec or str(folder)
    # Where both are there, transformers loads the single file too.
    if (single := folder / "model.safetensors").is_file():
        return (single,)
    if (index := folder / WEIGHTS_INDEX).is_file():
        return _shards(index, spec)
    _refuse_gguf(spec, *sorted(folder.glob("*.gguf")))
    if (pickled := find_pickled(folder)) is not None:
        raise DataError(
            f"{spec} has its weights in {pickled}, a pickle file, which p2d does not load: it could run code",
            hint="convert it to safetensors: load it with transformers where you trust it, and save_pretrained",
        )
    raise DataError(f"{spec} has no model.safetensors", hint="give a folder with weights in safetensors")


def _shards(index: Path, spec: str) -> tuple[Path, ...]:
    """Return the files that an index names, which must lie beside it."""
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        raise DataError(f"{index} is not a valid index: {problem}") from None
    for name in names:
        if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
            raise DataError(
                f"{index} names {name!r} as a weight file, and expected is a safetensors file beside it",
                hint="copy or download the model again",
            )
        if not (index.parent / name).is_file():
            raise DataError(f"{spec} is incomplete: {name} is missing", hint="copy or download it again")
    return tuple(index.parent / name for name in names)
