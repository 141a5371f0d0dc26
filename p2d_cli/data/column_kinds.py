"""What is said of columns beside their types: names of labels, and texts that are JSON.

It stands in a Parquet or Arrow file, or in the data set's card.
`datasets` writes its features into the schema's metadata; `mine-data` marks columns whose values fit no Arrow type.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from p2d_cli.data.dataset_card import Labels
from p2d_cli.data.raw_rows import BadRow, RawRow, unpack_json
from p2d_cli.errors import DataError
from p2d_cli.pipeline import JSON_MARK

Decode = Callable[[Any], Any]


def interpreted(rows: Iterator[RawRow | BadRow], schema: Any) -> Iterator[RawRow | BadRow]:
    """Yield a file's rows with JSON decoded, and with the names of labels beside them.

    Args:
        rows: as the file holds them.
        schema: its Arrow schema.
    """
    features = _features(schema.metadata or {})
    labels = label_names(features)
    decoders: dict[str, Decode] = {name: decode for name, kind in features.items() if (decode := _decoder(kind))}
    marked = (column.name for column in schema if JSON_MARK.items() <= (column.metadata or {}).items())
    decoders |= dict.fromkeys(marked, unpack_json)
    if not labels and not decoders:
        yield from rows
        return
    for row in rows:
        if isinstance(row, RawRow):
            decoded = {name: decode(row.fields[name]) for name, decode in decoders.items() if name in row.fields}
            yield replace(row, fields=row.fields | decoded, labels=labels)
        else:
            yield row


def with_labels(
    rows: Iterator[RawRow | BadRow], labels: Mapping[str, tuple[str, ...]], *, is_csv: bool
) -> Iterator[RawRow | BadRow]:
    """Yield rows with the names of labels that the data set's card gives.

    A text that is a number stands for the label of this number, unless it is a label itself; a cell of CSV that looks
    like a number always does, as for `datasets`.

    Args:
        rows: as their file holds them; what it says of its own columns gives way to the card.
        labels: names by column.
        is_csv: all their values are texts.
    """
    for row in rows:
        yield row if isinstance(row, BadRow) else _with_numbers(row, labels, is_csv)


def labels_beyond(files: Sequence[Path], labels: Labels) -> Labels:
    """Return the labels of a card that not all of its Parquet files give alike.

    What these say themselves is a part of their digest, and of the identity of artifacts.
    """
    if not labels or not files:
        return ()
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        own = [label_names(_features(pq.read_schema(path).metadata or {})) for path in files]
    except (OSError, pa.ArrowException):  # reading the rows tells what is wrong
        return labels
    return tuple((column, names) for column, names in labels if any(each.get(column) != names for each in own))


def _with_numbers(row: RawRow, labels: Mapping[str, tuple[str, ...]], is_csv: bool) -> RawRow | BadRow:
    fields = dict(row.fields)
    for column, names in labels.items():
        value = fields.get(column)
        if not isinstance(value, str) or (value in names and not (is_csv and _is_number(value))):
            continue
        if is_csv and not value:
            fields[column] = None
        elif _is_number(value):
            fields[column] = int(value)
        else:
            message = f"{row.where}: column '{column}' holds {value!r:.60}, which is none of the card's labels"
            return BadRow(row.where, DataError(message, hint=f"the labels are {', '.join(names[:8])}"))
    return replace(row, fields=fields, labels={**row.labels, **labels})


def _is_number(text: str) -> bool:
    return text.isascii() and text.strip().removeprefix("-").isdigit()


def label_names(features: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Return the names of each column of labels.

    Args:
        features: of a data set, as `datasets` writes them as JSON.
    """
    found = {}
    for column, kind in features.items():
        names = kind.get("names") if isinstance(kind, Mapping) and kind.get("_type") == "ClassLabel" else None
        if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
            found[column] = tuple(names)
    return found


def _features(metadata: Mapping[bytes, bytes]) -> Mapping[str, Any]:
    """Return the features of `datasets` in a schema's metadata; none where there are none, or other things."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def _decoder(kind: Any) -> Decode | None:
    """Return what decodes a value of this kind, None where nothing in it is JSON."""
    if isinstance(kind, list):
        return _decoder_of_lists(kind[0]) if len(kind) == 1 else None
    if not isinstance(kind, Mapping):
        return None
    if kind.get("_type") == "Json":
        return unpack_json
    if kind.get("_type") in {"List", "LargeList", "Sequence"} and "feature" in kind:
        return _decoder_of_lists(kind["feature"])
    fields = {name: decode for name, part in kind.items() if (decode := _decoder(part))}
    return (lambda value: _decoded_fields(value, fields)) if fields else None


def _decoder_of_lists(kind: Any) -> Decode | None:
    decode = _decoder(kind)
    if decode is None:
        return None
    return lambda value: [decode(item) for item in value] if isinstance(value, list) else decode(value)


def _decoded_fields(value: Any, fields: Mapping[str, Decode]) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {name: fields[name](part) if name in fields else part for name, part in value.items()}
