"""Which files belong to which split, by their names alone.

The rules are those of `datasets` (`datasets/data_files.py`), so that a folder, a snapshot in the hub cache and the hub
itself give the same rows. p2d departs from them in one thing: files whose names hold train and test are never put into
one split. So upper case counts like lower case, `trainset` and `testset` count as train and test where both are there,
and folders' names are not trusted where they put files of several names together.

All paths are relative to the folder that was asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import PurePath, PurePosixPath

from p2d_cli.data.raw_rows import FORMATS

Splits = dict[str, list[PurePosixPath]]

DEFAULT_SPLIT = "train"
"""What `datasets` calls the only split of files whose names hold none."""
_KEYWORDS = {
    "train": "train|training",
    "validation": "validation|valid|dev|val",
    "test": "test|testing|eval|evaluation",
}
_SEPARATOR = "[-._ 0-9]"
_IN_FILE_NAME = {
    split: re.compile(rf"(.*{_SEPARATOR})?({words}){_SEPARATOR}.*", re.IGNORECASE | re.DOTALL)
    for split, words in _KEYWORDS.items()
}
_IN_FOLDER_NAME = {
    split: re.compile(rf"(.*{_SEPARATOR})?({words})({_SEPARATOR}.*)?", re.IGNORECASE | re.DOTALL)
    for split, words in _KEYWORDS.items()
}
# `testset` or `gsm8ktest`: at a border of a word on one side.
_IN_WORD = {
    split: re.compile(rf"(?:^|{_SEPARATOR})(?:{words})|(?:{words})(?:{_SEPARATOR}|$)", re.IGNORECASE)
    for split, words in _KEYWORDS.items()
}
_SHARDED = re.compile(r"(.+)-[0-9]{5}-of-[0-9]{5}.*\..*", re.DOTALL)
"""A file of the folder `data`, as `push_to_hub` writes it."""
_SHARD = re.compile(
    r"(?P<before>.*[-_. ]|)(?P<number>[0-9]{1,9})(?P<of>[-_. ]?of[-_. ]?)(?P<total>[0-9]{1,9})(?![0-9]).*",
    re.DOTALL | re.IGNORECASE,
)
_SHARD_ENDING = re.compile(r"([-_.][0-9]+|[-_. ][0-9]+[-_. ]?of[-_. ]?[0-9]+(-\w+)?)$", re.IGNORECASE)


def split_by_name(files: Sequence[PurePosixPath]) -> Splits:
    """Return the files of each split; a file that belongs to none is left out, unless all files are like it.

    As in `datasets`, the first of these that finds anything decides: `data/NAME-00000-of-00001*`, the names of
    folders, the names of files. Otherwise all files are one split, `train`.
    """
    if sharded := _sharded(files):
        return sharded
    by_folder = _matching(files, lambda path: path.parts[:-1], _IN_FOLDER_NAME)
    if by_folder and not any(len(_by_file_name(group)) > 1 for group in by_folder.values()):
        return by_folder
    if by_file := _by_file_name(files):
        return by_file
    by_word = {
        split: found
        for split, word in _IN_WORD.items()
        if (found := [path for path in files if any(word.search(stem_of(PurePath(part))) for part in path.parts)])
    }
    if DEFAULT_SPLIT in by_word and len(by_word) > 1:
        return by_word
    return {DEFAULT_SPLIT: list(files)} if files else {}


def _sharded(files: Iterable[PurePosixPath]) -> Splits:
    splits: Splits = {}
    for path in files:
        if path.parts[:-1] == ("data",) and (match := _SHARDED.fullmatch(path.name)):
            splits.setdefault(match[1], []).append(path)
    return splits


def _by_file_name(files: Sequence[PurePosixPath]) -> Splits:
    return _matching(files, lambda path: path.parts[-1:], _IN_FILE_NAME)


def _matching(
    files: Sequence[PurePosixPath],
    parts: Callable[[PurePosixPath], tuple[str, ...]],
    patterns: dict[str, re.Pattern[str]],
) -> Splits:
    found = {
        split: [path for path in files if any(pattern.fullmatch(part) for part in parts(path))]
        for split, pattern in patterns.items()
    }
    return {split: group for split, group in found.items() if group}


def names_a_split(path: PurePosixPath) -> bool:
    """Say whether the name of a file, or of a folder on its way, is that of a split."""
    return bool(_by_file_name([path]) or _matching([path], lambda path: path.parts[:-1], _IN_FOLDER_NAME))


def joins_splits(files: Sequence[PurePosixPath]) -> bool:
    """Say whether files that a card puts into one split are of several by their names, or by those of their folders."""
    by_file = _by_file_name(files)
    by_folder = _matching(files, lambda path: path.parts[:-1], _IN_FOLDER_NAME)
    return len(by_file) > 1 or (not by_file and len(by_folder) > 1)


def several_stems(split: str, files: Sequence[PurePosixPath]) -> list[str]:
    """Return the different names of files that one split owes to their names, as `train` and `train_small`."""
    pattern = _IN_FILE_NAME.get(split)
    stems = sorted({stem_of(path) for path in files})
    by_name = pattern is not None and all(pattern.fullmatch(path.name) for path in files)
    return stems if by_name and len(stems) > 1 else []


def stem_of(path: PurePath) -> str:
    """Return a file's name without the endings of its format and the number of a shard."""
    name = path.name
    while PurePath(name).suffix.lower() in (*FORMATS, ".gz"):
        name = PurePath(name).stem
    return _SHARD_ENDING.sub("", name)


def matching_pattern(pattern: str, files: Iterable[PurePosixPath]) -> list[PurePosixPath]:
    """Return the files whose path a pattern of a dataset card stands for: `*`, `?`, `[...]`, and `**` for folders."""
    wanted = PurePosixPath(pattern).parts
    return [path for path in files if _matches(wanted, path.parts)]


def _matches(wanted: tuple[str, ...], parts: tuple[str, ...]) -> bool:
    if not wanted or not parts:
        return not wanted and not parts
    if wanted[0] == "**":
        return len(wanted) == 1 or any(_matches(wanted[1:], parts[start:]) for start in range(len(parts)))
    return fnmatchcase(parts[0], wanted[0]) and _matches(wanted[1:], parts[1:])


def shard_problem(files: Iterable[PurePosixPath]) -> str | None:
    """Say which shard is missing of files named as shards, or there twice; None where all are there once."""
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
        if problem := _number_problem(numbers, int(total)):
            number, what = problem
            missing = f"{name}{number:0{len(total)}}{of}{total}"
            return f"{len(set(numbers))} of {int(total)} shards are there: {missing} {what}"
    return None


def _number_problem(numbers: Sequence[int], total: int) -> tuple[int, str] | None:
    """Return the first number that is not there once; numbers start at 0, or at 1 where they end with the total."""
    start = 1 if total in numbers and 0 not in numbers else 0
    for number in range(start, start + total):
        if (count := numbers.count(number)) != 1:
            return number, "is there twice" if count else "is missing"
    return None
