"""Opening an adapter as an input: p2d's own, checked against its base model, or any other PEFT folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from p2d_cli.artifacts.digests import digest_files
from p2d_cli.artifacts.manifest import InputEntry, is_artifact
from p2d_cli.artifacts.store import recover
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
        job.artifact("adapter", spec, "adapter", same_model=True)
        if not (folder / ADAPTER_FILES[0]).is_file():
            raise ArtifactError(
                f"{spec} is a whole model (trained with --scope attention or full), not an adapter",
                hint="give it as --model, without --adapter",
            )
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
    digest = digest_files([folder / name for name in ADAPTER_FILES])
    job.inputs["adapter"] = InputEntry(kind="adapter", digest=digest, source=spec)
    return folder
