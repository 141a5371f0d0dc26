"""eval: how well does a model, with or without an adapter, answer held-out rows?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING

from p2d_cli.artifacts.cards import CARD_NAME
from p2d_cli.artifacts.digests import digest_file, digest_json
from p2d_cli.artifacts.evaluation import metric_entries, save_evaluation
from p2d_cli.artifacts.manifest import InputEntry
from p2d_cli.config import EvalConfig, Resolved
from p2d_cli.core.aer import MetricValue
from p2d_cli.core.metrics import wilson_interval
from p2d_cli.data.raw_rows import RowSource
from p2d_cli.data.records import Record
from p2d_cli.engine import caveats
from p2d_cli.engine.cost import StagePlan
from p2d_cli.engine.counting import CountingReader
from p2d_cli.engine.reader import ModelReader
from p2d_cli.engine.stage_run import Outcome, RunOptions, StageResult, StageRun
from p2d_cli.errors import DataError
from p2d_cli.modeling.model_files import ModelFiles
from p2d_cli.modeling.suitability import Needs, require
from p2d_cli.modeling.token_ids import checked_ids
from p2d_cli.stages.adapters import open_adapter
from p2d_cli.stages.measuring import Measured, Measuring, require_references

if TYPE_CHECKING:
    from p2d_cli.modeling.harness import TaskFigure

PHASE = "evaluate"
NEEDS = Needs(tokenizer=True, logits=True)


@dataclass(frozen=True)
class _Inputs:
    model: ModelFiles
    adapter: Path | None
    data: RowSource | None
    """None where the tasks of lm-eval bring their own rows."""
    choices: tuple[str, ...] | None


def run(resolved: Resolved[EvalConfig], options: RunOptions | None = None) -> StageResult:
    """Evaluate and write an evaluation artifact."""
    job = StageRun("eval", resolved, options or RunOptions())
    config = job.config
    if config.lm_eval:
        _open_tasks(job)
        job.inputs.open_chat_template()
    model = job.inputs.model(config.model)
    job.shown = "example" if {"accuracy", "perplexity"} & set(config.metric) else "prompt"
    adapter = None
    if config.adapter is not None and job.inputs.planned("adapter", config.adapter) is None:
        adapter = open_adapter(job, config.adapter)
    inputs = _Inputs(
        model=model,
        adapter=adapter,
        data=job.inputs.rows("data", config.data) if config.data is not None else None,
        choices=open_choices(job, config.choices) if config.choices is not None else None,
    )
    return job.complete(
        lambda folder: _compute(job, inputs, folder),
        lambda unfinished: _plan(job, inputs, unfinished),
        # lm-eval shares its work in ways of its own, or not at all.
        alone=inputs.data is None,
        check=lambda: require(model, NEEDS),
    )


def _plan(job: StageRun[EvalConfig], inputs: _Inputs, unfinished: Path | None) -> StagePlan:
    reader = CountingReader(job, inputs.model, unfinished)
    reader.need({"weights": reader.size.weight_bytes(reader.itemsize)})
    if inputs.adapter is not None and (weights := inputs.adapter / "adapter_model.safetensors").is_file():
        reader.need({"adapter": weights.stat().st_size})
    if inputs.data is None:
        reader.notes.append("the tasks of lm-eval bring their own rows, which are not counted here")
        return reader.plan()
    records = reader.sample("data", inputs.data, limit=job.config.limit)
    require_references(job.config, records, inputs.choices)
    reader.run(Measuring(job.config, reader, records, inputs.choices).passes())
    mean = sum(len(record.text) for record in records) / max(len(records), 1)
    reader.disk["artifact"] = round(2 * mean * len(records))
    return reader.plan()


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
    records: Sequence[Record] = ()
    reader = ModelReader(job, inputs.model, adapter=inputs.adapter, phases=(PHASE, PHASE))
    reader.import_libraries()
    if inputs.data is not None:
        with job.timer.phase("prepare"):
            records = job.inputs.read(inputs.data, limit=job.config.limit).records
            require_references(job.config, records, inputs.choices)
    with job.timer.phase(PHASE):
        if inputs.data is None:
            measured = _run_tasks(job, reader)
        else:
            measuring = Measuring(job.config, reader, records, inputs.choices)
            reader.run(measuring.passes())
            measured = measuring.result()
    if job.is_main:
        with job.saving():
            save_evaluation(folder, measured.metrics, measured.rows, answers_cut=measured.notes.get("answers_cut"))
    return Outcome(
        summary={"rows": len(measured.rows), "metrics": metric_entries(measured.metrics), **measured.notes},
        settings={
            "rows": len(measured.rows),
            "confidence": job.config.confidence,
            "data": job.config.data or ",".join(job.config.lm_eval),
        },
        precision=reader.precision,
        device=reader.device,
        tokens=reader.tokens,
        extras=frozenset({CARD_NAME}),
        warnings=[]
        if inputs.data is None
        else caveats.of_answers(len(measured.rows), measured.notes.get("answers_cut", 0), job.config.max_new_tokens),
    )


def _run_tasks(job: StageRun[EvalConfig], reader: ModelReader) -> Measured:
    """Hand the model to lm-eval, and give its figures intervals."""
    from p2d_cli.modeling.harness import harness_version, run_tasks

    config = job.config
    with checked_ids(reader.model, reader.known_ids, "a row of lm-eval"):
        found = run_tasks(
            reader.model,
            reader.tokenizer,
            config.lm_eval,
            folder=Path(config.lm_eval_tasks).expanduser() if config.lm_eval_tasks is not None else None,
            chat_template=reader.template.chat_template,
            frame=reader.template.simple_frame(reader.tokenizer),
            system=job.inputs.system_prompt,
            limit=config.limit,
            max_length=reader.max_length,
            # lm-eval knows rows, not tokens: as many as fit the budget if all are as long as may be.
            batch_size=max(1, reader.token_budget // reader.max_length),
            progress=job.progress.task,
        )
    reader.tokens += found.tokens
    metrics = {}
    for name, figure in found.figures.items():
        scores = [row[name] for row in found.rows if row.get(name) is not None]
        low, high = _interval_of(figure, scores, config.confidence)
        metrics[name] = MetricValue(value=figure.value, low=low, high=high, count=figure.count)
    return Measured(metrics, found.rows, {"lm_eval": harness_version()})


def _interval_of(figure: TaskFigure, scores: Sequence[float], confidence: float) -> tuple[float, float]:
    """Return the interval of a figure of lm-eval: Wilson's if it is the mean of scores of 0 and 1, else a normal one.

    lm-eval's standard error of rows that all score the same is 0.
    """
    if len(scores) == figure.count and set(scores) <= {0.0, 1.0}:
        return wilson_interval(round(sum(scores)), figure.count, confidence=confidence)
    reach = NormalDist().inv_cdf((1 + confidence) / 2) * figure.stderr
    return figure.value - reach, figure.value + reach
