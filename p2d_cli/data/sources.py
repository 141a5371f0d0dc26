"""Where rows lie, and reading them with file and line.

`locate` looks at names only and is quick; `read_rows` opens files. Neither imports torch, transformers or
`datasets` for local files, and pyarrow only for Parquet and Arrow.

A row is named by `file:line`, with lines counted from 1, or by `file#row`, with rows counted from 0, where the
format has no lines. The file is named relative to the folder that was asked for, so that a row keeps its name when
the data moves.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal

from p2d_cli.errors import DataError, StorageError, UnavailableError, UsageError

SourceKind = Literal["files", "dataset-folder", "hub"]
RowFormat = Literal["jsonl", "json", "csv", "tsv", "parquet", "arrow", "hub"]

_FORMATS: dict[str, RowFormat] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_TEXT_FORMATS = frozenset({"jsonl", "json", "csv", "tsv"})
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
_PROBE_SECONDS = 5.0
_LONGEST_LINE = 64 * 2**20
"""Bytes of a line, or characters of a CSV cell or of an object in a JSON array: no row that a model could read is as
long."""
_GZIP_BOMB_BYTES = 64 * 2**20
_GZIP_BOMB_RATIO = 50
"""A gzip file that expands to so many bytes and times its size is no text; deflate ends at 1032 times."""
_BLOCK = 2**18
_LONGEST_TOKEN = 16
"""Characters before the end of a JSON text that was cut, within which Python's decoder sees the error."""
_LONGEST_SHOWN = 2**24
"""Bytes of a .json file that is no table, up to which it is read to say what it is."""
_KNOWN_SUFFIXES = "known are " + ", ".join(_FORMATS) + ", and .gz of the text formats"


@dataclass(frozen=True)
class RowSource:
    """Where rows are to be read from."""

    spec: str
    """As the user wrote it."""
    kind: SourceKind
    format: RowFormat
    files: tuple[Path, ...] = ()
    """In reading order; empty for a hub data set."""
    repo: str | None = None
    revision: str | None = None
    split: str | None = None
    config_name: str | None = None


@dataclass(frozen=True)
class RawRow:
    """One row as it came."""

    where: str
    fields: dict[str, Any]


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be read, though the ones after it may be."""

    where: str
    problem: DataError


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
    if hub_id is None or spec.startswith((".", "/", "~")) or _format_of(path) is not None:
        raise DataError(f"no such file or folder: {spec}", hint=_near_names(path))
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
    rows = _read_hub(source) if source.kind == "hub" else _read_files(source)
    for row in rows:
        empty = False
        yield row
    if empty:
        raise DataError(f"{source.spec} holds no rows")


# --- finding


def _format_of(path: Path) -> RowFormat | None:
    name = path.name.lower()
    row_format = _FORMATS.get(Path(name.removesuffix(".gz")).suffix)
    return None if name.endswith(".gz") and row_format not in _TEXT_FORMATS else row_format


def _require_format(path: Path) -> RowFormat:
    row_format = _format_of(path)
    if row_format is None:
        raise DataError(f"{path}: cannot tell the format of its rows from its name", hint=_KNOWN_SUFFIXES)
    return row_format


def _near_names(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"the folder {folder} does not exist either"
    near = difflib.get_close_matches(path.name, sorted(entry.name for entry in folder.iterdir()), n=3)
    return f"did you mean {' or '.join(near)}?" if near else f"nothing of a similar name lies in {folder}"


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
    formats = {_format_of(path) for path in files}
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
        if path.is_file() and _format_of(path) and path.name not in _NOT_ROWS and not path.name.startswith((".", "_"))
    )


def _split_name(path: Path) -> str:
    name = path.name
    while Path(name).suffix.lower() in (*_FORMATS, ".gz"):
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
        raise DataError(f"{path}: expected a JSON object, found {_json_kind(value)}")
    return value


# --- reading files


def _read_files(source: RowSource) -> Iterator[RawRow | BadRow]:
    reader = {
        "jsonl": _read_json_lines,
        "json": _read_json,
        "csv": _read_csv,
        "tsv": _read_csv,
        "parquet": _read_parquet,
        "arrow": _read_arrow,
    }[source.format]
    for path in source.files:
        with _explain_file_errors(path):
            yield from reader(path)


@contextmanager
def _explain_file_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error) as problem:
        raise DataError(f"{path}: damaged or cut-off gzip file: {problem}") from None
    except OSError as problem:
        if problem.errno is None:  # not the system's, but gzip's or pyarrow's for bytes that make no sense
            raise DataError(f"{path}: damaged file: {problem}") from None
        raise StorageError(f"cannot read {path}: {problem.strerror or problem}") from None


def _open(path: Path) -> IO[bytes]:
    return io.BufferedReader(_Unzipped(path)) if path.suffix.lower() == ".gz" else path.open("rb")


class _Unzipped(io.RawIOBase):
    """The content of a gzip file, which may expand only so far."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stream = gzip.open(path, "rb")  # noqa: SIM115 - closed with this object
        self._largest = max(_GZIP_BOMB_BYTES, _GZIP_BOMB_RATIO * path.stat().st_size)
        self._count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._stream.readinto(buffer)
        self._count += count
        if self._count > self._largest:
            raise DataError(
                f"{self._path} expands to more than {self._largest:,} bytes, {_GZIP_BOMB_RATIO} times its size: "
                "that is no text",
                hint="if you trust it, unpack it first: gzip -dk FILE",
            )
        return count

    def close(self) -> None:
        self._stream.close()
        super().close()


