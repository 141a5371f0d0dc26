"""What the card of a data set, the `README.md` in its folder, says of its configurations and their files.

Repositories on the hub decide their splits by it, as `datasets` reads it: the key `configs` of the YAML at its top.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from p2d_cli.data.splits import DEFAULT_SPLIT
from p2d_cli.errors import DataError, first_line

CARD_NAME = "README.md"
_CHANGES_ROWS = ("column_names", "field", "filters", "header", "names", "nrows", "skipfooter", "skiprows")
"""Options for the readers of `datasets` with which a file holds other rows than p2d reads from it."""
_EXPECTED = "a name, a list of names, or a list of splits with their paths"


@dataclass(frozen=True)
class CardConfig:
    """One configuration of a data set."""

    name: str
    patterns: dict[str, tuple[str, ...]] | None
    """Patterns of its files by split, relative to its folder; None if their names tell the splits."""
    data_dir: str = ""
    """Its folder, relative to that of the card."""


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


def _entries(path: Path) -> list[dict[str, Any]]:
    # Most folders have no such card; what would parse it takes a while to import.
    try:
        if not path.is_file() or b"configs:" not in path.read_bytes():
            return []
    except OSError as problem:
        raise DataError(f"cannot read {path}: {problem.strerror or problem}") from None
    from huggingface_hub import metadata_load

    try:
        # Anything may be wrong with YAML that a person wrote; its parser's errors share no base with Python's.
        entries = (metadata_load(path) or {}).get("configs") or []
    except Exception as problem:  # noqa: BLE001
        raise DataError(f"{path}: the YAML at its top cannot be read: {first_line(problem)}") from None
    named = isinstance(entries, list) and all(isinstance(entry, dict) and "config_name" in entry for entry in entries)
    if not named:
        raise DataError(f"{path}: expected a list of configurations, each with config_name, under 'configs'")
    return list(entries)


def _config(path: Path, name: str, entry: dict[str, Any]) -> CardConfig:
    changing = [key for key in _CHANGES_ROWS if entry.get(key) is not None]
    if changing:
        hint = "name the files themselves if their rows are right without it"
        raise DataError(f"{path} sets {', '.join(changing)} for '{name}', which p2d does not apply", hint=hint)
    data_dir = entry.get("data_dir") or ""
    patterns = None if entry.get("data_files") is None else _patterns(path, entry["data_files"])
    for text in (data_dir, *(pattern for several in (patterns or {}).values() for pattern in several)):
        if not isinstance(text, str) or text.startswith("/") or "://" in text or ".." in text.split("/"):
            raise DataError(f"{path} names files outside of its folder: {text!r}", hint="name the files themselves")
    return CardConfig(name, patterns, data_dir)


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
