import csv
import gzip
import io
import json
import subprocess
import sys
import tracemalloc
import urllib.error
import urllib.request
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from p2d_cli.data import row_files
from p2d_cli.data.raw_rows import BadRow
from p2d_cli.data.sources import locate, read_rows, scan_rows
from p2d_cli.errors import DataError, StorageError, UnavailableError, UsageError

SAME_FOLDER = settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
VALUE = st.none() | st.booleans() | st.integers(-(10**12), 10**12) | TEXT | st.lists(TEXT, max_size=3)
ROWS = st.lists(st.dictionaries(TEXT, VALUE, max_size=4), min_size=1, max_size=6)


def read(path, **options):
    return list(read_rows(locate(str(path), **options)))


def fields(path, **options):
    return [row.fields for row in read(path, **options)]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# --- JSON Lines and JSON


@SAME_FOLDER
@given(
    rows=ROWS,
    bom=st.booleans(),
    ending=st.sampled_from(["\n", "\r\n"]),
    blanks=st.lists(st.integers(0, 2), min_size=6, max_size=6),
    zipped=st.booleans(),
)
def test_json_lines_give_back_what_was_written(tmp_path, rows, bom, ending, blanks, zipped):
    lines, places = [], []
    for row, blank in zip(rows, blanks, strict=False):
        lines += [" "] * blank + [json.dumps(row, ensure_ascii=False)]
        places.append(len(lines))
    content = (b"\xef\xbb\xbf" if bom else b"") + ending.join(lines).encode()
    path = write(tmp_path / ("a.jsonl.gz" if zipped else "a.jsonl"), gzip.compress(content) if zipped else content)
    found = read(path)
    assert [row.fields for row in found] == rows
    assert [row.where for row in found] == [f"{path.name}:{line}" for line in places]


def test_a_line_separator_inside_a_text_is_no_line_break(tmp_path):
    text = "one\u2028two\u2029three\x85four\x0bfive"
    path = write(tmp_path / "a.jsonl", json.dumps({"a": text}, ensure_ascii=False) + "\n" + '{"a": 2}')
    assert [(row.where, row.fields["a"]) for row in read(path)] == [("a.jsonl:1", text), ("a.jsonl:2", 2)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"a": 1', r"a\.jsonl:2: not valid JSON: .* at column 8"),
        (b'{"a": "\xe9"}', r"a\.jsonl:2: not valid UTF-8: byte 0xe9 at byte 8 of the line"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', r"a\.jsonl:2: the key 'c' repeats in an object"),
        ('{"a": 1}'.encode("utf-16"), r"a\.jsonl:2: not valid UTF-8: byte 0xff at byte 1"),
        (b"[1, 2]", r"a\.jsonl:2: expected a JSON object, found an array"),
        (b"null", r"a\.jsonl:2: expected a JSON object, found null"),
        (b"3", r"a\.jsonl:2: expected a JSON object, found a number"),
        (b"[" * 200_000, r"a\.jsonl:2: JSON that Python cannot hold"),
        (b'{"a": ' + b"9" * 5000 + b"}", r"a\.jsonl:2: JSON that Python cannot hold"),
    ],
)
def test_a_bad_line_is_named_and_does_not_stop_a_scan(tmp_path, line, message):
    path = write(tmp_path / "a.jsonl", b'{"a": 1}\n' + line + b'\n{"a": 3}\n')
    with pytest.raises(DataError, match=message):
        read(path)
    scanned = list(scan_rows(locate(str(path))))
    assert [isinstance(row, BadRow) for row in scanned] == [False, True, False]
    assert scanned[2].where == "a.jsonl:3"


