"""The columns that data sets are known to have, and answers that are no texts."""

import csv
import json

import pytest

from p2d_cli.data.records import ColumnMap, Message, read_records
from p2d_cli.data.sources import locate
from p2d_cli.errors import DataError


@pytest.fixture
def read(tmp_path):
    def read_these(*rows, **options):
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return read_records(locate(str(path)), **options)

    return read_these


ARC = {"text": ["up", "down"], "label": ["A", "B"]}


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        ({"prompt": "a", "response": "b"}, "a", "b"),
        ({"instruction": "a", "context": "c", "response": "b", "category": "x"}, "a\nc", "b"),
        ({"instruction": "a", "context": "", "response": "b"}, "a", "b"),
        ({"question": "a", "response": "b"}, "a", "b"),
        ({"query": "a", "response": "b"}, "a", "b"),
        ({"problem": "a", "solution": "b", "answer": "c"}, "a", "b"),
        ({"input": "a", "output": "b"}, "a", "b"),
        ({"inputs": "a", "targets": "b"}, "a", "b"),
        ({"text": "a", "label": "b"}, "a", "b"),
        ({"text": "a", "label": 1}, "a", "1"),
        ({"text": "a", "label": 1, "label_text": "b"}, "a", "b"),
        ({"conversation": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "a", "b"),
        ({"question": "a", "choices": ARC, "answerKey": "B"}, "a", "down"),
        ({"question_stem": "a", "choices": ARC, "answerKey": "A"}, "a", "up"),
        ({"question": "a", "choices": ["up", "down"], "answer": 1}, "a", "down"),
        ({"question": "a", "choices": ["up", "down"], "answer": "down"}, "a", "down"),
    ],
)
def test_shapes(read, row, prompt, completion):
    [record] = read(row).records
    assert (record.prompt, record.completion, record.unread) == (prompt, completion, ())
    if "choices" in row:
        assert record.choices == ("up", "down")


def test_columns_that_come_beside_a_conversation_are_no_second_shape(read):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for more in ({"problem": "p", "solution": "s"}, {"text": "t", "label": 1}, {"input": "i", "output": "o"}):
        assert read({"messages": turns} | more).records[0].completion == "b"
    assert read({"prompt": "a", "completion": "b", "text": "t", "label": "l"}).records[0].completion == "b"


def test_later_shapes_that_fit_together_are_an_error(read):
    with pytest.raises(DataError, match="the columns fit prompt/response and problem/solution"):
        read({"prompt": "a", "response": "b", "problem": "c", "solution": "d"})


def test_the_system_prompt_of_openorca(read):
    found = read(
        {"system_prompt": "s", "question": "a", "response": "b"},
        {"system_prompt": "", "question": "a", "response": "b"},
        {"system_prompt": "no", "system": "s", "question": "a", "response": "b"},
    ).records
    assert [record.system for record in found] == ["s", None, "s"]


def test_one_named_column_and_one_of_the_later_shapes(read):
    row = {"sentence": "a", "label": "b"}
    assert read(row, columns=ColumnMap(prompt="sentence")).records[0].completion == "b"
    assert read(row | {"answer": "c"}, columns=ColumnMap(prompt="sentence")).records[0].completion == "c"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (7, "7"),
        (-3, "-3"),
        (7.0, "7"),
        (0.25, "0.25"),
        (1e300, "1e+300"),
        (True, "true"),
        (False, "false"),
        ("7.0", "7.0"),
    ],
)
def test_answers_that_are_no_texts(read, value, text):
    assert read({"question": "a", "answer": value}).records[0].completion == text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a", "answer": float("nan")}, "column 'answer' must be a text or a finite number; found nan"),
        (
            {"question": "a", "choices": ["x", "y"], "answer": 2},
            "holds 2, which is the number of none of the 2 choices",
        ),
        ({"question": "a", "choices": ["x", "y"], "answer": -1}, "holds -1, which is the number of none"),
        (
            {"question": "a", "choices": ARC, "answerKey": ""},
            "column 'answerKey' holds '', which is not one of the labels",
        ),
        ({"question": "a", "choices": ["x"], "answerKey": "A"}, "column 'choices' must be an object with two lists"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "chosen, rejected state which answer is preferred"),
        ({"chosen": [], "rejected": []}, "chosen, rejected state which answer is preferred"),
        ({"instruction": "a", "output": "b", "kto_tag": False}, "kto_tag is false"),
        ({"prompt": "a", "completion": "b", "image": "a.png"}, "column 'image' holds more than text"),
        (
            {"prompt": "a", "completion": "b", "photo": {"bytes": "x", "path": None}},
            "column 'photo' holds more than text",
        ),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, r"history\[0\] must be a pair"),
        ({"instruction": "a", "output": "b", "history": [["c", None]]}, r"history\[0\]\[1\] must be a text"),
        ({"prompt": [], "completion": "b"}, "column 'prompt' must be a text; found list"),
    ],
)
def test_rows_that_are_refused(read, row, message):
    with pytest.raises(DataError, match=rf"a\.jsonl:1: .*{message}"):
        read(row)


