"""report-aer: what did it cost, selection included, against full fine-tuning?

Only manifests are read: each evaluation's manifest carries the costs of all that it was made from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from p2d_cli.artifacts.digests import digest_file, digest_json
from p2d_cli.artifacts.evaluation import metric_values
from p2d_cli.artifacts.manifest import InputEntry
from p2d_cli.artifacts.report import REPORT_PICTURE_NAME, save_report
from p2d_cli.artifacts.store import open_artifact
from p2d_cli.config import ReportAerConfig, Resolved
from p2d_cli.core.aer import DEFAULT_CONFIDENCE, AerReport, MetricValue, RunCost, StageCost, compare
from p2d_cli.core.metrics import ZERO_ONE_METRICS, wilson_interval
from p2d_cli.engine.stage_run import Outcome, RunOptions, StageResult, StageRun
from p2d_cli.errors import ArtifactError, DataError, first_line
from p2d_cli.recipes.recipe import read_recipe_text
from p2d_cli.registry import HEAD_METHODS, ROW_METHODS
from p2d_cli.reporting.table import share_text


def run(resolved: Resolved[ReportAerConfig], options: RunOptions | None = None) -> StageResult:
    """Compare evaluations with a reference and write a report artifact."""
    job = StageRun("report-aer", resolved, options or RunOptions())
    config = job.config
    _open_run(job, "reference", config.reference)
    # The reference is compared with itself too, so that its row stands in the table.
    specs = list(dict.fromkeys([*config.evaluations, config.reference]))
    runs = _distinct_names([_open_run(job, f"evaluation {number}", spec) for number, spec in enumerate(specs, start=1)])
    reference = next(run for run in runs if run.path == config.reference)
    report = compare(runs, reference, allow_mixed=config.allow_mixed)
    if config.recipe is not None:
        _read_recipe(config.recipe)
        job.inputs.entries["recipe"] = InputEntry(
            kind="recipe", digest=digest_file(Path(config.recipe).expanduser()), source=config.recipe
        )
    return job.complete(lambda folder: _compute(job, report, folder), alone=True)


def _read_recipe(spec: str) -> str:
    try:
        return read_recipe_text(Path(spec).expanduser())
    except (OSError, UnicodeDecodeError) as problem:
        raise DataError(
            f"cannot read the recipe {spec}: {first_line(problem)}", hint="give its file, or leave --recipe out"
        ) from None


def _open_run(job: StageRun[ReportAerConfig], name: str, spec: str) -> RunCost:
    """Register an evaluation as an input, and return the costs and scores that its manifest records."""
    manifest = open_artifact(Path(spec).expanduser(), "evaluation")
    # Costs are what a report says, so here the whole manifest counts, seconds included.
    job.inputs.entries[name] = InputEntry(
        kind="evaluation", digest=digest_json(manifest.model_dump(mode="json", exclude={"inputs"})), source=spec
    )
    try:
        for entry in manifest.ledger:
            _Entry.model_validate(entry, strict=True)
    except ValidationError as problems:
        first = problems.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ArtifactError(
            f"the costs in the manifest of {spec} cannot be read: {where}: {first['msg']}",
            hint="redo the stages that led to it",
        ) from None
    stages = tuple(StageCost.from_dict(entry) for entry in manifest.ledger)
    name = _describe(stages)
    run = RunCost(name, stages, _scores(manifest.summary["metrics"], stages), path=spec, label=name)
    return replace(run, is_control=_is_control(run))


def _scores(entries: dict[str, dict[str, Any]], stages: Sequence[StageCost]) -> dict[str, MetricValue]:
    """Return the scores; means of 0 and 1 to which an earlier version gave a bootstrap's interval get Wilson's."""
    confidence = next((cost.settings.get("confidence") for cost in stages[::-1] if cost.stage == "eval"), None)

    def renewed(metric: MetricValue) -> MetricValue:
        hits = round(metric.value * metric.count)
        low, high = wilson_interval(hits, metric.count, confidence=confidence or DEFAULT_CONFIDENCE)
        return replace(metric, low=low, high=high)

    scores = metric_values(entries)
    return {
        name: renewed(metric) if name in ZERO_ONE_METRICS and 0 <= metric.value <= 1 else metric
        for name, metric in scores.items()
    }


def _is_control(run: RunCost) -> bool:
    """Say whether a run's heads or rows were chosen by what other methods have to beat."""
    chosen = ((HEAD_METHODS, run.trained("heads_method")), (ROW_METHODS, run.trained("data_method")))
    return any(method in methods and methods[method].is_control for methods, method in chosen)


