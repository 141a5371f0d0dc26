"""Flags made from config models: one name, one default, one description for each setting."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from p2d_cli.config import FORMER_NAMES, Choice, StageConfig, declared, flag_name
from p2d_cli.errors import UsageError

SHORT_FLAGS = {"out": "-o", "model": "-m"}
REPEATABLE = {"metric", "stop", "tracker", "lm_eval"}
"""Settings with several values whose flag is given once a value (or once, with commas)."""

ROWS = frozenset({"data", "eval_data", "pool", "target"})
"""Settings that name rows. Their flags are taken as lists too, so that none that is given is silently left out."""


def _flag(help_text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=help_text, rich_help_panel="Run", **more)


@dataclass(frozen=True)
class Invocation:
    """How a command was called, apart from the stage's settings."""

    json: Annotated[bool, _flag("Print one JSON document on stdout.", "--json")] = False
    dry_run: Annotated[
        bool, _flag("Say what would be done, and what it would take: passes, tokens, memory, disk.", "--dry-run")
    ] = False
    time: Annotated[
        bool, _flag("With --dry-run: load the model, time a few batches, and estimate the seconds.", "--time")
    ] = False
    print_config: Annotated[bool, _flag("Print every setting and where it came from.", "--print-config")] = False
    force: Annotated[bool, _flag("Redo it; replace what is there, unfinished work too.", "--force", "-f")] = False
    config: Annotated[Path | None, _flag("Take settings from this recipe.", "--config", "-c", metavar="FILE")] = None
    quiet: Annotated[bool, _flag("No progress on stderr.", "--quiet", "-q")] = False
    verbose: Annotated[
        bool,
        _flag(
            "Every stage's result, not the last one's alone (run); a log of each rank (on many processes).",
            "--verbose",
            "-v",
        ),
    ] = False


_INVOCATION_FLAGS: dict[str, Any] = get_type_hints(Invocation, include_extras=True)
StageCommand = Callable[[dict[str, Any], Invocation], None]


def command_for(
    model: type[StageConfig], body: StageCommand, *, doc: str, arguments: tuple[str, ...] = ()
) -> Callable[..., None]:
    """Return a Typer command with one flag for each field of `model`, and those that every command has.

    Args:
        model: the config whose fields become flags.
        body: called with the settings that were given, by field, and with the invocation.
        doc: the command's help text.
        arguments: fields that are positional.
    """

    def command(**given: Any) -> None:
        invocation = Invocation(**{name: given.pop(name) for name in _INVOCATION_FLAGS})
        given = {name: _once(name, value) if name in ROWS else value for name, value in given.items()}
        # A repeated flag's values, each of which may hold several separated by commas, are joined.
        plain = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        body({name: value for name, value in plain.items() if value is not None and value != ()}, invocation)

    fields = model.model_fields
    ordered = [*arguments, *(name for name in fields if name not in arguments)]
    parameters = [_parameter(name, fields[name], positional=name in arguments) for name in ordered]
    parameters += [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=getattr(Invocation, name), annotation=annotation
        )
        for name, annotation in _INVOCATION_FLAGS.items()
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # read by Typer
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__doc__ = doc
    return command


def _once(name: str, values: list[str] | None) -> str | None:
    """Return the value of a flag that is given once.

    Raises:
        UsageError: it is given more often.
    """
    if values and len(values) > 1:
        hint = "put the files into one folder, or give a glob in quotes, as 'rows/*.jsonl'"
        raise UsageError(f"{flag_name(name)} is given {len(values)} times: {', '.join(values)}", hint=hint)
    return values[0] if values else None


def _parameter(name: str, field: FieldInfo, *, positional: bool) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    if positional:
        several = get_origin(field.annotation) is tuple
        argument = typer.Argument(help=field.description, metavar=name.upper() + ("..." if several else ""))
        words: Any = list[str] if several else str
        return inspect.Parameter(name, kind, annotation=Annotated[words, argument])
    choice = next((part for part in field.metadata if isinstance(part, Choice)), None)
    annotation = (list[str] if name in ROWS else _flag_type(name, field.annotation)) | None
    panel = declared(field).get("panel", "Run")
    option = typer.Option(
        *_declarations(name, field.annotation),
        help=f"{field.description}{f' {choice.methods.describe()}' if choice else ''}{_default_text(field.default)}",
        show_default=False,
        metavar=_metavar(name, field.annotation) if choice is None else f"<{'|'.join(choice.words())}>",
        rich_help_panel=str(panel),
    )
    return inspect.Parameter(name, kind, annotation=Annotated[annotation, option], default=None)


def _declarations(name: str, annotation: Any) -> tuple[str, ...]:
    flag = flag_name(name)
    former = tuple(flag_name(old) for old, new in FORMER_NAMES.items() if new == name)
    if _flag_type(name, annotation) is bool:
        return (f"{flag}/--no-{flag[2:]}",)
    return (flag, SHORT_FLAGS[name]) if name in SHORT_FLAGS else (flag, *former)


def _metavar(name: str, annotation: Any) -> str | None:
    if name in ROWS:
        return "<str>"  # not that of the list, as which it is taken
    if _is_number_or_word(annotation):
        parts = [part for part in get_args(annotation) if part is not type(None)]
        words = [word for part in parts if get_origin(part) is Literal for word in get_args(part)]
        return f"<{'|'.join(['number', *words])}>"
    return "VALUE" if name in REPEATABLE else "PATH" if annotation is Path else None


def _is_number_or_word(annotation: Any) -> bool:
    """Say whether a setting takes a number or one of a few words, such as `auto`."""
    is_union = isinstance(annotation, types.UnionType) or get_origin(annotation) is Union
    return is_union and any(get_origin(part) is Literal for part in get_args(annotation))


def _flag_type(name: str, annotation: Any) -> Any:
    """Return the type that Typer parses the flag's text as; pydantic checks the ranges."""
    if get_origin(annotation) is Annotated:
        return _flag_type(name, get_args(annotation)[0])
    if _is_number_or_word(annotation):
        return str
    if isinstance(annotation, types.UnionType) or get_origin(annotation) is Union:
        return _flag_type(name, next(part for part in get_args(annotation) if part is not type(None)))
    if get_origin(annotation) is tuple:
        return list[str] if name in REPEATABLE else str
    if get_origin(annotation) is Literal:
        return annotation
    # A path stays a text: as `Path`, an empty one would be the current folder.
    return annotation if annotation in (str, int, float, bool) else str


def _default_text(default: Any) -> str:
    """Return what the help adds to a description; a setting may still come from a variable or a recipe."""
    if default is PydanticUndefined:
        return " (required)"
    if default is None or default == () or default is False:
        return ""
    if default is True:
        return " (default on)"
    return f" (default {','.join(map(str, default)) if isinstance(default, tuple) else default})"
