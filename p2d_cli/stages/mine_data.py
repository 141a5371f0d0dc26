"""mine-data: which rows do the task's heads respond to?

A method (`p2d_cli.methods.rows`) turns the pool into one score a row, higher is better; the rest is the same for all.

The pool is never held as a whole: a chunk of its rows at a time (`data.pool`), and about 60 bytes a row at the peak,
for scores, ranks, draws and what sorting needs (`tests/benchmarks/pool_memory.py`). It is read two to five times: to
count it, for the readout to take its sample, once or more to score it (not for `random` and `full`), and to write the
rows that were chosen; twice more for a shortlist, which leaves most of it unread by the model.
Legend: N pool rows, M rows to choose from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2d_cli.artifacts.cards import CARD_NAME
from p2d_cli.artifacts.subset import PoolScores, save_subset, save_subset_card
from p2d_cli.config import MineDataConfig, Resolved
from p2d_cli.core.geometry import share_count
from p2d_cli.data.pool import Pool, digest64
from p2d_cli.data.records import Record, require_number
from p2d_cli.engine import caveats
from p2d_cli.engine.cost import StagePlan
from p2d_cli.engine.counting import CountingReader
from p2d_cli.engine.reader import ModelReader, Reader
from p2d_cli.engine.stage_run import Outcome, RunOptions, StageResult, StageRun
from p2d_cli.errors import NOT_FINITE_HINT, DataError, NonFiniteError, UsageError
from p2d_cli.methods.row_method import PoolTask, RowScores
from p2d_cli.methods.words import shortlist
from p2d_cli.modeling.model_files import require_tokenizer
from p2d_cli.stages.choosing import choose, scored_before
from p2d_cli.stages.mining_inputs import MiningInputs, counted, open_inputs

PICTURE_NAME = "scores.png"
ROWS_BETWEEN_REPORTS = 1024


def run(resolved: Resolved[MineDataConfig], options: RunOptions | None = None) -> StageResult:
    """Score the pool, keep the best share, and write a subset artifact."""
    options = options or RunOptions()
    resolved, asked = counted(resolved, options.planned)
    job = StageRun("mine-data", resolved, options)
    job.facts["rows_asked"] = asked
    inputs = open_inputs(job)
    return job.complete(
        lambda folder: _compute(job, inputs, folder),
        lambda unfinished: _plan(job, inputs, unfinished),
        check=lambda: _check_model(job.config, inputs),
    )


def _check_model(config: MineDataConfig, inputs: MiningInputs) -> int | None:
    """Refuse a model that cannot read the pool as the method wants it."""
    if inputs.method.reads_model and config.scores is None:
        return inputs.method.check_model(config, inputs.model)
    if config.skip_bad_rows:  # which rows it can be shown is asked of its template
        require_tokenizer(inputs.model)
    return None


def _plan(job: StageRun[MineDataConfig], inputs: MiningInputs, unfinished: Path | None) -> StagePlan:
    config, method = job.config, inputs.method
    reader = CountingReader(job, inputs.model, unfinished)
    target = reader.sample("target", inputs.target)
    reader.notes += caveats.of_target(target)
    pool = Pool.of(reader.sample("pool", inputs.pool), target)
    if reader.is_exact:
        _tell_twins(job, pool)
    reader.rows["chosen"] = chosen = method.count(config, pool.num_rows)
    reader.disk["artifact"] = round(reader.stored_bytes["pool"] * chosen / pool.num_rows) + 3 * 8 * pool.num_rows
    if not method.reads_model or config.scores is not None or not pool.size:
        return reader.plan()
    if config.has_shortlist:  # which rows it holds, and how long they are, only the words tell
        listed = min(share_count(config.shortlist, pool.num_rows), pool.size)
        pool = pool.only(np.arange(listed) * pool.size // listed)
        reader.is_exact = False
    scoring = method(_task(job, inputs, reader, pool, target))
    reader.run(scoring.passes())
    reader.disk |= scoring.disk()
    reader.notes += scoring.caveats()
    return reader.plan()


def _tell_unused(job: StageRun[MineDataConfig], inputs: MiningInputs) -> None:
    """Say which flags that were given change nothing; a recipe's settings are for all of its methods."""
    config, unused = job.config, ["index", "refine", "background"]
    if inputs.scored is not None:
        beside = "beside --scores"
        unused += ["target", "shortlist"]
    elif not inputs.method.sets_floor:
        beside = f"with --method {config.method}"
        unused += ["floor_quantile"]
        if inputs.method.takes_index:
            unused.remove("index")
    elif config.resolved_affinity != "readout":
        beside = "with --affinity attention"
    else:
        return
    for name in unused:
        if job.resolved.origins[name] == "flag":
            job.progress.note(f"--{name.replace('_', '-')} is of no use {beside}")