@pytest.mark.parametrize("content", [b"", b"\n \r\n", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_file_without_rows_is_an_error(tmp_path, name, content):
    with pytest.raises(DataError, match="holds no rows"):
        read(write(tmp_path / name, content))


@SAME_FOLDER
@given(rows=ROWS, indent=st.sampled_from([None, 2]))
def test_json_is_an_array_or_json_lines(tmp_path, rows, indent):
    array = write(tmp_path / "a.json", json.dumps(rows, indent=indent, ensure_ascii=False))
    assert [(row.where, row.fields) for row in read(array)] == [(f"a.json#{n}", row) for n, row in enumerate(rows)]
    lines = write(tmp_path / "b.json", "\n".join(json.dumps(row) for row in rows))
    assert fields(lines) == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{\n "data": [],\n "version": 1}',
            "expected an array of objects, or JSON Lines; found an object with the keys",
        ),
        ('"text"', "found a string"),
        ("oops", "found neither"),
        ('[{"a": 1},\n {"a": }]', r"a\.json:2: not valid JSON"),
        (b'[{"a": 1},\r\n{"a": "\xe9"}]', r"a\.json:2: not valid UTF-8: byte 0xe9"),
        ('[{"a": 1},\n {"a": 2},\n]', r"a\.json:3: not valid JSON"),
        ('[{"a": 1}\n {"a": 2}]', r"a\.json:2: not valid JSON: Expecting ','"),
        ('[{"a": 1}]\n\n{"a": 2}', r"a\.json:3: not valid JSON: Extra data"),
        ('[{"a": 1},\n {"a": 2', r"a\.json:2: not valid JSON"),
        ('[{"a": {"b": 1, "b": 2}}]', r"a\.json: the key 'b' repeats in an object"),
        ('[{"a": ' + "9" * 5000 + "}]", r"a\.json: JSON that Python cannot hold"),
        ('[{"a": 1}, 2]', r"a\.json#1: expected a JSON object, found a number"),
    ],
)
@pytest.mark.parametrize("block", [3, 2**20])
def test_json_that_is_no_table(tmp_path, content, message, block, monkeypatch):
    monkeypatch.setattr(row_files, "_BLOCK", block)
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / "a.json", content))


@SAME_FOLDER
@given(rows=ROWS, indent=st.sampled_from([None, 1]), block=st.integers(4, 40), blanks=st.sampled_from(["", "\n \n"]))
def test_an_array_may_be_cut_anywhere_while_it_is_read(tmp_path, rows, indent, block, blanks):
    text = blanks + json.dumps(rows, indent=indent, ensure_ascii=False) + blanks
    path = write(tmp_path / "a.json", "\ufeff" + text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_files, "_BLOCK", block)
        assert fields(path) == rows
        write(path, text + "x")
        last_line = text.count("\n") + 1
        with pytest.raises(DataError, match=rf"a\.json:{last_line}: not valid JSON: Extra data"):
            read(path)


@pytest.mark.parametrize("number", ["1.25", "-1e+5", "12"])
def test_a_number_in_an_array_may_be_cut_anywhere(tmp_path, number, monkeypatch):
    path = write(tmp_path / "a.json", f'[{{"a": {number}}}, {number}, {{"a": 2}}]')
    for block in range(1, 30):
        monkeypatch.setattr(row_files, "_BLOCK", block)
        found = list(scan_rows(locate(str(path))))
        assert [type(row).__name__ for row in found] == ["RawRow", "BadRow", "RawRow"]


def test_a_damaged_gzip_file(tmp_path):
    whole = gzip.compress(b'{"a": 1}\n' * 999)
    for name, content in {"cut.jsonl.gz": whole[:-20], "no.jsonl.gz": b"\x1f\x8bplain"}.items():
        with pytest.raises(DataError, match=f"{name}: damaged"):
            read(write(tmp_path / name, content))


# --- CSV


CELL = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0"), max_size=12)


@SAME_FOLDER
@given(
    table=st.integers(1, 4).flatmap(
        lambda width: st.lists(st.lists(CELL, min_size=width, max_size=width), min_size=1, max_size=5)
    ),
    tsv=st.booleans(),
    ending=st.sampled_from(["\n", "\r\n"]),
)
def test_csv_gives_back_what_was_written(tmp_path, table, tsv, ending):
    header = [f"column {number}" for number in range(len(table[0]))]
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t" if tsv else ",", lineterminator=ending, quoting=csv.QUOTE_ALL)
    writer.writerows([header, *table])
    path = write(tmp_path / ("a.tsv" if tsv else "a.csv"), text.getvalue())
    found = read(path)
    assert [list(row.fields.values()) for row in found] == table
    line, lines = 2, []
    for row in table:
        lines.append(line)
        line += 1 + sum(cell.count("\n") for cell in row)
    assert [row.where for row in found] == [f"{path.name}:{line}" for line in lines]


