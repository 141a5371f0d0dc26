"""Where an answer begins and ends, in what templates write and in what models write."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2d_cli.core.turns import REASONING, THINK, TurnFrame, split_turn
from p2d_cli.data.prompts import PromptTemplate, encoding_notes
from p2d_cli.data.records import Message, Record

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n%LEAD%{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n%OPEN%{% endif %}"
)
LAST = "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
HARMONY = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}{% if m['role'] == 'assistant' %}<|channel|>final{% endif %}"
    "<|message|>{{ m['content'] }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
TEMPLATES = {
    "plain ChatML": CHATML.replace("%LEAD%", "").replace("%OPEN%", ""),
    "an empty think block, as Qwen3": CHATML.replace("%LEAD%", LAST).replace("%OPEN%", ""),
    "a block opened in the prompt, as Qwen3.5": CHATML.replace("%LEAD%", LAST).replace("%OPEN%", "<think>\n"),
    "a block opened that answers do not show, as DeepSeek R1": CHATML.replace("%LEAD%", "").replace(
        "%OPEN%", "<think>\n"
    ),
    "no generation prompt": "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}\n{% endfor %}",
    "a closing tag": "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{{ eos_token }}\n{% endfor %}",
    "end of text behind the end of turn, as Phi-3": (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% else %}{{ eos_token }}{% endif %}"
    ),
    "channels, as gpt-oss": HARMONY,
}
ENDS = dict.fromkeys(TEMPLATES, "<|im_end|>") | {"no generation prompt": "</s>", "a closing tag": "</s>"}
REASONERS = [name for name in TEMPLATES if "block" in name]


def row(completion="yes", **answer_parts):
    return Record("r", (Message("user", "may I?"),), completion, None, {}, "r:1", answer_parts=answer_parts)


@pytest.fixture
def tokenizer(tokenizer_of):
    return tokenizer_of("chatml")


@pytest.mark.parametrize("name", TEMPLATES)
def test_answer_of_what_a_template_writes_is_the_content(tokenizer, name):
    template = PromptTemplate("chat", TEMPLATES[name])
    frame = template.frame(tokenizer, row())
    prompt, turn = template.render_example(tokenizer, row("yes, you may"))
    assert frame.answer(turn) == "yes, you may"
    assert frame.ends == (ENDS[name],)
    assert template.ends(tokenizer) == (ENDS[name],)
    assert prompt == template.render_prompt(tokenizer, row())


@pytest.mark.parametrize("name", TEMPLATES)
def test_tokens_of_the_answer_are_those_of_content_and_closing(tokenizer, name):
    template = PromptTemplate("chat", TEMPLATES[name])
    encoded = template.encode_example(tokenizer, row("yes, you may"), 1000)
    turn = template.render_example(tokenizer, row("yes, you may"))[1]
    expected = turn[turn.index("yes, you may") :]
    assert tokenizer.decode(encoded.input_ids[encoded.answer_start :]) == expected
    assert tokenizer.decode(encoded.input_ids[encoded.prompt_length :]) == turn
    assert sum(encoded.label_mask) == len(encoded.input_ids) - encoded.prompt_length


@pytest.mark.parametrize("name", REASONERS)
@pytest.mark.parametrize("thought", ["", "maybe?", "first\n\nsecond, with <b>tags</b>"])
def test_reasoning_of_a_model_is_not_its_answer(tokenizer, name, thought):
    frame = PromptTemplate("chat", TEMPLATES[name]).frame(tokenizer, row())
    opening = "" if frame.opened else "<think>\n"
    assert frame.answer(f"{opening}{thought}\n</think>\n\nyes") == "yes"
    assert frame.answer(f"{opening}{thought}") == ""  # still thinking when the tokens ran out
    assert not frame.has_begun(f"{opening}{thought}")
    assert frame.has_begun(f"{opening}{thought}\n</think>\n\nye")


def test_channels_of_a_model():
    specials = frozenset({"<|start|>", "<|channel|>", "<|message|>", "<|end|>"})
    frame = TurnFrame(lead="<|channel|>final<|message|>", blocks=(REASONING[1],), specials=specials)
    thinking = "<|channel|>analysis<|message|>They ask."
    assert frame.answer(thinking) == ""
    assert frame.answer(thinking + "<|start|>assistant<|channel|>final<|message|>yes") == "yes"
    assert frame.answer("<|channel|>final<|message|>yes") == "yes"
    assert frame.marks == {"<|start|>", "<|channel|>", "<|message|>"}
    call = " to=functions.weather<|channel|>commentary json<|message|>{}"
    assert frame.answer(thinking + "<|start|>assistant" + call).strip() == "to=functions.weathercommentary json{}"
    assert frame.answer(call) == " to=functions.weathercommentary json{}"


@pytest.mark.parametrize(("opening", "closing"), REASONING)
def test_every_known_block_is_left_out_of_plain_text_too(opening, closing):
    frame = TurnFrame()
    assert frame.answer(f"{opening}\nhm\n{closing}\n\nyes") == "yes"
    assert TurnFrame(blocks=((opening, closing),)).answer(f"{opening}\nhm") == ""
    assert frame.without_reasoning(f"{opening}hm{closing}yes") == "yes"


def test_a_block_whose_opening_was_lost_is_left_out():
    frame = TurnFrame(blocks=(THINK,))
    assert frame.answer("hm, so\n</think>\n\nyes") == "yes"
    assert frame.without_reasoning("hm, so</think>yes") == "yes"


@pytest.mark.parametrize("name", ["plain ChatML", "channels, as gpt-oss", "an empty think block, as Qwen3"])
@pytest.mark.parametrize("answer", ["Close it with </reasoning> now", "<thought> is the tag", "[/THINK] ends it"])
def test_tags_that_the_template_does_not_think_in_are_words(tokenizer, name, answer):
    template = PromptTemplate("chat", TEMPLATES[name])
    assert template.reference(tokenizer, row(answer)) == answer
    assert template.frame(tokenizer, row()).answer(template.render_example(tokenizer, row(answer))[1]) == answer


@given(st.text(alphabet="ab <>/\n", max_size=40))
def test_answers_without_tags_are_left_alone(text):
    assert TurnFrame().answer(text) == text
    assert TurnFrame(blocks=REASONING).without_reasoning(text) == text


def test_what_a_template_writes_between_answer_and_end_is_left_out(tokenizer):
    frame = PromptTemplate("chat", TEMPLATES["a closing tag"]).frame(tokenizer, row())
    assert frame.tail == "</assistant>"
    assert frame.answer("<assistant>yes</assistant>") == "yes"
    assert frame.answer("<assistant>yes") == "yes"


def test_reasoning_of_the_row_is_learnt_but_is_not_its_answer(tokenizer):
    given = row("<think>\nhm\n</think>\n\nyes")
    template = PromptTemplate("chat", TEMPLATES["plain ChatML"])
    encoded = template.encode_example(tokenizer, given, 1000)
    assert tokenizer.decode(encoded.input_ids[encoded.answer_start :]) == "yes<|im_end|>"
    assert "hm" in tokenizer.decode(encoded.input_ids[encoded.prompt_length : encoded.answer_start])
    assert template.reference(tokenizer, given) == "yes"
    assert not encoded.hides


def test_reasoning_that_the_template_leaves_out_is_told(tokenizer):
    shows = "{% for m in messages %}{{ m.reasoning_content or '' }}{{ m.content }}<|im_end|>{% endfor %}"
    given = row("yes", reasoning_content="hm")
    assert not PromptTemplate("chat", shows).encode_example(tokenizer, given, 1000).hides
    assert PromptTemplate("chat", TEMPLATES["plain ChatML"]).encode_example(tokenizer, given, 1000).hides


def test_no_end_where_a_template_closes_with_none(tokenizer):
    template = PromptTemplate("chat", "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    assert template.ends(tokenizer) == ()


def test_plain_text_ends_with_the_tokenizers_end(tokenizer):
    assert PromptTemplate("plain").ends(tokenizer) == (tokenizer.eos_token,)


def test_an_end_of_turn_that_is_no_special_token_counts(tokenizer_of):
    """As in models whose makers added <|im_end|> as an ordinary token."""
    tokenizer = tokenizer_of("chatml", "none")
    frame = PromptTemplate("chat", TEMPLATES["plain ChatML"]).frame(tokenizer, row())
    assert replace(frame, specials=frozenset()).answer("yes<|im_end|>") == "yes"


def test_the_turn_closes_a_block_that_only_the_prompt_opens():
    assert split_turn("Q:A:<think>\n", "Q:A:yes.") == "\n</think>\n\nyes."
    assert split_turn("Q:A:", "Q:A:yes.") == "yes."
    assert split_turn("Q:A:", "other") is None
    assert split_turn("Q:A:<think>\n", "Q:A:<think>hm</think>yes.") is None


@pytest.mark.parametrize("block", ["<think>\n\n</think>\n\n", "<think></think>", "</think>"])
def test_the_turn_goes_on_behind_a_block_that_only_the_prompt_has(block):
    assert split_turn(f"Q:A:{block}", "Q:A:yes.") == "yes."
    assert split_turn(f"Q:A:{block}", "Q:A:<think>\nhm\n</think>\n\nyes.") is None


def test_a_block_that_the_answer_closes_is_closed_once():
    """As in DeepSeek V3.1 with thinking."""
    assert split_turn("Q:A:<think>", "Q:A:</think>yes.") == "</think>yes."


SWITCHED = CHATML.replace("%LEAD%", "").replace(
    "%OPEN%", "{% if '/no_think' in messages[0].content %}<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}"
)


def test_a_word_of_the_row_may_switch_thinking(tokenizer):
    """Each row has a frame of its own: a turn with and without a think block before it."""
    template = PromptTemplate("chat", SWITCHED)
    asked = [
        Record("r", (Message("user", text),), "yes", None, {}, "r:1") for text in ("One?", "/no_think One?", "Two?")
    ]
    assert [template.frame(tokenizer, record).opened for record in asked] == ["</think>", None, "</think>"]
    assert template.frame(tokenizer, asked[1]).answer("yes") == "yes"
    assert template.frame(tokenizer, asked[0]).answer("yes") == ""
    assert len(template._frames) == 2
    for record in asked:
        encoded = template.encode_example(tokenizer, record, 1000)
        assert tokenizer.decode(encoded.input_ids[encoded.answer_start :]) == "yes<|im_end|>"


def test_an_answer_that_is_cut_away_has_no_tokens(tokenizer):
    template = PromptTemplate("chat", TEMPLATES["plain ChatML"])
    encoded = template.encode_example(tokenizer, row("<think>" + "hm " * 50 + "</think>yes"), 40)
    assert encoded.answer_start == len(encoded.input_ids)
    [note, _] = encoding_notes([encoded], 40)[::-1]
    assert note == "1 rows lost their whole completion to truncation and were left out"


# --- the day, and arguments


def test_text_does_not_depend_on_the_day(tokenizer):
    template = PromptTemplate(
        "chat", "{{ strftime_now('%Y-%m-%d') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    assert template.render_prompt(tokenizer, row()) == "2024-07-26may I?"
