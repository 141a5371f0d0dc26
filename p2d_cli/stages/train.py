"""train: those heads, on those rows, nothing else."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from p2d_cli.artifacts.adapter import (
    ADAPTER_RANK,
    CHAT_TEMPLATE_NAME,
    TRAINING_LOG_NAME,
    save_model_card,
    save_training_log,
)
from p2d_cli.artifacts.cards import CARD_NAME
from p2d_cli.config import Resolved, Scope, TrainConfig
from p2d_cli.core.geometry import SelectedHeads
from p2d_cli.data.raw_rows import RowSource
from p2d_cli.engine import caveats
from p2d_cli.engine.cost import StagePlan
from p2d_cli.engine.counting import CountingReader
from p2d_cli.engine.reader import ModelReader, Reader
from p2d_cli.engine.stage_run import Outcome, RunOptions, StageResult, StageRun
from p2d_cli.engine.training_costs import TrainingCosts
from p2d_cli.engine.training_defaults import ANCHOR_WIDTH
from p2d_cli.engine.tuning import TokenizedRows, Tuning, is_sharded
from p2d_cli.errors import UnavailableError, UsageError
from p2d_cli.modeling.model_files import ModelFiles
from p2d_cli.modeling.suitability import Needs, read_placed_rows, require
from p2d_cli.runtime import distributed

if TYPE_CHECKING:
    import torch

    from p2d_cli.modeling.head_adapter import TrainableShare
    from p2d_cli.modeling.training import TrainingPlan, TrainingRecord

PICTURE_NAME = "loss.png"


@dataclass(frozen=True)
class _Inputs:
    model: ModelFiles
    data: RowSource
    eval_data: RowSource | None
    heads: SelectedHeads | None
    """The selected heads (scope heads only)."""


def run(resolved: Resolved[TrainConfig], options: RunOptions | None = None) -> StageResult:
    """Fine-tune and write an adapter artifact: a PEFT folder, or a whole model for scopes attention and full."""
    job = StageRun("train", resolved, options or RunOptions())
    config = job.config
    _require_usable_launch(config)
    for tracker in config.tracker:
        if importlib.util.find_spec(tracker) is None:
            raise UnavailableError(f"--tracker {tracker}: it is not installed", hint=f"pip install {tracker}")
    job.shown = "conversation" if config.loss_on == "all" else "example"
    model = job.inputs.model(config.model)
    if config.lr in (None, "probe") and model.hidden_size > ANCHOR_WIDTH:
        job.rules["lr_rule"] = "width"  # version 0.1.0 had one rate for all widths
    heads = None
    if config.resolved_scope == "heads" and config.heads is not None:
        heads = job.inputs.heads(config.heads, model)
    inputs = _Inputs(
        model=model,
        data=job.inputs.rows("data", config.data),
        eval_data=job.inputs.rows("eval_data", config.eval_data) if config.eval_data is not None else None,
        heads=heads,
    )
    return job.complete(
        lambda folder: _compute(job, inputs, folder),
        lambda unfinished: _plan(job, inputs, unfinished),
        check=lambda: _check(model, config, heads),
    )


def _check(model: ModelFiles, config: TrainConfig, heads: SelectedHeads | None) -> int:
    """Refuse a model whose heads, channels or other parts cannot be trained; return its number of embeddings."""
    embeddings = require(model, _needs(config))
    if heads is not None and config.channels:
        read_placed_rows(model, heads.selected_LH, config.projections, config.channels)
    return embeddings


def _needs(config: TrainConfig) -> Needs:
    scope, quantise = config.resolved_scope, config.base_quantization != "none"
    return needs_of(scope, quantise=quantise, attention=config.resolved_lora_targets != ("all-linear",))


def needs_of(scope: Scope, *, quantise: bool = False, attention: bool = False) -> Needs:
    """Return what a scope asks of a model; `quantise` as for `--base-quantization`, `attention` of a LoRA for it."""
    return Needs(
        tokenizer=True,
        logits=True,
        heads=scope == "heads",
        parts=scope == "attention" or (scope == "lora" and attention),
        linear=scope == "lora" and not attention,
        plain="" if scope in {"heads", "lora"} else f"--scope {scope}",
        quantise=quantise,
    )


def _require_usable_launch(config: TrainConfig) -> None:
    """Refuse what a launcher asks for that this training cannot be."""
    size = distributed.world_size()
    if config.batch_size != "auto" and config.batch_size % (config.accumulation * size):
        raise UsageError(
            f"--batch-size {config.batch_size} cannot be shared evenly: it has to be a multiple of --accumulation times"
            f" processes, {config.accumulation} x {size} = {config.accumulation * size}",
            hint="change --batch-size or --accumulation, or start another number of processes",
        )
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        raise UsageError("p2d trains with DDP or FSDP2, not with DeepSpeed", hint="use an FSDP2 config of accelerate")
    if is_sharded() and os.environ.get("FSDP_VERSION", "1") != "2":
        raise UsageError("p2d shards models with FSDP2 only", hint="set fsdp_version: 2 in the config of accelerate")
    if is_sharded() and os.environ.get("FSDP_STATE_DICT_TYPE", "") != "FULL_STATE_DICT":
        # From sharded checkpoints transformers 5.24 puts other weights back into a partly frozen model.
        raise UsageError(
            "p2d writes whole checkpoints of a sharded model",
            hint="set fsdp_state_dict_type: FULL_STATE_DICT in the config of accelerate",
        )


def _plan(job: StageRun[TrainConfig], inputs: _Inputs, unfinished: Path | None) -> StagePlan:
    reader = CountingReader(job, inputs.model, unfinished)
    rows = TokenizedRows.read(reader, reader.sample("data", inputs.data))
    looked_at = reader.sample("eval_data", inputs.eval_data)
    held_out = TokenizedRows.read(reader, looked_at) if inputs.eval_data is not None else None
    tuning = Tuning(job, inputs.model, inputs.heads)
    TrainingCosts(tuning).count(reader, rows, held_out)
    reader.notes += _caveats(job, tuning, rows, held_out if reader.is_exact else None)
    return reader.plan()


def _caveats(
    job: StageRun[TrainConfig], tuning: Tuning, rows: TokenizedRows, held_out: TokenizedRows | None
) -> list[str]:
    """Say what about settings and rows is hardly meant so."""
    config = job.config
    found = caveats.of_unused(config, job.resolved.aimed)
    found += caveats.of_processes(tuning.batch_size(len(rows.sizes)), config.accumulation, distributed.world_size())
    if config.resolved_scope == "lora":
        found += caveats.of_rank(config.lora_rank, TrainingCosts(tuning).adapted().values())
    if held_out is not None:
        found += caveats.of_held_out(rows.examples, held_out.examples)
    return found


def _compute(job: StageRun[TrainConfig], inputs: _Inputs, folder: Path) -> Outcome:
    from p2d_cli.modeling.head_adapter import saved_rank, trainable_share

    config, scope = job.config, job.config.resolved_scope
    tuning, reader = Tuning(job, inputs.model, inputs.heads), ModelReader(job, inputs.model)
    with job.timer.phase("load"):
        device, dtype = tuning.device, tuning.dtype
    rows, eval_rows, ends = _tokenize(job, inputs, reader)
    with job.timer.phase("prepare"):
        learnt, looked_at = rows.to_training(), eval_rows.to_training() if eval_rows is not None else []
    model, plan, record = tuning.train(learnt, looked_at, reader.tokenizer.pad_token_id)
    share = trainable_share(model)
    if is_sharded():
        # Where accelerate finds no accelerators it shards nothing.
        job.facts["sharded"] = record.full_state is not None
    summary = _summary(config, plan, record, share) | {
        "rows": len(learnt),
        "rows_truncated": rows.truncated,
        "eval_rows": len(looked_at),
        "heads_trained": inputs.heads.count if inputs.heads is not None and config.projections else None,
        "channels": config.channels if scope == "heads" else None,
    }
    if tuning.probe is not None:
        summary["lr_probe"] = tuning.probe.to_dict()["losses"]
    if config.makes_adapter:
        summary[ADAPTER_RANK] = saved_rank(model)
    if job.is_main:
        with job.saving():
            _save(job.config, reader, model, dtype, folder, state=record.full_state, ends=ends)
            _describe(job, inputs, model, record.log, summary, folder)
    return Outcome(
        summary=summary,
        settings={
            "scope": scope,
            "trainable_share": share.share,
            "learning_rate": plan.learning_rate,
            "seed": config.seed,
            **_selection(job, inputs, len(learnt)),
        },
        precision=str(dtype).removeprefix("torch."),
        device=device,
        tokens=record.tokens + (tuning.probe.tokens if tuning.probe is not None else 0),
        tokens_planned=record.tokens_planned,
        epochs=config.epochs,
        steps_done=record.steps_done,
        steps_planned=_steps_meant(config, record),
        extras=frozenset({PICTURE_NAME, CARD_NAME, TRAINING_LOG_NAME}),
        warnings=[
            *tuning.warnings,
            *_caveats(job, tuning, rows, eval_rows),
            *caveats.of_plan(_updates_to_learn_from(config, record), plan.learning_rate, tuning.default_rate),
            *caveats.of_losses(record.log, record.untrained_eval_loss, record.best_eval_loss),
        ],
    )


def _tokenize(
    job: StageRun[TrainConfig], inputs: _Inputs, reader: Reader
) -> tuple[TokenizedRows, TokenizedRows | None, tuple[str, ...]]:
    """Return the rows to learn, those to look at, and the tokens that end the template's turns."""
    with job.timer.phase("prepare"):
        records = job.inputs.read(inputs.data).records
        held_out = job.inputs.read(inputs.eval_data).records if inputs.eval_data is not None else ()
    rows = TokenizedRows.read(reader, records)
    eval_rows = TokenizedRows.read(reader, held_out) if held_out else None
    for note in (*rows.notes, *(eval_rows.notes if eval_rows is not None else ())):
        job.progress.note(note)
    with job.timer.phase("prepare"):
        ends = reader.template.ends(reader.tokenizer, records)
    if len(ends) > 1:
        job.facts["template"]["ends"] = list(ends)
    return rows, eval_rows, ends


