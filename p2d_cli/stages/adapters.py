"""Opening an adapter as an input: p2d's own, checked against its base model, or any other PEFT folder."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from p2d_cli.artifacts.adapter import ADAPTER_RANK
from p2d_cli.artifacts.digests import digest_files, digest_json
from p2d_cli.artifacts.manifest import InputEntry, is_artifact
from p2d_cli.artifacts.store import recover
from p2d_cli.config import EvalConfig
from p2d_cli.data.chat_templates import find_chat_template
from p2d_cli.engine.stage_run import StageRun
from p2d_cli.errors import ArtifactError
from p2d_cli.modeling.model_files import find_pickled, locate_model, vocabulary_in

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
APPLIED_TYPES = (
    *("ADALORA", "ADAMSS", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD", "GLORA", "GRALORA", "HIRA"),
    *("HRA", "IA3", "LILY", "LN_TUNING", "LOHA", "LOKR", "LORA", "MISS", "OFT", "OSF", "PEANUT", "PSOFT", "PVERA"),
    *("RANDLORA", "ROAD", "SHIRA", "SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS", "UNILORA", "VBLORA", "VERA"),
    "WAVEFT",
)
"""Adapters of PEFT that change a model's modules and nothing else, so that whoever calls these has the adapter too.

The others change what the model is given (virtual tokens), need to know the task of each row, or read each row twice.
"""
_NOT_IN_MODULES = {
    "alora_invocation_tokens": "which comes into force behind certain tokens only",
    "arrow_config": "which chooses among adapters token by token",
    "layer_replication": "which repeats layers of the model",
}
"""What a LoRA may ask for beyond changed modules."""


def open_adapter(job: StageRun[Any], spec: str) -> Path:
    """Register an adapter as an input of the running stage, and return its folder.

    Raises:
        ArtifactError: not an adapter, damaged, made for another model, or, in an evaluation, trained with tokens which
            the model's tokenizer would cut into others.
    """
    folder = Path(spec).expanduser()
    recover(folder)
    if is_artifact(folder):
        manifest = job.inputs.artifact("adapter", spec, "adapter", same_model=True)
        if not (folder / ADAPTER_FILES[0]).is_file():
            raise ArtifactError(
                f"{spec} is a whole model (trained with --scope attention or full), not an adapter",
                hint="give it as --model, without --adapter",
            )
        refuse_unusable(folder)
        # The first adapters that p2d wrote are known by the digests that they had then.
        if ADAPTER_RANK in manifest.summary:
            # Its config says for other tools where its base model lies, which is no part of what it is.
            config = json.loads((folder / ADAPTER_FILES[0]).read_bytes())
            said = {name: file.sha256 for name, file in manifest.outputs.items() if file.content}
            said[ADAPTER_FILES[0]] = digest_json(config | {"base_model_name_or_path": None})
            entry = job.inputs.entries["adapter"]
            job.inputs.entries["adapter"] = entry.model_copy(update={"digest": digest_json(said)})
        return folder
    missing = [name for name in ADAPTER_FILES if not (folder / name).is_file()]
    if missing and (pickled := find_pickled(folder)):
        raise ArtifactError(
            f"{spec} has its weights in {pickled}, a pickle file, which p2d does not load: it could run code",
            hint="convert it to adapter_model.safetensors where you trust it: load it with PEFT, and save_pretrained",
        )
    if missing:
        raise ArtifactError(
            f"expected an adapter at {spec}, found no {missing[0]} there",
            hint="give a folder that p2d train or PEFT's save_pretrained wrote",
        )
    refuse_unusable(folder)
    if isinstance(job.config, EvalConfig):
        model = locate_model(job.inputs.entries["model"].source)
        if (token := has_new_tokens(folder, model.folder)) is not None:
            raise ArtifactError(
                f"{spec} brings a tokenizer with tokens that the model's own lacks, such as {token!r}, and rows are"
                " read with the model's",
                hint="export the adapter, and evaluate the exported model, which has the adapter's tokenizer",
            )
    template = find_chat_template(folder)
    digest = digest_files([*(folder / name for name in ADAPTER_FILES), *([] if template is None else [template])])
    job.inputs.entries["adapter"] = InputEntry(kind="adapter", digest=digest, source=spec)
    return folder


def has_new_tokens(adapter: Path, model: Path) -> str | None:
    """Return a token of the tokenizer in an adapter's folder that the model's own has not, or has as another.

    Tokens that a folder names beside its tokenizer.json, transformers adds to it as it loads it, and saves in it.
    """
    brought, known = vocabulary_in(adapter), vocabulary_in(model)
    if brought is None or known is None:
        return None
    changed = [token for token, index in brought.items() if known.get(token) != index]
    named = _tokens_beside(model) if changed else set()
    return next((token for token in changed if token in known or token not in named), None)


def _tokens_beside(folder: Path) -> set[str]:
    """Return all texts in the files beside a tokenizer.json, among them the tokens that are added to it."""
    found: set[str] = set()
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        with suppress(OSError, ValueError, RecursionError):
            left = [json.loads((folder / name).read_bytes())]
            while left:
                part = left.pop()
                if isinstance(part, str):
                    found.add(part)
                elif isinstance(part, list | dict):
                    left.extend([*part, *part.values()] if isinstance(part, dict) else part)
    return found


def refuse_unusable(folder: Path) -> None:
    """Refuse an adapter that p2d could not apply, from its config alone.

    Raises:
        ArtifactError: its config is not a JSON object; it makes PEFT import a module; its weights are not in modules.
    """
    path = folder / ADAPTER_FILES[0]
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as problem:
        raise ArtifactError(f"{path} is not valid JSON: {problem}", hint="copy or download it again") from None
    if not isinstance(config, dict):
        raise ArtifactError(f"{path} is not an adapter's config: it holds no JSON object")
    if config.get("megatron_config"):
        raise ArtifactError(
            f"{path} asks for code from the module {config.get('megatron_core')!r} (megatron_config), which p2d does "
            "not run",
            hint="remove megatron_config from it: p2d reads plain adapters",
        )
    kind = config.get("peft_type")
    if kind not in APPLIED_TYPES:
        raise ArtifactError(
            f"{path} is of peft_type {kind!r}, which p2d does not apply: expected an adapter with weights in the "
            "model's modules, such as LORA",
            hint="run it with PEFT itself; p2d trains, evaluates and exports LoRA",
        )
    if found := next((key for key in _NOT_IN_MODULES if config.get(key)), None):
        raise ArtifactError(
            f"{path} asks for {found}, {_NOT_IN_MODULES[found]}: p2d does not apply it", hint="run it with PEFT itself"
        )
