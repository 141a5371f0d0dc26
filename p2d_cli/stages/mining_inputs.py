"""The inputs of mine-data: the pool, the model that reads it, and what a choice may be made from or measured by.

With `--scorer-model` a smaller model reads the rows than the one that they are for (weak to strong). What is chosen are
rows, as text, and the smaller model tokenizes them itself: nothing of its tokens reaches the model that is trained.
Another tokenizer is therefore harmless to the result's form, but it cuts long rows elsewhere and shows them with
another chat template, so that it has to be asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from p2d_cli.artifacts.digests import digest_file
from p2d_cli.artifacts.manifest import InputEntry, ModelIdentity
from p2d_cli.artifacts.readings import Readings, load_readings
from p2d_cli.artifacts.store import open_artifact
from p2d_cli.artifacts.subset import NamedPoolScores, load_pool_scores
from p2d_cli.config import MineDataConfig, Resolved, ScoreHeadsConfig, StageConfig
from p2d_cli.core.geometry import SelectedHeads
from p2d_cli.core.subset_selection import DEFAULT_RATIO
from p2d_cli.data.raw_rows import RowSource
from p2d_cli.engine.stage_run import StageRun
from p2d_cli.errors import DataError, UsageError
from p2d_cli.methods.row_method import RowMethod
from p2d_cli.modeling.model_files import ModelFiles, locate_model, vocabulary
from p2d_cli.registry import ROW_METHODS
from p2d_cli.reporting.table import share_text


@dataclass(frozen=True)
class MiningInputs:
    """The inputs, located."""

    method: type[RowMethod]
    model: ModelFiles
    """The model that reads the rows."""
    pool: RowSource
    target: RowSource | None = None
    heads: SelectedHeads | None = None
    """The heads of a heads artifact, where the method takes any."""
    readings: Readings | None = None
    """What that artifact keeps of the rows that its heads have read."""
    readings_planned: int | None = None
    """Of how many pool rows it will keep them, where it is only planned."""
    scored: NamedPoolScores | None = None
    """Scores that an earlier run found."""
    relevant: frozenset[str] | None = None
    """Ids of rows that are known to be of the target's task: for measuring the choice, never for making it."""


def counted(
    resolved: Resolved[MineDataConfig], planned: Mapping[str, StageConfig]
) -> tuple[Resolved[MineDataConfig], str]:
    """Return the settings with the number of rows that `--count-of` comes to, and how many were asked for, in words.

    It is the number alone that is taken over: what the other rows cost to choose is not charged, and no more part of
    the artifact's identity than where a user's number comes from. The words are the same for every seed, also where a
    floor keeps another number for each.

    Args:
        resolved: the settings.
        planned: in a dry run, the settings of subsets that are still to be made, which may have as many as was asked.

    Raises:
        ArtifactError: it is no subset artifact.
    """
    config = resolved.config
    if config.count_of is None:
        return resolved, str(config.count) if config.count is not None else share_text(config.ratio or DEFAULT_RATIO)
    other = planned.get(config.count_of)
    if isinstance(other, MineDataConfig):
        size: dict[str, Any] = {"ratio": other.ratio, "count": other.count}
        method = other.method
    else:
        found = open_artifact(Path(config.count_of).expanduser(), "subset").summary
        size, method = {"ratio": None, "count": found["rows_selected"]}, found["method"]
    config = config.model_copy(update=size | {"count_of": None})
    origins = resolved.origins | {"count": resolved.origins["count_of"], "count_of": "default"}
    return replace(resolved, config=config, origins=origins), f"as {method}"


def open_inputs(job: StageRun[MineDataConfig]) -> MiningInputs:
    """Take the inputs that the method needs, and leave the others out of the artifact's identity.

    Raises:
        UsageError: the method needs heads and there are none; scores of another method, or of one that ranks no rows.
        ArtifactError: a heads or subset artifact that is none, or of another model.
        DataError: scores of another pool; a `--scorer-model` with another tokenizer; a bad file of `--relevance`.
    """
    config = job.config
    method: type[RowMethod] = ROW_METHODS[config.method]
    # Rows that training would leave out are none to choose, by no method: a control is as large as what it is one of.
    # Scores that are there are of the rows that were read then: without those that were left out.
    if config.skip_bad_rows or (method.reads_model and config.scores is None):
        job.shown = "episode" if "attention" in method.reads(config) else "example"
    if config.scores is not None:
        model, pool, scored = _open_scored(job, config.scores)
        return MiningInputs(method, model, pool, scored=scored, relevant=open_relevance(job))
    if method.takes_heads and config.heads is None:
        raise UsageError(
            f"--method {method.name} needs --heads: the artifact that score-heads wrote", hint="run p2d score-heads"
        )
    model, heads, readings, readings_planned = _open_reader(job), None, None, None
    if method.takes_heads and config.heads is not None:
        scorer = None if job.scorer is None else (job.scorer, "--scorer-model")
        heads = job.inputs.heads(config.heads, model, of=scorer)
        planned = job.inputs.planned("heads", config.heads)
        if isinstance(planned, ScoreHeadsConfig):
            readings_planned = planned.pool_readings
        else:
            readings = load_readings(Path(config.heads).expanduser())
    return MiningInputs(
        method=method,
        model=model,
        pool=job.inputs.rows("pool", config.pool),
        target=job.inputs.rows("target", config.target) if method.takes_target and config.target is not None else None,
        heads=heads,
        readings=readings,
        readings_planned=readings_planned,
        relevant=open_relevance(job),
    )