def test_a_row_of_another_width_is_named_and_skippable(tmp_path):
    path = write(tmp_path / "a.csv", 'a,b\n1,2\n\n"x\ny",2,3\n4,5\n')
    with pytest.raises(DataError, match=r"a\.csv:4: expected 2 cells as in the header, found 3"):
        read(path)
    assert [row.where for row in scan_rows(locate(str(path)))] == ["a.csv:2", "a.csv:4", "a.csv:6"]


ROW = '{"a": 1}'


@pytest.mark.parametrize(
    ("name", "content", "hint"),
    [
        ("a.jsonl", f"{ROW}\n\ufeff{ROW}\n", "two files were joined here"),
        ("a.jsonl", f"{ROW}\r{ROW}\r", "its lines end in carriage returns alone"),
        ("a.jsonl", f"{ROW}{ROW}\n", "each row stands on a line of its own"),
        ("a.csv", "a,b\n1,2\n\ufeffa,b\n3,4\n", "two files were joined here"),
        ("a.csv", "a,b\r1,2\r", "its lines end in carriage returns alone"),
        ("a.csv", "a;b\n1;2\n", "columns are separated by commas in a .csv file"),
        ("a.csv", "a\tb\n1\t2\n", "columns are separated by commas in a .csv file"),
    ],
)
def test_what_spoilt_a_file_is_told(tmp_path, name, content, hint):
    with pytest.raises(DataError) as caught:
        read(write(tmp_path / name, content))
    assert caught.value.hint.startswith(hint)


def test_long_cells_are_read(tmp_path):
    assert fields(write(tmp_path / "a.csv", "a\n" + "x" * 300_000)) == [{"a": "x" * 300_000}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b,a\n1,2,3\n", r"a\.csv:1: columns repeat in the header: a"),
        ('a\n"b"c\n', r"a\.csv:2: not valid CSV"),
        (b"a\nb\n\xff\n", r"a\.csv:3: not valid UTF-8"),
        ("a,b\r1,2\r", r"a\.csv:1: not valid CSV"),
        ('a\n1\n"never closed\n', r"a\.csv:3: not valid CSV"),
    ],
)
def test_csv_that_cannot_be_read(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / "a.csv", content))


# --- Parquet and Arrow

TABLE = [{"a": "x", "b": [{"role": "user", "content": "y"}]}, {"a": None, "b": []}] * 800


def test_parquet_and_arrow_give_back_what_was_written(tmp_path):
    table = pa.Table.from_pylist(TABLE)
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    with pa.ipc.new_stream(tmp_path / "stream.arrow", table.schema) as stream:
        stream.write_table(table, max_chunksize=100)
    with pa.ipc.new_file(tmp_path / "file.arrow", table.schema) as file:
        file.write_table(table, max_chunksize=100)
    for name in ("a.parquet", "stream.arrow", "file.arrow"):
        found = read(tmp_path / name)
        assert [row.fields for row in found] == TABLE
        assert [row.where for row in found] == [f"{name}#{number}" for number in range(len(TABLE))]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_damaged_tables_are_bad_data(tmp_path, name):
    with pytest.raises(DataError, match=name):
        read(write(tmp_path / name, b"ARROW1 and then nothing of use"))