class _Settings(BaseModel):
    """What a report takes from the settings of a stage."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    scope: str | None = None
    heads_method: str | None = None
    head_share: float | None = None
    data_method: str | None = None
    row_share: float | None = None
    rows_asked: str | None = None
    trainable_share: float | None = None
    seed: int | None = None
    precision: float | None = None
    confidence: Annotated[float, Field(gt=0, lt=1)] = DEFAULT_CONFIDENCE
    shape: Annotated[list[Annotated[int, Field(gt=0)]], Field(min_length=2, max_length=2)] | None = None
    selected: list[Annotated[int, Field(ge=0)]] = []
    reads_all: list[Annotated[int, Field(ge=0)]] = []
    reads_best: list[Annotated[int, Field(ge=0)]] = []
    levels: Annotated[str, Field(pattern="^[0-9.]*$")] = ""

    @model_validator(mode="after")
    def _heads_fit(self) -> _Settings:
        """Refuse a map of heads whose parts are not of one model."""
        if not self.levels:
            return self
        heads = math.prod(self.shape or [0])
        if heads != len(self.levels) or max([*self.selected, *self.reads_all, *self.reads_best], default=0) >= heads:
            raise ValueError(f"the heads do not fit the shape {self.shape}")
        return self


class _Entry(BaseModel):
    """The types of a cost entry, whose keys `StageCost.from_dict` checks."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    stage: str
    artifact: str
    seconds: dict[str, Annotated[float, Field(ge=0)]]
    hardware: str
    precision: str
    epochs: float | None = None
    steps_done: Annotated[int, Field(ge=0)] | None = None
    steps_planned: Annotated[int, Field(ge=0)] | None = None
    model: str = ""
    tokens: int | None = None
    peak_gib: float | None = None
    settings: _Settings = _Settings()


def _describe(stages: Sequence[StageCost], told: Mapping[str, str] = MappingProxyType({})) -> str:
    """Name a run after what was trained on what, with the shares and epochs that tell it from others, in words."""
    training = next((cost for cost in stages if cost.stage == "train"), None)
    if training is None:
        return "base model"
    trained = training.settings
    heads, rows = (f" {told[name]}" if name in told else "" for name in ("head_share", "row_share"))
    scope, data = trained.get("scope"), trained.get("data_method")
    if scope == "heads":
        scope = _parts_of(trained)
    name = f"{scope}{heads}, {'all' if data in {None, 'full'} else data} rows{rows}"
    return f"{name}, {told['epochs']}" if "epochs" in told else name


def _parts_of(trained: Mapping[str, Any]) -> str:
    """Say what a training of scope heads has trained; without a share of heads, channels alone."""
    channels, share = trained.get("channels"), trained.get("head_share")
    if channels and share is None:
        return "channels"
    heads = "all heads" if share == 1 else f"{trained.get('heads_method')} heads"
    return f"{heads} and channels" if channels else heads


def _distinct_names(runs: list[RunCost]) -> list[RunCost]:
    """Tell apart runs that would be called the same: by shares and epochs, by seeds, else by their folders."""
    runs = [_with_what_tells(run, [other for other in runs if other.name == run.name]) for run in runs]
    names = [run.name for run in runs]
    seeded = [f"{run.name}, seed {seed}" if (seed := run.trained("seed")) is not None else run.name for run in runs]
    distinct = []
    for run, name in zip(runs, seeded, strict=True):
        if names.count(run.name) > 1:
            run = replace(run, name=name if seeded.count(name) == 1 else f"{run.name} ({Path(run.path).name})")
        distinct.append(run)
    return distinct


def _with_what_tells(run: RunCost, namesakes: Sequence[RunCost]) -> RunCost:
    """Add to a run's name the shares, and the epochs, in which others of that name differ from it."""
    told = {}
    if len({other.trained("head_share") for other in namesakes}) > 1:
        told["head_share"] = share_text(run.trained("head_share"))
    if rows := _rows_that_tell(run, namesakes):
        told["row_share"] = rows
    epochs = {cost.epochs for other in namesakes for cost in other.stages_of("train")[:1]}
    own = next((cost.epochs for cost in run.stages_of("train")), None)
    if len(epochs) > 1 and own is not None:
        told["epochs"] = f"{own:g} epoch{'' if own == 1 else 's'}"
    if not told:
        return run
    name = _describe(run.stages, told)
    return replace(run, name=name, label=name)


def _rows_that_tell(run: RunCost, namesakes: Sequence[RunCost]) -> str:
    """Return how many rows were asked for, if that differs; else how many were kept, if that differs for one seed."""

    def asked(one: RunCost) -> str:
        return one.trained("rows_asked") or share_text(one.trained("row_share"))

    if len({asked(other) for other in namesakes}) > 1:
        return asked(run)
    kept = {other.trained("row_share") for other in namesakes if other.trained("seed") == run.trained("seed")}
    return share_text(run.trained("row_share")) if len(kept) > 1 else ""


def _compute(job: StageRun[ReportAerConfig], report: AerReport, folder: Path) -> Outcome:
    from p2d_cli.reporting.html import aer_html
    from p2d_cli.reporting.markdown import aer_markdown

    with job.saving():
        document = {"schema": "p2d.aer/1", **report.to_dict()}
        recipe = None if job.config.recipe is None else _read_recipe(job.config.recipe)
        save_report(folder, document, markdown=aer_markdown(report), html=aer_html(report, recipe=recipe))
        _draw(job, report, folder)
    return Outcome(
        summary=report.to_dict(),
        settings={},
        precision=report.reference.precision,
        device="cpu",
        extras=frozenset({REPORT_PICTURE_NAME}),
        charged=False,
    )


def _draw(job: StageRun[ReportAerConfig], report: AerReport, folder: Path) -> None:
    from p2d_cli.reporting.plots import aer_scatter

    with job.drawing(REPORT_PICTURE_NAME):
        aer_scatter(report, folder / REPORT_PICTURE_NAME)
