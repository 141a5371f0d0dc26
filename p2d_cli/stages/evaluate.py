"""eval: how well does a model, with or without an adapter, answer held-out rows?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from p2d_cli.artifacts.cards import CARD_NAME
from p2d_cli.artifacts.digests import digest_file, digest_json
from p2d_cli.artifacts.evaluation import metric_entries, save_evaluation
from p2d_cli.artifacts.manifest import InputEntry
from p2d_cli.config import EvalConfig, Resolved
from p2d_cli.core.aer import MetricValue
from p2d_cli.core.cost import StagePlan
from p2d_cli.core.metrics import (
    ANSWER_METRICS,
    bootstrap_interval,
    corpus_perplexity,
    perplexity_interval,
)
from p2d_cli.data.raw_rows import RowSource
from p2d_cli.data.records import Record, require_number
from p2d_cli.errors import DataError
from p2d_cli.modeling.model_files import ModelFiles
from p2d_cli.runtime.seeding import generator
from p2d_cli.stages.adapters import open_adapter
from p2d_cli.stages.execution import Outcome, RunOptions, StageResult, StageRun
from p2d_cli.stages.model_checks import check_evaluation

if TYPE_CHECKING:
    from p2d_cli.stages.workbench import Workbench


@dataclass(frozen=True)
class _Inputs:
    model: ModelFiles
    adapter: Path | None
    data: RowSource | None
    """None where the tasks of lm-eval bring their own rows."""
    choices: tuple[str, ...] | None


@dataclass(frozen=True)
class _Measured:
    """What an evaluation says."""

    metrics: dict[str, MetricValue]
    rows: list[dict[str, Any]]
    notes: dict[str, Any]
    """Further figures for the summary."""


def run(resolved: Resolved[EvalConfig], options: RunOptions | None = None) -> StageResult:
    """Evaluate and write an evaluation artifact.

    Raises:
        P2DError: as its message says; see `p2d_cli.errors` for the exit codes.
    """
    job = StageRun("eval", resolved, options or RunOptions())
    config = job.config
    if config.lm_eval:
        _open_tasks(job)
        job.inputs.open_chat_template()
    model = job.inputs.model(config.model)
    inputs = _Inputs(
        model=model,
        adapter=open_adapter(job, config.adapter) if config.adapter is not None else None,
        data=job.inputs.rows("data", config.data) if config.data is not None else None,
        choices=open_choices(job, config.choices) if config.choices is not None else None,
    )
    return job.complete(
        lambda folder: _compute(job, inputs, folder),
        lambda unfinished: _plan(job, inputs, unfinished),
        # lm-eval shares its work in ways of its own, or not at all.
        alone=inputs.data is None,
        check=lambda: check_evaluation(model),
    )


def _plan(job: StageRun[EvalConfig], inputs: _Inputs, unfinished: Path) -> StagePlan:
    from p2d_cli.stages.plan_tuning import plan_eval
    from p2d_cli.stages.planned_rows import read_sample

    data = read_sample(job, inputs.data, limit=job.config.limit) if inputs.data is not None else None
    return plan_eval(job, inputs.model, data, inputs.choices, inputs.adapter, unfinished)


def open_choices(job: StageRun[EvalConfig], spec: str) -> tuple[str, ...]:
    """Read the answers that rows without their own choose from, and register the file as an input.

    Raises:
        DataError: it is not a JSON list of at least two texts.
    """
    path = Path(spec).expanduser()
    if path.exists() and not path.is_file():
        raise DataError(f"--choices {spec} is no file", hint="give a file with a JSON list")
    try:
        choices = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as problem:
        raise DataError(
            f"--choices {spec} cannot be read as JSON: {problem}", hint='give a file such as ["yes", "no"]'
        ) from None
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(choice, str) for choice in choices):
        raise DataError(
            f"--choices {spec}: expected a JSON list of at least two strings", hint='write it as ["yes", "no"]'
        )
    job.inputs.entries["choices"] = InputEntry(kind="choices", digest=digest_file(path), source=spec)
    return tuple(choices)


def _open_tasks(job: StageRun[EvalConfig]) -> None:
    """Register what lm-eval would run: its version, which decides what a task is, and the folder of further tasks."""
    from p2d_cli.modeling.harness import harness_version

    tasks = {"version": harness_version(), "tasks": list(job.config.lm_eval)}
    job.inputs.entries["lm_eval"] = InputEntry(
        kind="tasks", digest=digest_json(tasks), source=",".join(job.config.lm_eval)
    )
    if (spec := job.config.lm_eval_tasks) is not None:
        folder = Path(spec).expanduser()
        if not folder.is_dir():
            raise DataError(f"--lm-eval-tasks {spec} is not a folder", hint="give a folder with task files of lm-eval")
        files = sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        digest = digest_json([[path.relative_to(folder).as_posix(), digest_file(path)] for path in files])
        job.inputs.entries["lm_eval_tasks"] = InputEntry(kind="tasks", digest=digest, source=spec)


def _compute(job: StageRun[EvalConfig], inputs: _Inputs, folder: Path) -> Outcome:
    from p2d_cli.modeling.head_adapter import load_adapter
    from p2d_cli.stages.workbench import open_workbench

    records: Sequence[Record] = ()
    if inputs.data is not None:
        with job.timer.phase("prepare"):
            records = job.inputs.read(inputs.data, limit=job.config.limit).records
            _check_references(job.config, records, inputs.choices)
    bench = open_workbench(job, inputs.model, job.config)
    if inputs.adapter is not None:
        with job.timer.phase("load"):
            bench.model = load_adapter(bench.model, inputs.adapter)
    with job.timer.phase("evaluate"):
        measured = _run_tasks(job, bench) if inputs.data is None else _measure(job, bench, records, inputs.choices)
    if job.is_main:
        with job.saving():
            save_evaluation(folder, measured.metrics, measured.rows)
    return Outcome(
        summary={"rows": len(measured.rows), "metrics": metric_entries(measured.metrics), **measured.notes},
        settings={
            "rows": len(measured.rows),
            "confidence": job.config.confidence,
            "data": job.config.data or ",".join(job.config.lm_eval),
        },
        precision=bench.precision,
        device=bench.device,
        tokens=bench.tokens,
        decoration=frozenset({CARD_NAME}),
    )


def _check_references(config: EvalConfig, records: Sequence[Record], choices: tuple[str, ...] | None) -> None:
    """Refuse a row whose reference cannot be judged, before the model is asked.

    Raises:
        DataError: naming the row.
    """
    for record in records if "number_match" in config.metric else ():
        require_number(record)
    for record in records if "accuracy" in config.metric else ():
        _offered(record, choices)


def _run_tasks(job: StageRun[EvalConfig], bench: Workbench) -> _Measured:
    """Hand the model to lm-eval; its standard errors become intervals, as of a normal distribution."""
    from p2d_cli.modeling.harness import harness_version, run_tasks
    from p2d_cli.modeling.token_ids import checked_ids

    config = job.config
    with checked_ids(bench.model, bench.known_ids, "a row of lm-eval"):
        found = run_tasks(
            bench.model,
            bench.tokenizer,
            config.lm_eval,
            folder=Path(config.lm_eval_tasks).expanduser() if config.lm_eval_tasks is not None else None,
            chat_template=bench.template.chat_template,
            frame=bench.template.simple_frame(bench.tokenizer),
            system=job.inputs.system_prompt,
            limit=config.limit,
            max_length=bench.max_length,
            # lm-eval knows rows, not tokens: as many as fit the budget if all are as long as may be.
            batch_size=max(1, bench.token_budget // bench.max_length),
            progress=job.progress.task,
        )
    bench.tokens += found.tokens
    errors = NormalDist().inv_cdf((1 + config.confidence) / 2)
    metrics = {
        name: MetricValue(
            value=figure.value,
            low=figure.value - errors * figure.stderr,
            high=figure.value + errors * figure.stderr,
            count=figure.count,
        )
        for name, figure in found.figures.items()
    }
    return _Measured(metrics, found.rows, {"lm_eval": harness_version()})


def _measure(
    job: StageRun[EvalConfig], bench: Workbench, records: Sequence[Record], choices: tuple[str, ...] | None
) -> _Measured:
    """Compute p2d's own metrics, each where its rows were read."""
    from p2d_cli.stages.row_scoring import generate_turns

    config = job.config
    columns: dict[str, Any] = {
        "id": [record.id for record in records],
        "prompt": [record.prompt for record in records],
        "reference": [bench.template.reference(bench.tokenizer, record) for record in records],
    }
    metrics: dict[str, MetricValue] = {}
    notes: dict[str, Any] = {}
    if generated := [name for name in config.metric if name in ANSWER_METRICS]:
        columns["generated"] = generate_turns(job, bench, records)
        columns["prediction"] = [
            bench.template.frame(bench.tokenizer, record).answer(turn)
            for record, turn in zip(records, columns["generated"], strict=True)
        ]
        _judge(config, generated, columns, metrics, notes)
    if "accuracy" in config.metric:
        _choose(job, bench, records, choices, columns, metrics, notes)
    if "perplexity" in config.metric:
        _perplexity(job, bench, records, columns, metrics)
    ordered = {name: metrics[name] for name in sorted(metrics, key=lambda name: _position(config, name))}
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return _Measured(ordered, rows, notes)