def damage(path):
    """Spoil a few bytes in the middle of a file."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 200] = bytes(byte ^ 0x5A for byte in content[middle : middle + 200])
    path.write_bytes(content)


def test_damage_within_a_table_is_placed(tmp_path):
    table = pa.table({"a": [f"{number:050}" for number in range(8000)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1000)
    damage(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet#\d{4}: the file is damaged from this row on"):
        read(tmp_path / "a.parquet")
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as stream:
        stream.write_table(table, max_chunksize=1000)
    content = (tmp_path / "a.arrow").read_bytes()
    (tmp_path / "a.arrow").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"a\.arrow#\d000: the file is damaged from this row on"):
        read(tmp_path / "a.arrow")


def test_columns_that_repeat_in_a_table_are_refused(tmp_path):
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as stream:
        stream.write_table(table)
    for name in ("a.parquet", "a.arrow"):
        with pytest.raises(DataError, match=rf"{name}: columns repeat: a"):
            read(tmp_path / name)


def test_texts_of_a_table_that_are_not_utf8(tmp_path):
    offsets, content = pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff")
    pq.write_table(
        pa.table({"a": pa.Array.from_buffers(pa.string(), 2, [None, offsets, content])}), tmp_path / "a.parquet"
    )
    with pytest.raises(DataError, match=r"a\.parquet#1: a text that is not valid UTF-8: byte 0xff"):
        read(tmp_path / "a.parquet")
    assert [type(row).__name__ for row in scan_rows(locate(str(tmp_path / "a.parquet")))] == ["RawRow", "BadRow"]


def test_a_table_without_rows(tmp_path):
    pq.write_table(pa.table({"a": pa.array([], pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="holds no rows"):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.arrow"])
def test_rows_are_read_one_after_the_other(tmp_path, name):
    """A file of 20 MB takes a small part of that in memory, and its first row is there at once."""
    rows = [{"prompt": f"{number:01000}", "completion": "x"} for number in range(20_000)]
    path = tmp_path / name
    if name == "a.jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif name == "a.json":
        path.write_text(json.dumps(rows))
    elif name == "a.csv":
        path.write_text("prompt,completion\n" + "".join(",".join(row.values()) + "\n" for row in rows))
    elif name == "a.parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=1000)
    else:
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table, max_chunksize=1000)
    del rows
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_rows(locate(str(path)))) == 20_000
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 5_000_000


def test_a_saved_dataset_is_read_in_order(tmp_path):
    import datasets

    rows = [{"prompt": str(number), "completion": "x"} for number in range(50)]
    whole = datasets.Dataset.from_list(rows)
    whole.save_to_disk(tmp_path / "one", num_shards=3)
    datasets.DatasetDict({"train": whole, "test": whole.select([7, 3])}).save_to_disk(tmp_path / "two")
    assert locate(str(tmp_path / "one")).kind == "dataset-folder"
    assert fields(tmp_path / "one") == rows
    assert fields(tmp_path / "two", split="test") == [rows[7], rows[3]]
    with pytest.raises(DataError, match="several splits: test, train"):
        locate(str(tmp_path / "two"))
    next((tmp_path / "one").glob("*.arrow")).unlink()
    with pytest.raises(DataError, match="without data-"):
        locate(str(tmp_path / "one"))


# --- finding


def test_a_missing_file_names_its_neighbours(tmp_path):
    write(tmp_path / "train.jsonl", "{}")
    with pytest.raises(DataError, match="no such file") as caught:
        locate(str(tmp_path / "tran.jsonl"))
    assert caught.value.hint == "did you mean train.jsonl?"
    with pytest.raises(DataError, match="no such file") as caught:
        locate(str(tmp_path / "none" / "a.jsonl"))
    assert "does not exist either" in caught.value.hint


@pytest.mark.parametrize("spec", ["data.jsonl", "owner/name.csv", "./owner/name", "~/owner/name", "squad", "a/b/c", ""])
def test_what_looks_like_a_path_is_no_hub_id(tmp_path, monkeypatch, spec):
    monkeypatch.chdir(tmp_path)
    if spec:
        with pytest.raises(DataError, match="no such file"):
            locate(spec)
    else:
        with pytest.raises(DataError, match="no files with rows"):
            locate(spec)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("openai/gsm8k", ("openai/gsm8k", None, None)),
        ("openai/gsm8k:main", ("openai/gsm8k", None, "main")),
        ("a/b.c@refs/pr/1", ("a/b.c", "refs/pr/1", None)),
        ("a-1/b_2@abc123:conf-1.x", ("a-1/b_2", "abc123", "conf-1.x")),
    ],
)
def test_hub_ids(tmp_path, monkeypatch, spec, expected):
    monkeypatch.chdir(tmp_path)
    source = locate(spec, split="test")
    assert (source.repo, source.revision, source.config_name) == expected
    assert (source.kind, source.format, source.files, source.split) == ("hub", "hub", (), "test")


def test_one_revision_only():
    assert locate("a/b", revision="x").revision == "x"
    assert locate("a/b@x", revision="x").revision == "x"
    with pytest.raises(UsageError, match="revision y, but --revision is x"):
        locate("a/b@y", revision="x")


def test_a_path_that_exists_wins_over_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "owner" / "name" / "rows.jsonl", '{"a": 1}')
    assert fields("owner/name") == [{"a": 1}]


def test_an_unknown_format(tmp_path):
    with pytest.raises(DataError, match="cannot tell the format") as caught:
        locate(str(write(tmp_path / "a.txt", "x")))
    assert ".jsonl" in caught.value.hint
    with pytest.raises(DataError, match="cannot tell the format"):
        locate(str(write(tmp_path / "a.parquet.gz", "x")))


def test_folders(tmp_path):
    write(tmp_path / "shards" / "part-00001.jsonl", '{"n": 1}')
    write(tmp_path / "shards" / "part-00000.jsonl", '{"n": 0}')
    write(tmp_path / "shards" / "README.md", "not rows")
    write(tmp_path / "shards" / ".hidden.jsonl", "not rows")
    assert fields(tmp_path / "shards") == [{"n": 0}, {"n": 1}]

    for split in ("train", "test"):
        write(tmp_path / "splits" / "data" / f"{split}-00000-of-00002.jsonl", f'{{"s": "{split}"}}')
        write(tmp_path / "splits" / "data" / f"{split}-00001-of-00002.jsonl", f'{{"s": "{split}"}}')
    assert fields(tmp_path / "splits", split="test") == [{"s": "test"}] * 2
    with pytest.raises(DataError, match="several splits: test, train") as caught:
        locate(str(tmp_path / "splits"))
    assert "--split" in caught.value.hint
    with pytest.raises(DataError, match="no split 'dev'; found: test, train"):
        locate(str(tmp_path / "splits"), split="dev")


def test_other_files_beside_the_splits_do_not_disturb(tmp_path):
    write(tmp_path / "train.jsonl", '{"s": "train"}')
    write(tmp_path / "labels.json", "[]")
    assert fields(tmp_path, split="train") == [{"s": "train"}]
    with pytest.raises(DataError, match="several splits: labels, train"):
        locate(str(tmp_path))


def test_one_split_in_two_formats_is_ambiguous(tmp_path):
    write(tmp_path / "train.jsonl", "{}")
    write(tmp_path / "train.csv", "a\n1\n")
    with pytest.raises(DataError, match=r"several formats: train\.csv, train\.jsonl"):
        locate(str(tmp_path))


def test_a_file_that_vanishes_is_a_storage_error(tmp_path):
    source = locate(str(write(tmp_path / "a.jsonl", "{}")))
    source.files[0].unlink()
    with pytest.raises(StorageError, match="cannot read"):
        list(read_rows(source))


def test_local_rows_need_no_heavy_library(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"prompt": "a", "completion": "b"}')
    code = (
        "import sys; from p2d_cli.data.sources import locate; from p2d_cli.data.records import read_records;"
        f"print(len(read_records(locate({str(path)!r})).records), "
        "[name for name in ('torch', 'transformers', 'datasets', 'pyarrow', 'numpy') if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown == "1 []\n"


# --- the hub


@pytest.fixture
def hub(monkeypatch):
    """A hub with one data set of two splits; the calls made are recorded."""
    import datasets

    splits = {"train": [{"a": 1}, {"a": 2}], "test": [{"a": 3}]}
    calls = []

    def builder(repo, config, *, revision):
        calls.append((repo, config, revision))
        if repo != "owner/name":
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{repo}' doesn't exist on the Hub")
        if config == "bad":
            raise ValueError("BuilderConfig 'bad' not found. Available: ['main']")
        return SimpleNamespace(info=SimpleNamespace(splits=splits if config == "main" else None))

    def load(repo, config, *, split, revision):
        return splits if split is None else splits[split]

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    monkeypatch.setattr(datasets, "load_dataset", load)
    return calls


def test_hub_rows(hub):
    found = list(read_rows(locate("owner/name@r1:main", split="train")))
    assert [(row.where, row.fields) for row in found] == [
        ("owner/name/train#0", {"a": 1}),
        ("owner/name/train#1", {"a": 2}),
    ]
    assert hub == [("owner/name", "main", "r1")]


@pytest.mark.parametrize("spec", ["owner/name:main", "owner/name"])
def test_a_hub_split_must_be_chosen(hub, spec):
    with pytest.raises(DataError, match="several splits: test, train"):
        list(read_rows(locate(spec)))


def test_a_hub_split_that_is_not_there(hub):
    with pytest.raises(DataError, match="no split 'dev'; found: test, train"):
        list(read_rows(locate("owner/name:main", split="dev")))


def test_hub_failures_tell_what_to_do(hub, monkeypatch):
    import datasets

    with pytest.raises(UnavailableError, match="owner/other is not available") as caught:
        list(read_rows(locate("owner/other")))
    assert "unset HF_HUB_OFFLINE" in caught.value.hint
    with pytest.raises(UnavailableError):
        list(read_rows(locate("owner/name:bad")))

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: io.BytesIO())
    with pytest.raises(DataError, match="BuilderConfig 'bad' not found"):
        list(read_rows(locate("owner/name:bad")))
    with pytest.raises(UnavailableError, match="doesn't exist on the Hub") as caught:
        list(read_rows(locate("owner/other")))
    assert "check the name" in caught.value.hint


def test_no_network_is_found_out_at_once(hub, monkeypatch):
    import datasets

    def refuse(request, timeout):
        assert timeout <= 10
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(UnavailableError, match=r"does not answer \(no route\)") as caught:
        list(read_rows(locate("owner/name:main", split="train")))
    assert "HF_HUB_OFFLINE=1" in caught.value.hint
    assert hub == []


def test_a_hub_that_answers_with_an_error_is_reachable(hub, monkeypatch):
    import datasets

    def answer(request, timeout):
        raise urllib.error.HTTPError(request.full_url, 405, "no HEAD here", None, io.BytesIO())

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(urllib.request, "urlopen", answer)
    assert len(list(read_rows(locate("owner/name:main", split="train")))) == 2


def test_the_libraries_bars_are_as_before(hub):
    import datasets

    before = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    list(read_rows(locate("owner/name:main", split="train")))
    assert (datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()) == before


# --- the hub's local cache


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """Write files into the cached snapshot of `owner/name`, at a commit and the names that stand for it."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))

    def put(files, commit=COMMIT, names=("main",)):
        folder = tmp_path / "datasets--owner--name"
        for name in names:
            write(folder / "refs" / name, commit)
        for name, rows in files.items():
            write(folder / "snapshots" / commit / name, "".join(json.dumps(row) + "\n" for row in rows))

    return put


