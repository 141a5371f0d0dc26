import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from p2d_cli.data.records import ColumnMap, Message, read_records
from p2d_cli.data.sources import locate
from p2d_cli.errors import DataError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(str.strip)
GOOD = {"prompt": "p", "completion": "c"}


@pytest.fixture
def read(tmp_path):
    def read_these(*rows, **options):
        path = tmp_path / "a.jsonl"
        path.write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
        return read_records(locate(str(path)), **options)

    return read_these


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def said(speaker, text):
    return {"from": speaker, "value": text}


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=TEXT, extra=st.none() | st.just(" ") | TEXT, completion=TEXT, shape=st.integers(0, 4))
def test_every_shape_says_the_same(read, prompt, extra, completion, shape):
    row = [
        {"prompt": prompt, "completion": completion},
        {"messages": [user(prompt), assistant(completion)]},
        {"instruction": prompt, "input": extra, "output": completion},
        {"question": prompt, "answer": completion},
        {"conversations": [said("human", prompt), said("gpt", completion)]},
    ][shape]
    [record] = read(row | {"other": 1}).records
    expected = f"{prompt}\n{extra}" if shape == 2 and extra and extra.strip() else prompt
    assert record.messages == (Message("user", expected),)
    assert (record.prompt, record.completion) == (expected, completion)
    assert record.text == f"{expected}\n{completion}"
    assert record.fields == row | {"other": 1}
    assert (record.id, record.where, record.choices) == ("a.jsonl:1", "a.jsonl:1", None)


def test_alpaca_without_the_input_column(read):
    assert read({"instruction": "a", "output": "b"}).records[0].prompt == "a"


def test_columns_beside_the_shape_may_appear_later(read):
    found = read({"instruction": "a", "output": "b"}, {"instruction": "a", "input": "x", "output": "b", "id": "i"})
    assert [(record.id, record.prompt) for record in found.records] == [("a.jsonl:1", "a"), ("i", "a\nx")]


def test_earlier_answers_are_context(read):
    turns = [{"role": "system", "content": "s"}, user("a"), assistant("b"), user("c"), assistant("d")]
    [record] = read({"messages": turns}).records
    assert [message.role for message in record.messages] == ["system", "user", "assistant", "user"]
    assert (record.system, record.prompt, record.completion) == ("s", "a\nb\nc", "d")


def test_conversations_of_sharegpt(read):
    turns = [said("system", "s"), said("human", "a"), said("gpt", "b"), said("user", "c"), said("assistant", "d")]
    [record] = read({"conversations": turns}).records
    assert [message.role for message in record.messages] == ["system", "user", "assistant", "user"]
    assert (record.system, record.prompt, record.completion) == ("s", "a\nb\nc", "d")
    assert read({"conversations": [user("a"), assistant("b")]}).records[0].completion == "b"
    with pytest.raises(DataError, match="the columns fit messages and conversations"):
        read({"conversations": turns, "messages": [user("a"), assistant("b")]})


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "must be a list of messages"),
        ("text", "must be a list of messages"),
        ([user("a")], "the last message is from user; expected the assistant's answer"),
        ([assistant("a")], "no user's message before"),
        ([user(" "), assistant("a")], "no user's message before"),
        ([user("a"), assistant("b"), assistant("c")], "another turn of the assistant stands right before"),
        ([user("a"), assistant("")], "the completion is empty"),
        ([user(None), assistant("b")], r"messages\[0\]\.content must be a text; found null"),
        ([{"from": "human"}, assistant("b")], r"messages\[0\] must have role and content"),
        ([user("a"), "b"], r"messages\[1\] must have role and content, or from and value"),
        ([said("human", 1), said("gpt", "b")], r"messages\[0\]\.value must be a text; found int"),
    ],
)
def test_conversations_that_cannot_be_used(read, turns, message):
    with pytest.raises(DataError, match=rf"a\.jsonl:1: .*{message}"):
        read({"messages": turns})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "expected the columns of prompt/completion, .*found text"),
        ({"prompt": "x"}, "expected the columns of .*found prompt"),
        ({}, "found no columns"),
        (GOOD | {"question": "q", "answer": "a"}, "fit prompt/completion and question/answer; found prompt, comp"),
    ],
)
def test_columns_that_fit_no_shape_or_several(read, row, message):
    with pytest.raises(DataError, match=message) as caught:
        read(row)
    assert "--prompt-column" in caught.value.hint
    assert "--completion-column" in caught.value.hint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": None}, "column 'prompt' must be a text; found null"),
        ({"prompt": 3}, "column 'prompt' must be a text; found int 3"),
        ({"prompt": " \n"}, "column 'prompt' is empty"),
        ({"completion": ["a"]}, r"column 'completion' must be a text; found list \['a'\]"),
        ({"completion": ""}, "the completion is empty"),
        ({"completion": "\ud800"}, "half of a surrogate pair"),
        ({"system": 3}, "column 'system' must be a text"),
    ],
)
def test_bad_rows_are_named_or_left_out(read, change, message):
    rows = [GOOD, GOOD | change, GOOD]
    with pytest.raises(DataError, match=rf"a\.jsonl:2: .*{message}"):
        read(*rows)
    found = read(*rows, skip_bad_rows=True)
    assert [record.where for record in found.records] == ["a.jsonl:1", "a.jsonl:3"]
    assert len(found.skipped) == 1
    assert found.skipped[0].startswith("a.jsonl:2: ")


