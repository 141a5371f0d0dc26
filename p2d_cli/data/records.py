"""What a row says: a context that ends with a user's message, and the completion that answers it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from p2d_cli.data.raw_rows import BadRow, RawRow, RowSource
from p2d_cli.data.sources import scan_rows
from p2d_cli.errors import DataError

_PROMPT_NAMES = ("prompt", "question", "instruction")
_COMPLETION_NAMES = ("completion", "answer", "output")
_MESSAGE_KEYS = (("role", "content"), ("from", "value"))
_ROLES = {"human": "user", "gpt": "assistant"}  # what ShareGPT calls them
_SKIPPED_SHOWN = 5
_FLAGS = "name them with --prompt-column and --completion-column, or --messages-column"


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str
    parts: Mapping[str, Any] = field(default_factory=dict)
    """What chat templates read beside the content: `tool_calls`, `reasoning_content`, `name`, `tool_call_id`."""
    is_learnt: bool = True
    """Whether an assistant's turn counts in the loss (`weight: 0` and `train: false` say no)."""


@dataclass(frozen=True)
class Record:
    """A row that p2d can show to a model."""

    id: str
    """The row's own id, else its `where`; unique within a `RecordSet`."""
    messages: tuple[Message, ...]
    """The context; the last message is a user's."""
    completion: str
    """The answer to learn or to compare with; empty only where none was needed."""
    choices: tuple[str, ...] | None
    """Answers to choose from, where the row brings its own."""
    fields: dict[str, Any]
    """The row's columns as they came."""
    where: str
    """`file:line` (from 1) or `file#row` (from 0)."""
    answer_parts: Mapping[str, Any] = field(default_factory=dict)
    """What the answer has beside its text; see `Message.parts`."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """The functions that the model may call, as JSON schemas."""

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
        return "\n".join(message.content for message in self.messages if message.role != "system")

    @property
    def text(self) -> str:
        """Prompt and completion, a line break between them."""
        return f"{self.prompt}\n{self.completion}"

    @property
    def plain_text(self) -> str:
        """The text without regard to case and white space: rows that share it say the same."""
        return " ".join(self.text.split()).casefold()


@dataclass(frozen=True)
class ColumnMap:
    """Columns named by the user; `None` leaves one to be found.

    Found by themselves are `prompt`/`completion`, `messages` or `conversations` (messages of `role` and `content`,
    or of `from` and `value`), `instruction`/`input`/`output` and `question`/`answer`, and beside any of them `id`,
    `system` (a text) and `choices` (a list of texts). In CSV, messages and choices are lists written as JSON.
    """

    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    id: str | None = None
    system: str | None = None
    choices: str | None = None


@dataclass(frozen=True)
class RecordSet:
    """The rows that were read, and what there is to tell about the reading."""

    records: tuple[Record, ...]
    skipped: tuple[str, ...]
    """The problem of each row left out, in order."""
    notes: tuple[str, ...]


def read_records(
    source: RowSource,
    *,
    columns: ColumnMap | None = None,
    system: str | None = None,
    limit: int | None = None,
    skip_bad_rows: bool = False,
    need_completion: bool = True,
) -> RecordSet:
    """Read the rows of a source as records.

    The first row decides which columns hold what; later rows must have these columns too.

    Args:
        source: where the rows lie.
        columns: columns named by the user.
        system: the system message of rows that bring none.
        limit: stop after so many records.
        skip_bad_rows: leave out rows that cannot be read or used, and list them, instead of stopping.
        need_completion: whether a row without an answer is a bad row.

    Raises:
        DataError: a bad row, by file and line; columns that fit no shape or several; no records at all.
        UnavailableError: a hub data set that is neither cached nor reachable.
    """
    skipped: list[str] = []
    rows = scan_records(
        source,
        columns=columns,
        system=system,
        skip=skipped.append if skip_bad_rows else None,
        need_completion=need_completion,
    )
    named, notes = _with_unique_ids(list(islice(rows, limit)))
    return RecordSet(records=named, skipped=tuple(skipped), notes=notes)


def scan_records(
    source: RowSource,
    *,
    columns: ColumnMap | None = None,
    system: str | None = None,
    skip: Callable[[str], None] | None = None,
    need_completion: bool = True,
    with_fields: bool = True,
) -> Iterator[Record]:
    """Yield the rows of a source as records, one after the other; their ids may repeat.

    Args:
        source: where the rows lie.
        columns: columns named by the user.
        system: the system message of rows that bring none.
        need_completion: whether a row without an answer is a bad row.
        skip: is told the problem of each bad row, which is then left out; without it the first one is an error.
        with_fields: whether the records keep their rows' columns beside what p2d shows of them.

    Raises:
        DataError: as `read_records`.
        UnavailableError: likewise.
    """
    wanted = columns or ColumnMap()
    layout: _Layout | None = None
    found, bad, first = 0, 0, ""
    for row in scan_rows(source):
        try:
            if isinstance(row, BadRow):
                raise row.problem
            layout = layout or _find_layout(row, wanted, need_completion=need_completion)
            record = _to_record(row, layout, system=system, need_completion=need_completion)
        except _AmbiguousColumnsError:
            raise
        except DataError as problem:
            if skip is None:
                raise
            skip(problem.message)
            bad, first = bad + 1, first or problem.message
            continue
        found += 1
        yield record if with_fields else replace(record, fields={})
    if not found:
        raise DataError(f"no usable rows in {source.spec}" + (f"; {bad} bad rows, the first: {first}" if bad else ""))


@dataclass
class SkippedRows:
    """How many bad rows were left out, and the problems of the first few."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, problems: Iterable[str]) -> SkippedRows:
        """Count these."""
        skipped = cls()
        for problem in problems:
            skipped(problem)
        return skipped

    def __call__(self, problem: str) -> None:
        """Count one more."""
        self.count += 1
        if len(self.first) < _SKIPPED_SHOWN:
            self.first.append(problem)