def test_a_cached_snapshot_is_read_by_revision_and_split(cached):
    cached({"data/train-00000-of-00001.jsonl": [{"a": 1}], "data/test-00000-of-00001.jsonl": [{"a": 2}, {"a": 3}]})
    cached({"train.jsonl": [{"a": 9}]}, commit=COMMIT[::-1], names=("v2",))
    assert [(row.where, row.fields["a"]) for row in read("owner/name", split="test")] == [
        ("owner/name/test#0", 2),
        ("owner/name/test#1", 3),
    ]
    assert fields("owner/name@v2") == fields("owner/name", revision=COMMIT[::-1]) == [{"a": 9}]
    with pytest.raises(DataError, match="several splits: test, train"):
        read("owner/name")
    with pytest.raises(DataError, match="no split 'dev'; found: test, train"):
        read("owner/name", split="dev")


def test_splits_of_a_snapshot_are_named_as_datasets_names_them(cached):
    cached({"questions_dev.jsonl": [{"a": 1}], "qa-eval.jsonl": [{"a": 2}], "extra.jsonl": [{"a": 3}]})
    assert fields("owner/name", split="validation") == [{"a": 1}]
    assert fields("owner/name", split="test") == [{"a": 2}]


def test_files_of_no_split_are_for_training(cached):
    cached({"one.jsonl": [{"a": 1}], "two.jsonl": [{"a": 2}]})
    assert [row.where for row in read("owner/name", split="train")] == ["owner/name/train#0", "owner/name/train#1"]
    assert fields("owner/name") == [{"a": 1}, {"a": 2}]