def _position(config: EvalConfig, name: str) -> tuple[int, str]:
    return config.metric.index(name.removesuffix("_strict")), name


def _judge(
    config: EvalConfig,
    wanted: Sequence[str],
    columns: dict[str, Any],
    metrics: dict[str, MetricValue],
    notes: dict[str, Any],
) -> None:
    """Add each metric of the generated answers, by row and on average; an unparseable answer counts as wrong."""
    for name in wanted:
        for figure, judge in ANSWER_METRICS[name].items():
            judged = [
                judge(answer, reference)
                for answer, reference in zip(columns["prediction"], columns["reference"], strict=True)
            ]
            if unparsed := sum(value is None for value in judged):
                notes[f"{figure}_unparsed"] = unparsed
            columns[figure] = [0.0 if value is None else float(value) for value in judged]
            metrics[figure] = _mean_with_interval(config, figure, np.array(columns[figure]))


def _choose(
    job: StageRun[EvalConfig],
    bench: Workbench,
    records: Sequence[Record],
    choices: tuple[str, ...] | None,
    columns: dict[str, Any],
    metrics: dict[str, MetricValue],
    notes: dict[str, Any],
) -> None:
    """Pick each row's likeliest choice by the log-likelihood of the whole choice, and add the accuracy."""
    from p2d_cli.stages.row_scoring import weigh_choices

    offered = [_offered(record, choices) for record in records]
    missing = [
        reference.strip() not in {option.strip() for option in options}
        for reference, options in zip(columns["reference"], offered, strict=True)
    ]
    if any(missing):
        notes["answers_not_offered"] = sum(missing)
        first = records[missing.index(True)]
        job.progress.note(
            f"{sum(missing)} rows offer other choices than their answer, as {first.where}; they count as wrong"
        )
    weights = weigh_choices(job, bench, records, offered)
    chosen = [options[int(np.argmax(weight))] for options, weight in zip(offered, weights, strict=True)]
    columns["choice"] = chosen
    columns["accuracy"] = [
        float(choice.strip() == reference.strip())
        for choice, reference in zip(chosen, columns["reference"], strict=True)
    ]
    metrics["accuracy"] = _mean_with_interval(job.config, "accuracy", np.array(columns["accuracy"]))


