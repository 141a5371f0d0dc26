"""Which files of a folder hold rows, and of which split: by the data set's card, else by their names.

The rules for names are those of `datasets` (`datasets/data_files.py`), so that a folder, a snapshot in the hub cache
and the hub itself give the same rows. p2d departs from them in one thing: files whose names hold train and test are
never put into one split. So upper case counts like lower case, `trainset` and `testset` count as train and test where
both are there, and folders' names are not trusted where they put files of several names together.

Paths of files are relative to the folder that was asked for.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from glob import has_magic
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from p2d_cli.data.dataset_card import DEFAULT_SPLIT, Labels, read_card
from p2d_cli.data.raw_rows import FORMATS, format_of
from p2d_cli.data.row_files import json_kind
from p2d_cli.errors import DataError

Splits = dict[str, list[PurePosixPath]]
STATE_NAME = "state.json"
"""Beside the Arrow files of `Dataset.save_to_disk`."""
DICT_NAME = "dataset_dict.json"
_NOT_ROWS = frozenset(
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
            matched = [path for path in files if _matches(PurePosixPath(pattern).parts, path.parts)]
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
    splits = _split_by_name(files)
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
    others = _grouped(beside)
    if all_asked:
        others |= _grouped(left_out, lambda path: (path.parent / _stem_of(path)).as_posix())
        left_out = []
    is_named = set(splits) != {DEFAULT_SPLIT} or any(map(_names_a_split, files))
    unread = () if is_named else tuple(path for path in paths if not may_hold_rows(path) and _names_a_split(path))
    return FoundSplits(root, splits, others, _grouped(files), tuple(left_out), unread)


# --- splits by name


def _patterns(form: str) -> dict[str, re.Pattern[str]]:
    """Return what finds the name of each split."""
    words = {
        "train": "train|training",
        "validation": "validation|valid|dev|val",
        "test": "test|testing|eval|evaluation",
    }
    form = form.replace("BORDER", "[-._ 0-9]")
    return {split: re.compile(form.replace("WORD", each), re.IGNORECASE) for split, each in words.items()}


_IN_FILE_NAME = _patterns("(?:^|BORDER)(?:WORD)BORDER")
_IN_FOLDER_NAME = _patterns(r"(?:^|BORDER)(?:WORD)(?:BORDER|\Z)")
# `testset` or `gsm8ktest`: at a border of a word on one side.
_IN_WORD = _patterns("(?:^|BORDER)(?:WORD)|(?:WORD)(?:BORDER|$)")
_SHARDED = re.compile(r"(.+)-[0-9]{5}-of-[0-9]{5}.*\..*", re.DOTALL)
"""A file of the folder `data`, as `push_to_hub` writes it."""
_SHARD = re.compile(
    r"(?P<before>.*[-_. ]|)(?P<number>[0-9]{1,9})(?P<of>[-_. ]?of[-_. ]?)(?P<total>[0-9]{1,9})(?![0-9]).*",
    re.DOTALL | re.IGNORECASE,
)
_SHARD_ENDING = re.compile(r"([-_.][0-9]+|[-_. ][0-9]+[-_. ]?of[-_. ]?[0-9]+(-\w+)?)$", re.IGNORECASE)


def _split_by_name(files: Sequence[PurePosixPath]) -> Splits:
    """Return the files of each split; a file that belongs to none is left out, unless all files are like it.

    As in `datasets`, the first of these that finds anything decides: `data/NAME-00000-of-00001*`, the names of
    folders, the names of files. Otherwise all files are one split, `train`.
    """
    sharded = [
        (match[1], path) for path in files if path.parts[:-1] == ("data",) and (match := _SHARDED.fullmatch(path.name))
    ]
    if sharded:
        return {split: [path for name, path in sharded if name == split] for split, _ in sharded}
    by_folder = _by_folder_name(files)
    if by_folder and not any(len(_by_file_name(group)) > 1 for group in by_folder.values()):
        return by_folder
    if by_file := _by_file_name(files):
        return by_file
    by_word = _matching(files, _IN_WORD, lambda path: tuple(_stem_of(PurePath(part)) for part in path.parts))
    if DEFAULT_SPLIT in by_word and len(by_word) > 1:
        return by_word
    return {DEFAULT_SPLIT: list(files)} if files else {}


def _by_file_name(files: Sequence[PurePosixPath]) -> Splits:
    return _matching(files, _IN_FILE_NAME, lambda path: path.parts[-1:])


def _by_folder_name(files: Sequence[PurePosixPath]) -> Splits:
    return _matching(files, _IN_FOLDER_NAME, lambda path: path.parts[:-1])


def _matching(
    files: Sequence[PurePosixPath],
    patterns: dict[str, re.Pattern[str]],
    parts: Callable[[PurePosixPath], tuple[str, ...]],
) -> Splits:
    found = {split: [path for path in files if any(map(each.search, parts(path)))] for split, each in patterns.items()}
    return {split: group for split, group in found.items() if group}


def _names_a_split(path: PurePosixPath) -> bool:
    """Say whether the name of a file, or of a folder on its way, is that of a split."""
    return bool(_by_file_name([path]) or _by_folder_name([path]))


def joins_splits(files: Sequence[PurePosixPath]) -> bool:
    """Say whether files that a card puts into one split are of several by their names, or by those of their folders."""
    return len(_by_file_name(files) or _by_folder_name(files)) > 1


def several_stems(split: str, files: Sequence[PurePosixPath]) -> list[str]:
    """Return the different names of files that one split owes to their names, as `train` and `train_small`."""
    pattern = _IN_FILE_NAME.get(split)
    stems = sorted({_stem_of(path) for path in files})
    by_name = pattern is not None and all(pattern.search(path.name) for path in files)
    return stems if by_name and len(stems) > 1 else []


def _stem_of(path: PurePath) -> str:
    """Return a file's name without the endings of its format and the number of a shard."""
    name = path.name
    while PurePath(name).suffix.lower() in (*FORMATS, ".gz"):
        name = PurePath(name).stem
    return _SHARD_ENDING.sub("", name)


