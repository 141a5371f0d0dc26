"""A turn of a conversation: what it says, what else templates read of it, and whether it is learnt.

Turns are read in the forms of OpenAI (`role`, `content`, `tool_calls`, `weight`) and of ShareGPT (`from`, `value`,
`train`), and handed on in the one that chat templates of `transformers` take.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from p2d_cli.core.json_values import without_nulls
from p2d_cli.data.raw_rows import holds, is_unicode, unpack_json
from p2d_cli.errors import DataError

_KEYS = (("role", "content"), ("from", "value"))
_ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
    **dict.fromkeys(("tool_response", "function_response", "function-response"), "tool"),
}
"""What a role is called in OpenAI's form, ShareGPT's and their cousins. Other roles stay as they are: the template
knows them or does not."""
KNOWN_ROLES = frozenset(_ROLES.values())
_CALLING_ROLES = frozenset({"function_call", "function-call", "tool_call"})
"""Turns whose text is the JSON of a call, or of several."""
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_CALL_KEYS = ("tool_calls", "function_call")
_PARTIAL_KEYS = ("train_detail", "training_detail")
_MEDIA_KEYS = ("image", "images", "audio", "audios", "video", "videos")
_HARMLESS_KEYS = frozenset(
    {
        *("annotations", "avatar", "category", "html", "lang", "language", "likes", "metadata", "rating", "score"),
        *("id", "idx", "index", "message_id", "msg_id", "parent_id", "turn", "turn_id", "user_id", "uuid"),
        *("model", "provider", "sender", "source", "task", "topic", "created_at", "date", "time", "timestamp"),
        *("num_tokens", "token_count", "tokens", "usage"),
    }
)
"""Keys of messages that say nothing to a model."""
_KNOWN_KEYS = frozenset({*_KEYS[0], *_KEYS[1], *_CALL_KEYS, *_MEDIA_KEYS, *_PARTIAL_KEYS, "weight", "train", "name"})
_MEDIA_HINT = "p2d shows text alone to a model: leave these rows out (--skip-bad-rows)"


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str
    parts: Mapping[str, Any] = field(default_factory=dict)
    """What chat templates read beside the content: `tool_calls`, `reasoning_content`, `name`, `tool_call_id`."""
    is_learnt: bool = True
    """Whether an assistant's turn counts in the loss (`weight: 0` and `train: false` say no)."""

    @property
    def text(self) -> str:
        """All that the turn says, reasoning and tool calls included, in a plain form that no model is shown."""
        if not self.parts:
            return self.content
        called = self.parts.get("tool_calls", ())
        calls = [json.dumps(call["function"], ensure_ascii=False, default=str) for call in called]
        return "\n".join(part for part in (self.parts.get("reasoning_content"), self.content, *calls) if part)


class Place(NamedTuple):
    """Where a value was found, for messages."""

    where: str
    """The row."""
    what: str
    """The value's place in the row, such as `messages[0]`."""

    def at(self, key: str | int) -> Place:
        """Return the place of a key's value, or of a list's item."""
        return Place(self.where, f"{self.what}[{key}]" if isinstance(key, int) else f"{self.what}.{key}")

    def problem(self, said: str, hint: str | None = None) -> DataError:
        """Return an error that begins with the place."""
        return DataError(f"{self.where}: {self.what} {said}", hint=hint)


def require_text(value: Any, place: Place) -> str:
    """Return a text; refuse anything else, and what is no Unicode."""
    if not isinstance(value, str):
        kind = "dict" if isinstance(value, dict) else type(value).__name__
        raise place.problem(f"must be a text; found {'null' if value is None else f'{kind} {value!r:.40}'}")
    if not is_unicode(value):
        raise place.problem("holds half of a surrogate pair, which is no Unicode text")
    return value


def _write_json(value: Any, place: Place) -> str:
    return require_text(json.dumps(value, ensure_ascii=False, default=str), place)


