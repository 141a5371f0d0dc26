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
FLAGS = "name them with --prompt-column and --completion-column, or --messages-column"
_PREFERENCE_COLUMNS = frozenset({"chosen", "rejected", "rejected_response", "rejected_messages"})
PREFERENCE_HINT = (
    "p2d learns answers, not preferences: keep the chosen answer as the completion, and leave the other out"
)
_MEDIA_COLUMNS = frozenset({"image", "images", "audio", "audios", "video", "videos"})
_MEANINGFUL_COLUMNS = frozenset(
    {*_PREFERENCE_COLUMNS, "document", "documents", "thinking", "reasoning", "reasoning_content", "context", "history"}
) | {
    "passage",
    "support",
    "options",
    "input",
    "weight",
    "loss_weight",
    "sample_weight",
    "chat_template_kwargs",
    "tools",
    "functions",
    "system_prompt",
}
"""Columns that say something of what a row means; where p2d does not read them, it says so."""


_NEEDLESS_COLUMNS = frozenset({"input", "context", "passage", "support"})
"""Such columns, that whoever names the prompt's column left out on purpose."""


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
    input: str | None = None
    """Text that follows the prompt."""
    completion: str | None = None
    messages: str | None = None
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

    @cached_property
    def read(self) -> frozenset[str | None]:
        """The columns that hold texts or turns."""
        return frozenset({self.prompt, self.input, self.completion, self.messages})


