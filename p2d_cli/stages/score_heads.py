"""score-heads: which heads does the task move?

A method (`p2d_cli.methods.heads`) turns the model into scores of its heads, higher is better; the rest is the same for
all. Legend: R repeats, L layers, H query heads a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2d_cli.artifacts.head_scores import HeadScores, load_head_scores, save_head_scores
from p2d_cli.artifacts.readings import Readings, load_readings, save_readings
from p2d_cli.config import Resolved, ScoreHeadsConfig
from p2d_cli.core.geometry import HeadGeometry, ReadingHeads
from p2d_cli.core.head_selection import (
    candidate_heads,
    head_levels,
    repeatability,
    select_readers,
    select_spread,
    select_top,
)
from p2d_cli.core.readout import held_out_area
from p2d_cli.data.pool import Pool
from p2d_cli.data.raw_rows import RowSource
from p2d_cli.data.records import Record
from p2d_cli.engine import caveats
from p2d_cli.engine.cost import FLOAT32, StagePlan
from p2d_cli.engine.counting import CountingReader
from p2d_cli.engine.reader import ModelReader, Reader
from p2d_cli.engine.stage_run import Outcome, RunOptions, StageResult, StageRun
from p2d_cli.errors import NOT_FINITE_HINT, NonFiniteError, UsageError
from p2d_cli.methods.head_method import HeadMethod, HeadTask, RepeatScores
from p2d_cli.modeling.model_files import ModelFiles
from p2d_cli.registry import HEAD_METHODS
from p2d_cli.runtime.seeding import derive_seed, generator, seed_everything

PICTURE_NAME = "heads.png"


@dataclass(frozen=True)
class _Inputs:
    """The inputs, located; those that the method does not use are None."""

    method: type[HeadMethod]
    model: ModelFiles
    task_model: ModelFiles | None = None
    target: RowSource | None = None
    pool: RowSource | None = None
    scored: HeadScores | None = None
    """Scores that an earlier run found."""
    readings: Readings | None = None
    """What that run kept of the rows that it read."""

    @property
    def reads_rows(self) -> bool:
        """Whether the model reads any."""
        return self.target is not None or self.pool is not None

    def tasks(self, reader: Reader, target: tuple[Record, ...], pool: Pool | None) -> Iterator[HeadTask]:
        """Yield the repeats, each with its own source of chance."""
        config: ScoreHeadsConfig = reader.job.config
        for repeat in range(self.method.repeats(config)):
            rng = generator(config.seed, "score-heads", self.method.name, repeat)
            yield HeadTask(reader.job, reader, rng, repeat, target, pool, self.task_model)


def run(resolved: Resolved[ScoreHeadsConfig], options: RunOptions | None = None) -> StageResult:
    """Score and select heads, and write a heads artifact."""
    job = StageRun("score-heads", resolved, options or RunOptions())
    inputs = _open_inputs(job)
    takes_scores = job.config.scores is not None
    return job.complete(
        lambda folder: _compute(job, inputs, folder),
        lambda unfinished: _plan(job, inputs, unfinished),
        alone=not inputs.reads_rows,
        check=lambda: None if takes_scores else inputs.method.check_model(inputs.model, inputs.task_model),
    )


def _open_inputs(job: StageRun[ScoreHeadsConfig]) -> _Inputs:
    """Take the inputs that the method needs, and leave the others out of the artifact's identity."""
    config = job.config
    if config.scores is not None:
        return _open_scores(job, config.scores)
    method: type[HeadMethod] = HEAD_METHODS[config.resolved_method]
    needs_target = method.takes_target(config)
    if needs_target and config.target is None:
        raise UsageError(
            f"--method {method.name} needs --target: rows of the task", hint="give a file, folder or hub id"
        )
    if method.takes_pool and config.pool is None:
        raise UsageError(
            f"--method {method.name} needs --pool: rows to tell the target from",
            hint="give --pool, or use --method pad, which needs the target rows only",
        )
    job.shown = "episode" if "attention" in method.reads else "example"
    tuned = config.task_model if method.takes_task_model else None
    return _Inputs(
        method=method,
        model=job.inputs.model(config.model, with_tokenizer=needs_target or method.takes_pool),
        task_model=job.inputs.model(tuned, name="task_model", with_tokenizer=False) if tuned else None,
        target=job.inputs.rows("target", config.target) if needs_target and config.target else None,
        pool=job.inputs.rows("pool", config.pool) if method.takes_pool and config.pool else None,
    )


