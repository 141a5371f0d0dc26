"""What a row says, once it is known which columns hold what: turns, the answer among them, tools, and choices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from p2d_cli.data.messages import Message, Place, read_message, read_tools, require_text
from p2d_cli.data.raw_rows import RawRow, holds, unpack_json
from p2d_cli.data.row_choices import OPTIONS, answer_text, choice_number, choice_of_key, read_choices, read_options
from p2d_cli.data.row_shapes import (
    PREFERENCE_HINT,
    Layout,
    refuse_other_kinds,
    require_columns,
    unread_columns,
)
from p2d_cli.errors import DataError

_TOOL_COLUMNS = ("tools", "functions")


@dataclass(frozen=True)
class RowContent:
    """What p2d takes of a row."""

    context: tuple[Message, ...]
    answer: Message
    choices: tuple[str, ...] | None
    tools: tuple[Mapping[str, Any], ...]
    fields: dict[str, Any]
    """The row's columns as they came, with the names of labels in place of their numbers where those were read."""
    unread: tuple[str, ...]
    """What the row carries that bears on its meaning, and that p2d neither shows nor heeds."""


def read_content(row: RawRow, layout: Layout, *, system: str | None, need_completion: bool) -> RowContent:
    """Read a row.

    Args:
        row: as it came.
        layout: which columns hold what.
        system: the system message if the row brings none.
        need_completion: whether a row without an answer is a bad row.

    Raises:
        DataError: naming the row, and what of it cannot be used.
    """
    _require_unicode_names(row)
    refuse_other_kinds(row, layout)
    unread: list[str] = []
    read: list[str] = []
    choices = read_choices(row, layout)
    if choices is None and (choices := read_options(row, layout)) is not None:
        read.append(OPTIONS)
    turns, fields = _turns(row, layout, choices, unread, read, need_completion=need_completion)
    context, answer = _split(row, turns, need_completion=need_completion)
    context = _with_system(context, row, layout, system, unread, read)
    tools = _tools(row, read)
    return RowContent(context, answer, choices, tools, fields, (*unread, *unread_columns(row, layout, read)))


def _require_unicode_names(row: RawRow) -> None:
    for name in row.fields:
        try:
            name.encode("utf-8")
        except UnicodeEncodeError:
            found = name.encode("ascii", "backslashreplace").decode("ascii")
            message = f"{row.where}: the column name '{found}' holds half of a surrogate pair, which is no Unicode text"
            raise DataError(message) from None


# --- turns


def _turns(
    row: RawRow,
    layout: Layout,
    choices: Sequence[str] | None,
    unread: list[str],
    read: list[str],
    *,
    need_completion: bool,
) -> tuple[list[Message], dict[str, Any]]:
    """Return the row's turns, and its columns with labels by name."""
    if layout.messages is not None:
        require_columns(row, [layout.messages])
        turns = unpack_json(row.fields[layout.messages])
        if not isinstance(turns, list) or not turns:
            said = "must be a list of messages with role and content"
            raise DataError(f"{row.where}: column '{layout.messages}' {said}")
        return _messages(row, turns, layout.messages, unread), row.fields
    asked = _prompt(row, layout, unread)
    answered, fields = _completion(row, layout, choices, unread, need_completion=need_completion)
    return [*_history(row, unread, read), *asked, *answered], fields


def _messages(row: RawRow, turns: Sequence[Any], column: str, unread: list[str]) -> list[Message]:
    messages = []
    for index, turn in enumerate(turns):
        message, ignored = read_message(turn, Place(row.where, f"{column}[{index}]"))
        messages.append(message)
        unread.extend(ignored)
    return messages