def test_a_configuration_of_a_snapshot_is_a_folder(cached):
    cached({"main/train.jsonl": [{"a": 1}], "other/train.jsonl": [{"a": 2}]})
    assert fields("owner/name:other") == [{"a": 2}]


def test_a_snapshot_that_is_there_in_part(cached):
    cached({"data/train-00001-of-00002.jsonl": [{"a": 1}]})
    with pytest.raises(UnavailableError, match="split train, 1 of 2 shards are there: data/train-00000-of-00002 is"):
        read("owner/name")


def test_a_snapshot_has_the_splits_of_a_folder(cached):
    """With shards that carry a hash, and metadata beside them."""
    cached(
        {
            "data/train-00000-of-00001-a09b74b3ef9c3b56.jsonl": [{"a": 1}],
            "data/test_sft-00000-of-00001-bdb3c4e5f6071829.jsonl": [{"a": 2}],
            "dataset_infos.json": [{"default": {}}],
            "labels.jsonl": [{"a": 3}],
        }
    )
    assert fields("owner/name", split="train") == [{"a": 1}]
    assert fields("owner/name", split="test_sft") == [{"a": 2}]
    with pytest.raises(DataError, match=r"several splits: test_sft, train$"):
        read("owner/name")


def test_the_card_of_a_snapshot_decides(cached, tmp_path):
    cached({"a/train.jsonl": [{"a": 1}], "b/train.jsonl": [{"a": 2}]})
    card = "---\nconfigs:\n- config_name: one\n  data_dir: a\n- config_name: two\n  data_files: b/*\n---\n"
    write(tmp_path / "datasets--owner--name" / "snapshots" / COMMIT / "README.md", card)
    assert fields("owner/name:one") == [{"a": 1}]
    assert fields("owner/name:two", split="train") == [{"a": 2}]
    with pytest.raises(DataError, match="several configurations: one, two"):
        read("owner/name")


