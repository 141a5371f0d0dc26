"""Reading the rows of files of every format, with file and line, within bounds of memory.

A row is named by `file:line`, with lines counted from 1, or by `file#row`, with rows counted from 0, where the format
has no lines.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from p2d_cli.core.json_values import JsonObject
from p2d_cli.data.column_kinds import interpreter, with_labels
from p2d_cli.data.foreign import HEAD_BYTES, refuse_foreign
from p2d_cli.data.raw_rows import BadRow, RawRow, RowSource, format_of
from p2d_cli.errors import DataError, StorageError

_LONGEST_LINE = 64 * 2**20
"""Bytes of a line, or characters of a CSV cell or of an object in a JSON array: no row that a model could read is as
long."""
_GZIP_BOMB_BYTES = 64 * 2**20
_GZIP_BOMB_RATIO = 50
"""A gzip file that expands to so many bytes and times its size is no text; deflate ends at 1032 times."""
_GZIP_MAGIC = b"\x1f\x8b"
_BLOCK = 2**18
_LONGEST_TOKEN = 16
"""Characters before the end of a JSON text that was cut, within which Python's decoder sees the error."""
_ONE_A_LINE = "each row stands on a line of its own"
_SAVE_AS_UTF_8 = "save the file as UTF-8"
_JOINED = "two files were joined here: take out the byte order mark (U+FEFF) at which the second one begins"
_RETURNS = "its lines end in carriage returns alone: make them line feeds, as with: tr '\\r' '\\n' < FILE"
_LONGEST_SHOWN = 2**24
"""Bytes of a .json file that is no table, up to which it is read to say what it is."""


def read_files(source: RowSource) -> Iterator[RawRow | BadRow]:
    """Yield the rows of a source's files in order, unreadable ones as `BadRow` where reading can go on behind them.

    Raises:
        DataError: a file that cannot be read any further.
        StorageError: a file that the system does not let p2d read.
    """
    read = {
        "jsonl": _read_json_lines,
        "json": _read_json,
        "csv": _read_csv,
        "tsv": _read_csv,
        "parquet": _read_parquet,
        "arrow": _read_arrow,
    }[source.format]
    labels, is_csv = dict(source.labels), source.format in {"csv", "tsv"}
    for path, name in zip(source.files, source.names, strict=True):
        try:
            _refuse_foreign(path)
            for row in read(path, name):
                yield with_labels(row, labels, is_csv=is_csv) if labels and isinstance(row, RawRow) else row
        except (EOFError, zlib.error) as problem:
            raise DataError(f"{path}: damaged or cut-off gzip file: {problem}") from None
        except OSError as problem:
            if problem.errno is None:  # not the system's, but gzip's or pyarrow's for bytes that make no sense
                raise DataError(f"{path}: damaged file: {problem}") from None
            raise StorageError(f"cannot read {path}: {problem.strerror or problem}") from None


def _refuse_foreign(path: Path) -> None:
    """Refuse a file that holds something else than its name says."""
    if path.suffix.lower() == ".gz":
        with path.open("rb") as stream:
            if (start := stream.read(2)) not in {_GZIP_MAGIC, b""}:
                hint = "if it is not damaged, take .gz off its name"
                raise DataError(f"{path} is not gzip, as its name says: it begins with {start!r}", hint=hint)
    with _open(path) as stream:
        refuse_foreign(stream.read(HEAD_BYTES), path, format_of(path))


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


def _text_lines(path: Path, name: str) -> Iterator[tuple[str, str | BadRow]]:
    """Yield `(file:line, text)`, split at line feeds only: U+2028 and the like may stand inside a JSON string."""
    with _open(path) as stream:
        for number, line in enumerate(iter(lambda: stream.readline(_LONGEST_LINE), b""), start=1):
            where = f"{name}:{number}"
            if len(line) == _LONGEST_LINE and not line.endswith(b"\n"):
                while (rest := stream.readline(2**20)) and not rest.endswith(b"\n"):
                    pass
                message = f"{where}: a line of more than {_LONGEST_LINE:,} bytes"
                yield where, BadRow(where, DataError(message, hint=_ONE_A_LINE))
                continue
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            try:
                yield where, line.decode("utf-8")
            except UnicodeDecodeError as problem:
                found = f"byte 0x{line[problem.start]:02x} at byte {problem.start + 1} of the line"
                yield where, BadRow(where, DataError(f"{where}: not valid UTF-8: {found}", hint=_SAVE_AS_UTF_8))