def _open_scores(job: StageRun[ScoreHeadsConfig], spec: str) -> _Inputs:
    """Take scores that are there, with what they cost; a method that is named has to be theirs."""
    model = job.inputs.model(job.config.model, with_tokenizer=False)
    if job.inputs.planned("scores", spec) is not None:
        return _Inputs(HEAD_METHODS[job.config.resolved_method], model)
    job.inputs.artifact("scores", spec, "heads", same_model=True)
    scored = load_head_scores(Path(spec).expanduser())
    if job.config.method not in {"auto", scored.method}:
        raise UsageError(f"--scores {spec} are of {scored.method}, not of --method {job.config.method}")
    method: type[HeadMethod] = HEAD_METHODS.require(scored.method, f"--scores {spec}")
    if not method.ranks:
        raise UsageError(
            f"--scores {spec} are of {scored.method}, which spreads a number of heads and ranks none",
            hint=f"give --method {scored.method} with another --ratio instead",
        )
    # What is recorded is the method that `auto` came to, and the selection that goes with it.
    job.config = job.config.model_copy(update={"method": scored.method})
    return _Inputs(method, model, scored=scored, readings=load_readings(Path(spec).expanduser()))


def _plan(job: StageRun[ScoreHeadsConfig], inputs: _Inputs, unfinished: Path | None) -> StagePlan:
    reader = CountingReader(job, inputs.model, unfinished)
    shape = reader.shape
    _require_candidates(job.config, shape)
    reader.disk["artifact"] = shape.exists_LH.size * (FLOAT32 + 2 + FLOAT32 * job.config.repeats)
    if job.config.scores is not None:
        return reader.plan()
    target = reader.sample("target", inputs.target)
    reader.notes += caveats.of_target(target)
    pool = Pool.of(reader.sample("pool", inputs.pool), target) if inputs.pool is not None else None
    for task in inputs.tasks(reader, target, pool):
        reader.run(inputs.method(task).passes())
    return reader.plan()


def _compute(job: StageRun[ScoreHeadsConfig], inputs: _Inputs, folder: Path) -> Outcome:
    config, method = job.config, inputs.method
    reader = ModelReader(job, inputs.model)
    shape, repeats_RLH, found, target = _score(job, inputs, reader)
    # As they are saved, so that whoever selects by saved scores has the same ties.
    repeats_RLH = repeats_RLH.astype(np.float32).astype(np.float64)
    found_LH = repeats_RLH.mean(axis=0) if inputs.scored is None else inputs.scored.scores_LH
    scores_LH = found_LH.astype(np.float32).astype(np.float64)
    _require_finite(scores_LH, shape, method.name)
    candidates_LH = _candidates(config, shape)
    select = _selection_rule(config, method, shape, candidates_LH)
    heads = HeadScores(
        scores_LH=scores_LH.astype(np.float32),
        selected_LH=select(scores_LH),
        repeats_RLH=repeats_RLH.astype(np.float32),
        method=method.name,
        geometry=shape,
        reading=_readers(job, scores_LH, shape, found.notes) if config.reads_apart else None,
    )
    readings = _readings(inputs, heads, found.readings)
    notes = dict(found.notes)
    if heads.reading is not None and readings is not None and found.readings is not None:
        with job.timer.phase("score"):
            notes |= _sureness(readings.of(heads.reading.deep_LH), found.notes["rows"], shape)
    if job.is_main:
        with job.saving():
            save_head_scores(folder, heads)
            if readings is not None:
                save_readings(folder, readings)
            _draw(job, heads, folder)
    repeat = repeatability(repeats_RLH, candidates_LH, select)
    is_read = inputs.reads_rows
    return Outcome(
        summary=_selection(heads) | {"repeatability": vars(repeat) if repeat else None} | notes,
        settings={
            "method": method.name,
            "ratio": config.ratio,
            # What a report draws of the heads, small enough to travel in every later manifest.
            "shape": list(heads.scores_LH.shape),
            "selected": np.flatnonzero(heads.selected_LH).tolist(),
            "levels": head_levels(heads.scores_LH, shape.exists_LH),
            **_reading_settings(heads.reading),
        },
        precision=reader.precision if is_read else "",
        device=reader.device if is_read else "cpu",
        tokens=reader.tokens,
        extras=frozenset({PICTURE_NAME}),
        warnings=caveats.of_target(target),
    )


def _score(
    job: StageRun[ScoreHeadsConfig], inputs: _Inputs, reader: ModelReader
) -> tuple[HeadGeometry, NDArray[np.float64], RepeatScores, tuple[Record, ...]]:
    """Return the model's shape, the scores of all repeats `[R, L, H]`, what the last one found, and the target rows."""
    if inputs.scored is not None:
        shape = inputs.scored.geometry
        _require_candidates(job.config, shape)
        return (
            shape,
            inputs.scored.repeats_RLH.astype(np.float64),
            RepeatScores(inputs.scored.scores_LH.astype(np.float64)),
            (),
        )
    if job.config.resolved_layers is not None:
        _require_candidates(job.config, reader.shape_without_weights())
    if inputs.reads_rows:
        reader.import_libraries()
    with job.timer.phase("prepare"):
        target = job.inputs.read(inputs.target).records if inputs.target is not None else ()
        pool = job.inputs.pool(inputs.pool, target) if inputs.pool is not None else None
    repeats = []
    for task in inputs.tasks(reader, target, pool):
        if inputs.reads_rows:
            seed_everything(derive_seed(job.config.seed, "score-heads", task.repeat))
        method = inputs.method(task)
        reader.run(method.passes())
        with job.timer.phase("score"):
            found = method.score()
        repeats.append(found.scores_LH)
    shape = reader.shape if inputs.reads_rows else reader.shape_without_weights()
    return shape, np.stack(repeats), found, target


