"""Tools, their calls and results through chat templates."""

import json

import pytest

from p2d_cli.data.episodes import encode_episode
from p2d_cli.data.prompts import PromptTemplate
from p2d_cli.data.records import Message, Record
from p2d_cli.errors import DataError

TOOLS = ({"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}},)
CALL = {"tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}]}
HERMES = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WRITTEN = HERMES.replace("c.function | tojson", "c.function.name + ' ' + c.function.arguments")
BLIND = {
    "the functions that may be called": HERMES.replace("{% if tools %}", "{% if false %}"),
    "calls of tools": HERMES.replace("m.tool_calls or []", "[]"),
    "results of tools": HERMES.replace("{{ m.content }}", "{% if m.role != 'tool' %}{{ m.content }}{% endif %}"),
}


def called():
    return Record("r", (Message("user", "Rome?"),), "", None, {}, "f:1", answer_parts=CALL, tools=TOOLS)


def answered():
    turns = (Message("user", "Rome?"), Message("assistant", "", CALL), Message("tool", "21 C", {"name": "weather"}))
    return Record("r", turns, "It is 21 C.", None, {}, "f:2", tools=TOOLS)


@pytest.fixture
def tokenizer(tokenizer_of):
    return tokenizer_of("chatml")


@pytest.mark.parametrize("make", [called, answered])
def test_rows_are_shown_as_transformers_shows_them(tokenizer, make):
    record = make()
    messages = [{"role": m.role, "content": m.content, **m.parts} for m in (*record.messages, record.answer)]
    how = {"tools": list(TOOLS), "chat_template": HERMES, "tokenize": False}
    prompt, completion = PromptTemplate("chat", HERMES).render_example(tokenizer, record)
    assert prompt == tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, **how)
    assert prompt + completion + "\n" == tokenizer.apply_chat_template(messages, **how)


def test_a_call_is_the_answer_to_learn_and_to_compare_with(tokenizer):
    template, record = PromptTemplate("chat", HERMES), called()
    expected = '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'
    assert template.reference(tokenizer, record) == expected
    encoded = template.encode_example(tokenizer, record, 1000)
    assert tokenizer.decode(encoded.input_ids[encoded.answer_start :]) == expected + "<|im_end|>"
    assert template.frame(tokenizer, record).answer(expected) == expected


CALLS_END = HERMES.replace(
    "</tool_call>{% endfor %}<|im_end|>", "</tool_call>{% endfor %}{{ '</s>' if m.tool_calls else '<|im_end|>' }}"
)


def test_calls_that_end_with_a_token_of_their_own_end_there(tokenizer):
    template = PromptTemplate("chat", CALLS_END)
    assert template.ends(tokenizer) == ("<|im_end|>",)
    assert template.ends(tokenizer, [called(), answered()]) == ("<|im_end|>", "</s>")
    frame = template.frame(tokenizer, called())
    assert frame.answer("<tool_call>{}</tool_call></s>more") == "<tool_call>{}</tool_call>"


def test_a_template_that_shows_one_call_of_two_is_refused(tokenizer):
    two = {"tool_calls": CALL["tool_calls"] * 2}
    record = Record("r", (Message("user", "Rome?"),), "", None, {}, "f:3", answer_parts=two, tools=TOOLS)
    first = HERMES.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")
    with pytest.raises(DataError, match=r"f:3: t.jinja does not show more than one call of a tool"):
        PromptTemplate("chat", first, origin="t.jinja").render_prompt(tokenizer, record)
    assert PromptTemplate("chat", HERMES).reference(tokenizer, record).count("<tool_call>") == 2


def test_text_beside_a_call_that_is_not_shown_is_told(tokenizer):
    record = Record("r", (Message("user", "Rome?"),), "Let me see.", None, {}, "f:4", answer_parts=CALL, tools=TOOLS)
    dropping = HERMES.replace("{{ m.content }}", "{{ '' if m.tool_calls else m.content }}")
    assert PromptTemplate("chat", dropping).encode_example(tokenizer, record, 500).hides
    assert not PromptTemplate("chat", HERMES).encode_example(tokenizer, record, 500).hides


def test_earlier_calls_are_learnt(tokenizer):
    encoded = PromptTemplate("chat", HERMES).encode_example(tokenizer, answered(), 1000, loss_on="all")
    [(start, stop)] = encoded.earlier
    assert json.loads(tokenizer.decode(encoded.input_ids[start:stop]).split("tool_call>")[1][:-2])["name"] == "weather"


def test_turns_that_are_not_to_be_learnt_are_not(tokenizer):
    turns = (Message("user", "a"), Message("assistant", "b", is_learnt=False), Message("user", "c"))
    record = Record("r", turns, "d", None, {}, "f:1")
    encoded = PromptTemplate("chat", HERMES).encode_example(tokenizer, record, 1000, loss_on="all")
    assert encoded.earlier == ()
    assert not encoded.rewritten
    assert sum(encoded.label_mask) == len(encoded.input_ids) - encoded.prompt_length


def test_templates_that_want_arguments_as_text_get_them_so(tokenizer):
    _, completion = PromptTemplate("chat", WRITTEN).render_example(tokenizer, called())
    assert completion == '<tool_call>weather {"city": "Rome"}</tool_call><|im_end|>'


@pytest.mark.parametrize("what", BLIND)
def test_what_a_template_does_not_show_is_refused_with_the_row(tokenizer, what):
    with pytest.raises(DataError, match=rf"f:2: t.jinja does not show {what}"):
        PromptTemplate("chat", BLIND[what], origin="t.jinja").render_prompt(tokenizer, answered())


def test_plain_text_shows_no_tools(tokenizer):
    for record in (called(), answered()):
        with pytest.raises(DataError, match=r"f:.: plain text cannot show tools"):
            PromptTemplate("plain").encode_example(tokenizer, record, 100)


def test_episodes_show_no_tools(tokenizer):
    with pytest.raises(DataError, match="f:1: few-shot episodes cannot show tools"):
        encode_episode(PromptTemplate("chat", HERMES), tokenizer, [called()], [called()], max_length=500)


@pytest.mark.parametrize("room", [40, 60, 90])
def test_a_prompt_that_is_cut_keeps_the_tools_if_they_fit(tokenizer, room):
    template, record = PromptTemplate("chat", HERMES), called()
    long = Record("r", (Message("user", "Rome? " * 100),), "", None, {}, "f:1", answer_parts=CALL, tools=TOOLS)
    ids = template.encode_prompt(tokenizer, long, room)
    assert len(ids) == room
    assert tokenizer.decode(ids).endswith("<|im_start|>assistant\n")
    assert template.encode_prompt(tokenizer, record, 1000) == template.encode_prompt(tokenizer, record)