def _updates_to_learn_from(config: TrainConfig, record: TrainingRecord) -> int:
    """Return the updates to learn from; a whole model may be cut short as a reference, for its cost alone."""
    most = config.max_steps if config.makes_adapter else None
    return min(record.steps_planned, most or record.steps_planned)


def _steps_meant(config: TrainConfig, record: TrainingRecord) -> int:
    """Return the updates of a whole training: one that --patience ended is whole, one that --max-steps ended is not."""
    last = min(record.steps_planned, config.max_steps or record.steps_planned)
    return record.steps_planned if record.steps_done == last else record.steps_done


def _summary(config: TrainConfig, plan: TrainingPlan, record: TrainingRecord, share: TrainableShare) -> dict[str, Any]:
    return {
        "scope": config.resolved_scope,
        "learning_rate": plan.learning_rate,
        "updates": record.steps_done,
        "updates_planned": record.steps_planned,
        "micro_batch": plan.micro_batch,
        "batch_size": plan.batch_size,
        "micro_batch_asked": plan.batch_size // config.accumulation,
        "packing": plan.packing,
        "first_loss": next(entry["loss"] for entry in record.log if "loss" in entry),
        "final_loss": record.final_loss,
        "best_update": record.best_step,
        "best_eval_loss": record.best_eval_loss,
        "untrained_eval_loss": record.untrained_eval_loss,
        "frozen_layers": record.frozen_layers,
        "frozen_kept": None if record.kept is None else record.kept.place,
        "frozen_kept_bytes": 0 if record.kept is None else record.kept.bytes,
        "trained_parameters": share.trained,
        "total_parameters": share.total,
        "trainable_share": share.share,
    }


