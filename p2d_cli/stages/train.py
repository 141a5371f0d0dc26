"""train: those heads, on those rows, nothing else."""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from p2d_cli.artifacts.adapter import (
    ADAPTER_RANK,
    CHAT_TEMPLATE_NAME,
    TRAINING_LOG_NAME,
    save_model_card,
    save_training_log,
)
from p2d_cli.artifacts.cards import CARD_NAME
from p2d_cli.artifacts.checkpoints import Checkpoint, discard_newer, newest_checkpoint, seal_checkpoint
from p2d_cli.artifacts.head_scores import load_head_scores
from p2d_cli.config import Resolved, Scope, TrainConfig
from p2d_cli.core.cost import StagePlan
from p2d_cli.data.raw_rows import RowSource
from p2d_cli.data.records import Record
from p2d_cli.errors import (
    DataError,
    MemoryExhaustedError,
    StoppedEarlyError,
    UnavailableError,
    UsageError,
    first_line,
    is_out_of_memory,
)
from p2d_cli.modeling.model_files import ModelFiles
from p2d_cli.runtime import distributed, signals
from p2d_cli.runtime.seeding import derive_seed, seed_everything
from p2d_cli.stages.execution import Outcome, RunOptions, StageResult, StageRun
from p2d_cli.stages.model_checks import check_training

if TYPE_CHECKING:
    import torch

    from p2d_cli.data.prompts import PromptTemplate
    from p2d_cli.modeling.head_adapter import TrainableShare
    from p2d_cli.modeling.training import TrainingPlan, TrainingRecord, TrainingRow

DEFAULT_LEARNING_RATE: dict[Scope, float] = {"heads": 3e-3, "attention": 1e-3, "lora": 3e-3, "full": 3e-4}
"""The best of a sweep on SmolLM2-135M (`tests/benchmarks/scopes.py`); not tried on larger models. Heads: a tenth."""
HIGHEST_DEFAULT_RATE = 1e-2
TIMED_UPDATES = 4
PICTURE_NAME = "loss.png"
TRAIN_WITH_LESS = "lower --max-length, give --checkpointing, train less with --scope heads, or take a larger device"


@dataclass(frozen=True)
class _Inputs:
    model: ModelFiles
    data: RowSource
    eval_data: RowSource | None
    heads_LH: NDArray[np.bool_] | None
    """The selected heads (scope heads only)."""


def run(resolved: Resolved[TrainConfig], options: RunOptions | None = None) -> StageResult:
    """Fine-tune and write an adapter artifact: a PEFT folder, or a whole model for scopes attention and full.

    Raises:
        P2DError: as its message says; see `p2d_cli.errors` for the exit codes.
    """
    job = StageRun("train", resolved, options or RunOptions())
    config = job.config
    _require_usable_launch(config)
    for tracker in config.tracker:
        if importlib.util.find_spec(tracker) is None:
            raise UnavailableError(f"--tracker {tracker}: it is not installed", hint=f"pip install {tracker}")
    model = job.inputs.model(config.model)
    heads_LH = None
    if config.resolved_scope == "heads" and config.heads is not None:
        job.inputs.artifact("heads", config.heads, "heads", same_model=True)
        heads_LH = load_head_scores(Path(config.heads).expanduser()).selected_LH
    inputs = _Inputs(
        model=model,
        data=job.inputs.rows("data", config.data),
        eval_data=job.inputs.rows("eval_data", config.eval_data) if config.eval_data is not None else None,
        heads_LH=heads_LH,
    )
    return job.complete(
        lambda folder: _compute(job, inputs, folder),
        lambda unfinished: _plan_ahead(job, inputs, unfinished),
        check=lambda: check_training(config, model),
    )


