"""From the scores of a pool's rows to those that are kept: none below the floor, no more than the pool seems to hold of
the task, and of the others the best, or some that cover them.

Legend: N pool rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from p2d_cli.artifacts.subset import NamedPoolScores
from p2d_cli.config import MineDataConfig
from p2d_cli.core.subset_selection import rank_rows
from p2d_cli.data.pool import Pool
from p2d_cli.engine.stage_run import StageRun
from p2d_cli.errors import DataError, UsageError
from p2d_cli.methods.row_method import PoolTask, RowScores
from p2d_cli.methods.words import cover_by_words

TIMES_UPPER_HALF = 3
"""So many times the rows that score like the upper half of the task's are taken for its own at most."""


@dataclass(frozen=True)
class Choice:
    """The rows that are kept: those of the ranks below `count`."""

    ranks_N: NDArray[np.int64]
    count: int
    covers: bool
    """Whether they were chosen to cover those above the floor, instead of being the highest."""


def choose(task: PoolTask, scored: RowScores, count: int) -> Choice:
    """Keep at most `count` rows of a pool.

    Args:
        task: the pool, without a target.
        scored: the scores of all N rows.
        count: the most that is kept.

    Raises:
        DataError: no row lies above the floor.
    """
    likely = min(task.pool.size, _above_floor(task.job, scored), _likely(task.job, scored))
    count, asked = min(count, likely), count
    with task.job.timer.phase("select"):
        ranks_N = rank_rows(scored.scores, scored.first)
    if task.config.pick == "cover" and not scored.notes.keys() & {"floor_score", "pool_of_one_task"}:
        task.job.progress.note("--pick cover is of no use without a floor: the best rows are kept")
    covers = asked < likely and _covers(task.config, scored)
    if covers and task.config.pick == "auto":
        task.job.progress.note(
            "target and pool can hardly be told apart: the pool seems to be of one task; rows that cover it are kept"
            if scored.notes.get("pool_of_one_task")
            else f"keeping {count} of them that cover the others in their words; --pick top keeps the highest scores"
        )
    return Choice(_cover(task, ranks_N, count, likely) if covers else ranks_N, count, covers)


def _above_floor(job: StageRun[MineDataConfig], scored: RowScores) -> int:
    """Return how many rows score at least as high as the floor, all of them where there is none.

    Raises:
        DataError: no row does.
    """
    if "floor_score" not in scored.notes:
        if job.config.has_floor and "pool_of_one_task" not in scored.notes:
            job.progress.note("one target row alone sets no floor: as many rows are kept as --ratio or --count says")
        return scored.scores.size
    floor = scored.notes["floor_score"]
    above = int((scored.scores >= floor).sum())
    if not above:
        best = float(np.nanmax(scored.scores))
        raise DataError(
            f"no row of the pool scores {floor:.2f}, below which {scored.notes['floor_quantile']:g} of the task's rows"
            f" would lie, and the best {best:.2f}: the pool holds none of the task, or shows it in another form, as by"
            " other words or spaces around a prompt",
            hint="show both in one form, or give --floor-quantile 0 for the rows that are the most like the target",
        )
    job.progress.note(f"{above} rows score at least {floor:.2f}, the floor that the target rows set")
    return above


def _likely(job: StageRun[MineDataConfig], scored: RowScores) -> int:
    """Return how many rows are taken for the task's: three times as many as score like the upper half of its own rows.

    Few target rows, or rows that differ much, set a floor so low that look-alikes lie above it; the middle of their
    scores is surer than so low a quantile. At least a third of the task's rows lie above it, as a rule, even of eight.
    """
    if "middle_score" not in scored.notes:
        return scored.scores.size
    likely = TIMES_UPPER_HALF * int((scored.scores >= scored.notes["middle_score"]).sum())
    above = int((scored.scores >= scored.notes["floor_score"]).sum())
    if 0 < likely < above:
        job.progress.note(
            f"{likely} of them are taken for the task's: {TIMES_UPPER_HALF} times as many as score like its upper half"
        )
    return likely or above


