"""mine-data --scores: other rows of a pool, by the scores that an earlier subset keeps of all of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from p2d_cli.artifacts.subset import NamedPoolScores, load_pool_scores
from p2d_cli.config import MineDataConfig
from p2d_cli.data.pool import Pool
from p2d_cli.errors import DataError, UsageError
from p2d_cli.modeling.model_files import locate_model
from p2d_cli.stages.execution import StageRun
from p2d_cli.stages.pool_task import MiningInputs, PoolScored
from p2d_cli.stages.relevance import open_relevance

METHODS_WITHOUT_RANKING = frozenset({"random", "coverage", "full"})
"""These choose for just the number of rows that is asked for."""


def open_scored(job: StageRun[MineDataConfig], spec: str) -> MiningInputs:
    """Take the scores of the subset at `spec`, with what they cost, and the pool that they are of.

    Raises:
        UsageError: they are of another method, or of one that ranks no rows.
        ArtifactError: not a subset artifact, or of another model.
        DataError: they are of another pool.
    """
    config = job.config
    model = job.inputs.model(config.model)
    manifest = job.inputs.artifact("scores", spec, "subset", same_model=True)
    method = manifest.summary["method"]
    if method in METHODS_WITHOUT_RANKING:
        raise UsageError(
            f"--scores {spec} are of {method}, which chooses a number of rows and ranks none",
            hint=f"give --method {method} with another --ratio instead",
        )
    if config.method != method:
        raise UsageError(
            f"--scores {spec} are of {method}, not of --method {config.method}", hint=f"give --method {method}"
        )
    reader = manifest.summary.get("scorer_model")
    if reader is not None and config.skip_bad_rows:  # which rows it could not be shown was decided by its own template
        job.inputs.reader = locate_model(reader["source"])
    pool = job.inputs.rows("pool", config.pool)
    if job.inputs.entries["pool"].digest != manifest.inputs["pool"].digest:
        raise DataError(
            f"--scores {spec} are of another pool than {config.pool}",
            hint=f"give --pool {manifest.inputs['pool'].source}, or leave --scores out",
        )
    scored = load_pool_scores(Path(spec).expanduser())
    return MiningInputs(
        model=model, pool=pool, target=None, heads_LH=None, relevance=open_relevance(job), scored=scored
    )


def choose_again(
    job: StageRun[MineDataConfig], pool: Pool, scored: NamedPoolScores, count: int
) -> tuple[Pool, PoolScored]:
    """Return the pool with the rows that have a score as those to choose from, and the scores of all of its rows.

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
    if told["rows_not_listed"] and count > has_score_N.sum():
        raise UsageError(
            f"a shortlist left {has_score_N.sum()} rows with a score, of which {count} are to be chosen",
            hint="mine again without --scores and with a greater --shortlist",
        )
    notes = {name: told[name] for name in ("rows_target", "rows_that_are_targets", "rows_not_listed")}
    if job.config.has_floor:
        notes |= _floor(job.config, told)
    return pool.only(np.flatnonzero(has_score_N)), PoolScored(scored.scores_N, scored.draws_N, notes=notes)


def _floor(config: MineDataConfig, told: Mapping[str, Any]) -> dict[str, float]:
    """Return the floor that the target rows set when the scores were found."""
    if told.get("floor_quantile") != config.floor_quantile:
        raise UsageError(
            f"--scores tell nothing of --floor-quantile {config.floor_quantile:g}: they were found"
            f" {'with ' + format(told['floor_quantile'], 'g') if 'floor_quantile' in told else 'without one'}",
            hint="leave --floor-quantile or --scores out",
        )
    return {name: told[name] for name in ("floor_quantile", "floor_score")}