def _plan_ahead(job: StageRun[TrainConfig], inputs: _Inputs, unfinished: Path) -> StagePlan:
    from p2d_cli.stages.plan_tuning import plan_train
    from p2d_cli.stages.planned_rows import read_sample

    held_out = read_sample(job, inputs.eval_data) if inputs.eval_data is not None else None
    return plan_train(job, inputs.model, read_sample(job, inputs.data), held_out, inputs.heads_LH, unfinished)


def _require_usable_launch(config: TrainConfig) -> None:
    """Refuse what a launcher asks for that this training cannot be."""
    size = distributed.world_size()
    if size > 1 and config.batch_size % (config.accumulation * size):
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


def is_sharded() -> bool:
    """Say whether `accelerate launch` was told to shard the model over the ranks."""
    return distributed.world_size() > 1 and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def _compute(job: StageRun[TrainConfig], inputs: _Inputs, folder: Path) -> Outcome:
    from p2d_cli.modeling.head_adapter import saved_rank, trainable_share
    from p2d_cli.stages.showing import open_prompts

    config, scope = job.config, job.config.resolved_scope
    with job.timer.phase("prepare"):
        records = job.inputs.read(inputs.data).records
        held_out = job.inputs.read(inputs.eval_data).records if inputs.eval_data is not None else ()
    device, dtype, tokenizer = _open(job, inputs.model)
    with job.timer.phase("prepare"):
        _, template = open_prompts(job, inputs.model, config)
        rows, truncated = _encode(job, inputs, template, tokenizer, records)
        ends = template.ends(tokenizer, records)
        eval_rows, _ = _encode(job, inputs, template, tokenizer, held_out) if held_out else ([], 0)
    if len(ends) > 1:
        job.facts["template"]["ends"] = list(ends)
    precision = str(dtype).removeprefix("torch.")
    lesson = _Lesson(rows, eval_rows, tokenizer.pad_token_id)
    model, plan, record = _train_within_memory(
        job, inputs, lesson, _plan(config, inputs.heads_LH, precision, device), dtype
    )
    share = trainable_share(model)
    if is_sharded():
        # Where accelerate finds no accelerators it shards nothing.
        job.facts["sharded"] = record.full_state is not None
    summary = _summary(config, plan, record, share) | {
        "rows": len(rows),
        "rows_truncated": truncated,
        "eval_rows": len(eval_rows),
        "heads_trained": None if inputs.heads_LH is None else int(inputs.heads_LH.sum()),
    }
    if scope in {"heads", "lora"}:
        summary[ADAPTER_RANK] = saved_rank(model)
    if job.is_main:
        with job.saving():
            _save(model, dtype, inputs.model, config, folder, record.full_state)
            _save_prompts(config, template, tokenizer, ends, folder)
            save_training_log(folder, record.log)
            _save_card(inputs.model, summary, folder)
            _draw(job, record.log, folder)
    settings = {
        "scope": scope,
        "trainable_share": share.share,
        "learning_rate": plan.learning_rate,
        "seed": config.seed,
    }
    return Outcome(
        summary=summary,
        settings=settings | _selection(job, inputs, len(rows)),
        precision=precision,
        device=device,
        tokens=record.tokens,
        tokens_planned=record.tokens_planned,
        epochs=config.epochs,
        steps_done=record.steps_done,
        steps_planned=_steps_meant(config, record),
        decoration=frozenset({PICTURE_NAME, CARD_NAME, TRAINING_LOG_NAME}),
    )


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
        "micro_batch_asked": config.batch_size // config.accumulation,
        "first_loss": record.log[0]["loss"],
        "final_loss": record.final_loss,
        "best_update": record.best_step,
        "best_eval_loss": record.best_eval_loss,
        "trained_parameters": share.trained,
        "total_parameters": share.total,
        "trainable_share": share.share,
    }


