"""Where rows lie: files, folders, the hub; and reading them from there.

`locate` looks at names, and at the card of a data set, and is quick; `scan_rows` opens files. Neither imports torch,
transformers or `datasets` for local files, and pyarrow only for Parquet and Arrow. A row's file is named relative to
the folder that holds all files, so that a row keeps its name when the data moves.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from glob import glob, has_magic
from pathlib import Path, PurePosixPath
from typing import Any

from p2d_cli.data import folders
from p2d_cli.data.column_kinds import label_names, labels_beyond
from p2d_cli.data.foreign import HEAD_BYTES, refuse_foreign
from p2d_cli.data.raw_rows import FORMATS, BadRow, RawRow, RowFormat, RowSource, format_of
from p2d_cli.data.row_files import read_files
from p2d_cli.errors import DataError, StorageError, UnavailableError, UsageError, near_names
from p2d_cli.hub import PROBE_SECONDS, why_unreachable

_HUB_ID = re.compile(
    r"(?P<repo>[\w][\w.-]*/[\w][\w.-]*)(@(?P<revision>[^\s:@]+))?(:(?P<config>[\w][\w.+-]*))?", re.ASCII
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NEED_A_FILE = "rows are read more than once: write them to a file, such as rows.jsonl"
_NO_LISTS = "a comma is part of a name: put the files into one folder, or give a glob in quotes, as 'rows/*.jsonl'"
_MOST_LISTED = 12
_KNOWN_SUFFIXES = "known are " + ", ".join(FORMATS) + ", and .gz of the text formats"


def locate(spec: str, *, split: str | None = None, revision: str | None = None) -> RowSource:
    """Find out what `spec` names, without reading rows.

    Args:
        spec: a file, a folder of files, with `:config` for one of several configurations, a `save_to_disk` folder, a
            glob, or a hub id `owner/name[@revision][:config]`. A path that exists wins over a hub id.
        split: which split of a folder or hub data set. A single file has none, and ignores it.
        revision: revision of a hub data set, instead of `@revision`.

    Raises:
        DataError: no such file, no data in the folder, an unknown format, or a split that is missing or not chosen.
        UsageError: two different revisions.
    """
    path = Path(spec).expanduser()
    if (local := _locate_here(spec, path, split)) is not None:
        return local
    hub_id = _HUB_ID.fullmatch(spec)
    if hub_id is None or spec.startswith((".", "/", "~")) or format_of(path) is not None:
        parts = [part.strip() for part in spec.split(",")]
        are_there = len(parts) > 1 and all(Path(part).expanduser().exists() for part in parts if part)
        raise DataError(f"no such file or folder: {spec}", hint=_NO_LISTS if are_there else near_names(path))
    if revision is not None and hub_id["revision"] not in (None, revision):
        raise UsageError(f"{spec} asks for revision {hub_id['revision']}, but --revision is {revision}")
    return RowSource(
        spec=spec,
        kind="hub",
        format="hub",
        repo=hub_id["repo"],
        revision=hub_id["revision"] or revision,
        split=split,
        config_name=hub_id["config"],
    )


def read_rows(source: RowSource) -> Iterator[RawRow]:
    """Yield the rows of a source in order, as `scan_rows` does; the first one that cannot be read is an error."""
    for row in scan_rows(source):
        if isinstance(row, BadRow):
            raise row.problem
        yield row


def scan_rows(source: RowSource) -> Iterator[RawRow | BadRow]:
    """Yield the rows of a source, with unreadable ones as `BadRow` where reading can go on behind them.

    Raises:
        DataError: a file that cannot be read any further, or a source without rows.
        UnavailableError: a hub data set that is neither cached nor reachable.
        StorageError: a file that the system does not let p2d read.
    """
    empty = True
    rows = _read_hub(source) if source.kind == "hub" else read_files(source)
    for row in rows:
        empty = False
        yield row
    if empty:
        raise DataError(f"{source.spec} holds no rows")


# --- finding


def _locate_here(spec: str, path: Path, split: str | None) -> RowSource | None:
    """Return what lies on this machine under a name; None if nothing does."""
    if spec == "-":
        raise DataError("rows cannot be read from standard input", hint=_NEED_A_FILE)
    if path.is_dir():
        return _locate_saved(spec, path, split) or _locate_files(spec, path, split, None)
    if path.exists():
        if not path.is_file():
            raise DataError(f"{spec} is no file but a pipe or a device", hint=_NEED_A_FILE)
        return RowSource(spec=spec, kind="files", format=_require_format(path), files=(path,))
    if has_magic(spec):
        return _locate_glob(spec, split)
    folder, _, config = spec.rpartition(":")
    if folder and config and (place := Path(folder).expanduser()).is_dir():
        if folders.is_own_artifact(place):
            raise DataError(f"{folder} is an artifact of p2d, which has no configurations", hint=f"give {folder}")
        return _locate_files(spec, place, split, config)
    return None


def _require_format(path: Path) -> RowFormat:
    """Return the format that a file's name stands for; if it stands for none, its first bytes may tell what it is."""
    if (row_format := format_of(path)) is not None:
        return row_format
    try:
        with path.open("rb") as stream:
            refuse_foreign(stream.read(HEAD_BYTES), path, None)
    except OSError as problem:
        raise StorageError(f"cannot read {path}: {problem.strerror or problem}") from None
    raise DataError(f"{path}: cannot tell the format of its rows from its name", hint=_KNOWN_SUFFIXES)