def require_number(record: Record) -> None:
    """Refuse a row whose answer states no number, for metrics that compare numbers.

    Raises:
        DataError: naming the row.
    """
    from p2d_cli.core.metrics import number_match  # which needs numpy

    try:
        number_match("", record.completion, "flexible")
    except DataError as problem:
        raise DataError(f"{record.where}: {problem.message}", hint=problem.hint) from None


def _with_unique_ids(records: list[Record]) -> tuple[tuple[Record, ...], tuple[str, ...]]:
    [(commonest, times)] = Counter(record.id for record in records).most_common(1)
    if times == 1:
        return tuple(records), ()
    note = repeated_ids_note(commonest, times)
    return tuple(replace(record, id=record.where) for record in records), (note,)


def repeated_ids_note(commonest: str, times: int) -> str:
    """Say that rows lose their own ids because some repeat."""
    return f"ids repeat ('{commonest}' stands {times} times): rows are named by their place in the file instead"


# --- which column holds what


class _AmbiguousColumnsError(DataError):
    """Several shapes fit; no later row can settle it."""


@dataclass(frozen=True)
class _Layout:
    """The columns of one data set. The first row must have those of prompt, completion and messages, if not `None`;
    the others are looked for in every row.
    """

    prompt: str | None = None
    input: str | None = None
    completion: str | None = None
    messages: str | None = None
    id: str | None = None
    system: str | None = None
    choices: str | None = None
    choices_named: bool = False
    """Whether the user named that column, so that it must hold choices."""


_SHAPES: dict[str, _Layout] = {
    "prompt/completion": _Layout(prompt="prompt", completion="completion"),
    "messages": _Layout(messages="messages"),
    "conversations": _Layout(messages="conversations"),
    "instruction/input/output": _Layout(prompt="instruction", input="input", completion="output"),
    "question/answer": _Layout(prompt="question", completion="answer"),
}


def _find_layout(row: RawRow, wanted: ColumnMap, *, need_completion: bool) -> _Layout:
    _require_columns(row, [name for name in vars(wanted).values() if name is not None])
    if wanted.messages is not None:
        layout = _Layout(messages=wanted.messages)
    elif wanted.prompt is not None or wanted.completion is not None:
        layout = _Layout(
            prompt=wanted.prompt or _only_known(row, _PROMPT_NAMES, "prompt"),
            completion=wanted.completion
            or _only_known(row, _COMPLETION_NAMES, "completion", optional=not need_completion),
        )
    else:
        layout = _only_shape(row, need_completion=need_completion)
    return replace(
        layout,
        id=wanted.id or "id",
        system=wanted.system or "system",
        choices=wanted.choices or "choices",
        choices_named=wanted.choices is not None,
    )


def _only_shape(row: RawRow, *, need_completion: bool) -> _Layout:
    def fits(shape: _Layout, *, whole: bool) -> bool:
        needed = [shape.prompt, shape.messages, shape.completion if whole else None]
        return all(name in row.fields for name in needed if name is not None)

    fitting = [name for name, shape in _SHAPES.items() if fits(shape, whole=True)]
    if not fitting and not need_completion:
        fitting = [name for name, shape in _SHAPES.items() if fits(shape, whole=False)]
    if len(fitting) == 1:
        shape = _SHAPES[fitting[0]]
        return shape if shape.completion in row.fields else replace(shape, completion=None)
    found = _list_columns(row)
    if fitting:
        message = f"{row.where}: the columns fit {' and '.join(fitting)}; found {found}"
        raise _AmbiguousColumnsError(message, hint=_FLAGS)
    message = f"{row.where}: expected the columns of {', '.join(_SHAPES)}; found {found}"
    raise DataError(message, hint=_FLAGS)


