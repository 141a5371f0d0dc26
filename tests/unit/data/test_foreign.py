"""A file that is something else than its name says is called what it is, in one sentence with a way out."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import sqlite3
import tarfile
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from p2d_cli.data.sources import locate, read_rows
from p2d_cli.errors import DataError

ROWS = [{"prompt": "a", "completion": "b"}]
TEXT = (json.dumps(ROWS[0]) + "\n").encode()


def packed(names):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return stream.getvalue()


def tar():
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("rows.jsonl"))
    return stream.getvalue()


def parquet():
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), stream)
    return stream.getvalue()


def arrow():
    stream = io.BytesIO()
    with pa.ipc.new_file(stream, pa.Table.from_pylist(ROWS).schema) as file:
        file.write_table(pa.Table.from_pylist(ROWS))
    return stream.getvalue()


def numpy():
    stream = io.BytesIO()
    np.save(stream, np.arange(3))
    return stream.getvalue()


def sqlite(folder):
    with sqlite3.connect(folder / "db") as connection:
        connection.execute("create table t (a)")
    connection.close()
    return (folder / "db").read_bytes()


MADE = {
    "gzip": (gzip.compress(TEXT, mtime=0), "is gzip", ".gz"),
    "bzip2": (bz2.compress(TEXT), "is bzip2", "bzip2 -dk"),
    "bzip2 of nothing": (bz2.compress(b""), "is bzip2", "bzip2 -dk"),
    "xz": (lzma.compress(TEXT), "is xz", "xz -dk"),
    "zstd": (pa.compress(TEXT, "zstd", asbytes=True), "is zstd", "zstd -d"),
    "zip": (packed(["rows.jsonl"]), "is a zip archive", "unzip"),
    "xlsx": (packed(["[Content_Types].xml", "xl/workbook.xml"]), "is an Excel workbook", "as CSV"),
    "torch": (packed(["archive/data.pkl"]), "is a file of torch.save", "convert"),
    "tar": (tar(), "is a tar archive", "tar -xf"),
    "parquet": (parquet(), "is Parquet", ".parquet"),
    "arrow": (arrow(), "is an Arrow file", ".arrow"),
    "numpy": (numpy(), "is a NumPy array", "convert"),
    "pdf": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "is PDF", "take the text out"),
    "pickle": (pickle.dumps(ROWS), "is a Python pickle, which p2d never opens", "convert"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "a Git LFS pointer", "git lfs pull"),
    "html": (b"\n<!DOCTYPE html>\n<html><body>404", "an HTML page", "download the file itself"),
    "utf-16": (TEXT.decode().encode("utf-16"), "is UTF-16 text", "iconv -f UTF-16 -t UTF-8"),
    "utf-16-be": (b"\xfe\xff" + TEXT.decode().encode("utf-16-be"), "is UTF-16 text", "save it as UTF-8"),
    "utf-16-le-unmarked": (TEXT.decode().encode("utf-16-le"), "is UTF-16 text", "iconv -f UTF-16LE"),
    "utf-16-be-unmarked": (TEXT.decode().encode("utf-16-be"), "is UTF-16 text", "iconv -f UTF-16BE"),
    "utf-32": (TEXT.decode().encode("utf-32"), "is UTF-32 text", "iconv -f UTF-32"),
}


def refuse(path, content, what, hint):
    path.write_bytes(content)
    with pytest.raises(DataError, match=what) as caught:
        list(read_rows(locate(str(path))))
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a", "a.txt"])
@pytest.mark.parametrize(("content", "what", "hint"), MADE.values(), ids=MADE)
def test_what_is_no_text_is_called_what_it_is(tmp_path, name, content, what, hint):
    refuse(tmp_path / name, content, what, hint)


def test_a_database_is_called_one(tmp_path):
    refuse(tmp_path / "a.csv", sqlite(tmp_path), "an SQLite database", "sqlite3 -header -csv")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
@pytest.mark.parametrize(
    ("content", "what", "hint"),
    [
        (TEXT, "is JSON text", ".jsonl"),
        (gzip.compress(TEXT, mtime=0), "is gzip", ".gz"),
        (MADE["lfs"][0], "a Git LFS pointer", "git lfs pull"),
    ],
)
def test_what_is_no_table_is_called_what_it_is(tmp_path, name, content, what, hint):
    refuse(tmp_path / name, content, what, hint)


def test_tables_under_each_others_names(tmp_path):
    refuse(tmp_path / "a.arrow", parquet(), "is Parquet", ".parquet")
    refuse(tmp_path / "a.parquet", arrow(), "is an Arrow file", ".arrow")


def test_an_archive_within_gzip_is_seen(tmp_path):
    refuse(tmp_path / "a.json.gz", gzip.compress(tar()), "is a tar archive", "tar -xf")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", TEXT),
        ("a.jsonl", b"\xef\xbb\xbf" + TEXT),
        ("a.jsonl.gz", gzip.compress(TEXT, mtime=0)),
        ("a.parquet", parquet()),
        ("a.arrow", arrow()),
        ("a.csv", b"prompt,completion\na,b\n"),
        ("a.csv", "prompt,completion\na,b\n".encode("utf-8-sig")),
    ],
)
def test_rows_are_still_rows(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert [row.fields for row in read_rows(locate(str(tmp_path / name)))] == ROWS


@pytest.mark.parametrize("name", ["ORCID", "PAR1", "BZhead", "ARROW1", "Obj", "Rar!", "PK", "PDF-%", "version"])
def test_a_column_is_not_taken_for_a_format(tmp_path, name):
    (tmp_path / "a.csv").write_text(f"{name},b\n1,2\n")
    assert [row.fields for row in read_rows(locate(str(tmp_path / "a.csv")))] == [{name: "1", "b": "2"}]


def test_a_word_in_a_text_is_no_archive(tmp_path):
    row = {"a": "x" * (257 - len('{"a": "')) + "ustard"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    assert (tmp_path / "a.jsonl").read_bytes()[257:262] == b"ustar"
    assert [found.fields for found in read_rows(locate(str(tmp_path / "a.jsonl")))] == [row]


def test_what_is_no_gzip_is_not_called_damaged(tmp_path):
    refuse(tmp_path / "a.jsonl.gz", TEXT, "is not gzip, as its name says", "take .gz off")


def test_text_of_two_letters_is_no_utf16(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"a\n1\n")
    assert [row.fields for row in read_rows(locate(str(tmp_path / "a.csv")))] == [{"a": "1"}]