def read_message(turn: Any, place: Place) -> tuple[Message, list[str]]:
    """Read one turn, and name what it carries that p2d neither shows nor heeds.

    Raises:
        DataError: no message; contents that are no text; a weight other than 0 and 1; tool calls in another form.
    """
    if (plain := _plain_message(turn)) is not None:
        return plain, []
    speaker, said = _keys_of(turn, place)
    for key in _MEDIA_KEYS:
        if holds(turn.get(key)):
            raise place.problem(f"carries {key}, which p2d does not show", _MEDIA_HINT)
    own = require_text(turn[speaker], place.at(speaker))
    if own.strip().lower() in _CALLING_ROLES:
        calls = _read_calls(turn.get(said), place.at(said))
        message = Message("assistant", "", {"tool_calls": calls}, _is_learnt(turn, place))
        return message, _unread_keys(turn, message)
    role = _ROLES.get(own.strip().lower(), own)
    calls = _calls_beside(turn, role, place)
    content, thoughts = _content(turn.get(said), role, bool(calls), place.at(said))
    parts: dict[str, Any] = {"tool_calls": calls}
    if role == "assistant":
        given = next((key for key in _REASONING_KEYS if isinstance(turn.get(key), str) and turn[key]), None)
        parts["reasoning_content"] = thoughts if given is None else require_text(turn[given], place.at(given))
    for key in ("name", "tool_call_id"):
        if turn.get(key) and isinstance(turn[key], str | list):
            parts[key] = require_text(turn[key], place.at(key))
    parts = {key: value for key, value in parts.items() if value}
    message = Message(role, content, parts, role != "assistant" or _is_learnt(turn, place))
    return message, _unread_keys(turn, message)


def _plain_message(turn: Any) -> Message | None:
    """Return a turn that has a known speaker and a text, and nothing else: the many are read fast."""
    given = {key: value for key, value in turn.items() if value is not None} if isinstance(turn, dict) else {}
    for speaker, said in _KEYS:
        if len(given) == 2 and speaker in given and isinstance(content := given.get(said), str):
            role = _ROLES.get(given[speaker]) if isinstance(given[speaker], str) else None
            return Message(role, content) if role is not None and is_unicode(content) else None
    return None


def _keys_of(turn: Any, place: Place) -> tuple[str, str]:
    """Return the keys of the speaker and of what is said, which a turn with tool calls may lack."""
    if isinstance(turn, Mapping):
        calls = any(_is_given(turn.get(key)) for key in _CALL_KEYS)
        fitting = [keys for keys in _KEYS if keys[0] in turn and (keys[1] in turn or calls)]
        if fitting:
            # Where all turns share their keys, as in Parquet, those of the other form are null.
            return min(fitting, key=lambda keys: turn[keys[0]] is None)
    raise place.problem(f"must have role and content, or from and value; found {turn!r:.60}")


def _content(value: Any, role: str, calls: bool, place: Place) -> tuple[str, str]:
    """Return a turn's text, and the reasoning that stands among its parts."""
    if value is None and calls:
        return "", ""
    if isinstance(value, list) and all(isinstance(part, Mapping) and "type" in part for part in value):
        texts = {"text": "", "thinking": ""}
        for index, part in enumerate(value):
            kind, own = part["type"], place.at(index)
            if kind not in ("text", "thinking"):
                raise own.problem(f"is a part of type {kind!r}; p2d shows parts of type text alone", _MEDIA_HINT)
            texts[kind] += require_text(part.get(kind), own.at(kind))
        return texts["text"], texts["thinking"]
    if role == "tool" and isinstance(value, Mapping | list):
        return _write_json(without_nulls(value), place), ""
    return require_text(value, place), ""


def _is_learnt(turn: Mapping[str, Any], place: Place) -> bool:
    """Say whether a turn of the assistant counts in the loss; one that is to count in part is refused."""
    for key in _PARTIAL_KEYS:
        if holds(turn.get(key)):
            raise place.at(key).problem("marks parts of a turn; p2d learns a turn as a whole, or not")
    marks = {key: turn.get(key) for key in ("weight", "train")}
    if isinstance(turn.get("loss"), bool):
        marks["loss"] = turn["loss"]
    for key, value in marks.items():
        if value is not None and not (isinstance(value, int | float) and value in (0, 1)):
            allowed = "0 or 1" if key == "weight" else "true or false"
            raise place.at(key).problem(f"must be {allowed}: a turn is learnt or not; found {value!r:.40}")
    return all(value is None or bool(value) for value in marks.values())


