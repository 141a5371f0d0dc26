"""Rows as they come: everything that is a row survives the way through mine-data, and the rest is named or counted."""

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

MANY = 1_000_000 if os.environ.get("P2D_SLOW") else 20_000
"""Rows before the bad one: more than a chunk."""

TEXTS = (
    "plain",
    "two\nlines\r\nand a carriage return\r",
    "line\u2028and paragraph\u2029separators, next line\x85, form feed\x0c",
    "😀 👩‍👩‍👧 e\u0301 \u202eright to left\u202c \ufeff not at the start",
    "nul \x00, escape \x1b, \x7f",
    '"quotes", back\\slash, \\u0041, comma,tab\t',
    "  spaces kept  ",
    "x" * 200_000,
)


@pytest.fixture
def mine(p2d, tiny_folder, tmp_path):
    def run(pool, *options):
        out = tmp_path / "subset"
        return p2d("mine-data", "--model", tiny_folder, "--pool", pool, "--out", out, "--method", "full", *options), out

    return run


def rows_with(texts):
    return [{"id": f"row {n}", "prompt": f"p{n} {text}", "completion": f"{text}."} for n, text in enumerate(texts)]


def chosen(out):
    return pq.read_table(out / "subset.parquet").to_pylist()


@pytest.mark.parametrize("name", ["bom.jsonl", "crlf.jsonl", "array.json", "table.csv", "table.parquet"])
def test_texts_come_through_byte_for_byte(mine, tmp_path, name):
    rows = rows_with(TEXTS)
    path = tmp_path / name
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    if name == "array.json":
        path.write_text("[" + ",\n".join(lines) + "]", encoding="utf-8")
    elif name == "table.csv":
        cells = [",".join('"' + value.replace('"', '""') + '"' for value in row.values()) for row in rows]
        path.write_bytes("\r\n".join(["id,prompt,completion", *cells]).encode("utf-8-sig"))
    elif name == "table.parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        bom, ending = ("\ufeff", "\n") if name == "bom.jsonl" else ("", "\r\n")
        path.write_bytes((bom + ending.join([*lines, ""])).encode("utf-8"))
    done, out = mine(path)
    assert done.code == 0, done.said
    found = [{column: row[column] for column in ("id", "prompt", "completion")} for row in chosen(out)]
    assert found == rows
    # And once more, as the data of the next command would be read.
    again = tmp_path / "again"
    again.mkdir()
    done, out = mine(out, "--force", "--out", again / "subset")
    assert done.code == 0, done.said
    assert [row["completion"] for row in chosen(again / "subset")] == [row["completion"] for row in rows]


def test_other_columns_keep_their_values(mine, tmp_path):
    extra = [
        {"nested": [[1, [2]], []], "meta": {"a": {"b": None}}, "mixed": 1, "big": 2**70, "half": "\ud83d", "n": 1},
        {"nested": None, "meta": {"a": None}, "mixed": "one", "big": 1, "half": "whole", "n": 2.5},
        {"nested": [[3]], "mixed": [None, {"x": "é"}], "empty": {}, "score": "own"},
    ]
    rows = [row | more for row, more in zip(rows_with("abc"), extra, strict=True)]
    path = tmp_path / "pool.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done, out = mine(path)
    assert done.code == 0, done.said
    found = chosen(out)
    assert [row["meta"] for row in found] == [{"a": {"b": None}}, {"a": None}, None]
    assert [row["n"] for row in found] == [1.0, 2.5, None]
    assert [row["source_score"] for row in found] == [None, None, "own"]
    for column in ("nested", "mixed", "big", "half", "empty"):
        texts = [json.loads(row[column]) for row in found]
        assert texts == [row.get(column) for row in rows], column