def _locate_saved(spec: str, folder: Path, split: str | None) -> RowSource | None:
    """Return what `save_to_disk` wrote into a folder, a data set or a dictionary of several; None if it did not."""
    if (folder / folders.DICT_NAME).is_file():
        names = folders.plain_names(folders.read_json_object(folder / folders.DICT_NAME).get("splits", []), folder)
        split = _choose_split(spec, names, split)
        folder = folder / split
    elif not folders.is_saved(folder):
        return None
    else:
        # In a dictionary its key counts: what `train_test_split` divided keeps saying what the whole was.
        saved = folders.read_json_object(folder / folders.STATE_NAME).get("_split")
        if split is not None and isinstance(saved, str) and split not in re.findall(r"[\w.]+", saved):
            raise DataError(f"{spec} has no split '{split}'; found: {saved}")
    files = folders.saved_files(folder)
    if not files:
        raise DataError(f"{spec} is a saved data set without data files", hint="save it again")
    return RowSource(spec=spec, kind="dataset-folder", format="arrow", files=files, split=split)


def _locate_files(spec: str, folder: Path, split: str | None, config: str | None) -> RowSource:
    found = folders.find_splits(folder, config)
    if found is None:
        raise DataError(f"no files with rows in {spec}", hint=_KNOWN_SUFFIXES)
    chosen, files = _choose_files(spec, found, split)
    if problem := _missing_part(found.root, files):
        hint = "fetch the missing file; or name the files to read, by a glob in quotes, as 'rows/*.jsonl'"
        raise DataError(f"{spec} is not whole: {problem}", hint=hint)
    source = _one_format(spec, [found.root / path for path in files], split)
    labels = labels_beyond(source.files, found.labels) if source.format == "parquet" else found.labels
    return replace(source, notes=_notes(spec, found, chosen, files), labels=labels)


def _notes(spec: str, found: folders.FoundSplits, split: str, files: Sequence[PurePosixPath]) -> tuple[str, ...]:
    """Say what `datasets` does without a word: files that it joins to one split, or leaves out."""
    notes = []
    if found.by_card and folders.joins_splits(files):
        notes.append(f"{spec}: its card joins files of several splits in {split}: {_listed(files)}")
    # Of files with different names one may be a part of the other.
    elif stems := folders.several_stems(split, files):
        notes.append(f"{spec}: {', '.join(stems)} are all of the split {split}; for one alone name its file")
    if count := len(found.left_out):
        which = f"{count} {'files' if count > 1 else 'file'} with rows in other folders"
        notes.append(f"{spec}: left out {which}, of no split by name: {_listed(found.left_out)}")
    return tuple(notes)


def _listed(names: Sequence[object]) -> str:
    more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return ", ".join(map(str, names[:_MOST_LISTED])) + more


