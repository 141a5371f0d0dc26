"""Which template shows the rows: the tokenizer's, that of a file or a folder, with its arguments filled in."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from p2d_cli.data.prompts import PLAIN_HINT, PromptTemplate
from p2d_cli.errors import DataError, UsageError

_PLACES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
"""Where transformers keeps a chat template; before 4.5x it was a key of the JSON files."""
_MARK = "{# set by p2d #}"
"""Behind each variable that was filled in, so that no line of the template's own is taken for one."""
_NOT_FOR_USERS = frozenset({"messages", "tools", "add_generation_prompt", "raise_exception", "strftime_now"})


def resolve_template(
    tokenizer: Any,
    requested: Literal["auto", "chat", "plain"] = "auto",
    *,
    chat_file: Path | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> PromptTemplate:
    """Choose how rows are shown: `auto` is the tokenizer's chat template, if it has one.

    Args:
        tokenizer: the model's.
        requested: `auto`, `chat` or `plain`.
        chat_file: a chat template that takes the place of the tokenizer's.
        arguments: values of the chat template's own variables; they become part of its source.

    Raises:
        DataError: the file cannot be read, or is not a template.
        UsageError: `chat` or an argument is asked for, and there is no chat template, or none with that variable.
    """
    if requested == "plain" or (requested == "auto" and chat_file is None and not tokenizer.chat_template):
        template = PromptTemplate("plain")
    elif chat_file is not None:
        template = PromptTemplate("chat", read_chat_template(chat_file), origin=f"the chat template {chat_file.name}")
    elif tokenizer.chat_template:
        template = PromptTemplate("chat", str(tokenizer.get_chat_template()))
    else:
        hint = f"{PLAIN_HINT}, or give --chat-template FILE"
        raise UsageError("--template chat: this model's tokenizer has no chat template", hint=hint)
    if not arguments:
        return template
    if template.chat_template is None:
        message = "--chat-template-kwargs: rows are shown as plain text, without a chat template"
        raise UsageError(message, hint="leave it out, or give --chat-template FILE")
    return replace(template, chat_template=with_arguments(template.chat_template, arguments))


def with_arguments(source: str, arguments: Mapping[str, Any]) -> str:
    """Fill in variables of a chat template, so that the source alone says how rows are shown.

    Whoever renders the result, p2d or a server that loads an adapter with it, gets the same text; and its digest tells
    it from the same template with other arguments.

    Args:
        source: Jinja.
        arguments: JSON values by variable.

    Raises:
        UsageError: the template has no such variable.
    """
    import jinja2.meta

    for name in arguments:  # one that is filled in already, in a template that an adapter brings
        source = re.sub(rf"\A((?:{{%- set .*{_MARK}\n)*?){{%- set {re.escape(name)} = .*{_MARK}\n", r"\1", source)
    environment = _environment()
    named = jinja2.meta.find_undeclared_variables(environment.parse(source))
    known = sorted(named - _NOT_FOR_USERS - environment.globals.keys())
    own = {target.name for target in environment.parse(source).find_all(jinja2.nodes.Name) if target.ctx == "store"}
    for name in arguments:
        if name not in known:
            message = f"--chat-template-kwargs: the chat template has no variable {name!r} to set"
            raise UsageError(message, hint=f"it has: {', '.join(word for word in known if word not in own) or 'none'}")
    return "".join(f"{{%- set {name} = {_literal(value)} %}}{_MARK}\n" for name, value in arguments.items()) + source


def _literal(value: Any) -> str:
    """Write a JSON value as Jinja has it."""
    if value is None:
        return "none"
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(item)}" for key, item in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False)


def find_chat_template(folder: Path) -> Path | None:
    """Return the file of a folder that holds its chat template, if there is one."""
    paths = (folder / name for name in _PLACES if (folder / name).is_file())
    return next((path for path in paths if path.suffix != ".json" or _template_of_json(path) is not None), None)


def _template_of_json(path: Path) -> str | None:
    """Return the default template of an older file; transformers allows several, by name."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return None
    found = content.get("chat_template") if isinstance(content, dict) else None
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    return found if isinstance(found, str) and found.strip() else None


def read_chat_template(path: Path) -> str:
    """Return the Jinja source of a chat template, which is parsed once to see that it is one.

    Args:
        path: a Jinja file, or a JSON file with a key `chat_template`, such as `tokenizer_config.json`.

    Raises:
        DataError: the file cannot be read, is empty, or is not valid Jinja, by file and line.
    """
    import jinja2

    try:
        source = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            source = _template_of_json(path) or ""
        _environment().parse(source)
    except OSError as problem:
        raise DataError(f"cannot read the chat template {path}: {problem.strerror or problem}") from None
    except UnicodeDecodeError as problem:
        raise DataError(f"{path}: not valid UTF-8: {problem.reason} at byte {problem.start + 1}") from None
    except jinja2.TemplateSyntaxError as problem:
        raise DataError(f"{path.name}:{problem.lineno}: not a valid chat template: {problem.message}") from None
    if not source.strip():
        raise DataError(f"{path}: the chat template is empty")
    return source


def _environment() -> Any:
    """Return an environment that parses what transformers parses."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols

    class GenerationTag(Extension):
        """`{% generation %}...{% endgeneration %}`, which shows what it holds: transformers masks answers by it."""

        tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

        def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return jinja2.Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, GenerationTag])