# --- JSON


def _read_json_lines(path: Path, name: str) -> Iterator[RawRow | BadRow]:
    for where, text in _text_lines(path, name):
        if isinstance(text, BadRow):
            yield text
        elif text.strip():
            yield _parse_json_row(where, text)


class _RepeatedKeyError(ValueError):
    """A JSON object with a key that stands in it twice, of which Python would keep the last."""


def _object_of(pairs: list[tuple[str, Any]]) -> JsonObject:
    fields = JsonObject(pairs)
    if len(fields) < len(pairs):
        [(repeated, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise _RepeatedKeyError(f"the key '{repeated}' repeats in an object")
    return fields


def _parse_json_row(where: str, text: str) -> RawRow | BadRow:
    hint = None
    try:
        return _object_row(where, json.loads(text.rstrip(), object_pairs_hook=_object_of))
    except json.JSONDecodeError as problem:
        message = f"not valid JSON: {problem.msg} at column {problem.colno}"
        if text.startswith("\ufeff"):
            hint = _JOINED
        elif problem.msg == "Extra data" and "\r" in text[: problem.pos]:
            hint = _RETURNS
        elif problem.msg == "Extra data" and text[problem.pos] in "{[":
            hint = _ONE_A_LINE
    except _RepeatedKeyError as problem:
        message = str(problem)
    except (ValueError, RecursionError) as problem:
        message = f"JSON that Python cannot hold: {problem}"
    return BadRow(where, DataError(f"{where}: {message}", hint=hint))


def _object_row(where: str, value: Any) -> RawRow | BadRow:
    if isinstance(value, dict):
        return RawRow(where, value)
    hint = "a JSON array of rows belongs into a .json file" if isinstance(value, list) else None
    return BadRow(where, DataError(f"{where}: expected a JSON object, found {json_kind(value)}", hint=hint))


def json_kind(value: Any) -> str:
    """Return what JSON calls a value, with its article."""
    kinds = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return "an object" if isinstance(value, dict) else kinds.get(type(value), "a number")


def _read_json(path: Path, name: str) -> Iterator[RawRow | BadRow]:
    """Read an array of objects, or what is JSON Lines but for its name."""
    with _open(path) as stream:
        number = 1
        first = stream.readline(_BLOCK).removeprefix(codecs.BOM_UTF8)
        while first and not first.strip():
            number += first.endswith(b"\n")
            first = stream.readline(_BLOCK)
        first = first.lstrip()
        if first.startswith(b"["):
            yield from _array_rows(name, _JsonWindow(name, stream, number, first))
            return
        while first and not first.endswith(b"\n") and len(first) < _LONGEST_LINE and (block := stream.readline(_BLOCK)):
            first += block
    try:
        is_lines = len(first) >= _LONGEST_LINE or not first or isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        is_lines = False
    yield from _read_json_lines(path, name) if is_lines else [_refuse_json(path, name)]


def _refuse_json(path: Path, name: str) -> BadRow:
    with _open(path) as stream:
        content = stream.read(_LONGEST_SHOWN).removeprefix(codecs.BOM_UTF8)
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        found = "neither"
    else:
        keys = f" with the keys {', '.join(list(value)[:8])}" if isinstance(value, dict) else ""
        found = f"{json_kind(value)}{keys}"
    return BadRow(name, DataError(f"{name}: expected an array of objects, or JSON Lines; found {found}"))


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
        mark = "]" if self._peek() == "]" else ","
        while mark != "]":
            yield self._value(decoder)
            mark = self._peek()
            if mark not in {",", "]"}:
                raise json.JSONDecodeError("Expecting ',' delimiter", self._text, self._position)
            self._position += mark == ","
        self._position += 1
        if self._peek():
            raise json.JSONDecodeError("Extra data", self._text, self._position)

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
            while self._position < len(self._text) and self._text[self._position] in " \t\n\r":
                self._position += 1
            if self._position < len(self._text) or not self._read_on():
                return self._text[self._position : self._position + 1]

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
            message = f"{self._name}:{line}: not valid UTF-8: byte 0x{read[problem.start]:02x}"
            raise DataError(message, hint=_SAVE_AS_UTF_8) from None


# --- tables


def _read_csv(path: Path, name: str) -> Iterator[RawRow | BadRow]:
    csv.field_size_limit(_LONGEST_LINE)  # the default of 131,072 characters cuts into long documents
    is_tsv = format_of(path) == "tsv"
    reader = csv.reader(_require_text(path, name), delimiter="\t" if is_tsv else ",", strict=True)
    header: list[str] | None = None
    while True:
        where = f"{name}:{reader.line_num + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as problem:
            hint = _RETURNS if "new-line character seen" in str(problem) else None
            raise DataError(f"{where}: not valid CSV: {problem}", hint=hint) from None
        if cells is None:
            return
        if not cells:
            continue
        if header is None:
            _check_header(where, cells, is_tsv=is_tsv)
            header = cells
        elif cells[0].startswith("\ufeff"):
            yield BadRow(where, DataError(f"{where}: a byte order mark within the file", hint=_JOINED))
        elif len(cells) != len(header):
            message = f"{where}: expected {len(header)} cells as in the header, found {len(cells)}"
            yield BadRow(where, DataError(message))
        else:
            yield RawRow(where, dict(zip(header, cells, strict=True)))


def _require_text(path: Path, name: str) -> Iterator[str]:
    for _, text in _text_lines(path, name):
        if isinstance(text, BadRow):
            raise text.problem
        yield text


def _check_header(where: str, cells: list[str], *, is_tsv: bool) -> None:
    repeated = sorted({name for name in cells if cells.count(name) > 1})
    if repeated:
        raise DataError(f"{where}: columns repeat in the header: {', '.join(repeated)}")
    marks = {";": "semicolons", "|": "bars"} | ({",": "commas"} if is_tsv else {"\t": "tabs"})
    if len(cells) == 1 and (found := [name for mark, name in marks.items() if mark in cells[0]]):
        message = f"{where}: the header is one cell, {cells[0]!r:.80}: its columns are separated by {found[0]}"
        raise DataError(message, hint="columns are separated by commas in a .csv file, by tabs in a .tsv file")


def _read_parquet(path: Path, name: str) -> Iterator[RawRow | BadRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as table:
            yield from _rows_of_batches(path, name, table.schema_arrow, table.iter_batches(batch_size=1024))
    except pa.ArrowException as problem:
        raise DataError(f"{path}: not a readable Parquet file: {problem}") from None


def _read_arrow(path: Path, name: str) -> Iterator[RawRow | BadRow]:
    """Read an Arrow stream, as `datasets` writes it, or an Arrow file (Feather)."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as stream:
            is_file = stream.read(6) == b"ARROW1"
            stream.seek(0)
            reader = pa.ipc.open_file(stream) if is_file else pa.ipc.open_stream(stream)
            batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else iter(reader)
            yield from _rows_of_batches(path, name, reader.schema, batches)
    except pa.ArrowException as problem:
        raise DataError(f"{path}: not a readable Arrow file: {problem}") from None


def _rows_of_batches(path: Path, name: str, schema: Any, batches: Iterator[Any]) -> Iterator[RawRow | BadRow]:
    import pyarrow as pa

    if repeated := sorted({column for column in schema.names if schema.names.count(column) > 1}):
        raise DataError(f"{path}: columns repeat: {', '.join(repeated)}")
    interpret = interpreter(schema)
    number = 0
    try:
        for batch in batches:
            for fields in _rows_of_batch(batch):
                where = f"{name}#{number}"
                if isinstance(fields, UnicodeDecodeError):
                    found = f"byte 0x{fields.object[fields.start]:02x}"
                    yield BadRow(where, DataError(f"{where}: a text that is not valid UTF-8: {found}"))
                else:
                    yield interpret(RawRow(where, fields))
                number += 1
    except (pa.ArrowException, OSError) as problem:
        if isinstance(problem, OSError) and problem.errno is not None:
            raise
        raise DataError(f"{name}#{number}: the file is damaged from this row on: {problem}") from None


def _rows_of_batch(batch: Any) -> Iterator[dict[str, Any] | UnicodeDecodeError]:
    """Yield a batch's rows, and the problem in place of one that Python cannot hold."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for index in range(batch.num_rows):
            try:
                yield batch.slice(index, 1).to_pylist()[0]
            except UnicodeDecodeError as problem:
                yield problem
