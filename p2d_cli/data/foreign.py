"""What a file is that holds no rows p2d reads, or holds them in another form than its name says: by its first bytes."""

from __future__ import annotations

import gzip
import re
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path

from p2d_cli.data.raw_rows import TEXT_FORMATS, RowFormat
from p2d_cli.errors import DataError

HEAD_BYTES = 512
"""So many bytes tell what a file is; those of a tar archive stand at 257."""
_Kind = tuple[str, str]
"""What a file is, and what to do about it."""

_UNPACK = "unpack it first: {}, and give the file that comes out"
_CONVERT = "convert it to .jsonl, .csv or .parquet first"
_EXPORT = "export a table as CSV: sqlite3 -header -csv FILE 'select * from TABLE'"
_GZIP, _ZIP, _TAR = rb"\x1f\x8b", rb"PK\x03\x04", rb"(?=.*\0).{257}ustar"
# Patterns that each hold a byte that no text holds, or more than a text would begin with, lest a column's name match.
_MAGIC: dict[bytes, _Kind] = {
    _GZIP: ("gzip", "rename it so that its name ends in .gz, as in rows.jsonl.gz"),
    rb"\x28\xb5\x2f\xfd": ("zstd", _UNPACK.format("zstd -d FILE")),
    rb"\xfd7zXZ\0": ("xz", _UNPACK.format("xz -dk FILE")),
    rb"BZh.(1AY|\x17rE)": ("bzip2", _UNPACK.format("bzip2 -dk FILE")),
    rb"\x04\x22\x4d\x18": ("lz4", _UNPACK.format("lz4 -d FILE")),
    _ZIP: ("a zip archive", _UNPACK.format("unzip FILE")),
    rb"7z\xbc\xaf\x27\x1c": ("a 7z archive", _UNPACK.format("7z x FILE")),
    rb"Rar!\x1a\x07": ("a RAR archive", _UNPACK.format("unrar x FILE")),
    rb"PAR1\x15": ("Parquet", "rename it so that its name ends in .parquet"),
    rb"ARROW1\0\0": ("an Arrow file", "rename it so that its name ends in .arrow"),
    rb"Obj\x01": ("Avro", _CONVERT),
    rb"%PDF-": ("PDF", "rows are read from .jsonl, .csv or .parquet: take the text out of it first"),
    rb"SQLite format 3\0": ("an SQLite database", _EXPORT),
    rb"\x89HDF\r\n\x1a\n": ("HDF5", _CONVERT),
    rb"\x93NUMPY": ("a NumPy array", _CONVERT),
    rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": ("an old Office document, such as .xls", "save the sheet as CSV (UTF-8)"),
    rb"version https://git-lfs": ("a Git LFS pointer, not the file itself", "fetch the file: git lfs pull"),
    _TAR: ("a tar archive", _UNPACK.format("tar -xf FILE")),
    # The second byte is the protocol.
    rb"\x80[\x02-\x05]": ("a Python pickle, which p2d never opens", _CONVERT),
}
_OWN_MAGIC = {"parquet": "Parquet", "arrow": "an Arrow file"}


def refuse_foreign(head: bytes, path: Path, row_format: RowFormat | None) -> None:
    """Refuse a file that is not what its name says, as far as its first bytes tell.

    Args:
        head: the first bytes of its content, unpacked if its name ends in .gz.
        path: the file.
        row_format: what its name says; None for nothing that p2d knows.

    Raises:
        DataError: naming what it is.
    """
    found = _by_magic(head, path)
    if found is None and (row_format is None or row_format in TEXT_FORMATS):
        found = _text_kind(head)
    if found is None and row_format in _OWN_MAGIC:
        is_json = head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith((b"{", b"["))
        found = ("JSON text", "rename it so that its name ends in .jsonl or .json") if is_json else None
    if found is not None and found[0] != _OWN_MAGIC.get(row_format or ""):
        raise DataError(f"{path} is {found[0]}", hint=found[1])


def _by_magic(head: bytes, path: Path) -> _Kind | None:
    magic = next((magic for magic in _MAGIC if re.match(magic, head, re.DOTALL)), None)
    if magic == _ZIP:
        return _kind_of_zip(path)
    if magic == _GZIP:
        unpacked = b""
        with suppress(OSError, EOFError, zlib.error), gzip.open(path, "rb") as stream:
            unpacked = stream.read(HEAD_BYTES)
        magic = _TAR if re.match(_TAR, unpacked, re.DOTALL) else magic
    return None if magic is None else _MAGIC[magic]


def _kind_of_zip(path: Path) -> _Kind:
    names: list[str] = []
    with suppress(OSError, ValueError, zipfile.BadZipFile, NotImplementedError), zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.startswith("xl/") for name in names):
        return "an Excel workbook", "save the sheet as CSV (UTF-8)"
    if any(name.endswith("data.pkl") for name in names):
        return "a file of torch.save", _CONVERT
    return _MAGIC[_ZIP]


def _text_kind(head: bytes) -> _Kind | None:
    encoding = ""
    even, odd = head[0:8:2], head[1:8:2]
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        encoding = "UTF-32"
    elif head.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "UTF-16"
    elif len(head) >= 4 and any(even) != any(odd):  # without a mark; every other byte of ASCII is zero
        encoding = "UTF-16LE" if any(even) else "UTF-16BE"
    if encoding:
        return f"{encoding[:6]} text", f"save it as UTF-8, as with: iconv -f {encoding} -t UTF-8 FILE"
    if head.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
        return "an HTML page", "download the file itself, not the page that shows it"
    return None