def _prompt(row: RawRow, layout: Layout, unread: list[str]) -> list[Message]:
    """Return what is asked: a text, or the turns before the answer, of which then none is learnt."""
    value = None if layout.prompt is None else _unpacked_turns(row.fields.get(layout.prompt))
    if value and isinstance(value, list) and layout.prompt is not None and _is_conversation(value):
        messages = _messages(row, value, layout.prompt, unread)
        return [replace(message, is_learnt=message.role != "assistant") for message in messages]
    prompt = _text(row, layout.prompt)
    if not prompt.strip():
        raise DataError(f"{row.where}: column '{layout.prompt}' is empty; expected the prompt")
    extra = _text(row, layout.input, optional=True)
    return [Message("user", f"{prompt}\n{extra}" if extra.strip() else prompt)]


def _is_conversation(value: Sequence[Any]) -> bool:
    return all(isinstance(turn, Mapping) and ("role" in turn or "from" in turn) for turn in value)


def _unpacked_turns(value: Any) -> Any:
    """Return the turns that a text holds as a JSON list, as a cell of CSV may; anything else as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    found = unpack_json(value)
    return found if isinstance(found, list) and found and all(map(_is_whole_turn, found)) else value


def _is_whole_turn(turn: Any) -> bool:
    if not isinstance(turn, Mapping):
        return False
    return ("role" in turn and not {"content", "tool_calls"}.isdisjoint(turn)) or {"from", "value"} <= turn.keys()


def _completion(
    row: RawRow, layout: Layout, choices: Sequence[str] | None, unread: list[str], *, need_completion: bool
) -> tuple[list[Message], dict[str, Any]]:
    """Return the answer, or the turns that end with it, and the row's columns with its label by name."""
    if layout.completion is None:
        return [], row.fields
    if need_completion:
        require_columns(row, [layout.completion])
    value = _unpacked_turns(row.fields.get(layout.completion))
    turns = [value] if isinstance(value, Mapping) else value
    if isinstance(turns, list) and turns and _is_conversation(turns):
        return _messages(row, turns, layout.completion, unread), row.fields
    if value is None and not need_completion:
        return [], row.fields
    place = Place(row.where, f"column '{layout.completion}'")
    if layout.is_keyed:
        return [Message("assistant", choice_of_key(row, layout, choices, value, place))], row.fields
    if choices is not None and (number := choice_number(row, layout, choices, value, place)) is not None:
        return [Message("assistant", choices[number])], row.fields
    names = row.labels.get(layout.completion)
    if names is not None and isinstance(value, int):
        name = _label_name(names, value, place)
        return [Message("assistant", name)], row.fields | {layout.completion: name}
    return [Message("assistant", answer_text(value, place))], row.fields


def _label_name(names: Sequence[str], value: int, place: Place) -> str:
    if not 0 <= value < len(names):
        raise place.problem(f"holds {value}, which is none of the labels {', '.join(names[:8])}: the row has no label")
    return names[value]


def _history(row: RawRow, unread: list[str], read: list[str]) -> list[Message]:
    """Return the earlier turns of a row with a prompt: pairs of question and answer, or messages.

    A column of that name that holds something else is none of it.
    """
    turns = row.fields.get("history")
    turns = unpack_json(turns) if turns else None
    if not isinstance(turns, list) or not turns:
        return []
    if _is_conversation(turns):
        read.append("history")
        return _messages(row, turns, "history", unread)
    if not all(isinstance(pair, list) for pair in turns):
        return []
    read.append("history")
    messages = []
    for index, pair in enumerate(turns):
        place = Place(row.where, f"history[{index}]")
        if len(pair) != 2:
            raise place.problem(f"must be a pair of question and answer; found {pair!r:.60}")
        texts = [require_text(text, Place(row.where, f"{place.what}[{part}]")) for part, text in enumerate(pair)]
        messages += [Message("user", texts[0]), Message("assistant", texts[1])]
    return messages


# --- the answer


