"""The columns that data sets are known to have, and answers that are no texts."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
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


USER = {"role": "user", "content": "a"}
ASSISTANT = {"role": "assistant", "content": "d"}
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
        ({"prompt": "a", "completion": "b", "label": False}, "label is false"),
        ({"prompt": [USER], "completion": [ASSISTANT], "label": False}, "label is false"),
        ({"question": "a", "choices": ["x", "y"], "answer": 2.0}, "the number of none of the 2 choices"),
        ({"question": "a", "choices": ["x", "y"], "answer": "2"}, "the number of none of the 2 choices"),
        ({"question": "a", "choices": ["x", "y"], "answer": 0.5}, "the number of none of the 2 choices"),
        ({"prompt": "a", "completion": "b", "image": "a.png"}, "column 'image' holds more than text"),
        (
            {"prompt": "a", "completion": "b", "photo": {"bytes": "x", "path": None}},
            "column 'photo' holds more than text",
        ),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, r"history\[0\] must be a pair"),
        ({"instruction": "a", "output": "b", "history": [["c", None]]}, r"history\[0\]\[1\] must be a text"),
        ({"prompt": [], "completion": "b"}, "column 'prompt' must be a text; found list"),
        ({"prompt": {"a": 1}, "completion": "b"}, "column 'prompt' must be a text; found dict {'a': 1}"),
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
        {"prompt": "a", "completion": "b", "rejected": "c", "label": True, "weight": 0.5},
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


NAMES = ["one", "two", "three"]
NUMBERS = ["1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("choices", "answer", "completion"),
    [
        *((NAMES, answer, "three") for answer in (2, 2.0, "2", "2.0", " 2 ", "C", "three")),
        *((NUMBERS, answer, "3") for answer in (2, 2.0, "3", "C")),
        (NUMBERS, "2", "2"),
        (["A", "B", "C"], "B", "B"),
        (["0.5", "2.5"], 2.5, "2.5"),
        (NAMES, "D", "D"),
        (NAMES, "the third", "the third"),
        (NAMES, True, "true"),
    ],
)
def test_numbers_and_letters_of_choices(read, choices, answer, completion):
    """A text that is one of the choices is meant as it stands."""
    [record] = read({"question": "a", "choices": choices, "answer": answer}).records
    assert (record.completion, record.choices) == (completion, tuple(choices))


def test_a_letter_is_the_answer_where_the_prompt_lists_the_choices(read):
    question = "which? A. one B. two C. three"
    assert read({"question": question, "choices": NAMES, "answer": "B"}).records[0].completion == "B"
    assert read({"prompt": "which?", "choices": NAMES, "completion": "B"}).records[0].completion == "B"


def test_numbers_of_choices_in_csv_and_in_columns_with_nulls(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('question,choices,answer\na,"[""x"", ""y"", ""z""]",2\nb,"[""x"", ""y"", ""z""]",0.0\n')
    assert [record.completion for record in read_records(locate(str(path))).records] == ["z", "x"]
    path = tmp_path / "a.parquet"
    columns = {"question": ["a", "b"], "choices": [["x", "y"]] * 2, "answer": pa.array([1.0, None])}
    pq.write_table(pa.table(columns), path)
    found = read_records(locate(str(path)), skip_bad_rows=True)
    assert ([record.completion for record in found.records], len(found.skipped)) == (["y"], 1)


@pytest.mark.parametrize(
    ("row", "completion"),
    [({"answer": "B"}, "y"), ({"answer": "y"}, "y"), ({"answer": "B", "answer_index": 1}, "y")],
)
def test_options_are_choices_where_the_answer_is_clear(read, row, completion):
    [record] = read({"question": "a", "options": ["x", "y"]} | row).records
    assert (record.completion, record.choices, record.unread) == (completion, ("x", "y"), ())


@pytest.mark.parametrize(
    "row",
    [
        {"answer": "1"},
        {"answer": "C"},
        {"answer": "B", "answer_index": 0},
        {"answer": "z"},
        {"options": {"A": "x", "B": "y"}, "answer": "B"},
        {"question": "x or y?", "answer": "B"},
    ],
)
def test_options_are_counted_where_the_answer_is_not_clear(read, row):
    [record] = read({"question": "a", "options": ["x", "y"]} | row).records
    assert (record.completion, record.choices, record.unread) == (row["answer"], None, ("column options",))


def test_turns_of_trl_may_be_json_in_a_cell(tmp_path, read):
    asked = [USER, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    lists = read({"prompt": asked, "completion": [ASSISTANT]}).records[0]
    texts = read({"prompt": json.dumps(asked), "completion": json.dumps([ASSISTANT])}).records[0]
    path = tmp_path / "a.csv"
    with path.open("w", newline="", encoding="utf-8") as stream:
        cells = csv.writer(stream)
        cells.writerows([["prompt", "completion"], [json.dumps(asked), json.dumps([ASSISTANT])]])
    [cell] = read_records(locate(str(path))).records
    assert (lists.messages, lists.answer) == (texts.messages, texts.answer) == (cell.messages, cell.answer)
    turns = json.dumps([{"from": "human", "value": "a"}])
    assert read({"prompt": turns, "completion": "d"}).records[0].messages == (Message("user", "a"),)


@pytest.mark.parametrize(
    "text", ["[1, 2]", "[]", '[{"role": "user"}]', '[{"a": 1}]', "[a", '{"role": "user", "content": "a"}']
)
def test_other_json_is_a_text(read, text):
    [record] = read({"prompt": text, "completion": text}).records
    assert (record.prompt, record.completion) == (text, text)


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({"chat_template_kwargs": {"enable_thinking": False}}, "column chat_template_kwargs"),
        ({"chat_template_kwargs": '{"enable_thinking": false}'}, "column chat_template_kwargs"),
        ({"passage": "p"}, "column passage"),
        ({"support": "p"}, "column support"),
        ({"history": [{"role": "system", "content": "t"}], "system": "s"}, "column system, beside a system message"),
    ],
)
def test_columns_that_were_dropped_are_counted(read, row, part):
    assert part in read({"question": "a", "answer": "b"} | row).notes[0]


def test_template_arguments_that_say_nothing_are_not_counted(read):
    for nothing in (None, {}, {"enable_thinking": None}, "", "{}"):
        assert read({"prompt": "a", "completion": "b", "chat_template_kwargs": nothing}).notes == ()


@pytest.mark.parametrize("column", ["system", "system_prompt"])
def test_a_system_column_beside_another_system_message_is_counted(read, column):
    turns = [{"role": "system", "content": "t"}, USER, ASSISTANT]
    [record] = read({"messages": turns, column: "s"}).records
    assert (record.system, record.unread) == ("t", (f"column {column}, beside a system message among the turns",))
    for same in ("t", " t\n", "", None):
        assert read({"messages": turns, column: same}).notes == ()


def test_labels_that_are_the_answer_or_say_that_it_is_wanted(read):
    assert read({"prompt": "a", "completion": "false", "label": False}).records[0].completion == "false"
    assert read({"prompt": "a", "completion": False, "label": False}).records[0].completion == "false"
    assert read({"prompt": "a", "completion": "b", "label": True}).records[0].completion == "b"
    assert read({"text": "a", "label": False}).records[0].completion == "false"
