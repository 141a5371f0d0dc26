"""What a row says, once it is known which columns hold what: turns, the answer among them, tools, and choices.

An answer may be one of the row's choices: by its text, its number, its label or its letter.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

from p2d_cli.data.messages import Message, Place, read_message, read_tools, require_text
from p2d_cli.data.raw_rows import RawRow, holds, is_unicode, unpack_json
from p2d_cli.data.row_shapes import PREFERENCE_HINT, Layout, refuse_other_kinds, require_columns, unread_columns
from p2d_cli.errors import DataError

_LARGEST_WHOLE = 2.0**53
_NUMBER = re.compile(r"([+-]?[0-9]{1,18})(?:\.0*)?")
_LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class Record:
    """A row that p2d can show to a model."""

    id: str
    """The row's own id, else its `where`; unique within a `RecordSet`."""
    messages: tuple[Message, ...]
    """The context; the last message is a user's, or a tool's."""
    completion: str
    """The answer to learn or to compare with; empty only where none was needed, or where it calls a tool."""
    choices: tuple[str, ...] | None
    """Answers to choose from, where the row brings its own."""
    fields: dict[str, Any]
    """The row's columns as they came, with the names of labels in place of their numbers where those were read."""
    where: str
    """`file:line` (from 1) or `file#row` (from 0)."""
    answer_parts: Mapping[str, Any] = field(default_factory=dict)
    """What the answer has beside its text; see `Message.parts`."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """The functions that the model may call, as JSON schemas."""
    unread: tuple[str, ...] = ()
    """What the row carries that bears on its meaning, and that p2d neither shows nor heeds."""

    @property
    def answer(self) -> Message:
        """The assistant's turn that answers."""
        return Message("assistant", self.completion, self.answer_parts)

    @property
    def system(self) -> str | None:
        """The system message, if there is one."""
        return next((message.content for message in self.messages if message.role == "system"), None)

    @property
    def prompt(self) -> str:
        """The context without the system message, a line break between the turns."""
        return "\n".join(message.text for message in self.messages if message.role != "system")

    @property
    def text(self) -> str:
        """Prompt and completion, a line break between them; see `Message.text` for tool calls and reasoning."""
        return f"{self.prompt}\n{self.answer.text}"

    @property
    def plain_text(self) -> str:
        """The text without regard to case and white space: rows that share it, and their tools, say the same."""
        tools = [json.dumps(tool, ensure_ascii=False, sort_keys=True, default=str) for tool in self.tools]
        return " ".join(" ".join([*tools, self.text]).split()).casefold()

    @property
    def digest(self) -> tuple[int, int]:
        """128 bits of a digest of all that a template may show of the row, the same in every process."""
        turns = [(turn.role, turn.content, turn.parts) for turn in (*self.messages, self.answer)]
        shown = json.dumps([turns, self.tools], ensure_ascii=True, sort_keys=True, default=str)
        digest = hashlib.blake2b(shown.encode("ascii"), digest_size=16).digest()
        return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def read_record(row: RawRow, layout: Layout, *, system: str | None, need_completion: bool) -> Record:
    """Read a row.

    Args:
        row: as it came.
        layout: which columns hold what.
        system: the system message if the row brings none.
        need_completion: whether a row without an answer is a bad row.

    Raises:
        DataError: naming the row, and what of it cannot be used.
    """
    for name in row.fields:
        if not is_unicode(name):
            found = name.encode("ascii", "backslashreplace").decode("ascii")
            message = f"{row.where}: the column name '{found}' holds half of a surrogate pair, which is no Unicode text"
            raise DataError(message)
    try:
        refuse_other_kinds(row, layout)
        return _Reading(row, layout, need_completion=need_completion).record(system)
    except RecursionError:
        raise DataError(f"{row.where}: JSON that is nested too deeply") from None


