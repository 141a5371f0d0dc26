"""score-heads: which heads does the task move?

Every method turns the model into scores of its heads (`head_scoring`), higher is better; the rest is the same for all.
Legend: R repeats, L layers, H query heads a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from p2d_cli.artifacts.head_scores import HeadScores, load_head_scores, save_head_scores
from p2d_cli.config import METHODS_WITH_POOL, Resolved, ScoreHeadsConfig
from p2d_cli.core.cost import StagePlan
from p2d_cli.core.geometry import HeadGeometry
from p2d_cli.errors import NOT_FINITE_HINT, NonFiniteError, UsageError
from p2d_cli.stages.execution import Outcome, RunOptions, StageResult, StageRun
from p2d_cli.stages.head_scoring import ScoringInputs, score_heads
from p2d_cli.stages.model_checks import check_scoring

PICTURE_NAME = "heads.png"


def run(resolved: Resolved[ScoreHeadsConfig], options: RunOptions | None = None) -> StageResult:
    """Score and select heads, and write a heads artifact.

    Raises:
        P2DError: as its message says; see `p2d_cli.errors` for the exit codes.
    """
    job = StageRun("score-heads", resolved, options or RunOptions())
    inputs = _open_inputs(job)
    return job.complete(
        lambda folder: _compute(job, inputs, folder),
        lambda unfinished: _plan(job, inputs, unfinished),
        alone=inputs.target is None,
        check=lambda: None if inputs.scored else check_scoring(inputs.method, inputs.model, inputs.task_model),
    )


def _plan(job: StageRun[ScoreHeadsConfig], inputs: ScoringInputs, unfinished: Path) -> StagePlan:
    from p2d_cli.stages.plan_selection import plan_score_heads
    from p2d_cli.stages.planned_rows import read_sample

    target = read_sample(job, inputs.target) if inputs.target is not None else None
    pool = read_sample(job, inputs.pool) if inputs.pool is not None else None
    return plan_score_heads(job, inputs.method, inputs.model, target, pool, unfinished)


def _open_inputs(job: StageRun[ScoreHeadsConfig]) -> ScoringInputs:
    """Take the inputs that the method needs, and leave the others out of the artifact's identity."""
    config = job.config
    if config.scores is not None:
        return _open_scores(job, config.scores)
    method = config.resolved_method
    needs_target = method in {*METHODS_WITH_POOL, "taylor"} or (method == "pad" and config.task_model is None)
    if needs_target and config.target is None:
        raise UsageError(f"--method {method} needs --target: rows of the task", hint="give a file, folder or hub id")
    if method in METHODS_WITH_POOL and config.pool is None:
        raise UsageError(
            f"--method {method} needs --pool: rows to tell the target from",
            hint="give --pool, or use --method pad, which needs the target rows only",
        )
    task_model = config.task_model if method == "pad" else None
    return ScoringInputs(
        method=method,
        model=job.inputs.model(config.model, with_tokenizer=needs_target),
        task_model=job.inputs.model(task_model, name="task_model", with_tokenizer=False) if task_model else None,
        target=job.inputs.rows("target", config.target) if needs_target and config.target else None,
        pool=job.inputs.rows("pool", config.pool) if method in METHODS_WITH_POOL and config.pool else None,
    )


def _open_scores(job: StageRun[ScoreHeadsConfig], spec: str) -> ScoringInputs:
    """Take scores that are there, with what they cost; a method that is named has to be theirs."""
    model = job.inputs.model(job.config.model, with_tokenizer=False)
    job.inputs.artifact("scores", spec, "heads", same_model=True)
    scored = load_head_scores(Path(spec).expanduser())
    if job.config.method not in {"auto", scored.method}:
        raise UsageError(f"--scores {spec} are of {scored.method}, not of --method {job.config.method}")
    if scored.method == "uniform":
        raise UsageError(
            f"--scores {spec} are of uniform, which spreads a number of heads and ranks none",
            hint="give --method uniform with another --ratio instead",
        )
    # What is recorded is the method that `auto` came to, and the selection that goes with it.
    job.config = job.config.model_copy(update={"method": scored.method})
    return ScoringInputs(method=scored.method, model=model, scored=scored)


