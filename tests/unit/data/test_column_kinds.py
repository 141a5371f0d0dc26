"""Rows say the same in JSON Lines, in what `datasets` writes of them, and in a subset artifact."""

import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from p2d_cli.artifacts.subset import PoolScores, save_subset
from p2d_cli.data.raw_rows import RowSource
from p2d_cli.data.records import read_records
from p2d_cli.data.sources import locate
from p2d_cli.errors import DataError


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text} | more


def call(name, arguments):
    return {"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}}


def schema(name, **properties):
    parameters = {"type": "object", "properties": properties, "required": sorted(properties)}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


CALLS = [
    {
        "messages": [user("w"), assistant(None, tool_calls=[call("weather", {"city": "Oslo"})])],
        "tools": [schema("weather", city={"type": "string", "enum": ["Oslo", "Rome"]})],
    },
    {
        "messages": [
            *(user("t"), assistant("", tool_calls=[call("time", {"zone": 2})])),
            *({"role": "tool", "tool_call_id": "c1", "content": "noon"}, assistant("noon", reasoning_content="so")),
        ],
        "tools": [schema("time", zone={"type": "integer"})],
    },
    {"messages": [user("a"), assistant("no", weight=0), user("b"), assistant("c", weight=1)], "tools": []},
    {"messages": [user("n"), assistant(None, tool_calls=[call("now", {})])], "tools": None},
]
MIXED = [
    *CALLS,
    {"messages": [user([{"type": "text", "text": "a"}]), assistant("b")], "tools": []},
    {"messages": [user("z"), assistant(None, tool_calls=[call("time", {"zone": 2.5})])], "tools": []},
    {"messages": [user("z"), assistant(None, tool_calls=[call("time", {"zone": "UTC"})])], "tools": []},
]
NULLS = [
    {
        "messages": [user("z"), assistant("", tool_calls=[call("f", {"x": None, "y": [{"z": None}]})])],
        "tools": [schema("f", x={"type": ["integer", "null"], "default": None}) | {"strict": None}],
    },
    {
        "messages": [user("z"), assistant("", tool_calls=[call("f", {"x": 1})])],
        "tools": [schema("f", x={"type": ["integer"]})],
    },
]
ANSWERS = [{"question": f"q{number}", "answer": answer} for number, answer in enumerate([7, 7.5, "seven", True, "7"])]
NUMBERS = [{"question": f"q{number}", "answer": answer} for number, answer in enumerate([7, 7.5, 2**53, None])]


def read(path):
    found = read_records(locate(str(path)), skip_bad_rows=True).records
    return [(record.messages, record.answer, record.tools, record.choices) for record in found]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_subset(folder, source):
    records = read_records(locate(str(source)), skip_bad_rows=True).records
    count = len(records)
    scores = PoolScores(np.zeros(count), np.arange(count), np.ones(count, dtype=np.int64))
    save_subset(folder, ((record.id, record.fields) for record in records), scores, count)
    return folder / "subset.parquet"


@pytest.fixture(autouse=True)
def no_bars():
    datasets.disable_progress_bars()


@pytest.mark.parametrize(
    "rows", [CALLS, MIXED, NULLS, ANSWERS, NUMBERS], ids=["calls", "mixed", "nulls", "answers", "numbers"]
)
def test_rows_of_a_subset_are_read_as_they_came(tmp_path, rows):
    lines = write_lines(tmp_path / "a.jsonl", rows)
    assert read(write_subset(tmp_path, lines)) == read(lines)


def test_nulls_that_arrow_filled_in_do_not_become_json(tmp_path):
    """Of a column that has to be JSON in a subset, since a call has no arguments at all."""
    struct = pa.struct([("name", pa.string()), ("arguments", pa.struct([])), ("unit", pa.string())])
    tools = pa.array([[{"name": "f", "arguments": {}, "unit": None}]], pa.list_(struct))
    table = pa.table({"prompt": ["a"], "completion": ["b"], "tools": tools})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    subset = write_subset(tmp_path, tmp_path / "a.arrow")
    assert read(subset) == read(tmp_path / "a.arrow")
    assert read(subset)[0][2][0]["function"] == {"name": "f", "arguments": {}}


def test_only_tools_with_nulls_of_their_own_become_json(tmp_path):
    turns = [user("a") | {"name": None}, assistant("b", tool_calls=None)]
    path = write_subset(tmp_path, write_lines(tmp_path / "a.jsonl", [{"messages": turns, "tools": None}]))
    assert pa.types.is_list(pq.read_schema(path).field("messages").type)


def test_arguments_of_a_subset_keep_their_numbers(tmp_path):
    rows = [{"messages": [user("z"), assistant("", tool_calls=[call("f", {"n": number})])]} for number in (2, 2.5)]
    lines = write_lines(tmp_path / "a.jsonl", rows)
    found = read(write_subset(tmp_path, lines))
    assert [answer.text for _, answer, _, _ in found] == [
        '{"name": "f", "arguments": {"n": 2}}',
        '{"name": "f", "arguments": {"n": 2.5}}',
    ]


@pytest.mark.parametrize("rows", [CALLS, NUMBERS], ids=["calls", "numbers"])
def test_what_datasets_writes_says_the_same(tmp_path, rows):
    """Its structs have all fields of all rows, null where a row has none."""
    lines = write_lines(tmp_path / "a.jsonl", rows)
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(str(tmp_path / "b.parquet"))
    table.save_to_disk(str(tmp_path / "disk"))
    assert read(tmp_path / "b.parquet") == read(lines)
    assert read(tmp_path / "disk") == read(lines)


@pytest.mark.skipif(not hasattr(datasets, "Json"), reason="this version of datasets has no JSON columns")
@pytest.mark.parametrize("rows", [MIXED, ANSWERS], ids=["mixed", "answers"])
def test_json_columns_of_datasets_are_decoded(tmp_path, rows):
    lines = write_lines(tmp_path / "a.jsonl", rows)
    table = datasets.Dataset.from_list(rows, on_mixed_types="use_json")
    table.to_parquet(str(tmp_path / "b.parquet"))
    table.save_to_disk(str(tmp_path / "disk"))
    assert read(tmp_path / "b.parquet") == read(lines)
    assert read(tmp_path / "disk") == read(lines)


def write_labels(path, values, names=("bad", "good")):
    """Write rows of text and label as `datasets` does; by hand, so that any value may stand there."""
    features = {"text": {"dtype": "string", "_type": "Value"}, "label": {"names": list(names), "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table({"text": [f"t{value}" for value in values], "label": pa.array(values, pa.int64())})
    pq.write_table(table.replace_schema_metadata(metadata), path)
    return path


def answers(path):
    return [record.completion for record in read_records(locate(str(path))).records]


def test_labels_are_learnt_by_their_names(tmp_path):
    table = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]})
    table = table.cast_column("label", datasets.ClassLabel(names=["bad", "good"]))
    table.to_parquet(str(tmp_path / "a.parquet"))
    table.save_to_disk(str(tmp_path / "disk"))
    assert answers(tmp_path / "a.parquet") == answers(tmp_path / "disk") == ["good", "bad"]
    assert answers(write_labels(tmp_path / "b.parquet", [0, 1, 1])) == ["bad", "good", "good"]


