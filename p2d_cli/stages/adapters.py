"""Opening an adapter as an input: p2d's own, checked against its base model, or any other PEFT folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from p2d_cli.artifacts.digests import digest_files
from p2d_cli.artifacts.manifest import InputEntry, is_artifact
from p2d_cli.artifacts.store import recover
from p2d_cli.data.chat_templates import find_chat_template
from p2d_cli.errors import ArtifactError
from p2d_cli.modeling.model_files import find_pickled
from p2d_cli.stages.execution import StageRun

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def open_adapter(job: StageRun[Any], spec: str) -> Path:
    """Register an adapter as an input of the running stage, and return its folder.

    Raises:
        ArtifactError: not an adapter, damaged, or made for another model.
    """
    folder = Path(spec).expanduser()
    recover(folder)
    if is_artifact(folder):
        job.inputs.artifact("adapter", spec, "adapter", same_model=True)
        if not (folder / ADAPTER_FILES[0]).is_file():
            raise ArtifactError(
                f"{spec} is a whole model (trained with --scope attention or full), not an adapter",
                hint="give it as --model, without --adapter",
            )
        refuse_imports(folder)
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
    refuse_imports(folder)
    template = find_chat_template(folder)
    digest = digest_files([*(folder / name for name in ADAPTER_FILES), *([] if template is None else [template])])
    job.inputs.entries["adapter"] = InputEntry(kind="adapter", digest=digest, source=spec)
    return folder


def refuse_imports(folder: Path) -> None:
    """Refuse an adapter whose config makes PEFT import a module that the config names.

    Raises:
        ArtifactError: it does, or is not a JSON object.
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