def _open_scored(job: StageRun[MineDataConfig], spec: str) -> tuple[ModelFiles, RowSource, NamedPoolScores | None]:
    """Take the scores of the subset at `spec`, with what they cost, and the pool that they are of.

    In a dry run that has only planned them, there are none.
    """
    config = job.config
    model = job.inputs.model(config.model)
    if job.inputs.planned("scores", spec) is not None:
        return model, job.inputs.rows("pool", config.pool), None
    manifest = job.inputs.artifact("scores", spec, "subset", same_model=True)
    method = manifest.summary["method"]
    if not ROW_METHODS.require(method, f"--scores {spec}").ranks:
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
    return model, pool, load_pool_scores(Path(spec).expanduser())


def _open_reader(job: StageRun[MineDataConfig]) -> ModelFiles:
    """Register the model that the rows are for, and the one that reads them in its place; return the reader.

    The subset belongs to `--model`; which model read is an input of its own and stands in the summary.
    """
    config = job.config
    model = job.inputs.model(config.model)
    if config.scorer_model is None or not ROW_METHODS[config.method].reads_model:
        return model
    reader = job.inputs.model(config.scorer_model, name="scorer_model")
    job.inputs.reader = reader
    job.scorer = ModelIdentity.model_validate(job.inputs.entries["scorer_model"].details)
    job.facts["scorer_model"] = job.scorer.model_dump(mode="json")
    job.facts["scorer_tokenizer"] = _compare_tokenizers(job, model, reader, job.scorer)
    return reader


def _compare_tokenizers(
    job: StageRun[MineDataConfig], model: ModelFiles, reader: ModelFiles, scorer: ModelIdentity
) -> str:
    """Return `same`, `same vocabulary` (with other settings or another chat template) or `other`."""
    identity = job.inputs.base_model
    if identity is not None and identity.tokenizer_digest == scorer.tokenizer_digest:
        return "same"
    theirs, its = vocabulary(model), vocabulary(reader)
    if theirs is not None and theirs == its:
        return "same vocabulary"

    def described(files: ModelFiles, tokens: dict[str, int] | None) -> str:
        return f"{files.spec} ({'no tokenizer.json' if tokens is None else f'{len(tokens):,} tokens'})"

    shown = f"  --model:        {described(model, theirs)}\n  --scorer-model: {described(reader, its)}"
    if not job.config.allow_other_tokenizer:
        raise DataError(
            f"--scorer-model has another tokenizer than --model\n{shown}",
            hint="give a smaller model of the same family; or --allow-other-tokenizer, since rows are chosen as text",
        )
    job.progress.note(f"the rows are read with another tokenizer than --model's\n{shown}")
    return "other"


def open_relevance(job: StageRun[MineDataConfig]) -> frozenset[str] | None:
    """Read the ids that `--relevance` names, and register the file as an input.

    Raises:
        DataError: it cannot be read, or is not `{"relevant": [id, ...]}`.
    """
    spec = job.config.relevance
    if spec is None:
        return None
    path = Path(spec).expanduser()
    try:
        relevant = json.loads(path.read_bytes())["relevant"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as problem:
        raise DataError(
            f'--relevance {spec}: expected a JSON object {{"relevant": [ids]}}; found {problem!r:.80}',
            hint="it names pool rows by their ids; it only measures, so leaving it out changes no choice",
        ) from None
    if not isinstance(relevant, list) or not all(isinstance(name, str) for name in relevant):
        raise DataError(
            f"--relevance {spec}: expected a list of ids, which are texts, under 'relevant'",
            hint="write numbers as texts too, as the subset's pool_scores.parquet does",
        )
    job.inputs.entries["relevance"] = InputEntry(kind="relevance", digest=digest_file(path), source=spec)
    return frozenset(relevant)
