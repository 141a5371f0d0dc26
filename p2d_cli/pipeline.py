"""READ FIRST. The five stages of p2d: what each reads, what it writes, and where it lives.

    score-heads --heads/--> mine-data --subset/--> train --adapter/--> eval --evaluation/--> report-aer --report/

Each stage turns a frozen config (`p2d_cli.config`) into one artifact, a folder with a manifest
(`p2d_cli.artifacts`). Stages know each other only through these folders, so that any of them can be cached,
rerun or replaced on its own. `p2d run` walks this table for every point of a recipe's grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ArtifactKind = Literal["heads", "subset", "adapter", "evaluation", "report", "model"]
JSON_MARK = {b"p2d": b"json"}
"""Metadata of a column of `subset.parquet` whose values fit no Arrow type, and are JSON as text."""


@dataclass(frozen=True)
class Stage:
    """One row of the table."""

    name: str
    """The subcommand, and the table of a recipe that configures it."""
    reads: tuple[str, ...]
    """Inputs by the name of their flag; a trailing `?` marks one that is optional."""
    writes: ArtifactKind
    """The kind of the artifact that the stage leaves in `--out`."""
    module: str
    """The module whose `run` does it."""
    purpose: str
    """One line for `--help`."""


STAGES: tuple[Stage, ...] = (
    Stage(
        name="score-heads",
        reads=("model", "target?", "pool?", "scores?", "task_model?"),
        writes="heads",
        module="p2d_cli.stages.score_heads",
        purpose="Rank the attention heads by how much a task moves them, and select a share of them.",
    ),
    Stage(
        name="mine-data",
        reads=("model", "heads?", "pool", "scores?", "target?", "scorer_model?"),
        writes="subset",
        module="p2d_cli.stages.mine_data",
        purpose="Score pool rows by how those heads respond to them, and keep the best share.",
    ),
    Stage(
        name="train",
        reads=("model", "data", "heads?"),
        writes="adapter",
        module="p2d_cli.stages.train",
        purpose="Fine-tune those heads on those rows, and nothing else (or LoRA, attention, everything).",
    ),
    Stage(
        name="eval",
        reads=("model", "data?", "adapter?"),
        writes="evaluation",
        module="p2d_cli.stages.evaluate",
        purpose="Score a model, with or without an adapter, on held-out rows, with intervals.",
    ),
    Stage(
        name="report-aer",
        reads=("evaluations", "reference"),
        writes="report",
        module="p2d_cli.stages.report_aer",
        purpose="Compare scores and costs, selection included, against a full fine-tuning.",
    ),
)

EXPORT = Stage(
    name="export",
    reads=("adapter",),
    writes="model",
    module="p2d_cli.stages.export",
    purpose="Merge an adapter into its base model and write a plain Hugging Face model folder.",
)


def stage_named(name: str) -> Stage:
    """Return the stage called `name`; raises KeyError for any other word."""
    return {stage.name: stage for stage in (*STAGES, EXPORT)}[name]


def stage_writing(kind: str) -> Stage:
    """Return the stage that writes artifacts of this kind."""
    return next(stage for stage in (*STAGES, EXPORT) if stage.writes == kind)