def _only_known(row: RawRow, names: Iterable[str], role: str, *, optional: bool = False) -> str | None:
    present = [name for name in names if name in row.fields]
    if len(present) == 1:
        return present[0]
    if optional and not present:
        return None
    message = f"{row.where}: expected one column for the {role}; found {_list_columns(row)}"
    raise DataError(message, hint=f"name it with --{role}-column")


def _require_columns(row: RawRow, names: Iterable[str]) -> None:
    missing = [name for name in names if name not in row.fields]
    if missing:
        raise DataError(f"{row.where}: no column '{missing[0]}'; found {_list_columns(row)}", hint=_FLAGS)


def _list_columns(row: RawRow) -> str:
    return ", ".join(row.fields) or "no columns"


# --- from row to record


def _to_record(row: RawRow, layout: _Layout, *, system: str | None, need_completion: bool) -> Record:
    _require_unicode_names(row)
    if layout.messages is not None:
        context, completion = _split_messages(row, layout.messages, need_completion=need_completion)
    else:
        context, completion = _pair(row, layout, need_completion=need_completion)
    system = _text(row, layout.system, optional=True) or system
    if system and all(message.role != "system" for message in context):
        context = (Message("system", system), *context)
    if need_completion and not completion.strip():
        raise DataError(f"{row.where}: the completion is empty")
    return Record(
        id=_own_id(row, layout.id),
        messages=context,
        completion=completion,
        choices=_choices(row, layout),
        fields=row.fields,
        where=row.where,
    )


def _require_unicode_names(row: RawRow) -> None:
    for name in row.fields:
        try:
            name.encode("utf-8")
        except UnicodeEncodeError:
            found = name.encode("ascii", "backslashreplace").decode("ascii")
            message = f"{row.where}: the column name '{found}' holds half of a surrogate pair, which is no Unicode text"
            raise DataError(message) from None


def _pair(row: RawRow, layout: _Layout, *, need_completion: bool) -> tuple[tuple[Message, ...], str]:
    prompt = _text(row, layout.prompt)
    extra = _text(row, layout.input, optional=True)
    if not prompt.strip():
        raise DataError(f"{row.where}: column '{layout.prompt}' is empty; expected the prompt")
    completion = _text(row, layout.completion, optional=not need_completion)
    return (Message("user", f"{prompt}\n{extra}" if extra.strip() else prompt),), completion


def _text(row: RawRow, column: str | None, *, optional: bool = False) -> str:
    """Return a column's text; an optional one may be absent or null, and is then empty."""
    if column is None:
        return ""
    if not optional:
        _require_columns(row, [column])
    value = row.fields.get(column)
    if value is None and optional:
        return ""
    return _require_text(row, value, f"column '{column}'")


def _require_text(row: RawRow, value: Any, what: str) -> str:
    if not isinstance(value, str):
        found = "null" if value is None else f"{type(value).__name__} {value!r:.40}"
        raise DataError(f"{row.where}: {what} must be a text; found {found}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        message = f"{row.where}: {what} holds half of a surrogate pair, which is no Unicode text"
        raise DataError(message) from None
    return value


def _split_messages(row: RawRow, column: str, *, need_completion: bool) -> tuple[tuple[Message, ...], str]:
    _require_columns(row, [column])
    turns = _unpacked(row.fields[column])
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{row.where}: column '{column}' must be a list of messages with role and content")
    messages = tuple(_message(row, turn, f"{column}[{index}]") for index, turn in enumerate(turns))
    completion = ""
    if messages[-1].role == "assistant":
        *context, last = messages
        messages, completion = tuple(context), last.content
    elif need_completion:
        raise DataError(f"{row.where}: the last message is from {messages[-1].role}; expected the assistant's answer")
    if not messages or messages[-1].role != "user" or not messages[-1].content.strip():
        raise DataError(f"{row.where}: no user's message before the assistant's answer")
    return messages, completion


def _unpacked(value: Any) -> Any:
    """Return what a text holds that is JSON, as a cell of CSV may be; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _message(row: RawRow, turn: Any, what: str) -> Message:
    for speaker, said in _MESSAGE_KEYS:
        if isinstance(turn, Mapping) and {speaker, said} <= turn.keys():
            role = _require_text(row, turn[speaker], f"{what}.{speaker}")
            return Message(_ROLES.get(role, role), _require_text(row, turn[said], f"{what}.{said}"))
    raise DataError(f"{row.where}: {what} must have role and content, or from and value; found {turn!r:.60}")


def _own_id(row: RawRow, column: str | None) -> str:
    value = None if column is None else row.fields.get(column)
    return str(value) if isinstance(value, str | int) and str(value) else row.where


def _choices(row: RawRow, layout: _Layout) -> tuple[str, ...] | None:
    value = None if layout.choices is None else _unpacked(row.fields.get(layout.choices))
    if isinstance(value, list) and value and all(isinstance(choice, str) for choice in value):
        return tuple(value)
    if layout.choices_named and value is not None:
        raise DataError(f"{row.where}: column '{layout.choices}' must be a list of texts; found {value!r:.60}")
    return None