def test_a_later_row_must_have_the_columns_of_the_first(read):
    with pytest.raises(DataError, match=r"a\.jsonl:2: no column 'completion'; found prompt, answer"):
        read(GOOD, {"prompt": "a", "answer": "b"})


def test_unreadable_lines_can_be_left_out_too(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{oops\n" + json.dumps(GOOD).encode())
    found = read_records(locate(str(path)), skip_bad_rows=True)
    assert [record.where for record in found.records] == ["a.jsonl:2"]
    assert "not valid JSON" in found.skipped[0]


def test_bad_rows_alone_are_an_error(read):
    with pytest.raises(DataError, match=r"no usable rows in .*; 2 bad rows, the first: a\.jsonl:1"):
        read({"a": 1}, {"b": 1}, skip_bad_rows=True)


def test_ambiguity_cannot_be_skipped(read):
    with pytest.raises(DataError, match="the columns fit"):
        read(GOOD | {"messages": []}, GOOD, skip_bad_rows=True)


def test_limit(read):
    assert [record.where for record in read(GOOD, GOOD, {"bad": 1}, limit=2).records] == ["a.jsonl:1", "a.jsonl:2"]


def test_prompts_alone_where_no_answer_is_needed(read):
    for row in ({"prompt": "a"}, {"messages": [user("a")]}, {"prompt": "a", "completion": None}, {"instruction": "a"}):
        [record] = read(row, need_completion=False).records
        assert (record.prompt, record.completion) == ("a", "")
    assert (
        read({"prompt": "a", "messages": [user("b"), assistant("c")]}, need_completion=False).records[0].prompt == "b"
    )


def test_lists_may_be_json_in_a_cell(tmp_path):
    path = tmp_path / "a.csv"
    turns = json.dumps([user("a"), assistant('say "b"')]).replace('"', '""')
    path.write_text(f'messages,choices\n"{turns}","[""a"", ""b""]"\n')
    [record] = read_records(locate(str(path))).records
    assert (record.prompt, record.completion, record.choices) == ("a", 'say "b"', ("a", "b"))
    path.write_text('messages\n"[{]"\n')
    with pytest.raises(DataError, match=r"a\.csv:2: column 'messages' must be a list of messages"):
        read_records(locate(str(path)))


def test_ids(read):
    found = read(GOOD | {"id": "x"}, GOOD | {"id": 7}, GOOD | {"id": None}, GOOD | {"id": ""})
    assert [record.id for record in found.records] == ["x", "7", "a.jsonl:3", "a.jsonl:4"]
    assert found.notes == ()


def test_ids_that_repeat_are_not_used(read):
    found = read(GOOD | {"id": "x"}, GOOD | {"id": "y"}, GOOD | {"id": "x"})
    assert [record.id for record in found.records] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3"]
    assert "'x' stands 2 times" in found.notes[0]
    assert found.records[1].fields["id"] == "y"


def test_named_columns(read):
    row = {"q": "a", "a": "b", "key": "k", "sys": "s", "options": ["b", "c"], "prompt": "no", "completion": "no"}
    columns = ColumnMap(prompt="q", completion="a", id="key", system="sys", choices="options")
    [record] = read(row, columns=columns).records
    assert (record.id, record.prompt, record.completion) == ("k", "a", "b")
    assert (record.system, record.choices) == ("s", ("b", "c"))
    turns = {"chat": [user("a"), assistant("b")]}
    assert read(turns, columns=ColumnMap(messages="chat")).records[0].completion == "b"


def test_one_named_column_and_one_found(read):
    row = {"text": "a", "answer": "b", "label": "c"}
    assert read(row, columns=ColumnMap(prompt="text")).records[0].completion == "b"
    assert read(row | {"question": "q"}, columns=ColumnMap(completion="label")).records[0].prompt == "q"
    with pytest.raises(DataError, match="expected one column for the completion; found text, answer, output") as caught:
        read({"text": "a", "answer": "b", "output": "c"}, columns=ColumnMap(prompt="text"))
    assert "--completion-column" in caught.value.hint


def test_a_named_column_must_be_there(read):
    with pytest.raises(DataError, match="no column 'nope'; found prompt, completion"):
        read(GOOD, columns=ColumnMap(prompt="nope"))


def test_system_and_choices_beside_any_shape(read):
    found = read(
        GOOD | {"system": "s", "choices": ["a", "b"]},
        GOOD | {"system": None, "choices": None},
        GOOD | {"system": "", "choices": {"text": []}},
    ).records
    assert [record.system for record in found] == ["s", None, None]
    assert [record.choices for record in found] == [("a", "b"), None, None]
    assert found[0].prompt == "p"
    with pytest.raises(DataError, match="column 'choices' must be a list of texts"):
        read(GOOD | {"choices": "a"}, columns=ColumnMap(choices="choices"))


def test_a_system_prompt_for_the_rows_that_bring_none(read):
    turns = [{"role": "system", "content": "own"}, user("a"), assistant("b")]
    found = read({"messages": turns}, {"messages": turns[1:]}, {"messages": turns[1:], "system": "column"}, system="s")
    assert [record.system for record in found.records] == ["own", "s", "column"]
    assert read(GOOD, system="").records[0].system is None
    assert read(GOOD, system="s").records[0].prompt == "p"


def test_a_conversations_own_system_message_stays(read):
    turns = [{"role": "system", "content": "own"}, user("a"), assistant("b")]
    assert read({"messages": turns, "system": "column"}).records[0].system == "own"
