"""What the stages of a recipe would take whose inputs are still to be made (see `planning`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2d_cli.artifacts.head_scores import load_head_scores
from p2d_cli.config import MineDataConfig, Resolved, ScoreHeadsConfig, StageConfig, TrainConfig
from p2d_cli.core.cost import StagePlan, model_size
from p2d_cli.core.subset_selection import resolve_count
from p2d_cli.modeling.model_files import ModelFiles, locate_model, tensor_shapes
from p2d_cli.stages.evaluate import open_choices
from p2d_cli.stages.execution import RunOptions, StageRun
from p2d_cli.stages.model_checks import check_evaluation, check_mining, check_scoring, check_training
from p2d_cli.stages.plan_selection import plan_mine_data, plan_score_heads
from p2d_cli.stages.plan_tuning import plan_eval, plan_train
from p2d_cli.stages.planned_rows import Sample, read_sample
from p2d_cli.stages.planning import assumed_heads
from p2d_cli.stages.pool_task import METHODS_WITH_TARGET


def plan_ahead(
    stage: str, resolved: Resolved[Any], options: RunOptions, planned: Mapping[str, StageConfig]
) -> tuple[StagePlan, dict[str, dict[str, Any]]]:
    """Plan a stage some of whose inputs are artifacts that are planned themselves.

    The bad rows that go with the plan are those of inputs that are there.

    Heads stand for themselves by their number, spread over all layers; rows to be mined by others of their pool; a
    model or an adapter to be trained by the base model.

    Args:
        stage: its name: score-heads, mine-data, train or eval.
        resolved: its settings.
        options: how to run.
        planned: the settings of the stages that are planned, by their output folder.
    """
    job: StageRun[Any] = StageRun(stage, resolved, options)
    job.require_device()
    plan = _plan(job, stage, planned)
    left_out = job.inputs.bad_rows.items()
    return plan, {name: bad for name, bad in left_out if getattr(job.config, name) not in planned}


def _plan(job: StageRun[Any], stage: str, planned: Mapping[str, StageConfig]) -> StagePlan:
    config = job.config
    if stage == "score-heads":  # of two models, one of which is still to be trained
        files = locate_model(config.model)
        check_scoring(config.resolved_method, files, files)
        return _marked(plan_score_heads(job, config.resolved_method, files, None, None))
    if stage == "mine-data":
        reader = config.scorer_model or config.model
        files = job.inputs.reader = locate_model(reader)
        job.num_embeddings = check_mining(config, files)
        uses_target = config.method in METHODS_WITH_TARGET and config.target is not None
        target = _sample(job, "target", config.target, planned) if uses_target else None
        pool = _sample(job, "pool", config.pool, planned)
        return _marked(plan_mine_data(job, files, pool, target, _heads_ahead(config.heads, files, planned)))
    if stage == "train":
        files = job.inputs.reader = locate_model(config.model)
        job.num_embeddings = check_training(config, files)
        held_out = _sample(job, "eval_data", config.eval_data, planned) if config.eval_data is not None else None
        data = _sample(job, "data", config.data, planned)
        heads_LH = _heads_ahead(config.heads, files, planned) if config.resolved_scope == "heads" else None
        return _marked(plan_train(job, files, data, held_out, heads_LH))
    trained = planned.get(config.model)
    files = job.inputs.reader = locate_model(trained.model if isinstance(trained, TrainConfig) else config.model)
    job.num_embeddings = check_evaluation(files)
    asked = _sample(job, "data", config.data, planned, limit=config.limit) if config.data is not None else None
    choices = open_choices(job, config.choices) if config.choices is not None else None
    return _marked(plan_eval(job, files, asked, choices, None))


def _marked(plan: StagePlan) -> StagePlan:
    return replace(plan, notes=(*plan.notes, "inputs that are still to be made are stood for by others like them"))


def _sample(
    job: StageRun[Any], name: str, spec: str, planned: Mapping[str, StageConfig], *, limit: int | None = None
) -> Sample:
    """Read rows; those that are still to be mined are stood for by as many of their pool."""
    mined = planned.get(spec)
    if not isinstance(mined, MineDataConfig):
        return read_sample(job, job.inputs.rows(name, spec), limit=limit)
    pool = read_sample(job, job.inputs.rows(name, mined.pool))
    count = pool.total if mined.method == "full" else resolve_count(pool.total, mined.ratio, mined.count)
    return pool.reduced_to(count)


def _heads_ahead(spec: str | None, files: ModelFiles, planned: Mapping[str, StageConfig]) -> NDArray[np.bool_] | None:
    if spec is None:
        return None
    scored = planned.get(spec)
    if not isinstance(scored, ScoreHeadsConfig):
        return load_head_scores(Path(spec).expanduser()).selected_LH
    return assumed_heads(model_size(files.config, tensor_shapes(files)), scored.ratio)