def test_labels_of_the_hub(tmp_path, monkeypatch):
    table = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]})
    table = table.cast_column("label", datasets.ClassLabel(names=["bad", "good"]))
    monkeypatch.setattr("p2d_cli.data.sources._load_hub", lambda source: (table, "train"))
    monkeypatch.setattr("p2d_cli.data.sources._probe_hub", lambda source: None)
    monkeypatch.setattr("p2d_cli.data.sources._cached_files", lambda source: None)
    source = RowSource(spec="o/n", kind="hub", format="hub", repo="o/n")
    assert [record.completion for record in read_records(source).records] == ["good", "bad"]


def test_names_of_labels_survive_a_subset(tmp_path):
    source = write_labels(tmp_path / "a.parquet", [1, 0])
    assert read(write_subset(tmp_path, source)) == read(source)


def test_a_row_without_label_is_a_bad_row(tmp_path):
    with pytest.raises(
        DataError, match=r"a\.parquet#1: column 'label' holds -1, which is none of the labels bad, good"
    ):
        answers(write_labels(tmp_path / "a.parquet", [1, -1]))


def test_labels_that_count_choices(tmp_path):
    """As in MMLU, whose answers are labels A to D and whose choices are texts."""
    table = datasets.Dataset.from_dict({"question": ["q"], "choices": [["w", "x", "y", "z"]], "answer": [2]})
    table = table.cast_column("answer", datasets.ClassLabel(names=["A", "B", "C", "D"]))
    table.to_parquet(str(tmp_path / "a.parquet"))
    assert answers(tmp_path / "a.parquet") == ["y"]
    assert answers(write_subset(tmp_path, tmp_path / "a.parquet")) == ["y"]


@pytest.mark.parametrize(
    "metadata",
    [b"", b"[]", b"{", b'{"info": null}', b'{"info": {"features": []}}', b'{"info": {"features": {"label": 3}}}'],
)
def test_metadata_that_say_nothing(tmp_path, metadata):
    table = pa.table({"text": ["a"], "label": [1]}).replace_schema_metadata({"huggingface": metadata})
    pq.write_table(table, tmp_path / "a.parquet")
    assert answers(tmp_path / "a.parquet") == ["1"]
