"""report-aer: what did it cost, selection included, against full fine-tuning?

Only manifests are read: each evaluation's manifest carries the costs of all that it was made from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from p2d_cli.artifacts.digests import digest_json
from p2d_cli.artifacts.manifest import InputEntry, Manifest
from p2d_cli.artifacts.report import REPORT_PICTURE_NAME, save_report
from p2d_cli.artifacts.store import open_artifact
from p2d_cli.config import ReportAerConfig, Resolved
from p2d_cli.core.aer import AerReport, MetricValue, RunCost, StageCost, compare
from p2d_cli.errors import UnavailableError
from p2d_cli.stages.execution import Outcome, RunOptions, StageResult, StageRun


def run(resolved: Resolved[ReportAerConfig], options: RunOptions | None = None) -> StageResult:
    """Compare evaluations with a reference and write a report artifact.

    Raises:
        P2DError: as its message says; see `p2d_cli.errors` for the exit codes.
    """
    job = StageRun("report-aer", resolved, options or RunOptions())
    config = job.config
    reference = _open_run(job, "reference", config.reference)
    # The reference is compared with itself too, so that its row stands in the table.
    specs = list(dict.fromkeys([*config.evaluations, config.reference]))
    runs = [_open_run(job, f"evaluation {number}", spec) for number, spec in enumerate(specs, start=1)]
    report = compare(_distinct_names(runs), _named_like(reference, runs), allow_mixed=config.allow_mixed)
    return job.complete(lambda folder: _compute(job, report, folder), alone=True)


def _open_run(job: StageRun[ReportAerConfig], name: str, spec: str) -> RunCost:
    manifest = open_artifact(Path(spec).expanduser(), "evaluation")
    # Costs are what a report says, so here the whole manifest counts, seconds included.
    job.inputs[name] = InputEntry(
        kind="evaluation", digest=digest_json(manifest.model_dump(mode="json", exclude={"inputs"})), source=spec
    )
    return run_cost(manifest, spec)


def run_cost(manifest: Manifest, path: str) -> RunCost:
    """Return the costs and scores that an evaluation's manifest records."""
    stages = tuple(StageCost.from_dict(entry) for entry in manifest.ledger)
    metrics = {name: MetricValue(**value) for name, value in manifest.summary["metrics"].items()}
    return RunCost(name=_describe(stages), stages=stages, metrics=metrics, path=path)


def _describe(stages: tuple[StageCost, ...]) -> str:
    """Name a run after what was trained on what: `contrast heads, p2d rows`."""
    trained = next((cost.settings for cost in stages if cost.stage == "train"), None)
    if trained is None:
        return "base model"
    scope = trained["scope"]
    if scope == "heads":
        scope = "all heads" if trained["head_share"] == 1 else f"{trained['heads_method']} heads"
    data = trained["data_method"]
    return f"{scope}, {'all' if data in {None, 'full'} else data} rows"


def _distinct_names(runs: list[RunCost]) -> list[RunCost]:
    """Add the artifact's folder name where several runs would be called the same."""
    from dataclasses import replace

    names = [run.name for run in runs]
    return [
        replace(run, name=f"{run.name} ({Path(run.path).name})") if names.count(run.name) > 1 else run for run in runs
    ]


def _named_like(reference: RunCost, runs: list[RunCost]) -> RunCost:
    from dataclasses import replace

    same = next(run for run in _distinct_names(runs) if run.path == reference.path)
    return replace(reference, name=same.name)


def _compute(job: StageRun[ReportAerConfig], report: AerReport, folder: Path) -> Outcome:
    from p2d_cli.reporting.html import aer_html
    from p2d_cli.reporting.markdown import aer_markdown

    with job.saving():
        document = {"schema": "p2d.aer/1", **report.to_dict()}
        save_report(folder, document, markdown=aer_markdown(report), html=aer_html(report))
        _draw(job, report, folder)
    return Outcome(
        summary=report.to_dict(),
        settings={},
        precision=report.reference.precision,
        device="cpu",
        decoration=frozenset({REPORT_PICTURE_NAME}),
        charged=False,
    )


def _draw(job: StageRun[ReportAerConfig], report: AerReport, folder: Path) -> None:
    from p2d_cli.reporting.plots import aer_scatter

    try:
        aer_scatter(report, folder / REPORT_PICTURE_NAME)
    except UnavailableError as missing:
        job.progress.note(f"no {REPORT_PICTURE_NAME}: {missing.message}")


def report_of(manifest: Manifest) -> dict[str, Any]:
    """Return the comparison that a report's manifest carries."""
    return manifest.summary