class _Reading:
    """A row that is being read; takes note of what of it was read, and of what was not."""

    def __init__(self, row: RawRow, layout: Layout, *, need_completion: bool) -> None:
        self._row = row
        self._layout = layout
        self._need_completion = need_completion
        self._fields = row.fields
        self._read: list[str] = []
        """Columns beside those of the layout."""
        self._unread: list[str] = []
        self._choices = self._own_choices()
        if self._choices is None and (options := self._options()) is not None:
            self._choices = options
            self._read.append("options")

    def record(self, system: str | None) -> Record:
        """Return what the row says, with this system message if it brings none."""
        context, answer = self._split(self._turns())
        context = self._with_system(context, system)
        tools = self._tools()
        own_id = self._row.fields.get(str(self._layout.id))
        return Record(
            id=str(own_id) if isinstance(own_id, str | int) and str(own_id) else self._row.where,
            messages=tuple(context),
            completion=answer.content,
            choices=self._choices,
            fields=self._fields,
            where=self._row.where,
            answer_parts=answer.parts,
            tools=tools,
            unread=(*self._unread, *unread_columns(self._row, self._layout, self._read)),
        )

    def _problem(self, said: str, hint: str | None = None) -> DataError:
        return DataError(f"{self._row.where}: {said}", hint=hint)

    # --- turns

    def _turns(self) -> list[Message]:
        column = self._layout.messages
        if column is None:
            asked, answered = self._prompt(), self._completion()
            return [*self._history(), *asked, *answered]
        require_columns(self._row, [column])
        turns = unpack_json(self._row.fields[column])
        if not isinstance(turns, list) or not turns:
            raise self._problem(f"column '{column}' must be a list of messages with role and content")
        return self._messages(turns, column)

    def _messages(self, turns: Sequence[Any], column: str) -> list[Message]:
        messages = []
        for index, turn in enumerate(turns):
            message, ignored = read_message(turn, Place(self._row.where, f"{column}[{index}]"))
            messages.append(message)
            self._unread.extend(ignored)
        return messages

    def _prompt(self) -> list[Message]:
        """Return what is asked: a text, or the turns before the answer, of which then none is learnt."""
        column = self._layout.prompt
        value = None if column is None else _unpack_turns(self._row.fields.get(column))
        if column is not None and _are_turns(value):
            asked = self._messages(value, column)
            return [replace(message, is_learnt=message.role != "assistant") for message in asked]
        prompt = self._text(column)
        if not prompt.strip():
            raise self._problem(f"column '{column}' is empty; expected the prompt")
        extra = self._text(self._layout.input, optional=True)
        return [Message("user", f"{prompt}\n{extra}" if extra.strip() else prompt)]

    def _completion(self) -> list[Message]:
        """Return the answer, or the turns that end with it."""
        column = self._layout.completion
        if column is None:
            return []
        if self._need_completion:
            require_columns(self._row, [column])
        value = _unpack_turns(self._row.fields.get(column))
        turns = [value] if isinstance(value, Mapping) else value
        if _are_turns(turns):
            return self._messages(turns, column)
        if value is None and not self._need_completion:
            return []
        return [Message("assistant", self._answer(column, value, Place(self._row.where, f"column '{column}'")))]

    def _history(self) -> list[Message]:
        """Return the earlier turns of a row with a prompt: pairs of question and answer, or messages.

        A column of that name that holds something else is none of it.
        """
        turns = self._row.fields.get("history")
        turns = unpack_json(turns) if turns else None
        if _are_turns(turns):
            self._read.append("history")
            return self._messages(turns, "history")
        if not isinstance(turns, list) or not turns or not all(isinstance(pair, list) for pair in turns):
            return []
        self._read.append("history")
        messages = []
        for index, pair in enumerate(turns):
            place = Place(self._row.where, f"history[{index}]")
            if len(pair) != 2:
                raise place.problem(f"must be a pair of question and answer; found {pair!r:.60}")
            asked, answered = (require_text(text, place.at(part)) for part, text in enumerate(pair))
            messages += [Message("user", asked), Message("assistant", answered)]
        return messages

    # --- choices, and the answer that is one of them

    def _own_choices(self) -> tuple[str, ...] | None:
        """Return the texts of a list, or of the list `text` of an object that has labels beside it."""
        column = self._layout.choices
        value = None if column is None else unpack_json(self._row.fields.get(column))
        texts = value.get("text") if isinstance(value, Mapping) and isinstance(value.get("label"), list) else value
        found = _texts(texts, Place(self._row.where, f"column '{column}'"))
        if found is None and self._layout.choices_named and value is not None:
            raise self._problem(f"column '{column}' must be a list of texts; found {value!r:.60}")
        return found

    def _options(self) -> tuple[str, ...] | None:
        """Return choices that are called options, as in MMLU-Pro, if it is clear which one is the answer."""
        fields = self._row.fields
        if self._layout.choices_named or not self._is_asked or not fields.get("options"):
            return None
        options = _texts(unpack_json(fields["options"]), Place(self._row.where, "column 'options'"))
        answer, stated = fields.get("answer"), fields.get("answer_index")
        if options is None or not isinstance(answer, str):
            return None
        number = options.index(answer) if answer in options else self._number_of_letter(options, answer)
        is_clear = stated is None or str(stated).strip() in {str(number), f"{number}.0"}
        return options if number is not None and is_clear else None

    @property
    def _is_asked(self) -> bool:
        return (self._layout.prompt, self._layout.completion) == ("question", "answer")

    def _answer(self, column: str, value: Any, place: Place) -> str:
        """Return the text of an answer, or of the choice or the label that a value stands for."""
        choices, names = self._choices, self._row.labels.get(column)
        if self._layout.is_keyed:
            return self._choice_of_key(value, place)
        if choices is not None and (number := self._number_of_choice(choices, value, place)) is not None:
            return choices[number]
        if names is None or not isinstance(value, int):
            return _answer_text(value, place)
        if not 0 <= value < len(names):
            known = ", ".join(names[:8])
            raise place.problem(f"holds {value}, which is none of the labels {known}: the row has no label")
        self._fields = self._row.fields | {column: names[value]}
        return names[value]

    def _number_of_choice(self, choices: Sequence[str], value: Any, place: Place) -> int | None:
        """Return the number, from 0, of the choice that an answer stands for; None where it is the answer's own text.

        Numbers become floats where their column meets a null, and texts in CSV. A text that is one of the choices is
        meant as it stands; other texts may be a number, or in rows of question and answer a letter.
        """
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            return None
        text = _answer_text(value, place).strip()
        found = _NUMBER.fullmatch(text)
        if (isinstance(value, str) or found is None) and text in {choice.strip() for choice in choices}:
            return None
        if (letter := self._number_of_letter(choices, text)) is not None:
            return letter
        if isinstance(value, str) and found is None:
            return None
        number = -1 if found is None else int(found[1])
        if not 0 <= number < len(choices):
            raise place.problem(f"holds {value}, which is the number of none of the {len(choices)} choices, from 0")
        return number

    def _number_of_letter(self, choices: Sequence[str], text: str) -> int | None:
        """Return the number of the choice with a letter; where the question lists them, the letter is the answer."""
        number = _LETTERS.find(text.strip()) if len(text.strip()) == 1 and self._is_asked else -1
        question = str(self._row.fields.get("question"))
        return number if 0 <= number < len(choices) and not all(choice in question for choice in choices) else None

    def _choice_of_key(self, value: Any, place: Place) -> str:
        """Return the text of the choice that a label names."""
        offered = unpack_json(self._row.fields.get(str(self._layout.choices)))
        listed = offered.get("label") if isinstance(offered, Mapping) else None
        if self._choices is None or not isinstance(listed, list) or len(listed) != len(self._choices):
            said = "must be an object with two lists of equal length, text and label"
            raise self._problem(f"column '{self._layout.choices}' {said}; found {offered!r:.60}")
        labels, key = [str(label) for label in listed], _answer_text(value, place).strip()
        if labels.count(key) != 1:
            raise place.problem(f"holds '{key}', which is not one of the labels {', '.join(labels[:8])}")
        return self._choices[labels.index(key)]

    # --- context and answer

    def _split(self, turns: Sequence[Message]) -> tuple[Sequence[Message], Message]:
        """Return the context and the answer: the last turn of the assistant that is learnt. What follows it goes."""
        if turns[-1].role != "assistant":
            if self._need_completion:
                said = f"the last message is from {turns[-1].role}; expected the assistant's answer"
                preferred = any(holds(self._row.fields.get(name)) for name in ("chosen", "rejected"))
                raise self._problem(said, PREFERENCE_HINT if preferred else None)
            self._require_question(turns)
            return turns, Message("assistant", "")
        learnt = [index for index, turn in enumerate(turns) if turn.role == "assistant" and turn.is_learnt]
        if not learnt:
            said = "no turn of the assistant is to be learnt: all have weight 0, or train false"
            raise self._problem(said, "give one of them weight 1, or leave the row out")
        # An answer that says nothing would teach to end at once.
        context = [replace(turn, is_learnt=False) if _is_empty(turn) else turn for turn in turns[: learnt[-1]]]
        answer = turns[learnt[-1]]
        self._require_question(context)
        if self._need_completion and _is_empty(answer):
            raise self._problem("the completion is empty")
        return context, answer

    def _require_question(self, context: Sequence[Message]) -> None:
        """Refuse an answer that answers nobody: before it stands a user's message, or what a tool returned to one."""
        last = context[-1] if context else None
        if last is not None and last.role == "assistant":
            raise self._problem(
                "another turn of the assistant stands right before the answer; expected a user's message",
                "join the two turns, give the last one weight 0, or leave the row out (--skip-bad-rows)",
            )
        asked = any(message.role == "user" for message in context)
        if last is not None and asked and (last.role == "tool" or (last.role == "user" and last.content.strip())):
            return
        if last is None:
            found = "it is the first message"
        elif last.role in ("user", "tool"):
            found = "the one there is empty" if last.role == "user" else "there is nothing but a tool's result"
        else:
            found = f"there stands {'an' if last.role[:1] in 'aeiou' else 'a'} {last.role} message"
        raise self._problem(
            f"no user's message before the assistant's answer: {found}",
            "the answer that is learnt follows a user's message, or a tool's",
        )

    # --- columns beside the turns

    def _text(self, column: str | None, *, optional: bool = False) -> str:
        """Return a column's text; an optional one may be absent or null, and is then empty."""
        if column is None or (optional and self._row.fields.get(column) is None):
            return ""
        require_columns(self._row, [column])
        return require_text(self._row.fields[column], Place(self._row.where, f"column '{column}'"))

    def _with_system(self, context: Sequence[Message], default: str | None) -> Sequence[Message]:
        """Put the row's system message, else this one, before a context that has none; the turns' own goes first."""
        column, text = "", ""
        for number, column in enumerate(self._layout.system):
            # A column that merely may hold a system message may hold other things as well.
            if number == 0 or isinstance(self._row.fields.get(column), str):
                self._read.append(column)
                if text := self._text(column, optional=True):
                    break
        own = [message.content.strip() for message in context if message.role == "system"]
        if not own:
            found = text or default
            return [Message("system", found), *context] if found else context
        if text.strip() and text.strip() not in own:
            self._unread.append(f"column {column}, beside a system message among the turns")
        return context

    def _tools(self) -> tuple[Mapping[str, Any], ...]:
        for column in ("tools", "functions"):
            if value := self._row.fields.get(column):
                found = read_tools(value, Place(self._row.where, column))
                if found is not None:
                    self._read.append(column)
                if found:
                    return found
        return ()


