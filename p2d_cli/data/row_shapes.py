"""Which column of a data set holds what: named by the user, or found by the shapes that rows are known to have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from p2d_cli.data.raw_rows import RawRow, holds, unpack_json
from p2d_cli.errors import DataError

_PROMPT_NAMES = (("prompt", "question", "instruction"), ("query", "problem", "input", "inputs", "text"))
_COMPLETION_NAMES = (("completion", "answer", "output"), ("response", "solution", "targets", "label"))
"""Where the user names one of the two columns, the other is looked for: among the first names, then the second."""
_FLAGS = "name them with --prompt-column and --completion-column, or --messages-column"
_PREFERENCE_COLUMNS = frozenset({"chosen", "rejected", "rejected_response", "rejected_messages"})
PREFERENCE_HINT = (
    "p2d learns answers, not preferences: keep the chosen answer as the completion, and leave the other out"
)
_MEDIA_COLUMNS = frozenset({"image", "images", "audio", "audios", "video", "videos"})
_NEEDLESS_COLUMNS = frozenset({"input", "context", "passage", "support"})
"""Columns with a part of the prompt, which whoever names the prompt's column left out on purpose."""
_MEANINGFUL_COLUMNS = frozenset(
    {
        *(*_PREFERENCE_COLUMNS, *_NEEDLESS_COLUMNS, "document", "documents", "options", "history", "system_prompt"),
        *("thinking", "reasoning", "reasoning_content", "weight", "loss_weight", "sample_weight"),
        *("chat_template_kwargs", "tools", "functions"),
    }
)
"""Columns that say something of what a row means; where p2d does not read them, it says so."""


class AmbiguousColumnsError(DataError):
    """Several shapes fit; no later row can settle it."""


@dataclass(frozen=True)
class ColumnMap:
    """Columns named by the user; `None` leaves one to be found.

    Found by themselves are the shapes of `SHAPES`, and beside any of them `id`, `system` or `system_prompt` (a text),
    `choices` (a list of texts, or an object with such a list `text` and one of their labels), `tools` or `functions`
    (JSON schemas), and beside a prompt `history` (pairs of earlier turns). In CSV, what is no text is written as JSON.
    """

    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    id: str | None = None
    system: str | None = None
    choices: str | None = None


@dataclass(frozen=True)
class Layout:
    """The columns of one data set. The first row must have those of prompt, completion and messages, if not `None`;
    the others are looked for in every row.
    """

    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    input: str | None = None
    """Text that follows the prompt."""
    id: str | None = None
    system: tuple[str, ...] = ()
    """The first of these that a row has."""
    choices: str | None = None
    choices_named: bool = False
    """Whether the user named that column, so that it must hold choices."""
    is_keyed: bool = False
    """Whether the completion column holds the label of the choice that is right."""
    is_found: bool = True
    """Whether the columns were found by themselves."""

    @property
    def name(self) -> str:
        """What messages call a shape."""
        columns = (self.messages, self.prompt, self.input, self.choices, self.completion)
        return "/".join(column for column in columns if column is not None)

    @cached_property
    def read(self) -> frozenset[str | None]:
        """The columns that hold texts or turns."""
        return frozenset({self.prompt, self.input, self.completion, self.messages})


SHAPES: tuple[tuple[Layout, ...], ...] = (
    (
        Layout("prompt", "completion"),
        Layout(messages="messages"),
        Layout(messages="conversations"),
        Layout("instruction", "output", input="input"),
        Layout("question", "answer"),
    ),
    (
        Layout("prompt", "response"),
        Layout("instruction", "response", input="context"),
        Layout("question", "response"),
        Layout("query", "response"),
        Layout("problem", "solution"),
        Layout("input", "output"),
        Layout("inputs", "targets"),
        Layout("question", "answerKey", choices="choices", is_keyed=True),
        Layout("question_stem", "answerKey", choices="choices", is_keyed=True),
        Layout("text", "label"),
        Layout(messages="conversation"),
    ),
)
"""The shapes that rows are known to have. Those behind the first ones count only where none of the first fits, since
data sets bring further columns beside their conversations."""


def find_layout(row: RawRow, wanted: ColumnMap, *, need_completion: bool) -> Layout:
    """Decide by a data set's first row which columns hold what.

    Raises:
        DataError: a column that the user named is missing, or no shape fits.
        AmbiguousColumnsError: several do.
    """
    require_columns(row, [name for name in vars(wanted).values() if name is not None])
    if wanted.messages is not None:
        layout = Layout(messages=wanted.messages, is_found=False)
    elif wanted.prompt is not None or wanted.completion is not None:
        prompt = wanted.prompt or _only_known(row, _PROMPT_NAMES, "prompt")
        completion = wanted.completion or _only_known(row, _COMPLETION_NAMES, "completion", needed=need_completion)
        layout = Layout(prompt, completion, is_found=False)
    else:
        layout = _only_shape(row, need_completion=need_completion)
    return replace(
        layout,
        id=wanted.id or "id",
        system=("system", "system_prompt") if wanted.system is None else (wanted.system,),
        choices=wanted.choices or "choices",
        choices_named=wanted.choices is not None,
    )