def _locate_glob(spec: str, split: str | None) -> RowSource:
    """Read a pattern as a folder that holds just the files it stands for."""
    # Path.glob takes no pattern from the root, nor one that leads upwards.
    matched = sorted({Path(name) for name in glob(str(Path(spec).expanduser()), recursive=True)})  # noqa: PTH207
    paths = [path for path in matched if path.is_file() or folders.is_dangling(path)]
    if not paths:
        what = "only folders match" if matched else "no file matches"
        raise DataError(f"{what} {spec}", hint="as in a shell, * stands for any name, and ** for any folders")
    asks_hidden = folders.is_hidden(PurePosixPath(spec))
    rows = [path for path in paths if folders.may_hold_rows(path) and (asks_hidden or not folders.is_hidden(path))]
    if not rows:
        _require_format(paths[0])
        raise DataError(f"none of the files that match {spec} holds rows: {paths[0]}", hint=_KNOWN_SUFFIXES)
    root = Path(os.path.commonpath([path.parent for path in rows]))
    asked = [*rows, *(path for path in paths if folders.may_hold_unread_rows(path))]
    found = folders.split_files(root, [PurePosixPath(os.path.relpath(path, root)) for path in asked], all_asked=True)
    chosen, group = _choose_files(spec, found, split)
    _refuse_dangling(root, group)
    return replace(_one_format(spec, [root / path for path in group], split), notes=_notes(spec, found, chosen, group))


def _choose_files(spec: str, found: folders.FoundSplits, split: str | None) -> tuple[str, list[PurePosixPath]]:
    """Return the name and the files of a split: the one asked for, or the only one."""
    # A file beside a split may have its name, as train.jsonl beside the folder train.
    others = {files[0].as_posix() if name in found.splits else name: files for name, files in found.others.items()}
    groups = found.splits | others
    if split is not None and split not in groups and split in found.stems:
        return split, found.stems[split]
    if found.unread:
        hint = "name the file with the rows; or convert them to .jsonl, .csv or .parquet first"
        message = f"{spec} has files of splits in a format that p2d does not read: {_listed(found.unread)}"
        raise DataError(message, hint=hint)
    if not found.by_card:
        _refuse_two_splits(spec, found.splits, split)
    chosen = _choose_split(spec, list(groups), split)
    return chosen, groups[chosen]


def _refuse_two_splits(spec: str, splits: folders.Splits, split: str | None) -> None:
    """Refuse a file whose name, or that of its folder, is of two splits, if it would be read."""
    counts = Counter(path for files in splits.values() for path in files)
    asked = counts if split is None else splits.get(split, [])
    if twice := [path for path in asked if counts[path] > 1]:
        names = ", ".join(sorted(name for name, files in splits.items() if twice[0] in files))
        message = f"{spec}: the name of {twice[0]} stands for several splits: {names}"
        raise DataError(message, hint="rename it, or name the file to read")


def _refuse_dangling(root: Path, files: Sequence[PurePosixPath]) -> None:
    for path in files:
        if folders.is_dangling(root / path):
            target = (root / path).readlink()
            raise DataError(f"{root / path} is a link to {target}, which is not there", hint="fetch or remove it")


def _missing_part(root: Path, files: Sequence[PurePosixPath]) -> str | None:
    """Say what is missing of a split; None if all of it is there. A link to what is not there is an error."""
    if not files:
        return "no file of the split is there"
    _refuse_dangling(root, files)
    absent = [path.as_posix() for path in files if not (root / path).is_file()]
    return f"{absent[0]} is missing" if absent else folders.shard_problem(files)


def _one_format(spec: str, files: Sequence[Path], split: str | None) -> RowSource:
    formats = {path: _require_format(path) for path in files}
    if len(set(formats.values())) > 1:
        names = ", ".join(path.name for path in files)
        raise DataError(f"{spec} holds rows in several formats: {names}", hint="name one of the files instead")
    for path in files:
        if path.suffix.lower() == ".gz" and (unpacked := path.with_suffix("")) in formats:
            hint = "remove one of them, or name one file"
            raise DataError(f"{spec} holds the same rows twice: {unpacked.name} and {path.name}", hint=hint)
    return RowSource(spec=spec, kind="files", format=_require_format(files[0]), files=tuple(files), split=split)


def _choose_split(spec: str, splits: Sequence[str], split: str | None) -> str:
    known = _listed(sorted(splits))
    if split is None:
        if len(splits) == 1:
            return splits[0]
        raise DataError(f"{spec} has several splits: {known}", hint="choose one with --split, or name one file")
    if split not in splits:
        raise DataError(f"{spec} has no split '{split}'; found: {known}")
    return split


# --- the hub