def _are_turns(value: Any) -> TypeGuard[list[Mapping[str, Any]]]:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, Mapping) and ("role" in turn or "from" in turn) for turn in value)
    )


def _unpack_turns(value: Any) -> Any:
    """Return the turns that a text holds as a JSON list, as a cell of CSV may; anything else as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    found = unpack_json(value)
    are_whole = _are_turns(found) and all(
        ("role" in turn and not {"content", "tool_calls"}.isdisjoint(turn)) or {"from", "value"} <= turn.keys()
        for turn in found
    )
    return found if are_whole else value


def _texts(value: Any, place: Place) -> tuple[str, ...] | None:
    if isinstance(value, list) and value and all(isinstance(choice, str) for choice in value):
        return tuple(require_text(text, place) for text in value)
    return None


def _answer_text(value: Any, place: Place) -> str:
    """Return an answer that may be a number or a boolean as text; whole numbers have no decimal point.

    A column of whole numbers becomes one of floats where it meets a null, or Parquet, and is to say the same.
    """
    if isinstance(value, bool | int):
        return str(value).lower()
    if isinstance(value, float):
        if not math.isfinite(value):
            raise place.problem(f"must be a text or a finite number; found {value}")
        return str(int(value)) if value.is_integer() and abs(value) <= _LARGEST_WHOLE else repr(value)
    return require_text(value, place)


def _is_empty(answer: Message) -> bool:
    return answer.role == "assistant" and not answer.content.strip() and not answer.parts.get("tool_calls")
