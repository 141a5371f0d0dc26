"""How a stage shows rows to a model: its tokenizer and template, loaded once, and the check that they show a row.

Rows are checked while they are read. So a row that the chat template refuses is a bad row like any other: named, or
left out and counted, before anything is computed, and by every rank and every later pass alike.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from p2d_cli.config import EvalConfig, MineDataConfig, RowOptions, ScoreHeadsConfig, TrainConfig
from p2d_cli.data.messages import KNOWN_ROLES
from p2d_cli.data.prompts import PromptTemplate
from p2d_cli.data.records import Check, OpenCheck, Record
from p2d_cli.errors import DataError
from p2d_cli.modeling.model_files import ModelFiles
from p2d_cli.stages.execution import StageRun
from p2d_cli.stages.pool_task import METHODS_WITHOUT_MODEL
from p2d_cli.stages.templates import template_for

Shown = Literal["prompt", "example", "conversation", "episode"]
"""What of a row a stage shows: the prompt alone, with its answer, with every answer as a target, or among others."""


def open_prompts(
    job: StageRun[Any], files: ModelFiles, config: RowOptions, *, light: bool = False
) -> tuple[Any, PromptTemplate]:
    """Return the tokenizer and the template with which a stage shows rows; they are loaded once.

    Args:
        job: the stage.
        files: the model.
        config: how rows are shown.
        light: whether to do without torch, which is not needed for counting tokens.

    Raises:
        P2DError: see `template_for`, and the ways of loading a tokenizer.
    """
    key = (str(files.folder), light)
    if key not in job.prompts:
        tokenizer = _load_tokenizer(files, light=light)
        job.prompts[key] = tokenizer, template_for(job, tokenizer, config)
    return job.prompts[key]


def _load_tokenizer(files: ModelFiles, *, light: bool) -> Any:
    from p2d_cli.modeling.light_tokenizer import ensure_pad_token, load_light_tokenizer

    if light:
        tokenizer = load_light_tokenizer(files)
    else:
        from p2d_cli.modeling.loading import load_tokenizer

        tokenizer = load_tokenizer(files.folder)
    ensure_pad_token(tokenizer)
    return tokenizer


def shown_by(config: RowOptions) -> Shown | None:
    """Return what of its rows a stage shows to a model; None where no model reads them."""
    if isinstance(config, TrainConfig):
        return "conversation" if config.loss_on == "all" else "example"
    if isinstance(config, EvalConfig):
        return "example" if {"accuracy", "perplexity"} & set(config.metric) else "prompt"
    if isinstance(config, ScoreHeadsConfig):
        return "episode" if config.method == "contrast" else "example"
    if isinstance(config, MineDataConfig):
        # Rows that training would leave out are none to choose, by no method: a control is as large as what it is one
        # of. Scores that are there are of the rows that were read then: without those that were left out.
        if not config.skip_bad_rows and (config.method in METHODS_WITHOUT_MODEL or config.scores is not None):
            return None
        by_attention = config.method == "p2d" and config.resolved_affinity == "attention"
        return "episode" if by_attention or config.method == "data-whisperer" else "example"
    return None


def open_row_check(job: StageRun[Any], files: ModelFiles) -> OpenCheck | None:
    """Return what opens the check of a stage's rows, which loads a tokenizer; None where no model reads any.

    Args:
        job: the stage.
        files: the model that reads the rows.
    """
    config = job.config
    shown = shown_by(config) if isinstance(config, RowOptions) else None
    if shown is None:
        return None

    def open_check() -> Check:
        tokenizer, template = open_prompts(job, files, config, light=job.options.dry_run)
        return lambda record: _require_shown(template, tokenizer, record, shown)

    return open_check


def _require_shown(template: PromptTemplate, tokenizer: Any, record: Record, shown: Shown) -> None:
    """Render a record as the stage will.

    Raises:
        DataError: the template refuses it, or drops a turn of a role that not all templates know.
    """
    if shown == "episode":
        _require_texts(record)
        template.place(tokenizer, template.conversation(tokenizer, record))
    if shown in {"prompt", "episode"} and "tool_calls" not in record.answer_parts:
        prompt = template.render_prompt(tokenizer, record)
    else:
        prompt, _ = template.render_example(tokenizer, record)
    if shown == "conversation":
        template.earlier_turns(tokenizer, record)
    _require_all_roles(template, record, prompt)


def _require_texts(record: Record) -> None:
    """Refuse what few-shot episodes, in which rows are turns of one conversation, have no place for."""
    turns = [*record.messages, record.answer]
    if record.tools or any("tool_calls" in turn.parts or turn.role == "tool" for turn in turns):
        raise DataError(
            "few-shot episodes cannot show tools and their calls",
            hint="let heads read rows one at a time: --affinity readout, and score-heads --method readout",
        )


def _require_all_roles(template: PromptTemplate, record: Record, prompt: str) -> None:
    """Refuse a row with a turn that the template passes over: of an unknown role, or a later system message.

    Some templates write what they do not know as JSON.
    """
    for index, message in enumerate(record.messages):
        is_common = message.role in KNOWN_ROLES and (message.role != "system" or not index)
        if is_common or not (said := message.content.strip()):
            continue
        if said not in prompt and json.dumps(said, ensure_ascii=False)[1:-1] not in prompt:
            raise DataError(
                f"{template.origin} does not show the turn of the role '{message.role}' at messages[{index}]",
                hint="call it user, assistant, system or tool, or use --template plain",
            )
