"""Where rows lie: files, folders, the hub; and reading them from there.

`locate` looks at names only and is quick; `scan_rows` opens files. Neither imports torch, transformers or `datasets`
for local files, and pyarrow only for Parquet and Arrow. A row's file is named relative to the folder that was asked
for, so that a row keeps its name when the data moves.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from p2d_cli.data.column_kinds import label_names
from p2d_cli.data.raw_rows import FORMATS, BadRow, RawRow, RowFormat, RowSource, format_of
from p2d_cli.data.row_files import json_kind, read_files
from p2d_cli.errors import DataError, UnavailableError, UsageError, near_names
from p2d_cli.hub import PROBE_SECONDS, why_unreachable

_NOT_ROWS = frozenset({"dataset_info.json", "state.json", "dataset_dict.json", "manifest.json"})
_SPLIT_NAMES = frozenset({"train", "training", "validation", "valid", "val", "dev", "eval", "test"})
_SHARD_NUMBER = re.compile(r"[-_.]\d+(-of-\d+)?$")
_HUB_ID = re.compile(
    r"(?P<repo>[\w][\w.-]*/[\w][\w.-]*)(@(?P<revision>[^\s:@]+))?(:(?P<config>[\w][\w.+-]*))?", re.ASCII
)
_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_SPLIT_SHARD = re.compile(r"([\w.]+)-\d{5}-of-\d{5}")
_SHARDS = re.compile(r"-\d+-of-(\d+)")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_KNOWN_SUFFIXES = "known are " + ", ".join(FORMATS) + ", and .gz of the text formats"


def locate(spec: str, *, split: str | None = None, revision: str | None = None) -> RowSource:
    """Find out what `spec` names, without reading rows.

    Args:
        spec: a file, a folder (one data set, or one file a split), a `save_to_disk` folder, or a hub id
            `owner/name[@revision][:config]`. A path that exists wins over a hub id.
        split: which split of a folder or hub data set. A single file has none, and ignores it.
        revision: revision of a hub data set, instead of `@revision`.

    Raises:
        DataError: no such file, no data in the folder, an unknown format, or a split that is missing or not chosen.
        UsageError: two different revisions.
    """
    path = Path(spec).expanduser()
    if path.is_dir():
        return _locate_folder(spec, path, split)
    if path.exists():
        if not path.is_file():
            hint = "rows are read more than once: write them to a file, such as rows.jsonl"
            raise DataError(f"{spec} is no file but a pipe or a device", hint=hint)
        return RowSource(spec=spec, kind="files", format=_require_format(path), files=(path,))
    hub_id = _HUB_ID.fullmatch(spec)
    if hub_id is None or spec.startswith((".", "/", "~")) or format_of(path) is not None:
        raise DataError(f"no such file or folder: {spec}", hint=near_names(path))
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
    """Yield the rows of a source in order.

    Raises:
        DataError: the first row that cannot be read, by file and line, or a source without rows.
        UnavailableError: a hub data set that is neither cached nor reachable.
        StorageError: a file that the system does not let p2d read.
    """
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


def _require_format(path: Path) -> RowFormat:
    row_format = format_of(path)
    if row_format is None:
        raise DataError(f"{path}: cannot tell the format of its rows from its name", hint=_KNOWN_SUFFIXES)
    return row_format


def _locate_folder(spec: str, folder: Path, split: str | None) -> RowSource:
    if (folder / "dataset_dict.json").is_file():
        splits = _names(_read_json_object(folder / "dataset_dict.json").get("splits", []), folder)
        chosen = _choose_split(spec, {name: [folder / name] for name in splits}, split)
        return _saved_dataset(spec, folder / chosen, chosen)
    if (folder / "state.json").is_file():
        return _saved_dataset(spec, folder, split)
    files = _data_files(folder) or _data_files(folder / "data")
    if not files:
        raise DataError(f"no files with rows in {spec}", hint=_KNOWN_SUFFIXES)
    groups: dict[str, list[Path]] = {}
    for path in files:
        groups.setdefault(_split_name(path), []).append(path)
    formats = {format_of(path) for path in files}
    if split is None and len(formats) == 1 and not _SPLIT_NAMES & {name.lower() for name in groups}:
        chosen_files = files
    else:
        chosen_files = groups[_choose_split(spec, groups, split)]
    return _one_format(spec, chosen_files, split)


def _one_format(spec: str, files: Sequence[Path], split: str | None) -> RowSource:
    formats = {path.name: _require_format(path) for path in files}
    if len(set(formats.values())) > 1:
        raise DataError(
            f"{spec} holds rows in several formats: {', '.join(formats)}", hint="name one of the files instead"
        )
    return RowSource(spec=spec, kind="files", format=_require_format(files[0]), files=tuple(files), split=split)


def _data_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and format_of(path) and path.name not in _NOT_ROWS and not path.name.startswith((".", "_"))
    )


def _split_name(path: Path) -> str:
    name = path.name
    while Path(name).suffix.lower() in (*FORMATS, ".gz"):
        name = Path(name).stem
    return _SHARD_NUMBER.sub("", name)


def _choose_split(spec: str, splits: dict[str, list[Path]], split: str | None) -> str:
    known = ", ".join(sorted(splits))
    if split is None:
        if len(splits) == 1:
            return next(iter(splits))
        raise DataError(f"{spec} has several splits: {known}", hint="choose one with --split, or name one file")
    if split not in splits:
        raise DataError(f"{spec} has no split '{split}'; found: {known}")
    return split


def _saved_dataset(spec: str, folder: Path, split: str | None) -> RowSource:
    """Describe a folder that `Dataset.save_to_disk` wrote; its state names the files in order."""
    listed = _read_json_object(folder / "state.json").get("_data_files", [])
    entries = [entry.get("filename") if isinstance(entry, dict) else entry for entry in listed]
    files = tuple(folder / name for name in _names(entries, folder))
    missing = [path.name for path in files if not path.is_file()]
    if not files or missing:
        raise DataError(
            f"{spec} is a saved data set without {', '.join(missing) or 'data files'}", hint="save it again"
        )
    return RowSource(spec=spec, kind="dataset-folder", format="arrow", files=files, split=split)


def _names(listed: Any, folder: Path) -> list[str]:
    """Return what a saved data set says it consists of, if those are names of things in its own folder."""
    names = listed if isinstance(listed, list) else [listed]
    for name in names:
        if not isinstance(name, str) or name in {"", ".", ".."} or "/" in name or "\\" in name:
            raise DataError(f"{folder} is a saved data set that names {name!r} as a part of it", hint="save it again")
    return names


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as problem:
        raise DataError(f"cannot read {path}: {problem}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object, found {json_kind(value)}")
    return value


# --- the hub


def _read_hub(source: RowSource) -> Iterator[RawRow | BadRow]:
    from huggingface_hub import constants, errors

    if constants.HF_HUB_OFFLINE and (cached := _cached_files(source)):
        yield from _read_cached(source, *cached)
        return
    if constants.HF_HUB_OFFLINE and source.revision is not None:
        raise _unavailable(source, f"its revision {source.revision} is not in the local cache", offline=True)
    import datasets

    # The base of all errors of the hub's HTTP client, which was httpx at first and is httpx2 now.
    client_error: type[Exception] = getattr(errors, "HTTPError", OSError)
    offline = bool(datasets.config.HF_HUB_OFFLINE)
    if not offline:
        _probe_hub(source)
    try:
        with _silenced():
            rows, split = _load_hub(source)
    except (DataError, UnavailableError):
        raise
    except ValueError as problem:
        if offline:
            raise _unavailable(source, str(problem), offline=True) from None
        raise DataError(f"cannot read data set {source.spec}: {problem}") from None
    except (OSError, RuntimeError, client_error, datasets.exceptions.DatasetsError) as problem:
        raise _unavailable(source, str(problem), offline=offline) from None
    features = getattr(rows, "features", None)
    labels = label_names(features.to_dict()) if features else {}
    for number, fields in enumerate(rows):
        yield RawRow(f"{source.repo}/{split}#{number}", dict(fields), labels)


def _read_cached(source: RowSource, split: str, files: list[Path]) -> Iterator[RawRow | BadRow]:
    """Read the files of a snapshot in the local cache, with the rows named as if they came from the hub."""
    shards = {int(match[1]) for path in files if (match := _SHARDS.search(path.name))}
    if shards and shards != {len(files)}:
        raise _unavailable(source, f"{len(files)} of {max(shards)} files of its split {split} are there", offline=True)
    for number, row in enumerate(read_files(_one_format(source.spec, files, split))):
        yield row if isinstance(row, BadRow) else replace(row, where=f"{source.repo}/{split}#{number}")


def _cached_files(source: RowSource) -> tuple[str, list[Path]] | None:
    """Return the split and its files in the local cache, as `hf download` leaves them, of just this revision.

    `datasets` finds offline what it prepared itself before, but of whatever revision that was.

    Raises:
        DataError: a split that is missing or not chosen.
    """
    from huggingface_hub import constants

    if (commit := hub_commit(source)) is None or "[" in (source.split or ""):
        return None
    folder = Path(constants.HF_HUB_CACHE) / _cache_name(source) / "snapshots" / commit / (source.config_name or "")
    splits: dict[str, list[Path]] = {}
    files = _data_files(folder) or _data_files(folder / "data")
    for path in files:
        if (name := _hub_split(path)) is not None:
            splits.setdefault(name, []).append(path)
    splits = splits or {"train": files}
    if not files:
        return None
    split = _choose_split(source.spec, splits, source.split)
    return split, splits[split]


def _hub_split(path: Path) -> str | None:
    """Return the split that a file of a hub data set belongs to, by its name, as `datasets` does; None for none."""
    if match := _SPLIT_SHARD.match(path.name):
        return match[1]
    words = re.split(r"[^a-z]+", path.name.lower())
    return next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), None)


def _cache_name(source: RowSource) -> str:
    return f"datasets--{str(source.repo).replace('/', '--')}"


def _load_hub(source: RowSource) -> tuple[Any, str]:
    """Load one split; which splits there are is asked before anything is downloaded."""
    import datasets

    builder = datasets.load_dataset_builder(source.repo, source.config_name, revision=source.revision)
    known: dict[str, list[Path]] = {name: [] for name in builder.info.splits or {}}
    split = source.split
    if known and (split is None or "[" not in split):
        split = _choose_split(source.spec, known, split)
    rows = datasets.load_dataset(source.repo, source.config_name, split=split, revision=source.revision)
    if split is None:
        split = _choose_split(source.spec, {name: [] for name in rows}, None)
        rows = rows[split]
    return rows, split


def hub_commit(source: RowSource) -> str | None:
    """Return the commit that a hub data set's revision stands for, without loading the data set.

    Asked of the hub within seconds; offline, the commit that the local cache knows, or None.
    """
    from huggingface_hub import HfApi, constants, errors

    revision = source.revision or "main"
    if _COMMIT.fullmatch(revision):
        return revision
    client_error: type[Exception] = getattr(errors, "HTTPError", OSError)
    if not constants.HF_HUB_OFFLINE:
        try:
            _probe_hub(source)
            return HfApi().dataset_info(str(source.repo), revision=revision, timeout=PROBE_SECONDS).sha
        except (UnavailableError, OSError, client_error):
            pass  # then the cache may know it
    reference = Path(constants.HF_HUB_CACHE) / _cache_name(source) / "refs" / revision
    return reference.read_text(encoding="utf-8").strip() if reference.is_file() else None


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
