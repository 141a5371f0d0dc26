"""Mining with a smaller model than the one that the rows are for (weak to strong).

What is chosen are rows, as text, and the smaller model tokenizes them itself: nothing of its tokens reaches the model
that is trained. Another tokenizer is therefore harmless to the result's form, but it cuts long rows elsewhere and shows
them with another chat template, so that it has to be asked for.
"""

from __future__ import annotations

from p2d_cli.artifacts.manifest import ModelIdentity
from p2d_cli.config import MineDataConfig
from p2d_cli.errors import DataError
from p2d_cli.modeling.model_files import ModelFiles, vocabulary
from p2d_cli.stages.execution import StageRun
from p2d_cli.stages.identity import ensure_same_model
from p2d_cli.stages.pool_task import METHODS_WITHOUT_MODEL


def open_reader(job: StageRun[MineDataConfig]) -> ModelFiles:
    """Register the model that the rows are for, and the one that reads them in its place; return the reader.

    The subset belongs to `--model`; which model read is an input of its own and stands in the summary.

    Raises:
        DataError: the two have different tokenizers, and `--allow-other-tokenizer` was not given.
    """
    config = job.config
    model = job.inputs.model(config.model)
    if config.scorer_model is None or config.method in METHODS_WITHOUT_MODEL:
        return model
    reader = job.inputs.model(config.scorer_model, name="scorer_model")
    job.inputs.reader = reader
    job.scorer = ModelIdentity.model_validate(job.inputs.entries["scorer_model"].details)
    job.facts["scorer_model"] = job.scorer.model_dump(mode="json")
    job.facts["scorer_tokenizer"] = _compare_tokenizers(job, model, reader, job.scorer)
    return reader


def ensure_own_heads(job: StageRun[MineDataConfig], spec: str) -> None:
    """Register the heads, and refuse those of another model than the one that reads the rows.

    Raises:
        ArtifactError: not a heads artifact, or of another model.
    """
    if job.scorer is None:
        job.inputs.artifact("heads", spec, "heads", same_model=True)
        return
    ensure_same_model(job.inputs.artifact("heads", spec, "heads"), job.scorer, spec, "--scorer-model")


def _compare_tokenizers(
    job: StageRun[MineDataConfig], model: ModelFiles, reader: ModelFiles, reader_identity: ModelIdentity
) -> str:
    """Return `same`, `same vocabulary` (with other settings or another chat template) or `other`."""
    identity = job.inputs.base_model
    if identity is not None and identity.tokenizer_digest == reader_identity.tokenizer_digest:
        return "same"
    theirs, its = vocabulary(model), vocabulary(reader)
    if theirs is not None and theirs == its:
        return "same vocabulary"
    shown = f"  --model:        {_describe(model, theirs)}\n  --scorer-model: {_describe(reader, its)}"
    if not job.config.allow_other_tokenizer:
        raise DataError(
            f"--scorer-model has another tokenizer than --model\n{shown}",
            hint="give a smaller model of the same family; or --allow-other-tokenizer, since rows are chosen as text",
        )
    job.progress.note(f"the rows are read with another tokenizer than --model's\n{shown}")
    return "other"


def _describe(files: ModelFiles, tokens: dict[str, int] | None) -> str:
    return f"{files.spec} ({'no tokenizer.json' if tokens is None else f'{len(tokens):,} tokens'})"
