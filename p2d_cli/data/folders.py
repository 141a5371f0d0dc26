"""Which files of a folder hold rows, and of which split: by the data set's card, else by their names."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from glob import has_magic
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from p2d_cli.data.dataset_card import Labels, read_card
from p2d_cli.data.raw_rows import format_of
from p2d_cli.data.row_files import json_kind
from p2d_cli.data.splits import (
    DEFAULT_SPLIT,
    Splits,
    grouped,
    matching_pattern,
    names_a_split,
    split_by_name,
    stem_of,
)
from p2d_cli.errors import DataError

STATE_NAME = "state.json"
"""Beside the Arrow files of `Dataset.save_to_disk`."""
DICT_NAME = "dataset_dict.json"
NOT_ROWS = frozenset(
    {
        *("dataset_info.json", "dataset_infos.json", DICT_NAME, STATE_NAME, "config.json"),  # of `datasets` and the hub
        *("croissant.json", "dataset-metadata.json", "datapackage.json"),  # of other catalogues
        "manifest.json",
    }
)
_PACKED = frozenset({".gz", ".tgz", ".zst", ".xz", ".bz2", ".lz4", ".zip", ".7z"})
"""Endings behind that of a format; p2d itself unpacks only gzip, and that only of text."""
_UNREAD = frozenset(
    {
        *(".txt", ".xml", ".xls", ".xlsx", ".orc", ".avro", ".feather", ".pkl", ".pickle"),
        *(".h5", ".hdf5", ".npz", ".npy", ".lance", ".tar", ".arff"),
    }
)
"""Endings of formats with rows that p2d does not read."""
_ARTIFACT_MARK = b'"schema": "p2d.'


@dataclass(frozen=True)
class FoundSplits:
    """The files of a folder, by split."""

    root: Path
    splits: Splits
    others: Splits = field(default_factory=dict)
    """Files with rows beside them that belong to no split, by the stems of their names."""
    stems: Splits = field(default_factory=dict)
    """All files by the stems of their names."""
    left_out: tuple[PurePosixPath, ...] = ()
    """Files with rows in other folders that belong to no split."""
    unread: tuple[PurePosixPath, ...] = ()
    """Files of other formats whose names are those of splits, where no file with rows has such a name."""
    labels: Labels = ()
    """Names of labels by the card."""
    by_card: bool = False
    """Whether the card names the files of each split."""


def find_splits(folder: Path, config: str | None = None) -> FoundSplits | None:
    """Return the splits of a folder and their files; None if there are no files with rows.

    Args:
        folder: a folder of files, as a repository on the hub is.
        config: a configuration of the data set: one of its card's, or a folder in it.

    Raises:
        DataError: the card is wrong or has no such configuration, or a folder that `datasets` saved is.
    """
    card = read_card(folder, config)
    root = folder / card.data_dir
    paths = sorted(PurePosixPath(path.relative_to(root)) for path in _walk(root))
    if card.patterns is None:
        found = split_files(root, paths)
        return replace(found, labels=card.labels) if found.stems else None
    files = [path for path in paths if may_hold_rows(path)]
    splits: Splits = {}
    for split, patterns in card.patterns.items():
        # What the card names, there or not: of the splits that it lists, some may never have been fetched.
        named: dict[PurePosixPath, None] = {}
        for pattern in patterns:
            matched = matching_pattern(pattern, files)
            named |= dict.fromkeys(matched if matched or has_magic(pattern) else [PurePosixPath(pattern)])
        splits[split] = list(named)
    return FoundSplits(root, splits, labels=card.labels, by_card=True)


def split_files(root: Path, paths: Sequence[PurePosixPath], *, all_asked: bool = False) -> FoundSplits:
    """Return the splits of files by their names.

    Args:
        root: the folder to which the files are relative.
        paths: files with rows, and of other formats.
        all_asked: whether each of them was asked for: what belongs to no split is then a choice of its own, by its
            path. Otherwise only what lies beside the files of a split is.
    """
    files = [path for path in paths if may_hold_rows(path)]
    splits = split_by_name(files)
    chosen = {path for group in splits.values() for path in group}
    if chosen == set(files) and len(splits) == 1:
        # Files of another format in deeper folders are left out, such as the JSON of a program beside Parquet.
        top = min(len(path.parts) for path in files)
        formats = {format_of(path) for path in files if len(path.parts) == top} | {None}
        splits = {name: [path for path in group if format_of(path) in formats] for name, group in splits.items()}
    folders = {PurePosixPath(), *(path.parent for path in chosen)}
    beside = [path for path in files if path not in chosen and path.parent in folders]
    taken = {*beside, *(path for group in splits.values() for path in group)}
    left_out = [path for path in files if path not in taken]
    others = grouped(beside)
    if all_asked:
        others |= grouped(left_out, lambda path: (path.parent / stem_of(path)).as_posix())
        left_out = []
    is_named = set(splits) != {DEFAULT_SPLIT} or any(map(names_a_split, files))
    unread = () if is_named else tuple(path for path in paths if not may_hold_rows(path) and names_a_split(path))
    return FoundSplits(root, splits, others, grouped(files), tuple(left_out), unread)


# --- looking for files


def may_hold_rows(path: PurePath) -> bool:
    """Say whether a file holds rows by its name, packed ones included, so that those are not left out in silence."""
    is_packed = path.suffix.lower() in _PACKED and format_of(PurePath(path.stem)) is not None
    return (format_of(path) is not None or is_packed) and path.name not in NOT_ROWS


def may_hold_unread_rows(path: PurePath) -> bool:
    """Say whether a file is of a format that `datasets` or others read rows from and p2d does not."""
    return path.suffix.lower() in _UNREAD | _PACKED and not may_hold_rows(path)


def is_hidden(path: PurePath) -> bool:
    """Say whether a part of a path begins with . or _, as of what programs keep for themselves."""
    return any(part.startswith((".", "_")) for part in path.parts)


def _walk(root: Path) -> Iterator[Path]:
    """Yield the files of a folder and of those in it that hold rows, or might.

    Of a folder that `datasets` saved, those that it names; of an artifact of p2d, none: what p2d wrote are no rows
    unless they are asked for.
    """
    seen: set[str] = set()
    for place, folders, names in os.walk(root, followlinks=True):
        folder, real = Path(place), os.path.realpath(place)
        if real in seen or (folder != root and is_own_artifact(folder)):
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not is_hidden(PurePath(name))]
        if STATE_NAME in names and is_saved(folder):
            yield from saved_files(folder)
            continue
        for path in (folder / name for name in names if not is_hidden(PurePath(name))):
            if (may_hold_rows(path) or may_hold_unread_rows(path)) and (path.is_file() or is_dangling(path)):
                yield path


def is_dangling(path: Path) -> bool:
    """Say whether a path is a link to what is not there."""
    return path.is_symlink() and not path.exists()


def is_own_artifact(folder: Path) -> bool:
    """Say whether p2d wrote a folder."""
    try:
        with (folder / "manifest.json").open("rb") as stream:
            return _ARTIFACT_MARK in stream.read(200)
    except OSError:
        return False


# --- folders that `datasets` saved


def is_saved(folder: Path) -> bool:
    """Say whether `Dataset.save_to_disk` wrote a folder: its state names files, which that of others would not."""
    try:
        return b'"_data_files"' in (folder / STATE_NAME).read_bytes()
    except OSError:
        return False


def saved_files(folder: Path) -> tuple[Path, ...]:
    """Return the files of a folder that `Dataset.save_to_disk` wrote, in the order in which its state names them."""
    listed = read_json_object(folder / STATE_NAME).get("_data_files", [])
    entries = [entry.get("filename") if isinstance(entry, dict) else entry for entry in listed]
    files = tuple(folder / name for name in plain_names(entries, folder))
    if missing := [path.name for path in files if not path.is_file()]:
        raise DataError(f"{folder} is a saved data set without {', '.join(missing)}", hint="save it again")
    return files


def plain_names(listed: Any, folder: Path) -> list[str]:
    """Return what a saved data set says it consists of, if those are names of things in its own folder."""
    names = listed if isinstance(listed, list) else [listed]
    for name in names:
        if not isinstance(name, str) or name in {"", ".", ".."} or "/" in name or "\\" in name:
            raise DataError(f"{folder} is a saved data set that names {name!r} as a part of it", hint="save it again")
    return names


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object; refuse one that holds something else."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as problem:
        raise DataError(f"cannot read {path}: {problem}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object, found {json_kind(value)}")
    return value
