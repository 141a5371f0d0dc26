"""Turns in the forms of OpenAI and ShareGPT: what is read, what is learnt, and what is refused or counted."""

import contextlib
import copy
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from p2d_cli.data.records import Message, read_records
from p2d_cli.data.sources import locate
from p2d_cli.errors import DataError


@pytest.fixture
def read(tmp_path):
    def read_these(*rows, **options):
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return read_records(locate(str(path)), **options)

    return read_these


def user(text, **more):
    return {"role": "user", "content": text} | more


def assistant(text, **more):
    return {"role": "assistant", "content": text} | more


def said(speaker, text, **more):
    return {"from": speaker, "value": text} | more


def call(arguments, name="weather", **more):
    return {"type": "function", "function": {"name": name, "arguments": arguments}} | more


SCHEMA = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
OSLO = call({"city": "Oslo"})


# --- tools


@pytest.mark.parametrize("missing", [{"content": None}, {"content": ""}, {}])
def test_a_tool_call_is_an_answer(read, missing):
    asked = call('{"city": "Oslo"}', id="c1")
    [record] = read({"messages": [user("w"), {"role": "assistant", "tool_calls": [asked]} | missing]}).records
    assert record.completion == ""
    assert record.answer_parts == {"tool_calls": [{"id": "c1"} | OSLO]}
    assert record.answer.parts == record.answer_parts


def test_a_result_of_a_tool_may_stand_before_the_answer(read):
    turns = [
        user("w"),
        assistant("let me look", tool_calls=[OSLO]),
        {"role": "tool", "content": "3 C", "tool_call_id": "c1", "name": "weather"},
        assistant("It is 3 degrees."),
    ]
    [record] = read({"messages": turns, "tools": [SCHEMA]}).records
    assert record.messages == (
        Message("user", "w"),
        Message("assistant", "let me look", {"tool_calls": [OSLO]}),
        Message("tool", "3 C", {"name": "weather", "tool_call_id": "c1"}),
    )
    assert (record.completion, record.tools) == ("It is 3 degrees.", (SCHEMA,))


SHAREGPT = {
    "conversations": [
        said("human", "w"),
        said("function_call", '{"name": "weather", "arguments": {"city": "Oslo"}}'),
        said("observation", '{"celsius": 3}'),
        said("gpt", "3"),
    ],
    "tools": json.dumps([SCHEMA["function"]]),
}
OPENAI = {
    "messages": [
        user("w"),
        assistant(None, tool_calls=[call('{"city": "Oslo"}')]),
        {"role": "tool", "content": '{"celsius": 3}'},
        assistant("3"),
    ],
    "tools": [SCHEMA],
}
LEGACY = {
    "messages": [
        user("w"),
        assistant(None, function_call={"name": "weather", "arguments": '{"city": "Oslo"}'}),
        {"role": "function", "content": {"celsius": 3}},
        assistant("3"),
    ],
    "functions": [SCHEMA["function"]],
}


@pytest.mark.parametrize("row", [SHAREGPT, OPENAI, LEGACY, OPENAI | {"tools": json.dumps([SCHEMA])}])
def test_all_forms_of_calls_say_the_same(read, row):
    [record] = read(row).records
    assert record.messages == (
        Message("user", "w"),
        Message("assistant", "", {"tool_calls": [OSLO]}),
        Message("tool", '{"celsius": 3}'),
    )
    assert (record.completion, record.tools, record.unread) == ("3", (SCHEMA,), ())