def _task(
    job: StageRun[MineDataConfig], inputs: MiningInputs, reader: Reader, pool: Pool, target: Sequence[Record]
) -> PoolTask:
    return PoolTask(job, reader, pool, target, inputs.heads, inputs.readings, inputs.readings_planned)


def _compute(job: StageRun[MineDataConfig], inputs: MiningInputs, folder: Path) -> Outcome:
    config, method = job.config, inputs.method
    is_read = inputs.scored is None and method.reads_model
    _tell_unused(job, inputs)
    reader = ModelReader(job, inputs.model)
    if is_read:
        reader.import_libraries()
    with job.timer.phase("prepare"):
        target = job.inputs.read(inputs.target).records if inputs.target is not None else ()
        asks_for_numbers = config.answer_weight == "generate" and config.answer_metric == "number_match"
        for record in target if asks_for_numbers else ():
            require_number(record)
        pool = job.inputs.pool(inputs.pool, target)
        count = method.count(config, pool.num_rows)
        _tell_twins(job, pool)
        relevant_N = _find_relevant(pool, inputs.relevant) if inputs.relevant is not None else None
    task = _task(job, inputs, reader, pool, target)
    if config.has_shortlist:
        task = replace(task, pool=_shorten(task, count))
    if inputs.scored is not None:
        pool, scored = scored_before(job, pool, inputs.scored, count)
    else:
        scoring = method(task)
        reader.run(scoring.passes())
        pool, scored = task.pool, _spread(scoring.score(), task.pool)
    scores_N = scored.scores
    _require_finite(method.name, pool, scored)
    chosen = choose(replace(task, pool=pool, target=()), scored, count)
    count, ranks_N = chosen.count, chosen.ranks_N
    cut = float(scores_N[ranks_N < count].min())
    answers: dict[str, Any] = {}
    if job.is_main:
        with job.saving():
            answers = _save(job, folder, pool, PoolScores(scores_N, ranks_N, scored.draws), count)
            if not method.is_control:
                _draw(job, scores_N, cut, folder)
    measured = {} if relevant_N is None else _measure(relevant_N, ranks_N < count, pool.is_excluded_N)
    return Outcome(
        summary={
            "method": method.name,
            "rows_selected": count,
            "rows_total": pool.num_rows,
            "rows_target": len(target),
            "rows_that_are_targets": len(pool.twins),
            "rows_not_listed": len(pool.unlisted),
            "rows_without_score": int(np.isnan(scores_N).sum()),
            "cut_score": cut,
            **({"picked": "cover"} if chosen.covers else {}),
            **answers,
            **scored.notes,
            **measured,
        },
        settings=_settings(config, count, pool.num_rows, measured | scored.notes),
        precision=reader.precision if is_read else "",
        device=reader.device if is_read else "cpu",
        tokens=reader.tokens,
        extras=frozenset({PICTURE_NAME, CARD_NAME}),
        warnings=caveats.of_target(target),
    )