def _offered(record: Record, choices: tuple[str, ...] | None) -> tuple[str, ...]:
    options = record.choices or choices
    if not options:
        raise DataError(
            f"{record.where}: the metric accuracy needs choices, and the row has none",
            hint="add a column 'choices', or give --choices FILE with a JSON list",
        )
    return options


def _perplexity(
    job: StageRun[EvalConfig],
    bench: Workbench,
    records: Sequence[Record],
    columns: dict[str, Any],
    metrics: dict[str, MetricValue],
) -> None:
    """Perplexity of the reference completions, over all their tokens; the interval resamples rows."""
    from p2d_cli.stages.row_scoring import weigh_completions

    sums_N, counts_N = weigh_completions(job, bench, "weigh references", records)
    columns["log_likelihood"] = sums_N.tolist()
    columns["completion_tokens"] = counts_N.tolist()
    rng = generator(job.config.seed, "eval", "bootstrap", "perplexity")
    low, high = perplexity_interval(sums_N, counts_N, confidence=job.config.confidence, rng=rng)
    value = corpus_perplexity(float(sums_N.sum()), int(counts_N.sum()))
    metrics["perplexity"] = MetricValue(value=value, low=low, high=high, count=len(records))


def _mean_with_interval(config: EvalConfig, name: str, values: NDArray[np.float64]) -> MetricValue:
    rng = generator(config.seed, "eval", "bootstrap", name)
    low, high = bootstrap_interval(values, confidence=config.confidence, rng=rng)
    return MetricValue(value=float(values.mean()), low=low, high=high, count=len(values))