def _open(job: StageRun[TrainConfig], files: ModelFiles) -> tuple[str, torch.dtype, Any]:
    """Return device, precision and tokenizer."""
    from p2d_cli.modeling.loading import resolve_device, resolve_dtype
    from p2d_cli.stages.showing import open_prompts

    with job.timer.phase("load"):
        device = str(resolve_device(distributed.own_device(job.config.device)))
        job.use_device(device)
        dtype = resolve_dtype(job.config.dtype, device)
        tokenizer, _ = open_prompts(job, files, job.config)
    return device, dtype, tokenizer


def _build(
    job: StageRun[TrainConfig],
    files: ModelFiles,
    heads_LH: NDArray[np.bool_] | None,
    dtype: torch.dtype,
    device: str,
) -> Any:
    """Load the model and prepare it for training; each time from the same random numbers."""
    from p2d_cli.modeling.loading import load_model

    with job.timer.phase("load"):
        seed_everything(derive_seed(job.config.seed, "train"))
        four_bit = job.config.base_quantization == "4bit"
        # A model that is to be sharded may not fit where it goes as a whole.
        place = "cpu" if is_sharded() else device
        model = load_model(files.folder, dtype=dtype, device=place, four_bit=four_bit)
    with job.timer.phase("prepare"):
        return _make_trainable(model, job.config, heads_LH)


def default_learning_rate(scope: Scope, heads_LH: NDArray[np.bool_] | None) -> float:
    """Return the peak learning rate of a training that names none.

    The more heads move together, the less each may move: their rate is the power of their share that leads from that of
    a tenth to that of all attention, to two digits, and at most the highest that was tried.

    Args:
        scope: what is trained.
        heads_LH: which heads, bool [L, H]; None where they do not matter.
    """
    rate = DEFAULT_LEARNING_RATE[scope]
    if scope != "heads" or heads_LH is None:
        return rate
    of_all = DEFAULT_LEARNING_RATE["attention"]
    scaled = of_all * float(heads_LH.mean()) ** math.log10(of_all / rate)
    return float(f"{min(scaled, HIGHEST_DEFAULT_RATE):.2g}")


def _plan(config: TrainConfig, heads_LH: NDArray[np.bool_] | None, precision: str, device: str) -> TrainingPlan:
    from p2d_cli.modeling.training import TrainingPlan

    return TrainingPlan(
        epochs=config.epochs,
        max_steps=config.max_steps,
        learning_rate=config.lr or default_learning_rate(config.resolved_scope, heads_LH),
        batch_size=config.batch_size,
        accumulation=config.accumulation,
        schedule=config.schedule,
        warmup_ratio=config.warmup_ratio,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        autocast=precision,
        device=device,
        seed=derive_seed(config.seed, "train"),
        checkpointing=config.checkpointing,
        trackers=config.tracker,
        eval_steps=config.eval_steps,
        patience=config.patience,
        checkpoint_minutes=config.checkpoint_minutes,
        packing=config.packing,
    )


@dataclass(frozen=True)
class _Lesson:
    """Tokenized rows."""

    rows: list[TrainingRow]
    eval_rows: list[TrainingRow]
    pad_id: int


def _train_within_memory(
    job: StageRun[TrainConfig], inputs: _Inputs, lesson: _Lesson, plan: TrainingPlan, dtype: torch.dtype
) -> tuple[Any, TrainingPlan, TrainingRecord]:
    """Train with the largest micro-batch that fits into memory, none larger than `plan` says.

    A training that runs out of memory is begun anew with a smaller one, from the weights that it began with: it ends
    with the very numbers that it would have had with the smaller one in the first place.
    """
    from p2d_cli.modeling.memory import release_memory

    plan = _as_far_as_known(job, plan)
    while True:
        model = _build(job, inputs.model, inputs.heads_LH, dtype, plan.device)
        try:
            return model, plan, _train(job, model, lesson, plan)
        except StoppedEarlyError as stopped:
            # All ranks stop here; saying it once is enough.
            distributed.raise_together(stopped)
            raise
        except Exception as problem:
            if not is_out_of_memory(problem):
                raise
            found = first_line(problem)
        del model
        release_memory(cycles=True)
        plan = _smaller(job, plan, found)