def _settings(config: MineDataConfig, count: int, total: int, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a report needs to know of the choice."""
    return {
        "method": config.method,
        "ratio": count / total,
        "rows_selected": count,
        "rows_total": total,
        **({"shortlist": config.shortlist} if config.has_shortlist else {}),
        **{name: found[name] for name in ("floor_quantile", "precision") if name in found},
    }


def _spread(scored: RowScores, pool: Pool) -> RowScores:
    """Return scores of the rows to choose from as those of all N rows of the pool; the others have none."""
    if pool.size == pool.num_rows:
        return scored
    others_N = ~pool.is_excluded_N
    scores_N = np.full(pool.num_rows, np.nan)
    draws_N = np.zeros(pool.num_rows, dtype=np.int64)
    scores_N[others_N], draws_N[others_N] = scored.scores, scored.draws
    first_N = None
    if scored.first is not None:
        first_N = np.full(pool.num_rows, np.nan)
        first_N[others_N] = scored.first
    return replace(scored, scores=scores_N, draws=draws_N, first=first_N)


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
    listed = min(share_count(task.config.shortlist, task.pool.num_rows), task.pool.size)
    if listed < min(count, task.pool.size):
        raise UsageError(
            f"--shortlist leaves {listed} rows of the pool, of which {count} are to be chosen",
            hint="give a greater --shortlist or a smaller --count",
        )
    task.job.progress.note(
        f"the model reads {listed} of {task.pool.num_rows} rows: those most like the target in words"
    )
    return shortlist(task, listed)


def _require_finite(method: str, pool: Pool, scored: RowScores) -> None:
    """Refuse a score that is no number, unless it says that there is nothing to go by."""
    wrong = np.isinf(scored.scores) | (np.isnan(scored.scores) & (scored.draws > 0))
    if not wrong.any():
        return
    [row] = pool.take([int(np.flatnonzero(wrong)[0])])
    raise NonFiniteError(f"the {method} score of {row.where} is not finite; nothing was written", hint=NOT_FINITE_HINT)


def _find_relevant(pool: Pool, relevant: frozenset[str]) -> NDArray[np.bool_]:
    """Return which rows are known to be of the target's task.

    Raises:
        DataError: none is.
    """
    is_relevant_N = np.fromiter((record.id in relevant for record in pool.read()), dtype=np.bool_, count=pool.num_rows)
    if not is_relevant_N.any():
        raise DataError(
            "none of the ids of --relevance is the id of a row of the pool",
            hint="give the ids as `mine-data --method full` writes them to pool_scores.parquet",
        )
    return is_relevant_N


def _measure(
    relevant_N: NDArray[np.bool_], chosen_N: NDArray[np.bool_], excluded_N: NDArray[np.bool_]
) -> dict[str, Any]:
    """Return precision and recall of the choice, the recall of what it could be made from, and chance's precision."""
    rows, found = int(relevant_N.sum()), int((relevant_N & chosen_N).sum())
    return {
        "precision": found / int(chosen_N.sum()),
        "recall": found / rows,
        "listed_recall": int((relevant_N & ~excluded_N).sum()) / rows,
        "rows_relevant": rows,
        "chance_precision": rows / len(relevant_N),
    }


def _save(job: StageRun[MineDataConfig], folder: Path, pool: Pool, scores: PoolScores, count: int) -> dict[str, int]:
    """Write the payload; return how many different answers there are, among the chosen rows and in the pool."""
    answers_N = np.zeros(pool.num_rows, dtype=np.uint64)
    with job.progress.task("write rows", pool.num_rows) as advance:

        def rows() -> Iterator[tuple[str, Mapping[str, Any]]]:
            for place, record in enumerate(pool.read(with_fields=True), start=1):
                answers_N[place - 1] = digest64(record.answer.text)
                yield record.id, record.fields
                if place % ROWS_BETWEEN_REPORTS == 0:
                    advance(ROWS_BETWEEN_REPORTS)

        save_subset(folder, rows(), scores, count, characters=pool.characters)
        save_subset_card(folder, method=job.config.method, chosen=count, total=pool.num_rows)
    chosen = answers_N[scores.ranks_N < count]
    return {"answers_selected": len(np.unique(chosen)), "answers_total": len(np.unique(answers_N))}


def _draw(job: StageRun[MineDataConfig], scores_N: NDArray[np.float64], cut: float, folder: Path) -> None:
    from p2d_cli.reporting.plots import score_histogram

    with job.drawing(PICTURE_NAME):
        score_histogram(scores_N, cut, folder / PICTURE_NAME, title=f"{job.config.method}: score of every pool row")
