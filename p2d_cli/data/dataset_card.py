"""What the card of a data set, the `README.md` in its folder, says of its configurations, their files and labels.

Repositories on the hub decide their splits by it, as `datasets` reads it: by the key `configs` of the YAML at its top.
The names of labels stand under `dataset_info`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from p2d_cli.data.splits import DEFAULT_SPLIT
from p2d_cli.errors import DataError, first_line

CARD_NAME = "README.md"
_CHANGES_ROWS = (
    *("column_names", "columns", "comment", "converters", "decimal", "delimiter", "doublequote", "dtype", "encoding"),
    *("encoding_errors", "escapechar", "false_values", "field", "filters", "header", "index_col", "keep_default_na"),
    *("lineterminator", "na_filter", "na_values", "names", "nrows", "on_bad_lines", "quotechar", "quoting", "sep"),
    *("skipfooter", "skipinitialspace", "skiprows", "thousands", "true_values", "usecols"),
)
"""Options for the readers of `datasets` with which a file holds other rows than p2d reads from it."""
_AS_READ: dict[str, tuple[Any, ...]] = {
    "doublequote": (True,),
    "encoding": ("utf-8", "UTF-8", "utf8"),
    "header": ("infer", 0),
    "quotechar": ('"',),
    "quoting": (0,),
    "skipinitialspace": (False,),
    "decimal": (".",),
}
"""Values of these options with which it holds the rows that p2d reads."""
Labels = tuple[tuple[str, tuple[str, ...]], ...]
"""Columns of labels, each with what its numbers stand for."""
_EXPECTED = "a name, a list of names, or a list of splits with their paths"


@dataclass(frozen=True)
class CardConfig:
    """One configuration of a data set."""

    name: str
    patterns: dict[str, tuple[str, ...]] | None
    """Patterns of its files by split, relative to its folder; None if their names tell the splits."""
    data_dir: str = ""
    """Its folder, relative to that of the card."""


def read_labels(folder: Path, config: str | None) -> Labels:
    """Return the names of labels that the card in `folder` gives, by column.

    Args:
        folder: of the data set.
        config: the configuration's name; None where the card has none.

    Raises:
        DataError: the card is not valid, or names are.
    """
    path = folder / CARD_NAME
    infos = _metadata(path, b"dataset_info:").get("dataset_info") or []
    by_name = {
        str(info.get("config_name", "default")): info
        for info in (infos if isinstance(infos, list) else [infos])
        if isinstance(info, dict)
    }
    # As in `datasets`, the only one counts whatever its name, unless a configuration is named.
    wanted = next(iter(by_name)) if config is None and len(by_name) == 1 else config or "default"
    features = by_name.get(wanted, {}).get("features") or []
    found = []
    for feature in features if isinstance(features, list) else []:
        kind = feature.get("dtype") if isinstance(feature, dict) else None
        label = kind.get("class_label") if isinstance(kind, dict) else None
        if isinstance(label, dict) and "names" in label:
            found.append((str(feature.get("name")), _names(path, feature, label["names"])))
    return tuple(found)


def _names(path: Path, feature: dict[str, Any], names: Any) -> tuple[str, ...]:
    """Return the names of labels in the order of their numbers, from a list or from an object with these as keys."""
    if isinstance(names, dict):
        by_number = {str(number): name for number, name in names.items()}
        names = [by_number.get(str(number)) for number in range(len(by_number))]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        message = f"{path}: class_label of '{feature.get('name')}': expected a text for each number from 0"
        raise DataError(f"{message}; found {names!r:.80}", hint="put names such as yes and 1 in quotes")
    return tuple(names)


def read_card(folder: Path, wanted: str | None) -> CardConfig | None:
    """Return a configuration that the card in `folder` describes; None if it describes none.

    Args:
        folder: of the data set.
        wanted: the configuration's name; by default the only one, or the one that the card says is the default.

    Raises:
        DataError: the card is not valid, or has no such configuration, or several and no default.
    """
    path = folder / CARD_NAME
    entries = _entries(path)
    if not entries:
        return None
    by_name = {str(entry["config_name"]): entry for entry in entries}
    known = ", ".join(sorted(by_name))
    if wanted is None:
        defaults = [name for name, entry in by_name.items() if name == "default" or entry.get("default")]
        candidates = list(by_name) if len(by_name) == 1 else defaults
        if len(candidates) != 1:
            hint = f"choose one as FOLDER_OR_ID:{next(iter(by_name))}"
            raise DataError(f"{folder} has several configurations: {known}", hint=hint)
        wanted = candidates[0]
    if wanted not in by_name:
        raise DataError(f"{folder} has no configuration '{wanted}'; found: {known}")
    return _config(path, wanted, by_name[wanted])


def _metadata(path: Path, key: bytes) -> dict[str, Any]:
    """Return the YAML at the top of a card; nothing where the card is not there or does not hold the key."""
    # Most folders have no such card; what would parse it takes a while to import.
    try:
        if path.is_symlink() and not path.exists():
            raise DataError(f"{path} is a link to a file that is not there", hint="fetch the data set again")
        if not path.is_file() or key not in path.read_bytes():
            return {}
    except OSError as problem:
        raise DataError(f"cannot read {path}: {problem.strerror or problem}") from None
    from huggingface_hub import metadata_load

    try:
        # Anything may be wrong with YAML that a person wrote; its parser's errors share no base with Python's.
        return dict(metadata_load(path) or {})
    except Exception as problem:  # noqa: BLE001
        raise DataError(f"{path}: the YAML at its top cannot be read: {first_line(problem)}") from None


def _entries(path: Path) -> list[dict[str, Any]]:
    entries = _metadata(path, b"configs:").get("configs") or []
    named = isinstance(entries, list) and all(isinstance(entry, dict) and "config_name" in entry for entry in entries)
    if not named:
        raise DataError(f"{path}: expected a list of configurations, each with config_name, under 'configs'")
    return list(entries)


def _config(path: Path, name: str, entry: dict[str, Any]) -> CardConfig:
    changing = [
        key
        for key in _CHANGES_ROWS
        if entry.get(key) is not None and entry[key] not in (*_AS_READ.get(key, ()), *_separators(key, entry))
    ]
    if changing:
        hint = "name the files themselves if their rows are right without it"
        raise DataError(f"{path} sets {', '.join(changing)} for '{name}', which p2d does not apply", hint=hint)
    data_dir = entry.get("data_dir") or ""
    patterns = None if entry.get("data_files") is None else _patterns(path, entry["data_files"])
    for text in (data_dir, *(pattern for several in (patterns or {}).values() for pattern in several)):
        if not isinstance(text, str) or text.startswith("/") or "://" in text or ".." in text.split("/"):
            raise DataError(f"{path} names files outside of its folder: {text!r}", hint="name the files themselves")
    return CardConfig(name, patterns, data_dir)


def _separators(key: str, entry: dict[str, Any]) -> tuple[str, ...]:
    """Return what p2d takes for the separator of a configuration's files, if the key is that of the separator."""
    if key not in {"sep", "delimiter"}:
        return ()
    endings = {ending.lower() for ending in re.findall(r"\.([ct]sv)\b", str(entry.get("data_files")), re.IGNORECASE)}
    return {frozenset({"csv"}): (",",), frozenset({"tsv"}): ("\t",)}.get(frozenset(endings), ())


def _patterns(path: Path, given: Any) -> dict[str, tuple[str, ...]]:
    """Return the patterns of each split from any of the forms in which a card may give them."""
    if isinstance(given, str):
        return {DEFAULT_SPLIT: (given,)}
    if isinstance(given, list) and given and all(isinstance(pattern, str) for pattern in given):
        return {DEFAULT_SPLIT: tuple(given)}
    patterns: dict[str, tuple[str, ...]] = {}
    for entry in given if isinstance(given, list) else [given]:
        if not isinstance(entry, dict) or set(entry) != {"split", "path"} or str(entry["split"]) in patterns:
            raise DataError(f"{path}: data_files: expected {_EXPECTED}; found {entry!r:.60}")
        paths = entry["path"] if isinstance(entry["path"], list) else [entry["path"]]
        patterns[str(entry["split"])] = tuple(paths)
    return patterns
