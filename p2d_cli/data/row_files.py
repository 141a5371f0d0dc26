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
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from p2d_cli.core.json_values import JsonObject
from p2d_cli.data.column_kinds import interpreted, with_labels
from p2d_cli.data.foreign import HEAD_BYTES, foreign_kind
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
    reader = {
        "jsonl": _read_json_lines,
        "json": _read_json,
        "csv": _read_csv,
        "tsv": _read_csv,
        "parquet": _read_parquet,
        "arrow": _read_arrow,
    }[source.format]
    for path, name in zip(source.files, source.names, strict=True):
        with _explain_file_errors(path):
            _refuse_foreign(path)
            rows = reader(path)
            if source.labels:
                rows = with_labels(rows, dict(source.labels), is_csv=source.format in {"csv", "tsv"})
            yield from rows if name == path.name else _renamed(rows, path.name, name)


def _refuse_foreign(path: Path) -> None:
    """Refuse a file that holds something else than its name says.

    Raises:
        DataError: naming what it is.
    """
    if path.suffix.lower() == ".gz":
        with path.open("rb") as stream:
            if (start := stream.read(2)) not in {_GZIP_MAGIC, b""}:
                hint = "if it is not damaged, take .gz off its name"
                raise DataError(f"{path} is not gzip, as its name says: it begins with {start!r}", hint=hint)
    with _open(path) as stream:
        head = stream.read(HEAD_BYTES)
    if (found := foreign_kind(head, path, format_of(path))) is not None:
        raise DataError(f"{path} is {found.what}", hint=found.hint)


def _renamed(rows: Iterator[RawRow | BadRow], own: str, name: str) -> Iterator[RawRow | BadRow]:
    """Name rows, and what is wrong with them, by their file's path, since files in other folders may share its name."""

    def renamed(text: str) -> str:
        return name + text.removeprefix(own) if text.startswith(own) else text

    try:
        for row in rows:
            if isinstance(row, BadRow):
                problem = DataError(renamed(row.problem.message), hint=row.problem.hint)
                yield BadRow(renamed(row.where), problem)
            else:
                yield replace(row, where=renamed(row.where))
    except DataError as problem:
        raise DataError(renamed(problem.message), hint=problem.hint) from None


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


def _text_lines(path: Path) -> Iterator[tuple[str, str | BadRow]]:
    """Yield `(file:line, text)`, split at line feeds only: U+2028 and the like may stand inside a JSON string."""
    with _open(path) as stream:
        for number, line in enumerate(iter(lambda: stream.readline(_LONGEST_LINE), b""), start=1):
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


def _object_of(pairs: list[tuple[str, Any]]) -> JsonObject:
    fields = JsonObject(pairs)
    if len(fields) < len(pairs):
        [(repeated, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise _RepeatedKeyError(f"the key '{repeated}' repeats in an object")
    return fields


def _parse_json_row(where: str, text: str) -> RawRow | BadRow:
    try:
        value = json.loads(text.rstrip(), object_pairs_hook=_object_of)
    except json.JSONDecodeError as problem:
        message = f"{where}: not valid JSON: {problem.msg} at column {problem.colno}"
        return BadRow(where, DataError(message, hint=_hint_of_line(text, problem)))
    except _RepeatedKeyError as problem:
        return BadRow(where, DataError(f"{where}: {problem}"))
    except (ValueError, RecursionError) as problem:
        return BadRow(where, DataError(f"{where}: JSON that Python cannot hold: {problem}"))
    return _object_row(where, value)


def _hint_of_line(text: str, problem: json.JSONDecodeError) -> str | None:
    """Return what may have spoilt a line of JSON: joined files, or the ends of lines of other systems."""
    if text.startswith("\ufeff"):
        return _JOINED
    if problem.msg != "Extra data":
        return None
    if "\r" in text[: problem.pos]:
        return _RETURNS
    return "each row stands on a line of its own" if text[problem.pos] in "{[" else None


def _object_row(where: str, value: Any) -> RawRow | BadRow:
    if isinstance(value, dict):
        return RawRow(where, value)
    hint = "a JSON array of rows belongs into a .json file" if isinstance(value, list) else None
    return BadRow(where, DataError(f"{where}: expected a JSON object, found {json_kind(value)}", hint=hint))


def json_kind(value: Any) -> str:
    """Return what JSON calls a value, with its article."""
    kinds = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return "an object" if isinstance(value, dict) else kinds.get(type(value), "a number")


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
        found = f"{json_kind(value)}{keys}"
    message = f"{path.name}: expected an array of objects, or JSON Lines; found {found}"
    return BadRow(path.name, DataError(message))


def _read_csv(path: Path) -> Iterator[RawRow | BadRow]:
    csv.field_size_limit(_LONGEST_LINE)  # the default of 131,072 characters cuts into long documents
    reader = csv.reader(_require_text(path), delimiter="\t" if format_of(path) == "tsv" else ",", strict=True)
    header: list[str] | None = None
    while True:
        where = f"{path.name}:{reader.line_num + 1}"
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
            header = _check_header(where, cells, is_tsv=format_of(path) == "tsv")
        elif cells[0].startswith("\ufeff"):
            yield BadRow(where, DataError(f"{where}: a byte order mark within the file", hint=_JOINED))
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


def _check_header(where: str, cells: list[str], *, is_tsv: bool) -> list[str]:
    repeated = sorted({name for name in cells if cells.count(name) > 1})
    if repeated:
        raise DataError(f"{where}: columns repeat in the header: {', '.join(repeated)}")
    marks = {";": "semicolons", "|": "bars"} | ({",": "commas"} if is_tsv else {"\t": "tabs"})
    if len(cells) == 1 and (found := [name for mark, name in marks.items() if mark in cells[0]]):
        message = f"{where}: the header is one cell, {cells[0]!r:.80}: its columns are separated by {found[0]}"
        raise DataError(message, hint="columns are separated by commas in a .csv file, by tabs in a .tsv file")
    return cells


def _read_parquet(path: Path) -> Iterator[RawRow | BadRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as table:
            rows = _rows_of_batches(path, table.schema_arrow.names, table.iter_batches(batch_size=1024))
            yield from interpreted(rows, table.schema_arrow)
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
            yield from interpreted(_rows_of_batches(path, reader.schema.names, batches), reader.schema)
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
