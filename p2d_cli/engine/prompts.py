"""How a stage shows rows to a model: its tokenizer and template, and the check that they show a row.

The template is on record, and an evaluation shows what the model was trained with.

Rows are checked while they are read. So a row that the chat template refuses is a bad row like any other: named, or
left out and counted, before anything is computed, and by every rank and every later pass alike.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from p2d_cli.config import EvalConfig, RowOptions, TrainConfig
from p2d_cli.data.chat_templates import find_chat_template, resolve_template
from p2d_cli.data.messages import KNOWN_ROLES
from p2d_cli.data.prompts import PromptTemplate
from p2d_cli.data.records import Check, OpenCheck, Record
from p2d_cli.engine.stage_run import Shown, StageRun
from p2d_cli.errors import ArtifactError, DataError
from p2d_cli.modeling.light_tokenizer import ensure_pad_token, load_light_tokenizer
from p2d_cli.modeling.model_files import ModelFiles

LONGEST_DEFAULT = 2048


def open_prompts(job: StageRun[Any], files: ModelFiles, *, light: bool = False) -> tuple[Any, PromptTemplate]:
    """Return the tokenizer and the template with which a stage shows rows; they are loaded once.

    The `light` tokenizer does without torch, which is not needed for counting tokens.

    Raises:
        P2DError: see `template_for`, and the ways of loading a tokenizer.
    """
    key = (str(files.folder), light)
    if key not in job.prompts:
        if light:
            tokenizer = load_light_tokenizer(files)
        else:
            from p2d_cli.modeling.loading import load_tokenizer

            tokenizer = load_tokenizer(files.folder)
        ensure_pad_token(tokenizer)
        job.prompts[key] = tokenizer, template_for(job, tokenizer)
    return job.prompts[key]


def template_for(job: StageRun[Any], tokenizer: Any) -> PromptTemplate:
    """Choose the stage's template, and put it on record in the manifest's summary.

    An evaluation shows what the model was trained with, where that is known and neither `--template` nor
    `--chat-template` says otherwise; a chat template that was trained with lies in the adapter's folder.

    Raises:
        ArtifactError: an evaluation that would show something else.
        DataError: a chat template that cannot be read.
        UsageError: there is no chat template, and one is asked for.
    """
    config: RowOptions = job.config
    trained = job.inputs.trained_prompt
    adopts_plain = trained is not None and trained["name"] == "plain" and config.template == "auto"
    chat_file = _chat_file(config, look_in_adapter=not adopts_plain)
    requested = "plain" if adopts_plain and chat_file is None else config.template
    template = resolve_template(tokenizer, requested, chat_file=chat_file, arguments=config.chat_template_kwargs)
    origin = "tokenizer" if chat_file is None else chat_file.name
    shown: dict[str, Any] = {
        "name": template.name,
        "digest": template.digest,
        "origin": origin if template.name == "chat" else None,
        "system": job.inputs.system_prompt,
    }
    if config.chat_template_kwargs:
        shown["arguments"] = config.chat_template_kwargs
    job.facts["template"] = shown
    _tell_missing_end(job, template, tokenizer)
    if isinstance(config, EvalConfig) and trained is not None and not config.allow_template_mismatch:
        _ensure_same_prompt(trained, shown, config.adapter or config.model)
    _tell_differences(job, shown)
    return template


def _chat_file(config: RowOptions, *, look_in_adapter: bool) -> Path | None:
    """Return the file of `--chat-template`, else in an evaluation the one that the adapter's folder holds."""
    if config.chat_template is not None:
        return Path(config.chat_template).expanduser()
    if not isinstance(config, EvalConfig) or config.adapter is None or config.template != "auto":
        return None
    return find_chat_template(Path(config.adapter).expanduser()) if look_in_adapter else None


def _tell_missing_end(job: StageRun[Any], template: PromptTemplate, tokenizer: Any) -> None:
    """Note where no token tells a model that its answer is over."""
    if not isinstance(job.config, TrainConfig | EvalConfig) or template.ends(tokenizer):
        return
    what = f"{template.origin} closes answers with no special token"
    if template.name == "plain":
        what = "the tokenizer has no end-of-sequence token"
    effect = "no end is learnt, and the model will not stop by itself"
    if isinstance(job.config, EvalConfig):
        effect = "answers end at --max-new-tokens, at --stop, or where the model's own end-of-sequence token comes"
    job.progress.note(f"{what}: {effect}")


def describe_prompt(shown: dict[str, Any]) -> str:
    """Return what a manifest records of a template in a few words."""
    origin = "the tokenizer's" if shown["origin"] == "tokenizer" else shown["origin"]
    if shown.get("arguments"):
        origin += " with " + ", ".join(f"{name}={value!r}" for name, value in shown["arguments"].items())
    text = "plain text" if shown["name"] == "plain" else f"chat template {shown['digest'][:12]} ({origin})"
    return f"{text}, " + ("no system prompt" if shown["system"] is None else f"system prompt {shown['system']!r:.80}")


def _what_differs(trained: dict[str, Any], shown: dict[str, Any]) -> list[str]:
    return [key for key in ("digest", "system") if trained[key] != shown[key]]


def _ensure_same_prompt(trained: dict[str, Any], shown: dict[str, Any], spec: str) -> None:
    differs = _what_differs(trained, shown)
    if not differs:
        return
    templates = {"plain": "--template plain", "tokenizer": "--template chat without --chat-template"}
    known = templates.get(trained["origin"] or "plain", f"--chat-template with the file {trained['origin']}")
    system = "--system '' for none" if trained["system"] is None else f"--system {trained['system']!r}"
    advice = " and ".join([known] * ("digest" in differs) + [system] * ("system" in differs))
    raise ArtifactError(
        f"{spec} was trained with other prompts than this evaluation would show\n"
        f"  trained with: {describe_prompt(trained)}\n  eval shows:   {describe_prompt(shown)}",
        hint=f"give {advice}; or --allow-template-mismatch to evaluate it all the same",
    )


def _tell_differences(job: StageRun[Any], shown: dict[str, Any]) -> None:
    """Note where the heads or rows of an earlier stage were found with other prompts."""
    for name in ("heads", "data"):
        made = job.inputs.manifests[name].summary.get("template") if name in job.inputs.manifests else None
        if made is not None and _what_differs(made, shown):
            told = f"--{name} was made with {describe_prompt(made)}; this stage shows {describe_prompt(shown)}"
            job.progress.note(told)


def context_length(asked: int | None, model_config: dict[str, Any]) -> int:
    """Return the longest sequence to build: as asked, else the model's context, at most 2048."""
    text_config = model_config.get("text_config", model_config)
    context = text_config.get("max_position_embeddings") or text_config.get("n_positions") or LONGEST_DEFAULT
    return asked or min(int(context), LONGEST_DEFAULT)


# --- the check of rows


def open_row_check(job: StageRun[Any], files: ModelFiles) -> OpenCheck | None:
    """Return what opens the check of the rows that this model reads, which loads a tokenizer; None if it reads none."""
    config, shown = job.config, job.shown
    if shown is None or not isinstance(config, RowOptions):
        return None

    def open_check() -> Check:
        tokenizer, template = open_prompts(job, files, light=job.options.dry_run)
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