SHAPES: tuple[Mapping[str, Layout], ...] = (
    {
        "prompt/completion": Layout(prompt="prompt", completion="completion"),
        "messages": Layout(messages="messages"),
        "conversations": Layout(messages="conversations"),
        "instruction/input/output": Layout(prompt="instruction", input="input", completion="output"),
        "question/answer": Layout(prompt="question", completion="answer"),
    },
    {
        "prompt/response": Layout(prompt="prompt", completion="response"),
        "instruction/context/response": Layout(prompt="instruction", input="context", completion="response"),
        "question/response": Layout(prompt="question", completion="response"),
        "query/response": Layout(prompt="query", completion="response"),
        "problem/solution": Layout(prompt="problem", completion="solution"),
        "input/output": Layout(prompt="input", completion="output"),
        "inputs/targets": Layout(prompt="inputs", completion="targets"),
        "question/choices/answerKey": Layout(
            prompt="question", choices="choices", completion="answerKey", is_keyed=True
        ),
        "question_stem/choices/answerKey": Layout(
            prompt="question_stem", choices="choices", completion="answerKey", is_keyed=True
        ),
        "text/label": Layout(prompt="text", completion="label"),
        "conversation": Layout(messages="conversation"),
    },
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
        layout = Layout(
            prompt=wanted.prompt or _only_known(row, _PROMPT_NAMES, "prompt"),
            completion=wanted.completion
            or _only_known(row, _COMPLETION_NAMES, "completion", optional=not need_completion),
            is_found=False,
        )
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
    if len(fitting) == 1:
        [shape] = fitting.values()
        return _with_label_texts(row, shape) if shape.completion in row.fields else replace(shape, completion=None)
    found = list_columns(row)
    if fitting:
        message = f"{row.where}: the columns fit {' and '.join(fitting)}; found {found}"
        raise AmbiguousColumnsError(message, hint=FLAGS)
    if preferred := sorted(_PREFERENCE_COLUMNS & row.fields.keys()):
        message = f"{row.where}: the columns {', '.join(preferred)} state which answer is preferred; found {found}"
        raise DataError(message, hint=PREFERENCE_HINT)
    known = ", ".join(name for shapes in SHAPES for name in shapes)
    raise DataError(f"{row.where}: expected the columns of {known}; found {found}", hint=FLAGS)


def _fitting(row: RawRow, *, whole: bool) -> dict[str, Layout]:
    """Return the shapes that fit, by name: the first ones, else the others."""

    def fits(shape: Layout) -> bool:
        needed = [shape.prompt, shape.messages, shape.choices, shape.completion if whole else None]
        return all(name in row.fields for name in needed if name is not None)

    found = ({name: shape for name, shape in shapes.items() if fits(shape)} for shapes in SHAPES)
    return next((fitting for fitting in found if fitting), {})


def _with_label_texts(row: RawRow, shape: Layout) -> Layout:
    """Take the texts of labels that stand beside their numbers, if the data set does not name them itself."""
    is_number = shape.completion == "label" and isinstance(row.fields["label"], int) and "label" not in row.labels
    return replace(shape, completion="label_text") if is_number and "label_text" in row.fields else shape


def _only_known(row: RawRow, names: Iterable[Iterable[str]], role: str, *, optional: bool = False) -> str | None:
    found = ([name for name in tier if name in row.fields] for tier in names)
    present = next((tier for tier in found if tier), [])
    if len(present) == 1:
        return present[0]
    if optional and not present:
        return None
    message = f"{row.where}: expected one column for the {role}; found {list_columns(row)}"
    raise DataError(message, hint=f"name it with --{role}-column")


def require_columns(row: RawRow, names: Iterable[str]) -> None:
    """Refuse a row that lacks a column.

    Raises:
        DataError: naming it.
    """
    missing = [name for name in names if name not in row.fields]
    if missing:
        raise DataError(f"{row.where}: no column '{missing[0]}'; found {list_columns(row)}", hint=FLAGS)


def list_columns(row: RawRow) -> str:
    """Return the names of a row's columns, for messages."""
    return ", ".join(row.fields) or "no columns"


def refuse_other_kinds(row: RawRow, layout: Layout) -> None:
    """Refuse a row that shows more than text, or whose answer is marked as one that is not wanted.

    Raises:
        DataError: naming the column.
    """
    for name, value in row.fields.items():
        if (name in _MEDIA_COLUMNS or _is_media(value)) and name not in layout.read and holds(value):
            message = f"{row.where}: column '{name}' holds more than text, and p2d shows text alone to a model"
            raise DataError(message, hint="leave these rows out (--skip-bad-rows), or the column")
    if (mark := _mark_of_the_unwanted(row, layout)) is not None:
        message = f"{row.where}: {mark} is false: the row's answer is one that is not wanted"
        raise DataError(message, hint="p2d learns answers: leave these rows out (--skip-bad-rows)")


def _mark_of_the_unwanted(row: RawRow, layout: Layout) -> str | None:
    """Return the column that says, as in rows for KTO, that the answer is not wanted; a label may be the answer too."""
    if row.fields.get("kto_tag") is False:
        return "kto_tag"
    is_marked = layout.completion == "completion" and row.fields.get("label") is False
    answer = row.fields.get("completion")
    is_answer = answer is False or (isinstance(answer, str) and answer.strip().lower() == "false")
    return "label" if is_marked and not is_answer else None


def _is_media(value: Any) -> bool:
    """Say whether a value is a file in the form of `datasets`."""
    return isinstance(value, dict) and value.keys() == {"bytes", "path"}


def unread_columns(row: RawRow, layout: Layout, read: Iterable[str]) -> list[str]:
    """Name the columns that bear on what a row means, hold something, and are not among those that were read."""
    if _MEANINGFUL_COLUMNS.isdisjoint(row.fields) and "label" not in row.fields:
        return []
    known = {*layout.read, *read, layout.choices}
    found = [name for name in row.fields if name in _MEANINGFUL_COLUMNS - known and _says(name, row.fields[name])]
    found = [name for name in found if not (name.endswith("weight") and row.fields[name] == 1)]
    if not layout.is_found:
        found = [name for name in found if name not in _NEEDLESS_COLUMNS]
    if layout.completion == "completion" and isinstance(row.fields.get("label"), bool):
        found.append("label")
    return [f"column {name}" for name in found]


def _says(name: str, value: Any) -> bool:
    """Say whether a column says something; arguments of a template say something by false and by nothing, too."""
    if name == "chat_template_kwargs":
        return isinstance(found := unpack_json(value), Mapping) and any(part is not None for part in found.values())
    return holds(value)