def test_preferences_beside_a_conversation_without_answer_are_named(read):
    row = {"conversations": [{"from": "human", "value": "a"}], "chosen": {"value": "b"}, "rejected": {"value": "c"}}
    with pytest.raises(DataError, match="the last message is from user") as caught:
        read(row)
    assert "preferences" in caught.value.hint


def test_media_columns_that_hold_nothing(read):
    row = {"prompt": "a", "completion": "b", "images": [], "image": None, "audio": {"bytes": None, "path": None}}
    assert read(row).records[0].completion == "b"


def test_history_becomes_earlier_turns(read):
    row = {"instruction": "a", "input": "b", "output": "c", "system": "s", "history": [["d", "e"], ["f", "g"]]}
    [record] = read(row).records
    assert [(message.role, message.content) for message in record.messages] == [
        *(("system", "s"), ("user", "d"), ("assistant", "e"), ("user", "f"), ("assistant", "g"), ("user", "a\nb"))
    ]
    assert (record.completion, record.unread) == ("c", ())
    for nothing in (None, [], ""):
        assert len(read(row | {"history": nothing}).records[0].messages) == 2


def test_a_history_of_another_kind_is_counted(read):
    for history in (["hello", "hi"], "he was ill", {"a": 1}):
        [record] = read({"prompt": "a", "completion": "b", "history": history}).records
        assert (len(record.messages), record.unread) == (1, ("column history",))


def test_a_system_prompt_of_another_kind_is_counted(read):
    [record] = read({"prompt": "a", "completion": "b", "system_prompt": ["x"]}).records
    assert (record.system, record.unread) == (None, ("column system_prompt",))


def test_conversational_prompts_and_completions(read):
    """As TRL has them: what is in the prompt is not learnt."""
    asked = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    answered = [{"role": "assistant", "content": "d"}]
    for prompt, completion in ((asked, answered), (asked, "d"), (asked, answered[0])):
        [record] = read({"prompt": prompt, "completion": completion}).records
        assert record.messages == (
            Message("user", "a"),
            Message("assistant", "b", is_learnt=False),
            Message("user", "c"),
        )
        assert record.completion == "d"
    assert read({"prompt": "c", "completion": answered}).records[0].messages == (Message("user", "c"),)


def test_columns_that_bear_on_the_meaning_are_counted_in_one_note(read):
    rows = [
        {"prompt": "a", "completion": "b", "rejected": "c", "topic": "x"},
        {"prompt": "a", "completion": "b", "documents": ["d"], "thinking": "so", "score": 3},
        {"prompt": "a", "completion": "b", "rejected": "c", "label": False, "weight": 0.5},
        {"prompt": "a", "completion": "b", "rejected": "", "documents": [], "weight": 1, "source": "s"},
    ]
    [note] = read(*rows).notes
    assert note.startswith("3 rows carry what p2d neither shows to the model nor heeds, first a.jsonl:1: ")
    for part in ("rejected (2)", "documents (1)", "thinking (1)", "label (1)", "weight (1)"):
        assert f"column {part}" in note
    assert not any(name in note for name in ("topic", "score", "source"))


def test_context_and_input_are_counted_where_the_shape_has_none(read):
    assert "column context (1)" in read({"question": "a", "answer": "b", "context": "c"}).notes[0]
    named = ColumnMap(prompt="question", completion="answer")
    assert read({"question": "a", "answer": "b", "context": "c"}, columns=named).notes == ()


def test_cells_of_csv(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "no", "weight": 0}]
    turns += [{"role": "user", "content": "b"}, {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}]
    path = tmp_path / "a.csv"
    with path.open("w", newline="", encoding="utf-8") as stream:
        cells = csv.writer(stream)
        cells.writerows([["messages", "tools"], [json.dumps(turns), json.dumps([{"name": "f"}])]])
    [record] = read_records(locate(str(path))).records
    assert [message.is_learnt for message in record.messages] == [True, False, True]
    assert record.answer_parts == {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
    assert record.tools == ({"type": "function", "function": {"name": "f"}},)
    path.write_text('instruction,output,history\na,b,"[[""c"", ""d""]]"\nq,r,\n', encoding="utf-8")
    assert [len(record.messages) for record in read_records(locate(str(path))).records] == [3, 1]
    path.write_text('question,choices,answerKey\na,"{""text"": [""x"", ""y""], ""label"": [""A"", ""B""]}",B\n')
    assert read_records(locate(str(path))).records[0].completion == "y"
