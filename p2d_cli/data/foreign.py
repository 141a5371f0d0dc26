"""What a file is that holds no rows p2d reads, or holds them in another form than its name says: by its first bytes."""

from __future__ import annotations

import gzip
import zipfile
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from p2d_cli.data.raw_rows import TEXT_FORMATS, RowFormat

HEAD_BYTES = 512
"""So many bytes tell what a file is; those of a tar archive stand at 257."""


@dataclass(frozen=True)
class Foreign:
    """What a file is, and what to do about it."""

    what: str
    hint: str


_UNPACK = "unpack it first: {}, and give the file that comes out"
_CONVERT = "convert it to .jsonl, .csv or .parquet first"
_GZIP, _ZIP, _BZIP2 = b"\x1f\x8b", b"PK\x03\x04", b"BZh"
# Each holds a byte that no text holds, or more than a text would begin with, lest a column's name be taken for one.
_TAR = Foreign("a tar archive", _UNPACK.format("tar -xf FILE"))
_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (_GZIP, "gzip", "rename it so that its name ends in .gz, as in rows.jsonl.gz"),
    (b"\x28\xb5\x2f\xfd", "zstd", _UNPACK.format("zstd -d FILE")),
    (b"\xfd7zXZ\0", "xz", _UNPACK.format("xz -dk FILE")),
    (_BZIP2, "bzip2", _UNPACK.format("bzip2 -dk FILE")),
    (b"\x04\x22\x4d\x18", "lz4", _UNPACK.format("lz4 -d FILE")),
    (_ZIP, "a zip archive", _UNPACK.format("unzip FILE")),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK.format("7z x FILE")),
    (b"Rar!\x1a\x07", "a RAR archive", _UNPACK.format("unrar x FILE")),
    (b"PAR1\x15", "Parquet", "rename it so that its name ends in .parquet"),
    (b"ARROW1\0\0", "an Arrow file", "rename it so that its name ends in .arrow"),
    (b"Obj\x01", "Avro", _CONVERT),
    (b"%PDF-", "PDF", "rows are read from .jsonl, .csv or .parquet: take the text out of it first"),
    (
        b"SQLite format 3\0",
        "an SQLite database",
        "export a table as CSV: sqlite3 -header -csv FILE 'select * from TABLE'",
    ),
    (b"\x89HDF\r\n\x1a\n", "HDF5", _CONVERT),
    (b"\x93NUMPY", "a NumPy array", _CONVERT),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document, such as .xls", "save the sheet as CSV (UTF-8)"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "fetch the file: git lfs pull"),
)
_UTF_16 = "save it as UTF-8, as with: iconv -f UTF-16 -t UTF-8 FILE"
_OWN_MAGIC = {"parquet": "Parquet", "arrow": "an Arrow file"}


def foreign_kind(head: bytes, path: Path, row_format: RowFormat | None) -> Foreign | None:
    """Return what a file is, if it is not what its name says; None where its first bytes do not tell.

    Args:
        head: the first bytes of its content, unpacked if its name ends in .gz.
        path: the file.
        row_format: what its name says; None for nothing that p2d knows.
    """
    found = _by_magic(head, path)
    if found is None and (row_format is None or row_format in TEXT_FORMATS):
        found = _text_kind(head)
    if found is None and row_format in _OWN_MAGIC:
        found = _text_in_place_of_a_table(head)
    return None if found is not None and found.what == _OWN_MAGIC.get(row_format or "") else found


def _by_magic(head: bytes, path: Path) -> Foreign | None:
    for magic, what, hint in _MAGIC:
        if head.startswith(magic) and (magic != _BZIP2 or head[4:7] in {b"1AY", b"\x17rE"}):
            if magic == _ZIP:
                return _of_zip(path)
            return _TAR if magic == _GZIP and _is_tar(_unzipped_head(path)) else Foreign(what, hint)
    if _is_tar(head):
        return _TAR
    # The second byte is the protocol, and an opcode of frames or memory follows.
    if head[:1] == b"\x80" and head[1:2] in {b"\x02", b"\x03", b"\x04", b"\x05"}:
        return Foreign("a Python pickle, which p2d never opens", _CONVERT)
    return None


def _is_tar(head: bytes) -> bool:
    return head[257:262] == b"ustar" and b"\0" in head


def _unzipped_head(path: Path) -> bytes:
    with suppress(OSError, EOFError, zlib.error), gzip.open(path, "rb") as stream:
        return stream.read(HEAD_BYTES)
    return b""


def _of_zip(path: Path) -> Foreign:
    """Tell apart what is packed as a zip archive."""
    names: list[str] = []
    with suppress(OSError, ValueError, zipfile.BadZipFile, NotImplementedError), zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.startswith("xl/") for name in names):
        return Foreign("an Excel workbook", "save the sheet as CSV (UTF-8)")
    if any(name.endswith("data.pkl") for name in names):
        return Foreign("a file of torch.save", _CONVERT)
    return Foreign("a zip archive", _UNPACK.format("unzip FILE"))


def _text_kind(head: bytes) -> Foreign | None:
    for mark, what in ((b"\xff\xfe\0\0", "UTF-32"), (b"\0\0\xfe\xff", "UTF-32"), (b"\xff\xfe", "UTF-16")):
        if head.startswith(mark):
            return Foreign(f"{what} text", _UTF_16.replace("UTF-16", what))
    if head.startswith(b"\xfe\xff"):
        return Foreign("UTF-16 text", _UTF_16)
    even, odd = head[0:8:2], head[1:8:2]
    if len(head) >= 4 and (not any(even)) != (not any(odd)):
        return Foreign("UTF-16 text", _UTF_16.replace("UTF-16", "UTF-16LE" if not any(odd) else "UTF-16BE"))
    if head.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
        return Foreign("an HTML page", "download the file itself, not the page that shows it")
    return None


def _text_in_place_of_a_table(head: bytes) -> Foreign | None:
    if head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in {b"{", b"["}:
        return Foreign("JSON text", "rename it so that its name ends in .jsonl or .json")
    return None
