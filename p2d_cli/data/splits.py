"""Which files belong to which split, by their names alone.

The rules are those of `datasets` (`datasets/data_files.py`), so that a folder, a snapshot in the hub cache and the hub
itself give the same rows. p2d departs from them in one thing: files whose names hold train and test are never put into
one split. So upper case counts like lower case, `trainset` and `testset` count as train and test where both are there,
and folders' names are not trusted where they put files of several names together.

All paths are relative to the folder that was asked for.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import PurePath, PurePosixPath

from p2d_cli.data.raw_rows import FORMATS

Splits = dict[str, list[PurePosixPath]]

DEFAULT_SPLIT = "train"
"""What `datasets` calls the only split of files whose names hold none."""


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


def split_by_name(files: Sequence[PurePosixPath]) -> Splits:
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
    by_word = _matching(files, _IN_WORD, lambda path: tuple(stem_of(PurePath(part)) for part in path.parts))
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


def names_a_split(path: PurePosixPath) -> bool:
    """Say whether the name of a file, or of a folder on its way, is that of a split."""
    return bool(_by_file_name([path]) or _by_folder_name([path]))


def joins_splits(files: Sequence[PurePosixPath]) -> bool:
    """Say whether files that a card puts into one split are of several by their names, or by those of their folders."""
    return len(_by_file_name(files) or _by_folder_name(files)) > 1


def several_stems(split: str, files: Sequence[PurePosixPath]) -> list[str]:
    """Return the different names of files that one split owes to their names, as `train` and `train_small`."""
    pattern = _IN_FILE_NAME.get(split)
    stems = sorted({stem_of(path) for path in files})
    by_name = pattern is not None and all(pattern.search(path.name) for path in files)
    return stems if by_name and len(stems) > 1 else []


def stem_of(path: PurePath) -> str:
    """Return a file's name without the endings of its format and the number of a shard."""
    name = path.name
    while PurePath(name).suffix.lower() in (*FORMATS, ".gz"):
        name = PurePath(name).stem
    return _SHARD_ENDING.sub("", name)


def grouped(files: Iterable[PurePosixPath], name_of: Callable[[PurePosixPath], str] = stem_of) -> Splits:
    """Return files by a name that they share, such as their stem."""
    groups: Splits = {}
    for path in files:
        groups.setdefault(name_of(path), []).append(path)
    return groups


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