def _selection(job: StageRun[TrainConfig], inputs: _Inputs, rows: int) -> dict[str, Any]:
    """Say which heads, channels and rows were trained, for the report."""
    heads, subset = job.inputs.manifests.get("heads"), job.inputs.manifests.get("data")
    trains_heads = bool(job.config.projections)
    return {
        "heads_method": heads.summary["method"] if heads and trains_heads else None,
        "head_share": inputs.heads.share if inputs.heads is not None and trains_heads else None,
        **({"channels": job.config.channels} if inputs.heads is not None and job.config.channels else {}),
        "data_method": subset.summary["method"] if subset else None,
        "row_share": subset.summary["rows_selected"] / subset.summary["rows_total"] if subset else 1.0,
        **({"rows_asked": subset.summary["rows_asked"]} if subset and "rows_asked" in subset.summary else {}),
        "rows": rows,
    }


def _save(
    config: TrainConfig,
    reader: Reader,
    model: Any,
    dtype: torch.dtype,
    folder: Path,
    *,
    state: dict[str, torch.Tensor] | None,
    ends: tuple[str, ...],
) -> None:
    """Write the PEFT folder, or the whole model with the base model's tokenizer, and how it was prompted.

    The weights are those of `state` if the model itself holds only a part of them.
    """
    from p2d_cli.modeling.saving import add_ends_of_turns, cast_weights, copy_tokenizer, save_plain_model

    base = reader.files
    if config.makes_adapter:
        from p2d_cli.modeling.head_adapter import save_adapter

        save_adapter(model, folder, base.name_elsewhere, state, revision=base.asked_revision)
        copy_tokenizer(base.folder, folder)
    else:
        save_plain_model(cast_weights(model, dtype) if state is None else model, base, folder, state)
        add_ends_of_turns(folder, reader.tokenizer.convert_tokens_to_ids(list(ends)))
    if config.chat_template is not None or config.chat_template_kwargs:  # it is not the model's own
        (folder / CHAT_TEMPLATE_NAME).write_text(reader.template.chat_template or "", encoding="utf-8")