def _text_lines(path: Path, start: int = 1) -> Iterator[tuple[str, str | BadRow]]:
    """Yield `(file:line, text)`, split at line feeds only: U+2028 and the like may stand inside a JSON string."""
    with _open(path) as stream:
        for number, line in enumerate(iter(lambda: stream.readline(_LONGEST_LINE), b""), start=start):
            where = f"{path.name}:{number}"
            if len(line) == _LONGEST_LINE and not line.endswith(b"\n"):
                message = f"{where}: a line of more than {_LONGEST_LINE:,} bytes"
                _skip_line(stream)
                yield where, BadRow(where, DataError(message, hint="each row stands on a line of its own"))
                continue
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            try:
                yield where, line.decode("utf-8")
            except UnicodeDecodeError as problem:
                found = f"byte 0x{line[problem.start]:02x} at byte {problem.start + 1} of the line"
                hint = "save the file as UTF-8"
                yield where, BadRow(where, DataError(f"{where}: not valid UTF-8: {found}", hint=hint))


def _skip_line(stream: IO[bytes]) -> None:
    """Read to the end of a line without keeping it."""
    while (part := stream.readline(2**20)) and not part.endswith(b"\n"):
        pass


def _read_json_lines(path: Path) -> Iterator[RawRow | BadRow]:
    for where, text in _text_lines(path):
        if isinstance(text, BadRow):
            yield text
        elif text.strip():
            yield _parse_json_row(where, text)