def _grouped(files: Iterable[PurePosixPath], name_of: Callable[[PurePosixPath], str] = _stem_of) -> Splits:
    """Return files by a name that they share, such as their stem."""
    groups: Splits = {}
    for path in files:
        groups.setdefault(name_of(path), []).append(path)
    return groups


def _matches(wanted: tuple[str, ...], parts: tuple[str, ...]) -> bool:
    """Say whether a pattern of a card stands for a path: `*`, `?`, `[...]`, and `**` for folders."""
    if not wanted or not parts:
        return not wanted and not parts
    if wanted[0] == "**":
        return len(wanted) == 1 or any(_matches(wanted[1:], parts[start:]) for start in range(len(parts)))
    return fnmatchcase(parts[0], wanted[0]) and _matches(wanted[1:], parts[1:])


def shard_problem(files: Iterable[PurePosixPath]) -> str | None:
    """Say which shard is missing of files named as shards, or there twice; None where all are there once.

    Numbers start at 0, or at 1 where they end with the total.
    """
    sets: dict[tuple[PurePosixPath, str, str], dict[str, list[int]]] = {}
    for path in files:
        if match := _SHARD.fullmatch(path.name):
            numbers = sets.setdefault((path.parent, match["before"], match["of"]), {}).setdefault(match["total"], [])
            numbers.append(int(match["number"]))
    for (folder, before, of), by_total in sets.items():
        name = f"{folder}/{before}" if folder.parts else before
        if len(by_total) > 1:
            return f"{name}*: shards of {' and of '.join(sorted(by_total))} lie side by side"
        [(total, numbers)] = by_total.items()
        times, count = Counter(numbers), int(total)
        start = 1 if times[count] and not times[0] else 0
        wrong = next((number for number in range(start, start + count) if times[number] != 1), None)
        if wrong is not None:
            what = "is there twice" if times[wrong] else "is missing"
            return f"{len(times)} of {count} shards are there: {name}{wrong:0{len(total)}}{of}{total} {what}"
    return None


# --- looking for files


def may_hold_rows(path: PurePath) -> bool:
    """Say whether a file holds rows by its name, packed ones included, so that those are not left out in silence."""
    is_packed = path.suffix.lower() in _PACKED and format_of(PurePath(path.stem)) is not None
    return (format_of(path) is not None or is_packed) and path.name not in _NOT_ROWS


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