def test_a_link_of_a_snapshot_to_no_blob_is_named(cached, tmp_path):
    cached({"a.jsonl": [{"a": 1}]})
    folder = tmp_path / "datasets--owner--name" / "snapshots" / COMMIT
    (folder / "b.jsonl").symlink_to("../../blobs/0123")
    with pytest.raises(DataError, match=r"b\.jsonl is a link to \.\./\.\./blobs/0123, which is not there"):
        read("owner/name")


def test_labels_of_a_snapshot_are_named_by_its_card(cached, tmp_path):
    cached({"train.jsonl": [{"text": "fine", "label": 1}]})
    features = "- name: label\n    dtype:\n      class_label:\n        names: [bad, good]\n"
    card = f"---\ndataset_info:\n  features:\n  {features}---\n"
    write(tmp_path / "datasets--owner--name" / "snapshots" / COMMIT / "README.md", card)
    [row] = read("owner/name")
    assert row.labels == {"label": ("bad", "good")}


def test_another_revision_than_the_cached_one_is_not_taken_for_it(cached):
    cached({"train.jsonl": [{"a": 1}]})
    with pytest.raises(UnavailableError, match="revision v3 is not in the local cache"):
        read("owner/name@v3")


def test_a_bad_row_of_a_snapshot_is_named_by_its_line(cached, tmp_path):
    cached({"train.jsonl": [{"a": 1}]})
    path = tmp_path / "datasets--owner--name" / "snapshots" / COMMIT / "train.jsonl"
    path.write_text(path.read_text() + "oops\n")
    with pytest.raises(DataError, match=r"train\.jsonl:2: not valid JSON"):
        read("owner/name")
