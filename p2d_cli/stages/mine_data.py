"""mine-data: which rows do the task's heads respond to?

Every method turns the pool into one score a row (`pool_scoring`), higher is better; the rest is the same for all.

The pool is never held as a whole: a chunk of its rows at a time (`data.pool`), and about 60 bytes a row at the peak,
for scores, ranks, draws and what sorting needs (`tests/benchmarks/pool_memory.py`). It is read two to five times: to
count it, for the readout to take its sample, once or more to score it (not for `random` and `full`), and to write the
rows that were chosen; twice more for a shortlist, which leaves most of it unread by the model.
Legend: N pool rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2d_cli.artifacts.cards import CARD_NAME
from p2d_cli.artifacts.head_scores import load_head_scores
from p2d_cli.artifacts.subset import PoolScores, save_subset, save_subset_card
from p2d_cli.config import MineDataConfig, Resolved
from p2d_cli.core.cost import StagePlan
from p2d_cli.core.geometry import share_count
from p2d_cli.core.subset_selection import rank_rows, resolve_count
from p2d_cli.data.pool import Pool
from p2d_cli.data.records import require_number
from p2d_cli.errors import NOT_FINITE_HINT, DataError, NonFiniteError, UsageError
from p2d_cli.stages.execution import Outcome, RunOptions, StageResult, StageRun
from p2d_cli.stages.model_checks import check_mining
from p2d_cli.stages.pool_reselection import choose_again, open_scored
from p2d_cli.stages.pool_scoring import METHODS
from p2d_cli.stages.pool_task import METHODS_WITH_TARGET, MiningInputs, PoolScored, PoolTask
from p2d_cli.stages.relevance import RelevanceTally, open_relevance
from p2d_cli.stages.weak_to_strong import ensure_own_heads, open_reader

PICTURE_NAME = "scores.png"
ROWS_BETWEEN_REPORTS = 1024


def run(resolved: Resolved[MineDataConfig], options: RunOptions | None = None) -> StageResult:
    """Score the pool, keep the best share, and write a subset artifact.

    Raises:
        P2DError: as its message says; see `p2d_cli.errors` for the exit codes.
    """
    job = StageRun("mine-data", resolved, options or RunOptions())
    inputs = _open_inputs(job)
    return job.complete(
        lambda folder: _compute(job, inputs, folder),
        lambda unfinished: _plan(job, inputs, unfinished),
        check=lambda: check_mining(job.config, inputs.model),
    )


def _plan(job: StageRun[MineDataConfig], inputs: MiningInputs, unfinished: Path) -> StagePlan:
    from p2d_cli.stages.plan_selection import plan_mine_data
    from p2d_cli.stages.planned_rows import read_sample

    target = read_sample(job, inputs.target) if inputs.target is not None else None
    return plan_mine_data(job, inputs.model, read_sample(job, inputs.pool), target, inputs.heads_LH, unfinished)


def _open_inputs(job: StageRun[MineDataConfig]) -> MiningInputs:
    config = job.config
    if config.scores is not None:
        return open_scored(job, config.scores)
    if config.method == "p2d" and config.heads is None:
        raise UsageError("--method p2d needs --heads: the artifact that score-heads wrote", hint="run p2d score-heads")
    model = open_reader(job)
    heads_LH = None
    if config.method == "p2d" and config.heads is not None:
        ensure_own_heads(job, config.heads)
        heads_LH = load_head_scores(Path(config.heads).expanduser()).selected_LH
    uses_target = config.method in METHODS_WITH_TARGET
    return MiningInputs(
        model=model,
        pool=job.inputs.rows("pool", config.pool),
        target=job.inputs.rows("target", config.target) if uses_target and config.target is not None else None,
        heads_LH=heads_LH,
        relevance=open_relevance(job),
    )


def _compute(job: StageRun[MineDataConfig], inputs: MiningInputs, folder: Path) -> Outcome:
    config = job.config
    with job.timer.phase("prepare"):
        target = job.inputs.read(inputs.target).records if inputs.target is not None else ()
        if config.perf == "generate" and config.perf_metric == "number_match":
            for record in target:
                require_number(record)
        pool = job.inputs.pool(inputs.pool, target)
        count = pool.num_rows if config.method == "full" else resolve_count(pool.num_rows, config.ratio, config.count)
        _tell_twins(job, pool)
        if inputs.relevance is not None:
            inputs.relevance.require_known(record.id for record in pool.read())
    if config.has_shortlist:
        pool = _shorten(PoolTask(job, inputs, pool, target), count)
    if inputs.scored is not None:
        pool, scored = choose_again(job, pool, inputs.scored, count)
    else:
        scored = METHODS[config.method](PoolTask(job, inputs, pool, target)).spread(pool)
    _require_finite(config.method, pool, scored)
    count = min(count, pool.size, _above_floor(job, scored))
    with job.timer.phase("select"):
        ranks_N = rank_rows(scored.scores)
        cut = float(scored.scores[ranks_N == count - 1][0])
    if job.is_main:
        with job.saving():
            _save(job, folder, pool, PoolScores(scored.scores, ranks_N, scored.draws), count, inputs.relevance)
            _draw(job, scored.scores, cut, folder)
    measured = inputs.relevance.summary(count, pool.num_rows) if inputs.relevance is not None and job.is_main else {}
    return Outcome(
        summary={
            "method": config.method,
            "rows_selected": count,
            "rows_total": pool.num_rows,
            "rows_target": len(target),
            "rows_that_are_targets": len(pool.twins),
            "rows_not_listed": len(pool.unlisted),
            "rows_without_score": int(np.isnan(scored.scores).sum()),
            "cut_score": cut,
            **scored.notes,
            **measured,
        },
        settings={
            "method": config.method,
            "ratio": count / pool.num_rows,
            "rows_selected": count,
            "rows_total": pool.num_rows,
            **({"shortlist": config.shortlist} if config.has_shortlist else {}),
            **({"floor_quantile": config.floor_quantile} if config.has_floor else {}),
            **({"precision": measured["precision"]} if measured else {}),
        },
        precision=scored.precision,
        device=scored.device,
        tokens=scored.tokens,
        decoration=frozenset({PICTURE_NAME, CARD_NAME}),
    )


def _tell_twins(job: StageRun[MineDataConfig], pool: Pool) -> None:
    """Say how many rows are target rows as well, which would be found by their own likeness."""
    if not pool.size:
        raise DataError(
            f"all {pool.num_rows} rows of the pool are target rows as well: there is nothing to choose from",
            hint="give a pool of other rows, or train on the target rows themselves",
        )
    if twins := len(pool.twins):
        job.progress.note(f"{twins} pool rows are target rows as well and are left out")


def _shorten(task: PoolTask, count: int) -> Pool:
    """Let words choose the rows that the model reads: at least as many as are to be kept.

    Raises:
        UsageError: `count` rows are to be kept of fewer.
    """
    from p2d_cli.stages.lexical_scoring import shortlist

    listed = min(share_count(task.job.config.shortlist, task.pool.num_rows), task.pool.size)
    if listed < min(count, task.pool.size):
        raise UsageError(
            f"--shortlist leaves {listed} rows of the pool, of which {count} are to be chosen",
            hint="give a greater --shortlist or a smaller --count",
        )
    task.job.progress.note(
        f"the model reads {listed} of {task.pool.num_rows} rows: those most like the target in words"
    )
    return shortlist(task, listed)


def _above_floor(job: StageRun[MineDataConfig], scored: PoolScored) -> int:
    """Return how many rows score at least as high as the floor, all of them where there is none.

    Raises:
        DataError: no row does.
    """
    if not job.config.has_floor:
        return scored.scores.size
    floor = scored.notes["floor_score"]
    above = int((scored.scores >= floor).sum())
    if not above:
        raise DataError(
            f"no row of the pool scores {floor:.2f}, the {job.config.floor_quantile:g} quantile of the target rows'"
            " own: the pool seems to hold none of the task",
            hint="give a pool that does, or leave --floor-quantile out for the rows that are the most like it",
        )
    job.progress.note(f"{above} rows score at least {floor:.2f}, the floor that the target rows set")
    return above


def _require_finite(method: str, pool: Pool, scored: PoolScored) -> None:
    """Refuse a score that is no number, unless it says that there is nothing to go by."""
    measured = scored.draws > 0
    wrong = np.isinf(scored.scores) | (np.isnan(scored.scores) & measured)
    if not wrong.any():
        return
    [row] = pool.take([int(np.flatnonzero(wrong)[0])])
    raise NonFiniteError(
        f"the {method} score of {row.where} is not finite; nothing was written",
        hint=NOT_FINITE_HINT,
    )


def _save(
    job: StageRun[MineDataConfig],
    folder: Path,
    pool: Pool,
    scores: PoolScores,
    count: int,
    relevance: RelevanceTally | None,
) -> None:
    with job.progress.task("write rows", pool.num_rows) as advance:

        def rows() -> Iterator[tuple[str, Mapping[str, Any]]]:
            for place, record in enumerate(pool.read(with_fields=True), start=1):
                yield record.id, record.fields
                if relevance is not None:
                    relevance.add(
                        record.id,
                        chosen=bool(scores.ranks_N[place - 1] < count),
                        listed=not pool.is_excluded_N[place - 1],
                    )
                if place % ROWS_BETWEEN_REPORTS == 0:
                    advance(ROWS_BETWEEN_REPORTS)

        save_subset(folder, rows(), scores, count, characters=pool.characters)
        save_subset_card(folder, method=job.config.method, chosen=count, total=pool.num_rows)


def _draw(job: StageRun[MineDataConfig], scores_N: NDArray[np.float64], cut: float, folder: Path) -> None:
    from p2d_cli.reporting.plots import score_histogram

    if job.config.method in {"full", "random"}:
        return
    with job.drawing(PICTURE_NAME):
        score_histogram(scores_N, cut, folder / PICTURE_NAME, title=f"{job.config.method}: score of every pool row")