def _only_shape(row: RawRow, *, need_completion: bool) -> Layout:
    fitting = _fitting(row, whole=True)
    if not fitting and not need_completion:
        fitting = _fitting(row, whole=False)
    found = _list_columns(row)
    if len(fitting) > 1:
        names = " and ".join(shape.name for shape in fitting)
        raise AmbiguousColumnsError(f"{row.where}: the columns fit {names}; found {found}", hint=_FLAGS)
    if fitting:
        [shape] = fitting
        if shape.completion not in row.fields:
            return replace(shape, completion=None)
        # The texts of labels may stand beside their numbers, if the data set does not name them itself.
        is_number = shape.completion == "label" and isinstance(row.fields["label"], int) and "label" not in row.labels
        return replace(shape, completion="label_text") if is_number and "label_text" in row.fields else shape
    if preferred := sorted(_PREFERENCE_COLUMNS & row.fields.keys()):
        message = f"{row.where}: the columns {', '.join(preferred)} state which answer is preferred; found {found}"
        raise DataError(message, hint=PREFERENCE_HINT)
    known = ", ".join(shape.name for shapes in SHAPES for shape in shapes)
    raise DataError(f"{row.where}: expected the columns of {known}; found {found}", hint=_FLAGS)


def _fitting(row: RawRow, *, whole: bool) -> list[Layout]:
    """Return the shapes that fit: of the first ones, else of the others."""

    def fits(shape: Layout) -> bool:
        needed = [shape.prompt, shape.messages, shape.choices, shape.completion if whole else None]
        return all(name in row.fields for name in needed if name is not None)

    return next((found for shapes in SHAPES if (found := list(filter(fits, shapes)))), [])


def _only_known(row: RawRow, names: Iterable[Iterable[str]], role: str, *, needed: bool = True) -> str | None:
    found = ([name for name in tier if name in row.fields] for tier in names)
    present = next((tier for tier in found if tier), [])
    if len(present) == 1:
        return present[0]
    if not needed and not present:
        return None
    message = f"{row.where}: expected one column for the {role}; found {_list_columns(row)}"
    raise DataError(message, hint=f"name it with --{role}-column")


def require_columns(row: RawRow, names: Iterable[str]) -> None:
    """Refuse a row that lacks a column."""
    for name in names:
        if name not in row.fields:
            raise DataError(f"{row.where}: no column '{name}'; found {_list_columns(row)}", hint=_FLAGS)


def _list_columns(row: RawRow) -> str:
    """Return the names of a row's columns, for messages."""
    return ", ".join(row.fields) or "no columns"


def refuse_other_kinds(row: RawRow, layout: Layout) -> None:
    """Refuse a row that shows more than text, or whose answer is marked as one that is not wanted."""
    for name, value in row.fields.items():
        is_file = isinstance(value, dict) and value.keys() == {"bytes", "path"}  # as `datasets` has it
        if (is_file or name in _MEDIA_COLUMNS) and name not in layout.read and holds(value):
            message = f"{row.where}: column '{name}' holds more than text, and p2d shows text alone to a model"
            raise DataError(message, hint="leave these rows out (--skip-bad-rows), or the column")
    # As in rows for KTO; but a label may be the answer too.
    answer = row.fields.get("completion")
    is_answer = answer is False or (isinstance(answer, str) and answer.strip().lower() == "false")
    may_mark = {"kto_tag": True, "label": layout.completion == "completion" and not is_answer}
    for name, is_mark in may_mark.items():
        if is_mark and row.fields.get(name) is False:
            message = f"{row.where}: {name} is false: the row's answer is one that is not wanted"
            raise DataError(message, hint="p2d learns answers: leave these rows out (--skip-bad-rows)")


def unread_columns(row: RawRow, layout: Layout, read: Iterable[str]) -> list[str]:
    """Name the columns that bear on what a row means, hold something, and are not among those that were read."""
    if _MEANINGFUL_COLUMNS.isdisjoint(row.fields) and "label" not in row.fields:
        return []
    asked = _MEANINGFUL_COLUMNS - {*layout.read, *read, layout.choices}
    asked -= frozenset() if layout.is_found else _NEEDLESS_COLUMNS
    found = [f"column {name}" for name, value in row.fields.items() if name in asked and _says(name, value)]
    if layout.completion == "completion" and isinstance(row.fields.get("label"), bool):
        found.append("column label")
    return found


def _says(name: str, value: Any) -> bool:
    """Say whether a column says something; arguments of a template do by false and by nothing, a weight not by 1."""
    if name == "chat_template_kwargs":
        return isinstance(found := unpack_json(value), Mapping) and any(part is not None for part in found.values())
    return holds(value) and not (name.endswith("weight") and value == 1)
