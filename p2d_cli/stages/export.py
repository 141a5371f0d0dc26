"""export: merge an adapter into its base model, and write a plain Hugging Face model folder."""

from __future__ import annotations

import json
from pathlib import Path

from p2d_cli.artifacts.adapter import CHAT_TEMPLATE_NAME, save_merged_card
from p2d_cli.artifacts.cards import CARD_NAME
from p2d_cli.artifacts.manifest import is_artifact
from p2d_cli.artifacts.store import recover
from p2d_cli.config import ExportConfig, Resolved
from p2d_cli.data.chat_templates import find_chat_template, read_chat_template, resolve_template
from p2d_cli.engine.stage_run import Outcome, RunOptions, StageResult, StageRun
from p2d_cli.errors import ArtifactError, DataError, UnavailableError, UsageError
from p2d_cli.modeling.model_files import ModelFiles, stored_precision
from p2d_cli.modeling.suitability import Needs, require
from p2d_cli.stages.adapters import ADAPTER_FILES, has_new_tokens, open_adapter, refuse_unusable

NEEDS = Needs(plain="p2d export")


def run(resolved: Resolved[ExportConfig], options: RunOptions | None = None) -> StageResult:
    """Write the merged model, with tokenizer, chat template and generation config."""
    job = StageRun("export", resolved, options or RunOptions())
    config = job.config
    adapter = Path(config.adapter).expanduser()
    recover(adapter)
    if (adapter / "config.json").is_file():
        raise UsageError(
            f"{config.adapter} is already a plain model folder (trained with --scope attention or full)",
            hint="use it as it is",
        )
    if (adapter / ADAPTER_FILES[0]).is_file():
        # What p2d does not apply at all is refused as that, before its base model is looked for.
        refuse_unusable(adapter)
    base = _open_base(job, adapter)
    open_adapter(job, config.adapter)
    if "adapter" in job.inputs.manifests and (shown := job.inputs.manifests["adapter"].summary.get("template")):
        job.facts["template"] = shown
    return job.complete(
        lambda folder: _compute(job, base, adapter, folder),
        alone=True,
        check=lambda: require(base, NEEDS),
    )


def _open_base(job: StageRun[ExportConfig], adapter: Path) -> ModelFiles:
    """Register the base model: that of `--model`, else the one that the adapter's config names."""
    if job.config.model is not None:
        return job.inputs.model(job.config.model)
    named = _base_of(adapter)
    try:
        return job.inputs.model(named)
    except (DataError, UnavailableError) as problem:
        raise type(problem)(
            f"the base model that {adapter} names cannot be opened: {problem.message}",
            hint="give --model, the folder or hub id of the model that the adapter was trained on",
        ) from None


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

    from p2d_cli.modeling.head_adapter import load_adapter
    from p2d_cli.modeling.loading import auto_model_name, load_model, resolve_device, resolve_dtype
    from p2d_cli.modeling.memory import release_memory
    from p2d_cli.modeling.merging import answer, merge, probe_tokens, require_same_answers, round_weights
    from p2d_cli.modeling.saving import cast_weights, copy_tokenizer, save_plain_model
    from p2d_cli.modeling.text_part import digest_other_parts

    config = job.config
    with job.timer.phase("load"):
        device = str(resolve_device(config.device))
        job.use_device(device)
        dtype = resolve_dtype(stored_precision(base) if config.dtype == "auto" else config.dtype, device)
        # Merged in float32 and rounded once: in bfloat16 the sum would lose most of a small change.
        model = load_model(base.folder, dtype=torch.float32, device=device)
        others = digest_other_parts(model)
        model = load_adapter(model, adapter)
    with job.timer.phase("merge"):
        ids_1n = probe_tokens(model)
        expected_nV = answer(model, ids_1n)
        model = merge(model)
        require_same_answers(answer(model, ids_1n), expected_nV, "merging the adapter")
        changed = {name for name, digest in digest_other_parts(model).items() if others.get(name) != digest}
        round_weights(model, dtype)
        expected_nV = answer(model, ids_1n)
        model = cast_weights(model, dtype)
    with job.saving():
        save_plain_model(model, base, folder, changed=changed)
        if has_new_tokens(adapter, base.folder) is not None:
            copy_tokenizer(adapter, folder)
        _hand_on_template(job, adapter, folder)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    precision = str(dtype).removeprefix("torch.")
    with job.timer.phase("check"):
        del model
        release_memory(cycles=True)
        # As whoever uses it will load it: what a config does not say is lost only there.
        written = load_model(folder, dtype=torch.float32, device=device)
        require_same_answers(answer(written, ids_1n), expected_nV, "writing the merged model")
    figures = {"Parameters": f"{parameters:,}", "Precision": precision}
    save_merged_card(
        folder, base.name_elsewhere, base.asked_revision, config.adapter, figures, auto_model_name(written)
    )
    return Outcome(
        summary={"base": base.spec, "parameters": parameters, "dtype": precision},
        settings={},
        precision=precision,
        device=device,
        charged=False,
        extras=frozenset({CARD_NAME}),
    )


def _hand_on_template(job: StageRun[ExportConfig], adapter: Path, folder: Path) -> None:
    """Write the chat template that the adapter brings, and let generation stop at the end of its turns."""
    from p2d_cli.modeling.loading import load_tokenizer
    from p2d_cli.modeling.saving import add_ends_of_turns

    carried = find_chat_template(adapter)
    if carried is not None:
        (folder / CHAT_TEMPLATE_NAME).write_text(read_chat_template(carried), encoding="utf-8")
    trained = job.facts.get("template", {})
    is_plain = trained.get("name") == "plain"
    tokenizer = load_tokenizer(folder)
    template = resolve_template(tokenizer, "plain" if is_plain else "auto", chat_file=None if is_plain else carried)
    ends = list(trained.get("ends") or template.ends(tokenizer))
    add_ends_of_turns(folder, tokenizer.convert_tokens_to_ids(ends))