def test_sharegpt_may_end_in_several_calls(read):
    calls = [{"name": "weather", "arguments": {"city": "Oslo"}}, {"name": "time", "arguments": {}}]
    [record] = read({"conversations": [said("human", "w"), said("function_call", json.dumps(calls))]}).records
    assert record.answer == Message("assistant", "", {"tool_calls": [OSLO, call({}, name="time")]})


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (
            {"city": None, "more": {"a": None, "b": [{"c": None}]}},
            {"city": None, "more": {"a": None, "b": [{"c": None}]}},
        ),
        ('{"city": "Oslo", "unit": null}', {"city": "Oslo", "unit": None}),
        ("", {}),
        (None, {}),
        ("{}", {}),
    ],
)
def test_arguments_become_an_object(read, given, found):
    """JSON says just what it says, nulls included."""
    [record] = read({"messages": [user("w"), assistant(None, tool_calls=[call(given)])]}).records
    assert record.answer_parts["tool_calls"][0]["function"]["arguments"] == found


NULLS = {"properties": {"a": None, "b": {"default": None}}}


@pytest.mark.parametrize("written", [list, json.dumps, lambda tools: [json.dumps(tool) for tool in tools]])
def test_schemas_keep_the_nulls_that_json_states(read, written):
    schema = {"type": "function", "function": {"name": "f", "description": None, "parameters": NULLS}}
    [record] = read({"messages": [user("w"), assistant("b")], "tools": written([schema])}).records
    assert record.tools == (schema,)


def test_nulls_go_where_parquet_fills_them_in(tmp_path):
    schema = {"type": "function", "function": {"name": "f", "description": None, "parameters": NULLS}}
    turns = [
        user("w", tool_calls=None),
        assistant("", tool_calls=[call({"city": "Oslo", "more": {"a": None, "b": 1}})]),
    ]
    pq.write_table(pa.Table.from_pylist([{"messages": turns, "tools": [schema]}]), tmp_path / "a.parquet")
    [record] = read_records(locate(str(tmp_path / "a.parquet"))).records
    assert record.tools == ({"type": "function", "function": {"name": "f", "parameters": {"properties": {"b": {}}}}},)
    arguments = record.answer_parts["tool_calls"][0]["function"]["arguments"]
    assert arguments == {"city": "Oslo", "more": {"b": 1}}


def test_results_of_tools_keep_the_nulls_that_json_states(read):
    turns = [user("w"), assistant("", tool_calls=[call({})]), {"role": "tool", "content": {"a": None}}, assistant("b")]
    assert read({"messages": turns}).records[0].messages[-1].content == '{"a": null}'


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        (assistant("", tool_calls=[call("Oslo")]), r"tool_calls\[0\]\.arguments must be a JSON object"),
        (assistant("", tool_calls=[call("[1]")]), r"tool_calls\[0\]\.arguments must be a JSON object"),
        (assistant("", tool_calls=[{"function": {"arguments": {}}}]), r"tool_calls\[0\] must be a call of a function"),
        (assistant("", tool_calls=["weather"]), r"tool_calls\[0\] must be a call of a function"),
        (assistant("", tool_calls=[OSLO, OSLO | {"type": "custom"}]), r"tool_calls\[1\] is a call of type 'custom'"),
        (said("function_call", "weather(Oslo)"), r"\[1\]\.value is not valid JSON: 'weather"),
        (said("function_call", "[]"), "holds no call"),
        ({"role": "tool_call", "tool_calls": [OSLO]}, r"content\[0\] must be a call of a function"),
    ],
)
def test_calls_in_another_form(read, turn, message):
    with pytest.raises(DataError, match=rf"a\.jsonl:1: messages\[1\].*{message}|a\.jsonl:1: .*{message}"):
        read({"messages": [user("w"), turn]})


def test_a_user_calls_no_tool(read):
    with pytest.raises(DataError, match=r"messages\[0\] carries tool_calls, and is a turn of user"):
        read({"messages": [user("w", tool_calls=[OSLO]), assistant("b")]})


@pytest.mark.parametrize("tools", ["[{", [{"parameters": {}}], [SCHEMA, "weather"]])
def test_schemas_in_another_form(read, tools):
    with pytest.raises(DataError, match=r"a\.jsonl:1: tools"):
        read({"messages": [user("w"), assistant("b")], "tools": tools})


