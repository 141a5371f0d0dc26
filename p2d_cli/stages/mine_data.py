"""mine-data: which rows do the task's heads respond to?

Every method turns the pool into one score a row (`pool_scoring`), higher is better; the rest is the same for all.
Legend: N pool rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from p2d_cli.artifacts.head_scores import load_head_scores
from p2d_cli.artifacts.subset import PoolScores, save_subset
from p2d_cli.config import MineDataConfig, Resolved
from p2d_cli.core.cost import StagePlan
from p2d_cli.core.subset_selection import rank_rows, resolve_count, select_rows
from p2d_cli.data.records import Record
from p2d_cli.errors import DataError, NonFiniteError, UnavailableError, UsageError
from p2d_cli.stages.execution import Outcome, RunOptions, StageResult, StageRun
from p2d_cli.stages.pool_scoring import METHODS
from p2d_cli.stages.pool_task import MiningInputs, PoolTask
from p2d_cli.stages.weak_to_strong import ensure_own_heads, open_reader

PICTURE_NAME = "scores.png"


def run(resolved: Resolved[MineDataConfig], options: RunOptions | None = None) -> StageResult:
    """Score the pool, keep the best share, and write a subset artifact.

    Raises:
        P2DError: as its message says; see `p2d_cli.errors` for the exit codes.
    """
    job = StageRun("mine-data", resolved, options or RunOptions())
    inputs = _open_inputs(job)
    return job.complete(lambda folder: _compute(job, inputs, folder), lambda unfinished: _plan(job, inputs, unfinished))


def _plan(job: StageRun[MineDataConfig], inputs: MiningInputs, unfinished: Path) -> StagePlan:
    from p2d_cli.stages.plan_selection import plan_mine_data
    from p2d_cli.stages.planned_rows import read_sample

    target = read_sample(job, inputs.target) if inputs.target is not None else None
    return plan_mine_data(job, inputs.model, read_sample(job, inputs.pool), target, inputs.heads_LH, unfinished)


def _open_inputs(job: StageRun[MineDataConfig]) -> MiningInputs:
    config = job.config
    if config.method == "p2d" and config.heads is None:
        raise UsageError("--method p2d needs --heads: the artifact that score-heads wrote", hint="run p2d score-heads")
    model = open_reader(job)
    heads_LH = None
    if config.method == "p2d" and config.heads is not None:
        ensure_own_heads(job, config.heads)
        heads_LH = load_head_scores(Path(config.heads).expanduser()).selected_LH
    uses_target = config.method in {"p2d", "data-whisperer", "embedding", "lexical"}
    return MiningInputs(
        model=model,
        pool=job.rows("pool", config.pool),
        target=job.rows("target", config.target) if uses_target and config.target is not None else None,
        heads_LH=heads_LH,
    )


def _compute(job: StageRun[MineDataConfig], inputs: MiningInputs, folder: Path) -> Outcome:
    config = job.config
    with job.timer.phase("prepare"):
        pool = job.read(inputs.pool).records
        target = job.read(inputs.target).records if inputs.target is not None else ()
        count = len(pool) if config.method == "full" else resolve_count(len(pool), config.ratio, config.count)
        others = _rows_that_are_no_target(job, pool, target)
    scored = METHODS[config.method](PoolTask(job, inputs, [pool[index] for index in others], target))
    scored = scored.spread(others, len(pool))
    count = min(count, len(others))
    if np.isinf(scored.scores_N).any():
        row = pool[int(np.flatnonzero(np.isinf(scored.scores_N))[0])]
        raise NonFiniteError(
            f"the {config.method} score of {row.where} is infinite; nothing was written", hint="try --dtype float32"
        )
    with job.timer.phase("select"):
        chosen = select_rows(scored.scores_N, count)
        scores = PoolScores(
            ids=tuple(record.id for record in pool),
            scores_N=scored.scores_N,
            ranks_N=rank_rows(scored.scores_N),
            draws_N=scored.draws_N,
        )
    with job.timer.phase("save"):
        save_subset(folder, [pool[index].fields for index in chosen], chosen, scores)
        _draw(job, scored.scores_N, float(scored.scores_N[chosen[-1]]), folder)
    return Outcome(
        summary={
            "method": config.method,
            "rows_selected": count,
            "rows_total": len(pool),
            "rows_target": len(target),
            "rows_that_are_targets": len(pool) - len(others),
            "rows_without_score": int(np.isnan(scored.scores_N).sum()),
            "cut_score": float(scored.scores_N[chosen[-1]]),
            **scored.notes,
        },
        settings={
            "method": config.method,
            "ratio": count / len(pool),
            "rows_selected": count,
            "rows_total": len(pool),
        },
        precision=scored.precision,
        device=scored.device,
        tokens=scored.tokens,
        decoration=frozenset({PICTURE_NAME}),
    )


def _rows_that_are_no_target(
    job: StageRun[MineDataConfig], pool: Sequence[Record], target: Sequence[Record]
) -> list[int]:
    """Return the pool rows to choose from: a row that is a target row as well would be found by its own likeness."""
    from p2d_cli.data.episodes import duplicate_groups

    pool_groups, target_groups = duplicate_groups(pool, target)
    others: list[int] = np.flatnonzero(~np.isin(pool_groups, target_groups)).tolist()
    if not others:
        raise DataError(
            f"all {len(pool)} rows of the pool are target rows as well: there is nothing to choose from",
            hint="give a pool of other rows, or train on the target rows themselves",
        )
    if len(others) < len(pool):
        job.progress.note(f"{len(pool) - len(others)} pool rows are target rows as well and are left out")
    return others


def _draw(job: StageRun[MineDataConfig], scores_N: NDArray[np.float64], cut: float, folder: Path) -> None:
    from p2d_cli.reporting.plots import score_histogram

    if job.config.method in {"full", "random"}:
        return
    try:
        score_histogram(scores_N, cut, folder / PICTURE_NAME, title=f"{job.config.method}: score of every pool row")
    except UnavailableError as missing:
        job.progress.note(f"no {PICTURE_NAME}: {missing.message}")