def _covers(config: MineDataConfig, scored: RowScores) -> bool:
    """Say whether the rows that are kept are to cover those that may be kept, instead of being the highest.

    The highest are much alike: a model trained on them predicts held-out answers far worse than one trained on as many
    rows from anywhere above the floor (`tests/benchmarks/by_training.py`).
    """
    may_cover = scored.notes.get("pool_of_one_task") or "floor_score" in scored.notes
    return config.pick != "top" and bool(may_cover)


def _cover(task: PoolTask, ranks_N: NDArray[np.int64], count: int, likely: int) -> NDArray[np.int64]:
    """Return ranks whose first `count` rows cover in words the `likely` first ones; the others follow as they were.

    Args:
        task: the pool, without a target.
        ranks_N: ranks by score.
        count: rows to be kept.
        likely: rows to keep them of.
    """
    pool = task.pool
    may_be_kept = np.flatnonzero(ranks_N[~pool.is_excluded_N] < likely)
    those = pool.only(may_be_kept)
    order = np.argsort(-cover_by_words(replace(task, pool=those), count, phase="select"), kind="stable")
    first = those.places(order)[:count]
    is_first_N = np.zeros(pool.num_rows, dtype=np.bool_)
    is_first_N[first] = True
    others = np.argsort(ranks_N)
    order_N = np.concatenate([first, others[~is_first_N[others]]])
    new_N = np.empty_like(ranks_N)
    new_N[order_N] = np.arange(len(order_N))
    return new_N


def scored_before(
    job: StageRun[MineDataConfig], pool: Pool, scored: NamedPoolScores, count: int
) -> tuple[Pool, RowScores]:
    """Return the pool with the rows that have a score as those to choose from, and the scores of all of its rows.

    These are the scores that an earlier subset keeps.

    Raises:
        DataError: the pool's rows are read under other ids than they were.
        UsageError: a shortlist left fewer rows than are to be chosen, or they tell nothing of the floor asked for.
    """
    if len(scored.ids) != pool.num_rows or any(
        record.id != name for record, name in zip(pool.read(), scored.ids, strict=True)
    ):
        raise DataError(
            "the pool's rows are not those of --scores, as they are read now",
            hint="give --id-column, --skip-bad-rows and --chat-template as they were given there",
        )
    has_score_N = ~np.isnan(scored.scores_N)
    told = job.inputs.manifests["scores"].summary
    sets_floor = (job.config.has_floor or job.config.keeps_floor) and "floor_score" in told
    if count > has_score_N.sum() and sets_floor and "rows_not_read_on" in told:
        # What was not read on was left out as being below the floor, as far as the first heads tell.
        job.progress.note(
            f"{has_score_N.sum()} rows were read on and have a score; to have more of them, mine again without --scores"
        )
    elif count > has_score_N.sum() and (told["rows_not_listed"] or "rows_not_read_on" in told):
        listed = pool.num_rows - told["rows_that_are_targets"] - told["rows_not_listed"]
        flag = "--refine" if "rows_not_read_on" in told and count <= listed else "--shortlist"
        raise UsageError(
            f"{has_score_N.sum()} rows have a score, of which {count} are to be chosen",
            hint=f"mine again without --scores and with a greater {flag}",
        )
    notes = {name: told[name] for name in ("rows_target", "rows_that_are_targets", "rows_not_listed")}
    kept = ("rows_read_on", "rows_not_read_on", "pool_area", "pool_of_one_task")
    notes |= {name: told[name] for name in kept if name in told}
    quantile = job.config.resolved_floor
    if job.config.has_floor and told.get("floor_quantile") != quantile:
        found = f"with {told['floor_quantile']:g}" if "floor_quantile" in told else "without one"
        raise UsageError(
            f"--scores tell nothing of --floor-quantile {quantile:g}: they were found {found}",
            hint="leave --floor-quantile or --scores out",
        )
    if job.config.has_floor or job.config.keeps_floor:
        notes |= {name: told[name] for name in ("floor_quantile", "floor_score", "middle_score") if name in told}
    return pool.only(np.flatnonzero(has_score_N)), RowScores(scored.scores_N, scored.draws_N, notes)