def _unread_keys(turn: Mapping[str, Any], message: Message) -> list[str]:
    """Name the keys that may mean something, and are neither shown nor heeded."""
    known = set(_KNOWN_KEYS | _HARMLESS_KEYS)
    if message.role == "assistant":
        known |= {key for key in _REASONING_KEYS if turn.get(key) == message.parts.get("reasoning_content")}
        known |= {"loss"} if isinstance(turn.get("loss"), bool) else set()
    if message.role == "tool":
        known.add("tool_call_id")
    names = [f"message key {key}" for key in turn if key not in known and holds(turn[key])]
    if message.role != "assistant":
        asked = [key for key in ("weight", "train", "loss") if turn.get(key) in (1, True)]
        names += [f"message key {key} of other turns than the assistant's" for key in asked]
    return names


# --- tools


def _calls_beside(turn: Mapping[str, Any], role: str, place: Place) -> list[dict[str, Any]]:
    """Return the calls that a turn carries beside its content."""
    for key in _CALL_KEYS:
        value = turn.get(key)
        if _is_given(value) and unpack_json(value):
            if role != "assistant":
                raise place.problem(f"carries {key}, and is a turn of {role}; calls are the assistant's")
            return _read_calls(value, place.at(key))
    return []


def _is_given(value: Any) -> bool:
    """Say whether calls or tools are given; where other rows have them, Parquet may hold an object of nulls."""
    return bool(value) and (isinstance(value, list | str) or holds(value))


def _read_calls(value: Any, place: Place) -> list[dict[str, Any]]:
    """Return tool calls as chat templates take them: of type function, with the arguments as an object."""
    found = unpack_json(value)
    if isinstance(found, str):
        raise place.problem(f"is not valid JSON: {found!r:.60}", "calls are JSON objects with name and arguments")
    calls = found if isinstance(found, list) else [found]
    if not calls:
        raise place.problem("holds no call")
    return [_read_call(call, place.at(index)) for index, call in enumerate(calls)]


def _read_call(call: Any, place: Place) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) and call.get("function") is not None else call
    if not isinstance(function, Mapping) or not isinstance(name := function.get("name"), str) or not name:
        raise place.problem(f"must be a call of a function, with name and arguments; found {call!r:.60}")
    if call.get("type") not in (None, "function"):
        raise place.problem(f"is a call of type {call['type']!r}; p2d shows those of type function alone")
    given = function.get("arguments", function.get("parameters"))
    # Templates write an object as JSON, and would quote a text once more.
    arguments = {} if given is None or given == "" else unpack_json(without_nulls(given))
    if not isinstance(arguments, dict):
        raise place.at("arguments").problem(f"must be a JSON object, or one as text; found {given!r:.60}")
    found = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    found |= {"type": "function", "function": {"name": name, "arguments": arguments}}
    _write_json(found, place)
    return found


def read_tools(value: Any, place: Place) -> tuple[Mapping[str, Any], ...] | None:
    """Return the functions that a row's column describes, as JSON schemas; None if it describes something else.

    A bare function, as in ShareGPT's texts, is put into an object of type function.

    Raises:
        DataError: something that looks like schemas, and is none.
    """
    found = unpack_json(value) if _is_given(value) else None
    if not found or (isinstance(found, str) and not found.strip()):
        return ()
    if isinstance(found, str):
        if found.lstrip().startswith(("[", "{")):
            raise place.problem(f"is not valid JSON: {found!r:.60}", "it must be a list of JSON schemas of functions")
        return None
    listed = [unpack_json(tool) for tool in (found if isinstance(found, list) else [found])]
    if not any(isinstance(tool, Mapping) for tool in listed):
        return None
    return tuple(_read_tool(without_nulls(tool), place.at(index)) for index, tool in enumerate(listed))


def _read_tool(tool: Any, place: Place) -> Mapping[str, Any]:
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise place.problem(f"must be the JSON schema of a function, with a name; found {tool!r:.60}")
    _write_json(tool, place)
    return tool if "function" in tool else {"type": "function", "function": function}