class _RepeatedKeyError(ValueError):
    """A JSON object with a key that stands in it twice, of which Python would keep the last."""


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        [(repeated, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise _RepeatedKeyError(f"the key '{repeated}' repeats in an object")
    return fields


def _parse_json_row(where: str, text: str) -> RawRow | BadRow:
    try:
        value = json.loads(text.rstrip(), object_pairs_hook=_object_of)
    except json.JSONDecodeError as problem:
        return BadRow(where, DataError(f"{where}: not valid JSON: {problem.msg} at column {problem.colno}"))
    except _RepeatedKeyError as problem:
        return BadRow(where, DataError(f"{where}: {problem}"))
    except (ValueError, RecursionError) as problem:
        return BadRow(where, DataError(f"{where}: JSON that Python cannot hold: {problem}"))
    return _object_row(where, value)


def _object_row(where: str, value: Any) -> RawRow | BadRow:
    if isinstance(value, dict):
        return RawRow(where, value)
    hint = "a JSON array of rows belongs into a .json file" if isinstance(value, list) else None
    return BadRow(where, DataError(f"{where}: expected a JSON object, found {_json_kind(value)}", hint=hint))


def _json_kind(value: Any) -> str:
    kinds = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")


def _read_json(path: Path) -> Iterator[RawRow | BadRow]:
    """Read an array of objects, or what is JSON Lines but for its name."""
    with _open(path) as stream:
        line, first = _first_line(stream)
        if first.startswith(b"["):
            yield from _array_rows(path.name, _JsonWindow(path.name, stream, line, first))
            return
        while first and not first.endswith(b"\n") and len(first) < _LONGEST_LINE and (block := stream.readline(_BLOCK)):
            first += block
    is_lines = len(first) >= _LONGEST_LINE or _is_row(first)
    yield from _read_json_lines(path) if is_lines else [_refuse_json(path)]


def _first_line(stream: IO[bytes]) -> tuple[int, bytes]:
    """Return the number of the first line that is not blank, and its beginning without the blanks before it."""
    number = 1
    line = stream.readline(_BLOCK).removeprefix(b"\xef\xbb\xbf")
    while line and not line.strip():
        number += line.endswith(b"\n")
        line = stream.readline(_BLOCK)
    return number, line.lstrip()


def _array_rows(name: str, window: _JsonWindow) -> Iterator[RawRow | BadRow]:
    """Yield the objects of an array one after the other; no more is held than a block of the text, or a long object."""
    number = 0
    try:
        for number, value in enumerate(window.values()):
            yield _object_row(f"{name}#{number}", value)
    except json.JSONDecodeError as problem:
        raise DataError(f"{name}:{window.line + problem.lineno - 1}: not valid JSON: {problem.msg}") from None
    except _RepeatedKeyError as problem:
        raise DataError(f"{name}: {problem}, at or behind {name}#{number}") from None
    except (ValueError, RecursionError) as problem:
        raise DataError(f"{name}: JSON that Python cannot hold: {problem}") from None


class _JsonWindow:
    """The part of a JSON array's text that is being read.

    Args:
        name: of the file.
        stream: the bytes behind `start`.
        line: of the opening bracket.
        start: the first bytes, from that bracket on.
    """

    def __init__(self, name: str, stream: IO[bytes], line: int, start: bytes) -> None:
        self.line = line
        """Of the file, at which the window begins."""
        self._name = name
        self._stream = stream
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._text = ""
        self._position = 0
        self._append(start)

    def values(self) -> Iterator[Any]:
        """Yield the array's values.

        Raises:
            json.JSONDecodeError: its line counts from the window's beginning.
            DataError: bytes that are not UTF-8.
        """
        decoder = json.JSONDecoder(object_pairs_hook=_object_of)
        self._position += 1
        if self._peek() == "]":
            self._end()
            return
        while True:
            yield self._value(decoder)
            mark = self._peek()
            if mark == "]":
                self._end()
                return
            if mark != ",":
                raise json.JSONDecodeError("Expecting ',' delimiter", self._text, self._position)
            self._position += 1

    def _value(self, decoder: json.JSONDecoder) -> Any:
        self._peek()
        while True:
            try:
                value, stop = decoder.raw_decode(self._text, self._position)
            except json.JSONDecodeError as problem:
                # A text that is cut somewhere is wrong at its end, or where its last string begins.
                cut = problem.pos >= len(self._text) - _LONGEST_TOKEN or problem.msg.startswith("Unterminated string")
                if not (cut and self._read_on()):
                    raise
            else:
                # A number may go on where the window ends.
                if stop < len(self._text) - _LONGEST_TOKEN or not self._read_on():
                    self._position = stop
                    return value

    def _peek(self) -> str:
        """Skip white space and return the character behind it, an empty text at the end."""
        while True:
            self._position = _skip_space(self._text, self._position)
            if self._position < len(self._text) or not self._read_on():
                return self._text[self._position : self._position + 1]

    def _end(self) -> None:
        self._position += 1
        if self._peek():
            raise json.JSONDecodeError("Extra data", self._text, self._position)

    def _read_on(self) -> bool:
        """Read as much again as is left, at least a block, and drop what has been read; False at the end."""
        if len(self._text) - self._position > _LONGEST_LINE:
            where = f"{self._name}:{self.line + self._text.count(chr(10), 0, self._position)}"
            raise DataError(f"{where}: an object of more than {_LONGEST_LINE:,} characters", hint="is it one row?")
        block = self._stream.read(max(_BLOCK, len(self._text) - self._position))
        if block:
            self.line += self._text.count("\n", 0, self._position)
            self._text = self._text[self._position :]
            self._position = 0
        self._append(block)
        return bool(block)

    def _append(self, block: bytes) -> None:
        try:
            self._text += self._decode(block, final=not block)
        except UnicodeDecodeError as problem:
            read = bytes(problem.object)
            line = self.line + self._text.count("\n") + read.count(b"\n", 0, problem.start)
            found = f"byte 0x{read[problem.start]:02x}"
            hint = "save the file as UTF-8"
            raise DataError(f"{self._name}:{line}: not valid UTF-8: {found}", hint=hint) from None


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\n\r":
        position += 1
    return position


def _is_row(line: bytes) -> bool:
    try:
        return not line or isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _refuse_json(path: Path) -> BadRow:
    with _open(path) as stream:
        content = stream.read(_LONGEST_SHOWN).removeprefix(b"\xef\xbb\xbf")
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        found = "neither"
    else:
        keys = f" with the keys {', '.join(list(value)[:8])}" if isinstance(value, dict) else ""
        found = f"{_json_kind(value)}{keys}"
    message = f"{path.name}: expected an array of objects, or JSON Lines; found {found}"
    return BadRow(path.name, DataError(message))


def _read_csv(path: Path) -> Iterator[RawRow | BadRow]:
    csv.field_size_limit(_LONGEST_LINE)  # the default of 131,072 characters cuts into long documents
    reader = csv.reader(_require_text(path), delimiter="\t" if _format_of(path) == "tsv" else ",", strict=True)
    header: list[str] | None = None
    while True:
        where = f"{path.name}:{reader.line_num + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as problem:
            raise DataError(f"{where}: not valid CSV: {problem}") from None
        if cells is None:
            return
        if not cells:
            continue
        if header is None:
            header = _check_header(where, cells)
        elif len(cells) != len(header):
            message = f"{where}: expected {len(header)} cells as in the header, found {len(cells)}"
            yield BadRow(where, DataError(message))
        else:
            yield RawRow(where, dict(zip(header, cells, strict=True)))


def _require_text(path: Path) -> Iterator[str]:
    for _, text in _text_lines(path):
        if isinstance(text, BadRow):
            raise text.problem
        yield text


def _check_header(where: str, cells: list[str]) -> list[str]:
    repeated = sorted({name for name in cells if cells.count(name) > 1})
    if repeated:
        raise DataError(f"{where}: columns repeat in the header: {', '.join(repeated)}")
    return cells


def _read_parquet(path: Path) -> Iterator[RawRow | BadRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as table:
            yield from _rows_of_batches(path, table.schema_arrow.names, table.iter_batches(batch_size=1024))
    except pa.ArrowException as problem:
        raise DataError(f"{path}: not a readable Parquet file: {problem}") from None


def _read_arrow(path: Path) -> Iterator[RawRow | BadRow]:
    """Read an Arrow stream, as `datasets` writes it, or an Arrow file (Feather)."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as stream:
            is_file = stream.read(6) == b"ARROW1"
            stream.seek(0)
            if is_file:
                reader = pa.ipc.open_file(stream)
                batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
            else:
                reader = pa.ipc.open_stream(stream)
                batches = iter(reader)
            yield from _rows_of_batches(path, reader.schema.names, batches)
    except pa.ArrowException as problem:
        raise DataError(f"{path}: not a readable Arrow file: {problem}") from None


def _rows_of_batches(path: Path, names: list[str], batches: Iterator[Any]) -> Iterator[RawRow | BadRow]:
    import pyarrow as pa

    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{path}: columns repeat: {', '.join(repeated)}")
    number = 0
    try:
        for batch in batches:
            for fields in _rows_of_batch(batch):
                where = f"{path.name}#{number}"
                if isinstance(fields, UnicodeDecodeError):
                    found = f"byte 0x{fields.object[fields.start]:02x}"
                    yield BadRow(where, DataError(f"{where}: a text that is not valid UTF-8: {found}"))
                else:
                    yield RawRow(where, fields)
                number += 1
    except (pa.ArrowException, OSError) as problem:
        if isinstance(problem, OSError) and problem.errno is not None:
            raise
        raise DataError(f"{path.name}#{number}: the file is damaged from this row on: {problem}") from None


def _rows_of_batch(batch: Any) -> Iterator[dict[str, Any] | UnicodeDecodeError]:
    """Yield a batch's rows, and the problem in place of one that Python cannot hold."""
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
    except UnicodeDecodeError:
        for index in range(batch.num_rows):
            try:
                yield batch.slice(index, 1).to_pylist()[0]
            except UnicodeDecodeError as problem:
                yield problem
    else:
        yield from rows


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
    for number, fields in enumerate(rows):
        yield RawRow(f"{source.repo}/{split}#{number}", dict(fields))


def _read_cached(source: RowSource, split: str, files: list[Path]) -> Iterator[RawRow | BadRow]:
    """Read the files of a snapshot in the local cache, with the rows named as if they came from the hub."""
    shards = {int(match[1]) for path in files if (match := _SHARDS.search(path.name))}
    if shards and shards != {len(files)}:
        raise _unavailable(source, f"{len(files)} of {max(shards)} files of its split {split} are there", offline=True)
    for number, row in enumerate(_read_files(_one_format(source.spec, files, split))):
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
            return HfApi().dataset_info(str(source.repo), revision=revision, timeout=_PROBE_SECONDS).sha
        except (UnavailableError, OSError, client_error):
            pass  # then the cache may know it
    reference = Path(constants.HF_HUB_CACHE) / _cache_name(source) / "refs" / revision
    return reference.read_text(encoding="utf-8").strip() if reference.is_file() else None


def _probe_hub(source: RowSource) -> None:
    """Fail within seconds where there is no network; the hub's own client tries again for half a minute."""
    import ssl
    import urllib.error
    import urllib.request

    from huggingface_hub.constants import ENDPOINT

    try:
        urllib.request.urlopen(urllib.request.Request(ENDPOINT, method="HEAD"), timeout=_PROBE_SECONDS).close()
    except urllib.error.HTTPError as answer:
        answer.close()  # an answer all the same
    except OSError as problem:
        reason = getattr(problem, "reason", problem)
        if not isinstance(reason, ssl.SSLError):  # a certificate is the hub client's affair, not ours
            raise _unavailable(source, f"{ENDPOINT} cannot be reached ({reason})", offline=False) from None


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