def _compute(job: StageRun[ScoreHeadsConfig], inputs: ScoringInputs, folder: Path) -> Outcome:
    from p2d_cli.core.head_selection import among_layers, candidate_layers, repeatability

    config = job.config
    scored = score_heads(job, inputs)
    scores_LH = scored.repeats_RLH.mean(axis=0) if inputs.scored is None else inputs.scored.scores_LH.astype(np.float64)
    _require_finite(scores_LH, inputs.method)
    layers = candidate_layers(config.layers, scored.geometry.num_layers)
    select = _selection_rule(config, scored.geometry)
    heads = HeadScores(
        scores_LH=scores_LH.astype(np.float32),
        selected_LH=among_layers(select(scores_LH[layers.start : layers.stop]), layers, len(scores_LH)),
        repeats_RLH=scored.repeats_RLH.astype(np.float32),
        method=inputs.method,
        geometry=scored.geometry,
    )
    if job.is_main:
        with job.saving():
            save_head_scores(folder, heads)
            _draw(job, heads, folder)
    repeat = repeatability(scored.repeats_RLH[:, layers.start : layers.stop], select)
    return Outcome(
        summary=_selection(heads) | {"repeatability": vars(repeat) if repeat else None} | scored.notes,
        settings={"method": inputs.method, "ratio": config.ratio} | _map(heads),
        precision=scored.precision,
        device=scored.device,
        tokens=scored.tokens,
        decoration=frozenset({PICTURE_NAME}),
    )


def _selection_rule(
    config: ScoreHeadsConfig, shape: HeadGeometry
) -> Callable[[NDArray[np.float64]], NDArray[np.bool_]]:
    """Return what makes a selection from the scores of some layers, `[layers, H]`."""
    from p2d_cli.core.head_selection import select_spread, select_top

    budget = shape.head_budget(config.ratio)
    if config.resolved_selection == "spread" and config.method != "uniform":
        return lambda scores: select_spread(scores, budget, shape.num_groups)
    return lambda scores: select_top(scores, budget)


def _require_finite(scores_LH: NDArray[np.float64], method: str) -> None:
    if np.isfinite(scores_LH).all():
        return
    layer, head = np.argwhere(~np.isfinite(scores_LH))[0]
    raise NonFiniteError(
        f"the {method} score of layer {layer}, head {head} is not a finite number; nothing was written",
        hint=NOT_FINITE_HINT,
    )


def _selection(heads: HeadScores) -> dict[str, object]:
    """Say how many heads were selected, and how they spread: heads of one group share their keys and values."""
    shape = heads.geometry
    return {
        "method": heads.method,
        "heads_selected": int(heads.selected_LH.sum()),
        "heads_total": shape.total_heads,
        "groups_touched": int(shape.groups_of(heads.selected_LH).sum()),
        "groups_total": shape.num_layers * shape.num_groups,
        "layers_touched": int(heads.selected_LH.any(axis=1).sum()),
    }


def _map(heads: HeadScores) -> dict[str, object]:
    """Return what a report draws of the heads, small enough to travel in every later manifest."""
    from p2d_cli.core.head_selection import head_levels

    return {
        "shape": list(heads.scores_LH.shape),
        "selected": np.flatnonzero(heads.selected_LH).tolist(),
        "levels": head_levels(heads.scores_LH),
    }


def _draw(job: StageRun[ScoreHeadsConfig], heads: HeadScores, folder: Path) -> None:
    from p2d_cli.reporting.plots import head_heatmap

    title = f"{heads.method}: {int(heads.selected_LH.sum())} of {heads.scores_LH.size} heads"
    with job.drawing(PICTURE_NAME):
        head_heatmap(heads.scores_LH, heads.selected_LH, folder / PICTURE_NAME, title=title)