def _as_far_as_known(job: StageRun[TrainConfig], plan: TrainingPlan) -> TrainingPlan:
    """Begin with the micro-batch that an interrupted run had come down to; several processes keep to what was asked."""
    if distributed.world_size() > 1:
        return plan
    tried = [int(folder.name.rpartition("-")[2]) for folder in job.scratch("checkpoints").glob("micro-batch-*")]
    smallest = min([plan.micro_batch, *tried])
    return replace(plan, accumulation=plan.batch_size // smallest)


def _smaller(job: StageRun[TrainConfig], plan: TrainingPlan, found: str) -> TrainingPlan:
    """Return the plan with half the micro-batch, or the next smaller one that divides the batch.

    Raises:
        MemoryExhaustedError: it is a single row already, or other processes would go on with theirs.
    """
    if distributed.world_size() > 1:
        raise MemoryExhaustedError(
            f"training: out of memory with micro-batches of {plan.micro_batch} rows: {found}",
            hint=f"--accumulation {2 * plan.accumulation}, or {TRAIN_WITH_LESS}",
        )
    if plan.micro_batch == 1:
        raise MemoryExhaustedError(f"training: out of memory with a single row: {found}", hint=TRAIN_WITH_LESS)
    sizes = range(1, plan.micro_batch // 2 + 1)
    size = max(size for size in sizes if plan.batch_size % size == 0)
    job.progress.note(
        f"out of memory with micro-batches of {plan.micro_batch} rows: beginning anew with {size}, "
        f"{plan.batch_size // size} of them an update"
    )
    shutil.rmtree(_checkpoints(job, plan))
    return replace(plan, accumulation=plan.batch_size // size)


def _checkpoints(job: StageRun[TrainConfig], plan: TrainingPlan) -> Path:
    return job.scratch(f"checkpoints/micro-batch-{plan.micro_batch}")


def _train(job: StageRun[TrainConfig], model: Any, lesson: _Lesson, plan: TrainingPlan) -> TrainingRecord:
    """Train, from the newest checkpoint of an interrupted run if there is one, charging what that run spent."""
    from p2d_cli.modeling.head_adapter import freeze_placing
    from p2d_cli.modeling.training import Ranks, ResumePoint, TrainingHooks, planned_updates, train

    scratch = _checkpoints(job, plan)
    earlier = distributed.from_main(lambda: _earlier(job, scratch))
    job.timer.charge("train", earlier.progress["seconds"] if earlier else 0.0)
    spent, started = job.timer.seconds["train"], time.perf_counter()
    updates = min(planned_updates(len(lesson.rows), plan), plan.max_steps or sys.maxsize)
    found = earlier.updates if earlier else 0
    with (
        job.timer.phase("train"),
        job.progress.task(f"train ({job.config.resolved_scope})", updates, found=found) as advance,
        # An update is worth finishing; behind the last one there is nothing left but to write the result.
        signals.deferred(),
    ):

        def seal(folder: Path, tokens: int) -> None:
            seconds = spent + time.perf_counter() - started
            if job.is_main:
                seal_checkpoint(folder, {"seconds": seconds, "tokens": tokens, "work": job.key})

        record = train(
            model,
            lesson.rows,
            plan,
            pad_id=lesson.pad_id,
            scratch=scratch,
            eval_rows=lesson.eval_rows,
            ranks=Ranks(
                distributed.rank(),
                distributed.world_size(),
                exchange=distributed.exchange,
                raise_together=distributed.raise_together,
            ),
            resume=ResumePoint(earlier.folder, earlier.progress["tokens"]) if earlier else None,
            hooks=TrainingHooks(
                on_step=advance,
                on_checkpoint=seal,
                should_stop=lambda: any(distributed.exchange(signals.stop_requested())),
                after_loading=freeze_placing if job.config.resolved_scope == "heads" else lambda _: None,
            ),
        )
        job.see_through()
        return record


def _earlier(job: StageRun[TrainConfig], scratch: Path) -> Checkpoint | None:
    checkpoint, problems = newest_checkpoint(scratch, work=job.key)
    for problem in problems:
        job.progress.note(f"not going on from {problem}")
    if checkpoint is not None:
        job.progress.note(f"going on from {checkpoint.folder.name} of the interrupted run")
    discard_newer(scratch, checkpoint)
    return checkpoint


def _selection(job: StageRun[TrainConfig], inputs: _Inputs, rows: int) -> dict[str, Any]:
    """Say which heads and rows were trained, for the report."""
    heads, subset = job.inputs.manifests.get("heads"), job.inputs.manifests.get("data")
    return {
        "heads_method": heads.summary["method"] if heads else None,
        "head_share": None if inputs.heads_LH is None else float(inputs.heads_LH.mean()),
        "data_method": subset.summary["method"] if subset else None,
        "row_share": subset.summary["rows_selected"] / subset.summary["rows_total"] if subset else 1.0,
        "rows": rows,
    }


def _encode(
    job: StageRun[TrainConfig], inputs: _Inputs, template: PromptTemplate, tokenizer: Any, records: Sequence[Record]
) -> tuple[list[TrainingRow], int]:
    """Tokenize the rows; refuse if truncation left nothing to learn from."""
    from p2d_cli.data.prompts import encoding_notes
    from p2d_cli.modeling.gradients import IGNORED_LABEL
    from p2d_cli.modeling.token_ids import KnownIds
    from p2d_cli.modeling.training import TrainingRow
    from p2d_cli.stages.templates import context_length

    config = job.config
    max_length = context_length(config.max_length, inputs.model.config)
    examples = [template.encode_example(tokenizer, record, max_length, loss_on=config.loss_on) for record in records]
    if job.num_embeddings is not None:
        known_ids = KnownIds(tokenizer, job.num_embeddings)
        known_ids.require_all((row.where, ids.input_ids) for row, ids in zip(records, examples, strict=True))
    rows = [
        TrainingRow(record.where, example.input_ids, tuple(example.labels(IGNORED_LABEL)))
        for record, example in zip(records, examples, strict=True)
        if len(example.input_ids) > example.answer_start
    ]
    if not rows:
        raise DataError(
            f"--max-length {max_length} cuts off the completions of all {len(records)} rows: nothing to learn from",
            hint="raise --max-length",
        )
    for note in encoding_notes(examples, max_length):
        job.progress.note(note)
    return rows, sum(example.truncated > 0 for example in examples)


def time_update(
    job: StageRun[TrainConfig],
    files: ModelFiles,
    heads_LH: NDArray[np.bool_] | None,
    *,
    rows: int,
    length: int,
    labels: int,
) -> tuple[float, float]:
    """Return the seconds until the first update and of each update, from a few on made-up rows; nothing is kept.

    Args:
        job: a training that is planned.
        files: its model.
        heads_LH: the heads that it trains (scope heads only).
        rows: of a micro-batch.
        length: tokens of each row.
        labels: tokens of a micro-batch that are learnt.
    """
    from p2d_cli.modeling.gradients import IGNORED_LABEL
    from p2d_cli.modeling.training import TrainingHooks, TrainingRow, train

    device, dtype, tokenizer = _open(job, files)
    model = _build(job, files, heads_LH, dtype, device)
    learnt = max(1, min(length - 1, round(labels / rows)))
    ids = tuple(5 + place % 50 for place in range(length))
    row = TrainingRow("made up", ids, (IGNORED_LABEL,) * (length - learnt) + ids[length - learnt :])
    ends: list[float] = []
    settings = _plan(job.config, heads_LH, str(dtype).removeprefix("torch."), device)
    plan = replace(
        settings,
        batch_size=rows * settings.accumulation,
        epochs=1.0,
        max_steps=TIMED_UPDATES,
        trackers=(),
        eval_steps=None,
        patience=None,
        checkpoint_minutes=math.inf,
    )
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        train(
            model,
            [row] * (plan.batch_size * TIMED_UPDATES),
            plan,
            pad_id=tokenizer.pad_token_id,
            scratch=Path(scratch),
            hooks=TrainingHooks(on_step=lambda _: ends.append(time.perf_counter())),
        )
    update = (ends[-1] - ends[0]) / (len(ends) - 1)
    return max(ends[0] - started - update, 0.0), update


def _make_trainable(model: Any, config: TrainConfig, heads_LH: NDArray[np.bool_] | None) -> Any:
    from p2d_cli.modeling.head_adapter import attach_heads, attach_lora, prepare_full, unfreeze_attention

    scope = config.resolved_scope
    if scope == "heads" and heads_LH is not None:
        return attach_heads(model, heads_LH, config.projections)
    if scope == "lora":
        return attach_lora(model, config.lora_rank, config.lora_alpha, config.projections, config.lora_dropout)
    if scope == "attention":
        unfreeze_attention(model)
    else:
        prepare_full(model)
    return model


def _save(
    model: Any,
    dtype: torch.dtype,
    base: ModelFiles,
    config: TrainConfig,
    folder: Path,
    state: dict[str, torch.Tensor] | None,
) -> None:
    """Write the PEFT folder, or the whole model with the base model's tokenizer.

    The weights are those of `state` if the model itself holds only a part of them.
    """
    from p2d_cli.modeling.saving import copy_tokenizer, save_plain_model

    if config.resolved_scope in {"heads", "lora"}:
        from p2d_cli.modeling.head_adapter import save_adapter

        save_adapter(model, folder, base.name_elsewhere, state, revision=base.asked_revision)
        copy_tokenizer(base.folder, folder)
    else:
        save_plain_model(model.to(dtype) if state is None else model, base.folder, folder, state)


def _save_prompts(
    config: TrainConfig, template: PromptTemplate, tokenizer: Any, ends: tuple[str, ...], folder: Path
) -> None:
    """Write a chat template that is not the model's own; a whole model is told which token ends its turns."""
    from p2d_cli.modeling.saving import add_ends_of_turns

    if config.chat_template is not None or config.chat_template_kwargs:
        (folder / CHAT_TEMPLATE_NAME).write_text(template.chat_template or "", encoding="utf-8")
    if config.resolved_scope in {"attention", "full"}:
        add_ends_of_turns(folder, tokenizer.convert_tokens_to_ids(list(ends)))


def _save_card(base: ModelFiles, summary: dict[str, Any], folder: Path) -> None:
    save_model_card(
        folder,
        base.name_elsewhere,
        base.asked_revision,
        scope=summary["scope"],
        figures=_card_figures(summary),
        rank=summary.get(ADAPTER_RANK),
    )


def _card_figures(summary: dict[str, Any]) -> dict[str, Any]:
    return {
        "Rows": summary["rows"],
        "Updates": summary["updates"],
        "Peak learning rate": summary["learning_rate"],
        "Final loss": f"{summary['final_loss']:.4f}",
        "Trained parameters": f"{summary['trained_parameters']:,} ({summary['trainable_share']:.3%})",
    }


def _draw(job: StageRun[TrainConfig], log: list[dict[str, float]], folder: Path) -> None:
    from p2d_cli.reporting.plots import loss_curve

    steps, losses = zip(*((entry["step"], entry["loss"]) for entry in log if "loss" in entry), strict=True)
    looks = [(entry["step"], entry["eval_loss"]) for entry in log if "eval_loss" in entry]
    with job.drawing(PICTURE_NAME):
        loss_curve(steps, losses, folder / PICTURE_NAME, held_out=looks)
