"""export: merge an adapter into its base model, and write a plain Hugging Face model folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from p2d_cli.artifacts.adapter import CHAT_TEMPLATE_NAME
from p2d_cli.artifacts.manifest import is_artifact
from p2d_cli.artifacts.store import recover
from p2d_cli.config import ExportConfig, Resolved
from p2d_cli.errors import ArtifactError, UsageError
from p2d_cli.modeling.model_files import ModelFiles
from p2d_cli.modeling.suitability import require_suitable
from p2d_cli.stages.adapters import open_adapter
from p2d_cli.stages.execution import Outcome, RunOptions, StageResult, StageRun


def run(resolved: Resolved[ExportConfig], options: RunOptions | None = None) -> StageResult:
    """Write the merged model, with tokenizer, chat template and generation config.

    Raises:
        P2DError: as its message says; see `p2d_cli.errors` for the exit codes.
    """
    job = StageRun("export", resolved, options or RunOptions())
    config = job.config
    adapter = Path(config.adapter).expanduser()
    recover(adapter)
    if (adapter / "config.json").is_file():
        raise UsageError(
            f"{config.adapter} is already a plain model folder (trained with --scope attention or full)",
            hint="use it as it is",
        )
    base = job.inputs.model(config.model or _base_of(adapter))
    open_adapter(job, config.adapter)
    if "adapter" in job.inputs.manifests and (shown := job.inputs.manifests["adapter"].summary.get("template")):
        job.facts["template"] = shown
    return job.complete(
        lambda folder: _compute(job, base, adapter, folder), alone=True, check=lambda: require_suitable(base)
    )


def _base_of(adapter: Path) -> str:
    path = adapter / "adapter_config.json"
    if not path.is_file():
        found = "an artifact of another kind" if is_artifact(adapter) else "no adapter_config.json"
        raise ArtifactError(
            f"expected an adapter at {adapter}, found {found}", hint="give a folder that p2d train wrote"
        )
    try:
        config = json.loads(path.read_bytes())
        base, revision = config["base_model_name_or_path"], config.get("revision")
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise ArtifactError(f"{path} names no base model: {problem!r:.80}", hint="give --model") from None
    if not isinstance(base, str) or not base:
        raise ArtifactError(f"{path} names no base model", hint="give --model")
    return f"{base}@{revision}" if isinstance(revision, str) and revision else base


def _compute(job: StageRun[ExportConfig], base: ModelFiles, adapter: Path, folder: Path) -> Outcome:
    import torch

    from p2d_cli.modeling.head_adapter import load_adapter, merge
    from p2d_cli.modeling.loading import load_model, resolve_device, resolve_dtype
    from p2d_cli.modeling.saving import save_plain_model

    config = job.config
    with job.timer.phase("load"):
        device = str(resolve_device(config.device))
        job.use_device(device)
        stored = str(base.config.get("dtype") or base.config.get("torch_dtype") or "float32")
        dtype = resolve_dtype(stored if config.dtype == "auto" else config.dtype, device)
        # Merged in float32 and rounded once: in bfloat16 the sum would lose most of a small change.
        model = load_adapter(load_model(base.folder, dtype=torch.float32, device=device), adapter)
    with job.timer.phase("merge"):
        model = merge(model).to(dtype)
    with job.saving():
        save_plain_model(model, base.folder, folder)
        if (adapter / CHAT_TEMPLATE_NAME).is_file():
            shutil.copyfile(adapter / CHAT_TEMPLATE_NAME, folder / CHAT_TEMPLATE_NAME)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    precision = str(dtype).removeprefix("torch.")
    return Outcome(
        summary={"base": base.spec, "parameters": parameters, "dtype": precision},
        settings={},
        precision=precision,
        device=device,
        charged=False,
    )
