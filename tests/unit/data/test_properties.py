"""Rows from any format to tokens: nothing is lost on the way, whatever the texts are."""

import csv
import io
import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from p2d_cli.data.chat_templates import resolve_template
from p2d_cli.data.episodes import encode_episode
from p2d_cli.data.records import Message, Record, read_records
from p2d_cli.data.sources import locate

PROPERTY = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
# Any text, and more often than by chance what formats and templates stumble over.
AWKWARD = [
    "\u2028",
    "\x85",
    "\r",
    "\r\n",
    "\n",
    "\ufeff",
    "\0",
    '"',
    ",",
    "\\",
    "😀",
    "e\u0301",
    " ",
    "{{",
    "<s>",
    "[INST]",
]
TEXT = st.lists(
    st.sampled_from(AWKWARD) | st.text(st.characters(exclude_categories=["Cs"]), max_size=8), min_size=1, max_size=4
).map("".join)
SAID = TEXT.filter(str.strip)


def turns(contents):
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(contents)]


CONVERSATION = st.lists(SAID, min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0)
ROW = st.fixed_dictionaries(
    {
        "messages": CONVERSATION.map(turns),
        "system": st.none() | SAID,
        "choices": st.none() | st.lists(TEXT, min_size=1, max_size=3),
    }
)


def write_csv(path, rows):
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\r\n" if path.stem == "crlf" else "\n")
    writer.writerow(rows[0])
    for row in rows:
        values = [row[column] for column in rows[0]]
        cells = [json.dumps(value) if isinstance(value, list) else value for value in values]
        writer.writerow(["" if cell is None else cell for cell in cells])
    path.write_bytes(b"\xef\xbb\xbf" + text.getvalue().encode())


def write_arrow(path, rows):
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(path, table.schema) as stream:
        stream.write_table(table, max_chunksize=2)


WRITERS = {
    "a.jsonl": lambda path, rows: path.write_bytes(
        b"\r\n".join(json.dumps(row, ensure_ascii=False).encode() for row in rows)
    ),
    "a.json": lambda path, rows: path.write_bytes(json.dumps(rows, indent=1, ensure_ascii=False).encode()),
    "a.csv": write_csv,
    "crlf.csv": write_csv,
    "a.parquet": lambda path, rows: pq.write_table(pa.Table.from_pylist(rows), path),
    "a.arrow": write_arrow,
}


@pytest.mark.parametrize("name", WRITERS)
@PROPERTY
@given(rows=st.lists(ROW, min_size=1, max_size=4))
def test_every_format_gives_the_same_records(tmp_path, name, rows):
    # A cell at the start of a line cannot begin so: it is taken for the seam of two files that were joined.
    assume(not name.endswith(("csv", "tsv")) or not any((row["system"] or "").startswith("\ufeff") for row in rows))
    WRITERS[name](tmp_path / name, rows)
    found = read_records(locate(str(tmp_path / name))).records
    assert len(found) == len(rows)
    for record, row in zip(found, rows, strict=True):
        said = [Message(turn["role"], turn["content"]) for turn in row["messages"]]
        head = [] if row["system"] is None else [Message("system", row["system"])]
        assert record.messages == (*head, *said[:-1])
        assert record.completion == said[-1].content
        assert record.choices == (None if row["choices"] is None else tuple(row["choices"]))


@PROPERTY
@given(
    lines=st.lists(SAID.map(lambda text: json.dumps({"prompt": text, "completion": text})) | TEXT, min_size=1).filter(
        lambda lines: any('"completion"' in line for line in lines)
    )
)
def test_bad_lines_among_good_ones_are_counted_and_cost_no_other(tmp_path, lines):
    lines = [line.replace("\n", " ") for line in lines]
    path = tmp_path / "a.jsonl"
    path.write_bytes("\n".join(lines).encode())
    found = read_records(locate(str(path)), skip_bad_rows=True)
    good = [number for number, line in enumerate(lines, start=1) if line.startswith('{"prompt"')]
    blank = sum(not line.removeprefix("\ufeff" if number == 0 else "").strip() for number, line in enumerate(lines))
    assert [record.where for record in found.records] == [f"a.jsonl:{number}" for number in good]
    assert len(found.skipped) == len(lines) - len(good) - blank
    assert all(problem.startswith("a.jsonl:") for problem in found.skipped)


def record_of(contents, system=None):
    messages = [Message(turn["role"], turn["content"]) for turn in turns(contents)]
    head = [] if system is None else [Message("system", system)]
    return Record("r", (*head, *messages[:-1]), messages[-1].content, None, {}, "r:1")


@pytest.mark.parametrize("added", ["none", "bos"])
@pytest.mark.parametrize("name", ["chatml", "llama-2", "trimming", None])
@PROPERTY
@given(contents=CONVERSATION, system=st.none() | SAID, max_length=st.integers(2, 80))
def test_the_prompt_of_training_is_the_prompt_of_inference_however_short(
    tokenizer_of, name, added, contents, system, max_length
):
    tokenizer = tokenizer_of(name, added)
    template, record = resolve_template(tokenizer), record_of(contents, system)
    encoded = template.encode_example(tokenizer, record, max_length, loss_on="all")
    answer = len(encoded.input_ids) - encoded.prompt_length
    shown = template.encode_prompt(tokenizer, record, max_length - answer)
    assert list(encoded.input_ids[: encoded.prompt_length]) == shown
    assert answer >= 1


@pytest.mark.parametrize("name", ["chatml", "llama-2", "trimming", None])
@PROPERTY
@given(contents=CONVERSATION, system=st.none() | SAID)
def test_spans_are_the_answers(tokenizer_of, name, contents, system):
    tokenizer = tokenizer_of(name)
    template, record = resolve_template(tokenizer), record_of(contents, system)
    text = template.render_prompt(tokenizer, record)
    spans = template.earlier_turns(tokenizer, record)
    ending = {"llama-2": " </s>", None: "</s>"}.get(name, "<|im_end|>")
    found = [text[start:stop] for start, stop in spans]
    assert all(answer.endswith(ending) for answer in found)
    assert [answer.removesuffix(ending).strip() for answer in found] == [said.strip() for said in contents[1:-1:2]]


@pytest.mark.parametrize("name", ["chatml", None])
@PROPERTY
@given(demo=CONVERSATION, query=CONVERSATION)
def test_conversations_are_demos_and_queries_too(tokenizer_of, name, demo, query):
    tokenizer = tokenizer_of(name)
    template = resolve_template(tokenizer)
    records = record_of(demo), replace(record_of(query), id="q")
    episode = encode_episode(template, tokenizer, records[:1], records[1:], max_length=10_000)
    assert 0 in episode.segment_ids
    assert any(episode.answer_mask)
    assert all(asked for asked, answered in zip(episode.query_mask, episode.answer_mask, strict=True) if answered)