def _candidates(config: ScoreHeadsConfig, shape: HeadGeometry) -> NDArray[np.bool_]:
    """Return the heads that may be selected for training, `[L, H]`."""
    return candidate_heads(config.resolved_layers, shape.exists_LH, shape.head_budget(config.ratio))


def _require_candidates(config: ScoreHeadsConfig, shape: HeadGeometry) -> None:
    """Refuse layers that the model has not, or that hold too few heads, before anything is computed."""
    if config.reads_apart:
        select_readers(np.zeros(shape.exists_LH.shape), config.depth, shape.exists_LH, shape.layers)
    budget, there = shape.head_budget(config.ratio), int(_candidates(config, shape).sum())
    if budget > there:
        raise UsageError(
            f"--ratio {config.ratio:g} asks for {budget} heads; layers {config.layers} have {there}",
            hint="name more layers, or give a smaller --ratio",
        )


def _readers(
    job: StageRun[ScoreHeadsConfig], scores_LH: NDArray[np.float64], shape: HeadGeometry, notes: Mapping[str, Any]
) -> ReadingHeads:
    """Return the heads that read rows, by scores that were found here or were given."""
    scored = job.inputs.manifests.get("scores")
    known = notes if scored is None else scored.summary
    rows = {} if "rows" not in known else {"target_rows": known["rows"]}
    return select_readers(scores_LH, job.config.depth, shape.exists_LH, shape.layers, **rows)


def _readings(inputs: _Inputs, heads: HeadScores, found: Readings | None) -> Readings | None:
    """Return what the reading heads put out on the rows that were read, here or for the scores that were given."""
    if heads.reading is None:
        return None
    if found is not None:
        return found.of(heads.reading.all_LH)
    kept = inputs.readings
    return kept if kept is not None and (kept.heads_LH == heads.reading.all_LH).all() else None


def _sureness(readings: Readings, target: int, shape: HeadGeometry) -> dict[str, Any]:
    """Return how well the reading heads together tell the target's rows from others, with an interval."""
    outputs_nKPd = readings.outputs_nKPd
    dims_K = shape.dims(readings.heads_LH)
    found = held_out_area(outputs_nKPd[:target], outputs_nKPd[target:], dims_K=dims_K)
    return {"area": found.value, "area_low": found.low, "area_high": found.high}


def _reading_settings(reading: ReadingHeads | None) -> dict[str, Any]:
    """Return what a report draws of the heads that read rows."""
    if reading is None:
        return {}
    return {
        "reads_all": np.flatnonzero(reading.shallow_LH).tolist(),
        "reads_best": np.flatnonzero(reading.deep_LH).tolist(),
    }


def _selection_rule(
    config: ScoreHeadsConfig, method: type[HeadMethod], shape: HeadGeometry, candidates_LH: NDArray[np.bool_]
) -> Callable[[NDArray[np.float64]], NDArray[np.bool_]]:
    """Return what makes a selection of the candidates from scores, `[L, H]`."""
    budget = shape.head_budget(config.ratio)
    if config.resolved_selection == "spread" and method.ranks:
        return lambda scores: select_spread(scores, budget, candidates_LH, shape.layers)
    return lambda scores: select_top(scores, budget, candidates_LH)


def _require_finite(scores_LH: NDArray[np.float64], shape: HeadGeometry, method: str) -> None:
    unknown = np.argwhere(shape.exists_LH & ~np.isfinite(scores_LH))
    if not unknown.size:
        return
    layer, head = unknown[0]
    raise NonFiniteError(
        f"the {method} score of layer {layer}, head {head} is not a finite number; nothing was written",
        hint=NOT_FINITE_HINT,
    )


def _selection(heads: HeadScores) -> dict[str, object]:
    """Say how many heads were selected, and how they spread: heads of one group share their keys and values."""
    shape, reading = heads.geometry, heads.reading
    readers = (
        {}
        if reading is None
        else {
            "heads_reading_all": int(reading.shallow_LH.sum()),
            "heads_reading_best": int(reading.deep_LH.sum()),
            "depths": list(reading.depths),
        }
    )
    return readers | {
        "method": heads.method,
        "heads_selected": int(heads.selected_LH.sum()),
        "heads_total": shape.total_heads,
        "groups_touched": len(shape.groups_of(heads.selected_LH)),
        "groups_total": shape.total_groups,
        "layers_touched": int(heads.selected_LH.any(axis=1).sum()),
    }


def _draw(job: StageRun[ScoreHeadsConfig], heads: HeadScores, folder: Path) -> None:
    from p2d_cli.reporting.plots import head_heatmap

    title = f"{heads.method}: {int(heads.selected_LH.sum())} of {heads.geometry.total_heads} heads"
    with job.drawing(PICTURE_NAME):
        head_heatmap(heads.scores_LH, heads.selected_LH, folder / PICTURE_NAME, title=title, reading=heads.reading)
