"""Answers to choose from, and which of them a row's answer is: by its text, its number, its label or its letter."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from p2d_cli.data.messages import Place, require_text
from p2d_cli.data.raw_rows import RawRow, unpack_json
from p2d_cli.data.row_shapes import Layout
from p2d_cli.errors import DataError

OPTIONS = "options"
"""What some data sets call the choices; others have something else there."""
_LARGEST_WHOLE = 2.0**53
_NUMBER = re.compile(r"([+-]?[0-9]{1,18})(?:\.0*)?")
_LETTERS = "ABCDEFGHIJ"


def read_choices(row: RawRow, layout: Layout) -> tuple[str, ...] | None:
    """Return the texts of a list, or of the list `text` of an object that has labels beside it.

    Raises:
        DataError: the user named the column, and it holds something else.
    """
    value = None if layout.choices is None else unpack_json(row.fields.get(layout.choices))
    texts = value.get("text") if isinstance(value, Mapping) and isinstance(value.get("label"), list) else value
    found = _texts(texts, Place(row.where, f"column '{layout.choices}'"))
    if found is None and layout.choices_named and value is not None:
        raise DataError(f"{row.where}: column '{layout.choices}' must be a list of texts; found {value!r:.60}")
    return found


def _texts(value: Any, place: Place) -> tuple[str, ...] | None:
    if isinstance(value, list) and value and all(isinstance(choice, str) for choice in value):
        return tuple(require_text(text, place) for text in value)
    return None


def read_options(row: RawRow, layout: Layout) -> tuple[str, ...] | None:
    """Return the choices of a row that calls them options, as MMLU-Pro does, if it is clear which one its answer is."""
    if layout.choices_named or not _is_asked(layout) or not row.fields.get(OPTIONS):
        return None
    options = _texts(unpack_json(row.fields[OPTIONS]), Place(row.where, f"column '{OPTIONS}'"))
    answer = row.fields.get("answer")
    if options is None or not isinstance(answer, str):
        return None
    number = options.index(answer) if answer in options else _number_of_letter(row, layout, options, answer)
    stated = row.fields.get("answer_index")
    is_clear = stated is None or str(stated).strip() in {str(number), f"{number}.0"}
    return options if number is not None and is_clear else None


def choice_number(row: RawRow, layout: Layout, choices: Sequence[str], value: Any, place: Place) -> int | None:
    """Return the number, from 0, of the choice that an answer stands for; None where it is the answer's own text.

    Numbers become floats where their column meets a null, and texts in CSV. A text that is one of the choices is meant
    as it stands; other texts may be a number, or in rows of question and answer a letter.

    Raises:
        DataError: a number that no choice has.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    text = answer_text(value, place).strip()
    found = _NUMBER.fullmatch(text)
    if (isinstance(value, str) or found is None) and text in {choice.strip() for choice in choices}:
        return None
    if (letter := _number_of_letter(row, layout, choices, text)) is not None:
        return letter
    if isinstance(value, str) and found is None:
        return None
    number = -1 if found is None else int(found[1])
    if not 0 <= number < len(choices):
        raise place.problem(f"holds {value}, which is the number of none of the {len(choices)} choices, from 0")
    return number


def _number_of_letter(row: RawRow, layout: Layout, choices: Sequence[str], text: str) -> int | None:
    """Return the number of the choice with a letter; where the question itself lists them, the letter is the answer."""
    number = _LETTERS.find(text.strip()) if len(text.strip()) == 1 and _is_asked(layout) else -1
    question = str(row.fields.get("question"))
    return number if 0 <= number < len(choices) and not all(choice in question for choice in choices) else None


def _is_asked(layout: Layout) -> bool:
    return (layout.prompt, layout.completion) == ("question", "answer")


def choice_of_key(row: RawRow, layout: Layout, choices: Sequence[str] | None, value: Any, place: Place) -> str:
    """Return the text of the choice that a label names.

    Raises:
        DataError: choices without labels, or a label that none of them has.
    """
    offered = unpack_json(row.fields.get(str(layout.choices)))
    listed = offered.get("label") if isinstance(offered, Mapping) else None
    if choices is None or not isinstance(listed, list) or len(listed) != len(choices):
        said = "must be an object with two lists of equal length, text and label"
        raise DataError(f"{row.where}: column '{layout.choices}' {said}; found {offered!r:.60}")
    labels, key = [str(label) for label in listed], answer_text(value, place).strip()
    if labels.count(key) != 1:
        raise place.problem(f"holds '{key}', which is not one of the labels {', '.join(labels[:8])}")
    return choices[labels.index(key)]


def answer_text(value: Any, place: Place) -> str:
    """Return an answer that may be a number or a boolean as text; whole numbers have no decimal point.

    A column of whole numbers becomes one of floats where it meets a null, or Parquet, and is to say the same.

    Raises:
        DataError: anything else, or a number that is not finite.
    """
    if isinstance(value, bool | int):
        return str(value).lower()
    if isinstance(value, float):
        if not math.isfinite(value):
            raise place.problem(f"must be a text or a finite number; found {value}")
        return str(int(value)) if value.is_integer() and abs(value) <= _LARGEST_WHOLE else repr(value)
    return require_text(value, place)