def _describe(
    job: StageRun[TrainConfig],
    inputs: _Inputs,
    model: Any,
    log: list[dict[str, float]],
    summary: dict[str, Any],
    folder: Path,
) -> None:
    """Write the log, the model card and the curve of the loss."""
    from p2d_cli.modeling.loading import auto_model_name

    save_training_log(folder, log)
    save_model_card(
        folder,
        inputs.model.name_elsewhere,
        inputs.model.asked_revision,
        scope=job.config.resolved_scope,
        figures=_card_figures(summary),
        rank=summary.get(ADAPTER_RANK),
        auto_model=auto_model_name(model),
    )
    _draw(job, log, folder)


def _card_figures(summary: dict[str, Any]) -> dict[str, Any]:
    return {
        "Rows": summary["rows"],
        "Updates": summary["updates"],
        "Peak learning rate": summary["learning_rate"],
        "Final loss": f"{summary['final_loss']:.4f}",
        **_held_out_figures(summary),
        "Trained parameters": f"{summary['trained_parameters']:,} ({summary['trainable_share']:.3%})",
    }


def _held_out_figures(summary: dict[str, Any]) -> dict[str, Any]:
    if summary["best_eval_loss"] is None:
        return {}
    untrained, best = summary["untrained_eval_loss"], f"{summary['best_eval_loss']:.4f}"
    before = "" if untrained is None else f"{untrained:.4f} untrained, "
    return {"Held-out loss": f"{before}{best} after update {summary['best_update']}, whose weights these are"}


def _draw(job: StageRun[TrainConfig], log: list[dict[str, float]], folder: Path) -> None:
    from p2d_cli.reporting.plots import loss_curve

    steps, losses = zip(*((entry["step"], entry["loss"]) for entry in log if "loss" in entry), strict=True)
    looks = [(entry["step"], entry["eval_loss"]) for entry in log if "eval_loss" in entry]
    with job.drawing(PICTURE_NAME):
        loss_curve(steps, losses, folder / PICTURE_NAME, held_out=looks)