def _split(row: RawRow, turns: Sequence[Message], *, need_completion: bool) -> tuple[tuple[Message, ...], Message]:
    """Return the context and the answer: the last turn of the assistant that is learnt. What follows it goes."""
    if turns[-1].role != "assistant":
        if need_completion:
            said = f"the last message is from {turns[-1].role}; expected the assistant's answer"
            preferred = any(holds(row.fields.get(name)) for name in ("chosen", "rejected"))
            raise DataError(f"{row.where}: {said}", hint=PREFERENCE_HINT if preferred else None)
        _require_question(row, turns)
        return tuple(turns), Message("assistant", "")
    learnt = [index for index, turn in enumerate(turns) if turn.role == "assistant" and turn.is_learnt]
    if not learnt:
        said = "no turn of the assistant is to be learnt: all have weight 0, or train false"
        raise DataError(f"{row.where}: {said}", hint="give one of them weight 1, or leave the row out")
    context, answer = tuple(map(_without_empty_lesson, turns[: learnt[-1]])), turns[learnt[-1]]
    _require_question(row, context)
    if need_completion and _is_empty(answer):
        raise DataError(f"{row.where}: the completion is empty")
    return context, answer


def _without_empty_lesson(turn: Message) -> Message:
    """Return a turn that is not learnt if it is an answer that says nothing: that would teach to end at once."""
    return replace(turn, is_learnt=False) if turn.role == "assistant" and _is_empty(turn) else turn


def _is_empty(answer: Message) -> bool:
    return not answer.content.strip() and not answer.parts.get("tool_calls")


def _require_question(row: RawRow, context: Sequence[Message]) -> None:
    """Refuse an answer that answers nobody: before it stands a user's message, or what a tool returned to one."""
    last = context[-1] if context else None
    if last is not None and last.role == "assistant":
        raise DataError(
            f"{row.where}: another turn of the assistant stands right before the answer; expected a user's message",
            hint="join the two turns, give the last one weight 0, or leave the row out (--skip-bad-rows)",
        )
    asked = any(message.role == "user" for message in context)
    if last is not None and asked and (last.role == "tool" or (last.role == "user" and last.content.strip())):
        return
    if last is None:
        found = "it is the first message"
    elif last.role == "user":
        found = "the one there is empty"
    elif last.role == "tool":
        found = "there is nothing but a tool's result"
    else:
        found = f"there stands {'an' if last.role[:1] in 'aeiou' else 'a'} {last.role} message"
    raise DataError(
        f"{row.where}: no user's message before the assistant's answer: {found}",
        hint="the answer that is learnt follows a user's message, or a tool's",
    )


# --- columns beside the turns


def _text(row: RawRow, column: str | None, *, optional: bool = False) -> str:
    """Return a column's text; an optional one may be absent or null, and is then empty."""
    if column is None:
        return ""
    if not optional:
        require_columns(row, [column])
    value = row.fields.get(column)
    if value is None and optional:
        return ""
    return require_text(value, Place(row.where, f"column '{column}'"))


def _with_system(
    context: tuple[Message, ...], row: RawRow, layout: Layout, system: str | None, unread: list[str], read: list[str]
) -> tuple[Message, ...]:
    """Put the row's system message, else `system`, before a context that has none; the turns' own goes before both."""
    column, text = _system(row, layout, read)
    own = [message.content.strip() for message in context if message.role == "system"]
    if own:
        if text.strip() and text.strip() not in own:
            unread.append(f"column {column}, beside a system message among the turns")
        return context
    found = text or system
    return (Message("system", found), *context) if found else context


def _system(row: RawRow, layout: Layout, read: list[str]) -> tuple[str, str]:
    """Return the column with the row's own system message, and its text, empty if there is none.

    A column that merely may hold one may hold other things as well.
    """
    for number, column in enumerate(layout.system):
        if number and not isinstance(row.fields.get(column), str):
            continue
        read.append(column)
        if text := _text(row, column, optional=True):
            return column, text
    return "", ""


def _tools(row: RawRow, read: list[str]) -> tuple[Mapping[str, Any], ...]:
    """Return the row's tools, and add the column that they were read from to `read`."""
    for column in _TOOL_COLUMNS:
        if not row.fields.get(column):
            continue
        found = read_tools(row.fields.get(column), Place(row.where, column))
        if found is not None:
            read.append(column)
        if found:
            return found
    return ()
