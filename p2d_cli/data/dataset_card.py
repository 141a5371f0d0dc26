"""What the card of a data set, the `README.md` in its folder, says of its configurations, their files and labels.

Repositories on the hub decide their splits by it, as `datasets` reads it: by the key `configs` of the YAML at its top.
The names of labels stand under `dataset_info`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from p2d_cli.errors import DataError, first_line

DEFAULT_SPLIT = "train"
"""What `datasets` calls the only split of files whose names hold none."""
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
Patterns = dict[str, tuple[str, ...]]
"""Of the files of each split, relative to the folder of a configuration."""
Labels = tuple[tuple[str, tuple[str, ...]], ...]
"""Columns of labels, each with what its numbers stand for."""


@dataclass(frozen=True)
class CardConfig:
    """One configuration of a data set."""

    data_dir: str = ""
    """Its folder, relative to that of the card."""
    patterns: Patterns | None = None
    """None if the names of the files tell the splits."""
    labels: Labels = ()


def read_card(folder: Path, wanted: str | None) -> CardConfig:
    """Return what the card in `folder` says of a configuration.

    Args:
        folder: of the data set.
        wanted: the configuration's name; by default the only one, or the one that the card says is the default. Where
            the card describes none, it is a folder in this one.

    Raises:
        DataError: the card is not valid, or has no such configuration, or several and no default.
    """
    path = folder / "README.md"
    metadata = _metadata(path)
    entries = metadata.get("configs") or []
    named = isinstance(entries, list) and all(isinstance(entry, dict) and "config_name" in entry for entry in entries)
    if not named:
        raise DataError(f"{path}: expected a list of configurations, each with config_name, under 'configs'")
    if not entries:
        return CardConfig(wanted or "", labels=_labels(path, metadata, wanted))
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
    data_dir, patterns = _files(path, wanted, by_name[wanted])
    return CardConfig(data_dir, patterns, _labels(path, metadata, wanted))


def _metadata(path: Path) -> dict[str, Any]:
    """Return the YAML at the top of a card; nothing where the card is not there or says nothing of its files."""
    try:
        if path.is_symlink() and not path.exists():
            raise DataError(f"{path} is a link to a file that is not there", hint="fetch the data set again")
        content = path.read_bytes() if path.is_file() else b""
    except OSError as problem:
        raise DataError(f"cannot read {path}: {problem.strerror or problem}") from None
    # Most folders have no such card; what would parse it takes a while to import.
    if b"configs:" not in content and b"dataset_info:" not in content:
        return {}
    from huggingface_hub import metadata_load

    try:
        # Anything may be wrong with YAML that a person wrote; its parser's errors share no base with Python's.
        return dict(metadata_load(path) or {})
    except Exception as problem:  # noqa: BLE001
        raise DataError(f"{path}: the YAML at its top cannot be read: {first_line(problem)}") from None


def _files(path: Path, name: str, entry: dict[str, Any]) -> tuple[str, Patterns | None]:
    """Return the folder of a configuration, and the patterns of its splits if it has any."""
    data_dir, given = entry.get("data_dir") or "", entry.get("data_files")
    endings = {ending.lower() for ending in re.findall(r"\.([ct]sv)\b", str(given), re.IGNORECASE)}
    separators = {"csv": (",",), "tsv": ("\t",)}.get("".join(endings), ())
    as_read = _AS_READ | {"sep": separators, "delimiter": separators}
    changing = [key for key in _CHANGES_ROWS if entry.get(key) is not None and entry[key] not in as_read.get(key, ())]
    if changing:
        hint = "name the files themselves if their rows are right without it"
        raise DataError(f"{path} sets {', '.join(changing)} for '{name}', which p2d does not apply", hint=hint)
    patterns = None if given is None else _patterns(path, given)
    for text in (data_dir, *(pattern for several in (patterns or {}).values() for pattern in several)):
        if not isinstance(text, str) or text.startswith("/") or "://" in text or ".." in text.split("/"):
            raise DataError(f"{path} names files outside of its folder: {text!r}", hint="name the files themselves")
    return data_dir, patterns


def _patterns(path: Path, given: Any) -> Patterns:
    """Return the patterns of each split from any of the forms in which a card may give them."""
    if isinstance(given, str) or (given and isinstance(given, list) and all(isinstance(name, str) for name in given)):
        given = {"split": DEFAULT_SPLIT, "path": given}
    patterns: Patterns = {}
    for entry in given if isinstance(given, list) else [given]:
        if not isinstance(entry, dict) or set(entry) != {"split", "path"} or str(entry["split"]) in patterns:
            expected = "a name, a list of names, or a list of splits with their paths"
            raise DataError(f"{path}: data_files: expected {expected}; found {entry!r:.60}")
        paths = entry["path"] if isinstance(entry["path"], list) else [entry["path"]]
        patterns[str(entry["split"])] = tuple(paths)
    return patterns


def _labels(path: Path, metadata: dict[str, Any], config: str | None) -> Labels:
    """Return the names of labels by column, of a configuration or, for None, of a card without any."""
    infos = metadata.get("dataset_info") or []
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
        if not isinstance(label, dict) or "names" not in label:
            continue
        names = label["names"]
        if isinstance(names, dict):  # with the numbers as keys
            by_number = {str(number): name for number, name in names.items()}
            names = [by_number.get(str(number)) for number in range(len(by_number))]
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            message = f"{path}: class_label of '{feature.get('name')}': expected a text for each number from 0"
            raise DataError(f"{message}; found {names!r:.80}", hint="put names such as yes and 1 in quotes")
        found.append((str(feature.get("name")), tuple(names)))
    return tuple(found)