BAD = {
    "null": (b"null", "expected a JSON object, found null"),
    "null-prompt": (b'{"prompt": null, "completion": "b"}', "'prompt' must be a text; found null"),
    "number": (b'{"prompt": 7, "completion": "b"}', "'prompt' must be a text; found int 7"),
    "object": (b'{"prompt": "a", "completion": {"b": 7}}', "'completion' must be a text; found dict"),
    "list": (b'{"prompt": ["a"], "completion": "b"}', "'prompt' must be a text; found list"),
    "cut": (b'{"prompt": "a", "compl', "not valid JSON"),
    "bytes": (b'{"prompt": "a\xff", "completion": "b"}', "not valid UTF-8: byte 0xff at byte 14"),
    "surrogate": (b'{"prompt": "a \\ud83d", "completion": "b"}', "half of a surrogate pair"),
    "column": (b'{"prompt": "a", "completion": "b", "\\ud83d": 1}', "column name '\\ud83d' holds half of a surrogate"),
    "deep": (b'{"prompt": "a", "completion": "b", "x": ' + b"[" * 100_000 + b"}", "JSON that Python cannot hold"),
    "bom-inside": (b'\xef\xbb\xbf{"prompt": "a", "completion": "b"}', "not valid JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named(mine, tmp_path, name):
    line, words = BAD[name]
    path = tmp_path / "pool.jsonl"
    path.write_bytes(b'{"prompt": "a", "completion": "b"}\r\n\r\n' + line + b"\n")
    done, out = mine(path)
    assert done.code == 65, done.said
    assert "pool.jsonl:3: " in done.said
    assert words in done.said
    assert not out.exists()


def test_bad_rows_are_counted_on_record(p2d, mine, tmp_path):
    """In the notes, in the summary and in what the manifest keeps; the others lose nothing."""
    path = tmp_path / "pool.jsonl"
    good = [json.dumps(row).encode() for row in rows_with("abc")]
    path.write_bytes(b"\n".join([good[0], *(line for line, _ in BAD.values()), good[1], b"", good[2]]))
    done, out = mine(path, "--skip-bad-rows")
    assert done.code == 0, done.said
    assert f"{len(BAD)} bad rows left out, first: pool.jsonl:2: expected a JSON object, found null" in done.err
    assert f"{len(BAD)} bad rows of --pool were left out, the first: pool.jsonl:2: " in done.out
    record = json.loads((out / "manifest.json").read_text())["summary"]
    assert record["rows_total"] == 3
    assert record["bad_rows"]["pool"]["count"] == len(BAD)
    assert [problem.split(": ")[0] for problem in record["bad_rows"]["pool"]["first"]] == [
        f"pool.jsonl:{line}" for line in range(2, 7)
    ]
    assert f"{len(BAD)} bad rows of --pool" in p2d("inspect", out).out
    assert [row["id"] for row in chosen(out)] == ["row 0", "row 1", "row 2"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b""),
        ("a.jsonl", b"\xef\xbb\xbf\r\n"),
        ("a.json", b"[]"),
        ("a.json", b" "),
        ("a.csv", b"prompt,completion\n"),
    ],
)
def test_an_empty_file(mine, tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    done, out = mine(path)
    assert done.code == 65
    assert f"{path} holds no rows" in done.said
    assert not out.exists()


def test_bad_rows_alone(mine, tmp_path):
    path = tmp_path / "pool.jsonl"
    path.write_text("null\n" * 3)
    done, _ = mine(path, "--skip-bad-rows")
    assert done.code == 65
    assert "3 bad rows, the first: pool.jsonl:1" in done.said


def test_a_bad_row_far_down_a_large_file(mine, tmp_path):
    path = tmp_path / "pool.jsonl"
    with path.open("w", encoding="utf-8") as stream:
        for number in range(MANY):
            stream.write(f'{{"id": "{number}", "prompt": "what is {number}?", "completion": "it is"}}\n')
        stream.write('{"prompt": "and this", "completion": null}\n')
        stream.write('{"id": "last", "prompt": "what is left?", "completion": "it is"}\n')
    random = ("--method", "random", "--count", 50)
    done, out = mine(path, *random)
    assert done.code == 65
    assert f"pool.jsonl:{MANY + 1}: column 'completion' must be a text; found null" in done.said
    assert not out.exists()
    done, out = mine(path, *random, "--skip-bad-rows")
    assert done.code == 0, done.said
    summary = json.loads((out / "manifest.json").read_text())["summary"]
    assert (summary["rows_total"], summary["bad_rows"]["pool"]["count"]) == (MANY + 1, 1)
    scores = pq.read_table(out / "pool_scores.parquet").to_pydict()
    assert scores["id"] == [*map(str, range(MANY)), "last"]
    best = sorted(range(MANY + 1), key=lambda place: -scores["score"][place])[:50]
    assert [row["id"] for row in chosen(out)] == [scores["id"][place] for place in best]


def test_many_chunks_interrupted_at_every_other_batch(mine, few, pipeline, tmp_path, monkeypatch):
    """Each chunk has a journal of its own; the artifact is that of a run that was not interrupted."""
    from p2d_cli.artifacts.journal import Journal

    monkeypatch.setattr("p2d_cli.data.pool.CHUNK_ROWS", 13)
    options = ("--method", "p2d", "--heads", pipeline / "heads", "--target", few["target"], "--background", 10)
    done, out = mine(few["pool"], *options, "--out", tmp_path / "undisturbed")
    assert done.code == 0, done.said
    add, calls = Journal.add, []

    def add_and_stop(self, *arguments, **costs):
        add(self, *arguments, **costs)
        calls.append(self)
        if len(calls) % 2 == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "add", add_and_stop)
    codes = []
    while codes[-1:] != [0]:
        codes.append(mine(few["pool"], *options)[0].code)
        assert codes[-1] in {0, 130}
        assert len(codes) < 20
    assert len(codes) > 2
    for name in ("subset.parquet", "pool_scores.parquet"):
        found, expected = (pq.read_table(folder / name).to_pydict() for folder in (out, tmp_path / "undisturbed"))
        assert repr(found) == repr(expected)  # nan is not equal to nan