@pytest.mark.parametrize("calls", [None, [], "", "[]", "null"])
def test_no_calls(read, calls):
    [record] = read({"messages": [user("w", tool_calls=calls), assistant("b", tool_calls=calls)]}).records
    assert (record.messages, record.answer) == ((Message("user", "w"),), Message("assistant", "b"))
    assert record.unread == ()


@pytest.mark.parametrize("tools", [None, [], "", " ", "[]", "null", {"name": None, "parameters": None}])
def test_no_tools(read, tools):
    found = read({"messages": [user("w"), assistant("b")], "tools": tools})
    assert (found.records[0].tools, found.notes) == ((), ())


HALF = "\ud83d"


@pytest.mark.parametrize(
    "turn",
    [
        assistant("", tool_calls=[call({"city": HALF})]),
        assistant("", tool_calls=[call(json.dumps({HALF: 1}))]),
        assistant("b", reasoning_content=HALF),
        assistant("b", name=HALF),
        assistant([{"type": "text", "text": HALF}]),
        assistant(HALF),
        said("function_call", json.dumps({"name": HALF})),
    ],
)
def test_halves_of_surrogate_pairs(read, turn):
    with pytest.raises(DataError, match=r"a\.jsonl:1: messages\[1\].* holds half of a surrogate pair"):
        read({"messages": [user("w"), turn]})
    with pytest.raises(DataError, match=r"a\.jsonl:1: tools\[0\] holds half of a surrogate pair"):
        read({"messages": [user("w"), assistant("b")], "tools": [{"name": HALF}]})


@pytest.mark.parametrize("kind", [["text"], {"a": 1}, None, 3])
def test_kinds_of_parts_that_are_no_texts(read, kind):
    with pytest.raises(DataError, match=r"messages\[0\]\.content\[0\] is a part of type"):
        read({"messages": [user([{"type": kind, "text": "a"}]), assistant("b")]})


def test_values_that_are_nested_too_deeply(tmp_path):
    """What JSON can hold and Python cannot walk is a bad row."""
    path = tmp_path / "a.jsonl"
    deep = '{"a": ' * 900 + "1" + "}" * 900
    calls = '[{"function": {"name": "f", "arguments": %s}}]' % deep  # noqa: UP031
    path.write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": %s}]}\n' % calls  # noqa: UP031
        + json.dumps({"messages": [user("a"), assistant("b")]})
    )
    found = read_records(locate(str(path)), skip_bad_rows=True)
    assert [record.where for record in found.records][-1] == "a.jsonl:2"
    for record in found.records:
        assert record.plain_text


def test_tools_that_are_no_functions_are_counted(read):
    found = read(*[{"prompt": "a", "completion": "b", "tools": ["hammer"]}] * 2, {"prompt": "a", "completion": "b"})
    assert [record.tools for record in found.records] == [(), (), ()]
    assert found.notes == (
        "2 rows carry what p2d neither shows to the model nor heeds, first a.jsonl:1: column tools (2)",
    )


def test_rows_that_differ_in_calls_results_tools_or_reasoning_say_different_things(read):
    def row(city="Oslo", result="3", tools=(), **more):
        asked = assistant("", tool_calls=[call({"city": city})])
        return {
            "messages": [user("w"), asked, {"role": "tool", "content": result}, assistant("b", **more)],
            "tools": list(tools),
        }

    rows = [row(), row(city="Rome"), row(result="4"), row(tools=[SCHEMA]), row(reasoning_content="so")]
    found = read(*rows, row()).records
    assert len({record.plain_text for record in found[:5]}) == 5
    assert found[5].plain_text == found[0].plain_text
    assert found[0].prompt == 'w\n{"name": "weather", "arguments": {"city": "Oslo"}}\n3'
    assert found[4].text.endswith("\nso\nb")
    ending = read({"messages": [user("w"), assistant("", tool_calls=[OSLO])]}).records[0]
    assert ending.text == 'w\n{"name": "weather", "arguments": {"city": "Oslo"}}'


# --- what is learnt


