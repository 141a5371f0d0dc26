"""What is said of columns beside their types: names of labels, and texts that are JSON.

It stands in a Parquet or Arrow file, or in the data set's card.
`datasets` writes its features into the schema's metadata; `mine-data` marks columns whose values fit no Arrow type.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from p2d_cli.data.dataset_card import Labels
from p2d_cli.data.raw_rows import BadRow, RawRow, unpack_json
from p2d_cli.errors import DataError
from p2d_cli.pipeline import JSON_MARK


def interpreter(schema: Any) -> Callable[[RawRow], RawRow]:
    """Return what decodes the JSON in the rows of a file of this Arrow schema, and adds the names of labels."""
    features = _features(schema.metadata or {})
    labels = label_names(features)
    kinds = {name: kind for name, kind in features.items() if '"Json"' in json.dumps(kind)}
    for column in schema:
        if JSON_MARK.items() <= (column.metadata or {}).items():
            kinds[column.name] = {"_type": "Json"}

    def interpret(row: RawRow) -> RawRow:
        decoded = {name: _decoded(row.fields[name], kind) for name, kind in kinds.items() if name in row.fields}
        return replace(row, fields=row.fields | decoded, labels=labels)

    return interpret if labels or kinds else lambda row: row


def _decoded(value: Any, kind: Any) -> Any:
    """Decode what is JSON in a value, by the form that `datasets` gives to the features of a column."""
    fields = kind if isinstance(kind, Mapping) else {}
    if fields.get("_type") == "Json":
        return unpack_json(value)
    items = kind if isinstance(kind, list) else []
    if fields.get("_type") in {"List", "LargeList", "Sequence"} and "feature" in fields:
        items = [fields["feature"]]
    if len(items) == 1:
        return [_decoded(item, items[0]) for item in value] if isinstance(value, list) else _decoded(value, items[0])
    if isinstance(value, Mapping):
        return {name: _decoded(part, fields.get(name)) for name, part in value.items()}
    return value


def label_names(features: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Return the names of each column of labels, by the features of a data set as `datasets` writes them as JSON."""
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


def with_labels(row: RawRow, labels: Mapping[str, tuple[str, ...]], *, is_csv: bool) -> RawRow | BadRow:
    """Return a row with the names of labels that the data set's card gives.

    A text that is a number stands for the label of this number, unless it is a label itself; a cell of CSV that looks
    like a number always does, as for `datasets`.

    Args:
        row: as its file holds it; what that says of its own columns gives way to the card.
        labels: names by column.
        is_csv: whether all values are texts.
    """
    fields = dict(row.fields)
    for column, names in labels.items():
        value = fields.get(column)
        if not isinstance(value, str):
            continue
        is_number = value.isascii() and value.strip().removeprefix("-").isdigit()
        if value in names and not (is_csv and is_number):
            continue
        if not is_number and not (is_csv and not value):
            message = f"{row.where}: column '{column}' holds {value!r:.60}, which is none of the card's labels"
            return BadRow(row.where, DataError(message, hint=f"the labels are {', '.join(names[:8])}"))
        fields[column] = int(value) if is_number else None
    return replace(row, fields=fields, labels={**row.labels, **labels})