def _read_hub(source: RowSource) -> Iterator[RawRow | BadRow]:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE and (cached := _cached_files(source)) is not None:
        for number, row in enumerate(read_files(cached)):
            yield row if isinstance(row, BadRow) else replace(row, where=f"{source.repo}/{cached.split}#{number}")
        return
    if constants.HF_HUB_OFFLINE and source.revision is not None:
        raise _unavailable(source, f"its revision {source.revision} is not in the local cache", offline=True)
    import datasets

    offline = bool(datasets.config.HF_HUB_OFFLINE)
    if not offline:
        _probe_hub(source)
    try:
        with _silenced():
            rows, split = _load_hub(source)
    except ValueError as problem:
        if offline:
            raise _unavailable(source, str(problem), offline=True) from None
        raise DataError(f"cannot read data set {source.spec}: {problem}") from None
    except (OSError, RuntimeError, _client_error(), datasets.exceptions.DatasetsError) as problem:
        raise _unavailable(source, str(problem), offline=offline) from None
    features = getattr(rows, "features", None)
    labels = label_names(features.to_dict()) if features else {}
    for number, fields in enumerate(rows):
        yield RawRow(f"{source.repo}/{split}#{number}", dict(fields), labels)


def _cached_files(source: RowSource) -> RowSource | None:
    """Return what the local cache holds, as `hf download` leaves it, of just this revision.

    `datasets` finds offline what it prepared itself before, but of whatever revision that was.
    """
    if (commit := hub_commit(source)) is None or "[" in (source.split or ""):
        return None
    folder = _cache_folder(source) / "snapshots" / commit
    found = folders.find_splits(folder, source.config_name) if folder.is_dir() else None
    if found is None:
        return None
    # On the hub, what belongs to no split is documentation.
    split, files = _choose_files(source.spec, replace(found, others={}), source.split)
    if problem := _missing_part(found.root, files):
        raise _unavailable(source, f"of its split {split}, {problem}", offline=True)
    return replace(_one_format(source.spec, [found.root / path for path in files], split), labels=found.labels)


def _cache_folder(source: RowSource) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"datasets--{str(source.repo).replace('/', '--')}"


def _load_hub(source: RowSource) -> tuple[Any, str]:
    """Load one split; which splits there are is asked before anything is downloaded."""
    import datasets

    builder = datasets.load_dataset_builder(source.repo, source.config_name, revision=source.revision)
    known = list(builder.info.splits or {})
    split = source.split
    if known and (split is None or "[" not in split):
        split = _choose_split(source.spec, known, split)
    rows = datasets.load_dataset(source.repo, source.config_name, split=split, revision=source.revision)
    if split is None:
        split = _choose_split(source.spec, list(rows), None)
        rows = rows[split]
    return rows, split


def hub_commit(source: RowSource) -> str | None:
    """Return the commit that a hub data set's revision stands for, without loading the data set.

    Asked of the hub within seconds; offline, the commit that the local cache knows, or None.
    """
    from huggingface_hub import HfApi, constants

    revision = source.revision or "main"
    if _COMMIT.fullmatch(revision):
        return revision
    if not constants.HF_HUB_OFFLINE:
        try:
            _probe_hub(source)
            return HfApi().dataset_info(str(source.repo), revision=revision, timeout=PROBE_SECONDS).sha
        except (UnavailableError, OSError, _client_error()):
            pass  # then the cache may know it
    reference = _cache_folder(source) / "refs" / revision
    return reference.read_text(encoding="utf-8").strip() if reference.is_file() else None


def _client_error() -> type[Exception]:
    """Return the base of all errors of the hub's HTTP client, which was httpx at first and is httpx2 now."""
    from huggingface_hub import errors

    return getattr(errors, "HTTPError", OSError)


def _probe_hub(source: RowSource) -> None:
    from huggingface_hub.constants import ENDPOINT

    if (reason := why_unreachable(ENDPOINT)) is not None:
        raise _unavailable(source, reason, offline=False)


def _unavailable(source: RowSource, reason: str, *, offline: bool) -> UnavailableError:
    if offline:
        advice = "it is not in the cache: unset HF_HUB_OFFLINE to download it, or give a local file"
    else:
        advice = "check the name and the network, set HF_HUB_OFFLINE=1 to use the cache alone, or give a local file"
    message = f"data set {source.spec} is not available (and no such file or folder exists): {reason.strip()}"
    return UnavailableError(message, hint=advice)


@contextmanager
def _silenced() -> Iterator[None]:
    """Keep the bars and advice of `datasets` off the terminal; p2d shows its own progress."""
    import datasets
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    verbosity = datasets.logging.get_verbosity()
    datasets_bars, hub_bars = datasets.are_progress_bars_disabled(), are_progress_bars_disabled()
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not datasets_bars:
            datasets.enable_progress_bars()
        if not hub_bars:
            enable_progress_bars()