def turns_of(read, *turns):
    [record] = read({"messages": list(turns)}).records
    return record, [message.is_learnt for message in record.messages if message.role == "assistant"]


@pytest.mark.parametrize("mark", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"weight": 0, "train": True}])
def test_turns_may_be_marked_as_not_to_be_learnt(read, mark):
    record, learnt = turns_of(read, user("a"), assistant("no", **mark), user("b"), assistant("yes", weight=1))
    assert (record.completion, learnt) == ("yes", [False])
    record, learnt = turns_of(
        read, user("a"), assistant("yes"), user("b"), assistant("too", train=True), user("c"), assistant("no", **mark)
    )
    assert (record.completion, learnt, len(record.messages)) == ("too", [True], 3)


def test_a_row_must_teach_something(read):
    good = {"messages": [user("a"), assistant("b")]}
    bad = {"messages": [user("a"), assistant("b", weight=0), user("c"), assistant("d", train=False)]}
    with pytest.raises(DataError, match=r"a\.jsonl:2: no turn of the assistant is to be learnt"):
        read(good, bad)
    assert len(read(good, bad, skip_bad_rows=True).skipped) == 1


@pytest.mark.parametrize("mark", [{"weight": 0.5}, {"weight": 2}, {"weight": "1"}, {"train": "no"}])
def test_no_turn_is_learnt_by_halves(read, mark):
    with pytest.raises(DataError, match=rf"messages\[1\]\.{next(iter(mark))} must be .*; found"):
        read({"messages": [user("a"), assistant("b", **mark)]})


def test_marks_within_a_turn_are_refused(read):
    detail = [{"begin_offset": 0, "end_offset": 1, "train": False}]
    with pytest.raises(DataError, match="train_detail marks parts of a turn"):
        read({"messages": [user("a"), assistant("b", train_detail=detail)]})


# --- what a turn says


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning(read, key):
    record, _ = turns_of(read, user("a"), assistant("b", **{key: "so"}), user("c"), assistant("d", **{key: "then"}))
    assert record.messages[1] == Message("assistant", "b", {"reasoning_content": "so"})
    assert record.answer == Message("assistant", "d", {"reasoning_content": "then"})
    assert record.unread == ()


def test_contents_in_parts(read):
    asked = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "image": None}]
    answered = [{"type": "thinking", "thinking": "so"}, {"type": "text", "text": "c"}]
    record, _ = turns_of(read, user(asked), assistant(answered))
    assert (record.prompt, record.answer) == ("ab", Message("assistant", "c", {"reasoning_content": "so"}))


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        (user([{"type": "image", "image": "a.png"}, {"type": "text", "text": "b"}]), r"content\[0\] is a part of type"),
        (user([{"type": "input_audio", "input_audio": {}}]), r"content\[0\] is a part of type 'input_audio'"),
        (user("a", images=["a.png"]), "carries images"),
        (user("a", audio={"id": "x"}), "carries audio"),
        (user([{"type": "text", "text": None}]), r"content\[0\]\.text must be a text; found null"),
    ],
)
def test_what_is_no_text_is_refused(read, turn, message):
    with pytest.raises(DataError, match=rf"a\.jsonl:1: messages\[0\].*{message}"):
        read({"messages": [turn, assistant("b")]})


@pytest.mark.parametrize("speaker", ["gpt", "chatgpt", "bing", "bard", "model", "assistant", "Assistant"])
def test_names_of_the_assistant(read, speaker):
    [record] = read({"conversations": [said("User", "a"), said(speaker, "b")]}).records
    assert (record.messages, record.completion) == ((Message("user", "a"),), "b")


def test_keys_that_p2d_does_not_know_are_counted(read):
    rows = [
        {"messages": [user("a", timestamp=3, mood="bad"), assistant("b", rank=2, refusal=None)]},
        {"messages": [user("a", weight=1), assistant("b", rank=1, thinking=True)]},
        {"messages": [user("a"), assistant("b", id="x", score=1, rank=None)]},
    ]
    [note] = read(*rows).notes
    assert note.startswith("2 rows carry what p2d neither shows to the model nor heeds, first a.jsonl:1: ")
    for part in ("key rank (2)", "key mood (1)", "key thinking (1)", "weight of other turns than the assistant's (1)"):
        assert part in note
    assert "timestamp" not in note
    [note] = read({"messages": [user("a", **{f"key{number}": 1 for number in range(20)}), assistant("b")]}).notes
    named = ", ".join(f"message key key{number} (1)" for number in range(8))
    assert note.endswith(f"a.jsonl:1: {named} and 12 others"), "in the order of the row, in every process"


@pytest.mark.parametrize(
    ("turns", "found"),
    [
        ([user("a"), {"role": "system", "content": "s"}, assistant("b")], "there stands a system message"),
        ([user("a"), {"role": "critic", "content": "s"}, assistant("b")], "there stands a critic message"),
        ([{"role": "tool", "content": "s"}, assistant("b")], "nothing but a tool's result"),
        ([user(" "), assistant("b")], "the one there is empty"),
        ([assistant("b")], "it is the first message"),
    ],
)
def test_an_answer_answers_somebody(read, turns, found):
    with pytest.raises(DataError, match=rf"no user's message before the assistant's answer: .*{found}"):
        read({"messages": turns})


@pytest.mark.parametrize("earlier", [assistant("b"), assistant("b", weight=0), assistant("")])
def test_an_answer_that_follows_another_is_said_to_do_so(read, earlier):
    with pytest.raises(
        DataError, match=r"a\.jsonl:1: another turn of the assistant stands right before the answer"
    ) as no:
        read({"messages": [user("a"), earlier, assistant("c")]})
    assert "no user's message before" not in no.value.message


def test_an_earlier_answer_that_says_nothing_is_not_learnt(read):
    """Else the model would learn to end at once; a call says something."""
    calls = [{"name": "f", "arguments": {}}]
    turns = [user("a"), assistant(""), user("b"), assistant(" \n"), user("c"), assistant(None, tool_calls=calls)]
    turns += [{"role": "tool", "content": ""}, assistant("d"), user("e"), assistant("f")]
    [record] = read({"messages": turns}).records
    learnt = [message.is_learnt for message in record.messages if message.role == "assistant"]
    assert learnt == [False, False, True, True]
    [record] = read({"prompt": "b", "completion": "c", "history": [["a", ""]]}).records
    assert not record.messages[1].is_learnt
    with pytest.raises(DataError, match="the completion is empty"):
        read({"messages": [user("a"), assistant("b"), user("c"), assistant("")]})


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["", "a", HALF, "[]", "{}", '[{"name": "f"}]']),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["type", "name", "role", "a"]), inner),
    max_leaves=4,
)
FULL = OPENAI | {"history": [["a", "b"]], "choices": ["a"], "image": None, "system": "s"}
FULL_PAIR = {"prompt": [user("a")], "completion": [assistant("b", weight=1, thinking="t")], "history": [["a", "b"]]}
KEYED = {"question": "a", "choices": {"text": ["x"], "label": ["A"]}, "answerKey": "A", "tools": json.dumps([SCHEMA])}


def places_in(value, path=()):
    """Yield the path to every value within a value."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inside:
        yield from places_in(part, (*path, key))


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(row=st.sampled_from([FULL, SHAREGPT, LEGACY, FULL_PAIR, KEYED]), data=st.data(), value=ANYTHING)
def test_any_value_at_any_place_is_read_or_refused(read, row, data, value):
    changed = copy.deepcopy(row)
    path = data.draw(st.sampled_from([path for path in places_in(row) if path]))
    parent = changed
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    with contextlib.suppress(DataError):
        [record] = read(changed).records
        record.plain_text.encode()
        assert record.completion.strip() or record.answer_parts["tool_calls"]
        json.dumps([record.tools, record.answer_parts, [message.parts for message in record.messages]]).encode()
