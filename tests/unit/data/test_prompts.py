from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2d_cli.data.chat_templates import resolve_template
from p2d_cli.data.prompts import EncodedExample, PromptTemplate, encoding_notes
from p2d_cli.data.records import Message, Record
from p2d_cli.errors import DataError, UsageError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40).filter(str.strip)
ADDED = ["none", "bos", "bos-eos"]


def decode(tokenizer, ids):
    return tokenizer.decode(list(ids), skip_special_tokens=False)


def test_auto_is_chat_where_there_is_a_template(tokenizer_of):
    assert resolve_template(tokenizer_of("chatml")).name == "chat"
    assert resolve_template(tokenizer_of()).name == "plain"
    assert resolve_template(tokenizer_of("chatml"), "plain") == PromptTemplate("plain")
    with pytest.raises(UsageError, match="no chat template"):
        resolve_template(tokenizer_of(), "chat")


def test_a_file_takes_the_place_of_the_tokenizers_template(tokenizer_of, record_of, tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_bytes(b"\xef\xbb\xbf{% generation %}{{ messages[0]['content'] }}")
    with pytest.raises(DataError, match=r"chat\.jinja:1: not a valid chat template"):
        resolve_template(tokenizer_of(), chat_file=path)
    path.write_text("{% generation %}{{ messages[0]['content'] }}{% endgeneration %}?\n")
    template = resolve_template(tokenizer_of(), chat_file=path)
    assert template.render_prompt(tokenizer_of(), record_of("hi")) == "hi?"
    assert template.digest == replace(template, origin="another name").digest
    path.write_text("{{ raise_exception('no') }}")
    with pytest.raises(DataError, match=r"the chat template chat\.jinja refuses a conversation of user: no"):
        resolve_template(tokenizer_of(), chat_file=path).render_prompt(tokenizer_of(), record_of("hi"))
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="not valid UTF-8"):
        resolve_template(tokenizer_of(), chat_file=path)


def test_digest_tells_templates_apart(tokenizer_of):
    digests = {resolve_template(tokenizer_of(name)).digest for name in ("chatml", "trimming")}
    digests.add(PromptTemplate("plain").digest)
    assert len(digests) == 3
    assert PromptTemplate("plain").digest == PromptTemplate("plain").digest


def test_chat_text_is_what_the_template_says(tokenizer_of, record_of):
    tokenizer = tokenizer_of("default-system")
    template = resolve_template(tokenizer)
    head = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    # The line break behind <|im_end|> is never generated, and so not learnt either.
    assert template.render_example(tokenizer, record_of("hi", "yes")) == (head, "yes<|im_end|>")


def test_plain_text(tokenizer_of, record_of):
    tokenizer, template = tokenizer_of(), PromptTemplate("plain")
    assert template.render_example(tokenizer, record_of("hi", "yes")) == ("hi\n", "yes</s>")
    assert template.render_prompt(tokenizer, record_of("hi", system="Be kind.")) == "Be kind.\n\nhi\n"


def test_a_template_without_system_role_gets_it_in_the_first_turn(tokenizer_of, record_of):
    tokenizer = tokenizer_of("no-system")
    text = resolve_template(tokenizer).render_prompt(tokenizer, record_of("hi", system="Be kind."))
    assert text == "<|im_start|>user\nBe kind.\n\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_a_template_that_shows_reasoning_in_the_last_answer_can_be_split(tokenizer_of, record_of):
    tokenizer = tokenizer_of("reasoning")
    _, completion = resolve_template(tokenizer).render_example(tokenizer, record_of("hi", "yes"))
    assert completion == "<think>\n\n</think>\n\nyes<|im_end|>"


def test_a_template_that_cannot_be_split_is_refused(tokenizer_of, record_of):
    tokenizer = tokenizer_of("chatml")
    template = PromptTemplate("chat", "{{ messages | length }} turns: {{ messages[0]['content'] }}")
    with pytest.raises(DataError, match=r"r:1: .* cannot be split"):
        template.render_example(tokenizer, record_of("hi"))


def test_a_conversation_that_the_template_refuses(tokenizer_of, record_of):
    template = PromptTemplate("chat", "{{ raise_exception('users only') }}")
    with pytest.raises(DataError, match="refuses a conversation of user: users only") as caught:
        template.render_prompt(tokenizer_of("chatml"), record_of("hi"))
    assert "--template plain" in caught.value.hint


def test_the_date_does_not_change_the_prompt(tokenizer_of, record_of):
    llama = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "{{ date_string }} {{ messages[0]['content'] }}"
    )
    text = PromptTemplate("chat", llama).render_prompt(tokenizer_of("chatml"), record_of("hi"))
    assert text == "26 Jul 2024 hi"


@pytest.mark.parametrize("added", ADDED)
def test_plain_prompts_keep_the_bos_habit_and_never_end_with_eos(tokenizer_of, record_of, added):
    tokenizer = tokenizer_of(None, added)
    ids = PromptTemplate("plain").encode_prompt(tokenizer, record_of("hi"))
    assert decode(tokenizer, ids) == ("" if added == "none" else "<s>") + "hi\n"


@pytest.mark.parametrize("added", ADDED)
@pytest.mark.parametrize("name", ["chatml", "trimming", "system-last", None])
@settings(deadline=None, max_examples=30)
@given(prompt=TEXT, completion=TEXT)
def test_training_sees_the_prompt_of_inference_and_the_whole_completion(
    tokenizer_of, record_of, name, added, prompt, completion
):
    tokenizer = tokenizer_of(name, added)
    template, record = resolve_template(tokenizer), record_of(prompt, completion)
    encoded = template.encode_example(tokenizer, record, 10_000)
    prompt_text, completion_text = template.render_example(tokenizer, record)
    shown, answer = encoded.input_ids[: encoded.prompt_length], encoded.input_ids[encoded.prompt_length :]
    assert list(shown) == template.encode_prompt(tokenizer, record)
    bos = "<s>" if name is None and added != "none" else ""
    assert decode(tokenizer, shown) == bos + prompt_text
    assert decode(tokenizer, answer) == completion_text
    assert completion_text.rstrip().endswith(("</s>", "<|im_end|>"))
    assert encoded.truncated == 0


@pytest.mark.parametrize("added", ["none", "bos"])
@pytest.mark.parametrize("name", ["chatml", "default-system", "mangling", None])
@settings(deadline=None, max_examples=30)
@given(prompt=TEXT, completion=TEXT, max_length=st.integers(2, 60))
def test_what_is_cut_is_counted_and_the_completion_goes_last(
    tokenizer_of, record_of, name, added, prompt, completion, max_length
):
    tokenizer = tokenizer_of(name, added)
    template, record = resolve_template(tokenizer), record_of(prompt, completion)
    try:
        whole = template.encode_example(tokenizer, record, 10_000)
    except DataError:
        assert name == "mangling"
        return
    encoded = template.encode_example(tokenizer, record, max_length)
    assert len(encoded.input_ids) == min(len(whole.input_ids), max_length)
    assert encoded.truncated == len(whole.input_ids) - len(encoded.input_ids)
    assert encoded.prompt_length >= 1
    answer = whole.input_ids[whole.prompt_length :]
    kept = encoded.input_ids[encoded.prompt_length :]
    assert kept == answer[: max_length - 1]
    # The end of the prompt, which opens the answer, is what inference ends with too.
    assert encoded.input_ids[encoded.prompt_length - 1] == whole.input_ids[whole.prompt_length - 1]


def test_the_templates_head_survives_cutting(tokenizer_of, record_of):
    tokenizer = tokenizer_of("chatml")
    template, record = resolve_template(tokenizer), record_of("one two three four five six seven " * 9)
    head = tokenizer("<|im_start|>user\n", add_special_tokens=False)["input_ids"]
    whole = template.encode_prompt(tokenizer, record)
    ids = template.encode_prompt(tokenizer, record, max_length=60)
    assert len(ids) == 60
    assert ids == whole[: len(head)] + whole[len(whole) - 60 + len(head) :]


def test_bos_survives_cutting(tokenizer_of, record_of):
    tokenizer = tokenizer_of(None, "bos")
    ids = PromptTemplate("plain").encode_prompt(tokenizer, record_of("one two three four five six"), max_length=5)
    assert len(ids) == 5
    assert ids[0] == tokenizer.bos_token_id


def test_a_token_over_the_border_does_not_change_the_prompt(tokenizer_of, record_of):
    tokenizer, template = tokenizer_of(), PromptTemplate("plain")
    record = record_of("a", "\nb")  # "\n\n" is one token of the whole text
    encoded = template.encode_example(tokenizer, record, 100)
    assert decode(tokenizer, encoded.input_ids[: encoded.prompt_length]) == "a\n"
    assert decode(tokenizer, encoded.input_ids[encoded.prompt_length :]) == "\nb</s>"


def test_no_room_at_all(tokenizer_of, record_of):
    with pytest.raises(UsageError, match="no room"):
        PromptTemplate("plain").encode_example(tokenizer_of(), record_of("a"), 1)


@pytest.mark.parametrize(
    "name", ["chatml", "trimming", "no-system", "default-system", "system-last", "reasoning", None]
)
@settings(deadline=None, max_examples=40)
@given(contents=st.lists(TEXT, min_size=1, max_size=5).filter(lambda texts: len(texts) % 2 == 1), system=TEXT)
def test_placed_contents_stand_where_they_are_said_to(tokenizer_of, name, contents, system):
    tokenizer = tokenizer_of(name)
    template = resolve_template(tokenizer)
    messages = [Message(("user", "assistant")[index % 2], text) for index, text in enumerate(contents)]
    if template.takes_system(tokenizer):
        messages = [Message("system", system), *messages]
    placed = template.place(tokenizer, messages)
    found = [placed.text[start:stop] for start, stop in placed.spans]
    assert [text.strip() for text in found] == [message.content.strip() for message in messages]
    if name in ("chatml", "default-system", "system-last", None):
        assert found == [message.content for message in messages]
    ordered = sorted(placed.spans)
    assert all(first[1] <= second[0] for first, second in pairwise(ordered))


def test_earlier_reasoning_is_placed_as_the_template_shows_it(tokenizer_of):
    tokenizer = tokenizer_of("reasoning")
    template = resolve_template(tokenizer)
    messages = [Message("user", "a"), Message("assistant", "<think>\nhm\n</think>\n\nb"), Message("user", "c")]
    placed = template.place(tokenizer, messages)
    assert [placed.text[start:stop] for start, stop in placed.spans] == ["a", "b", "c"]


def test_a_template_that_changes_contents_is_refused(tokenizer_of):
    tokenizer = tokenizer_of("mangling")
    with pytest.raises(DataError, match="drops or changes messages"):
        resolve_template(tokenizer).place(tokenizer, [Message("user", "hello")])


def test_only_the_last_turn_of_a_context_is_answered(tokenizer_of, record_of):
    tokenizer = tokenizer_of("chatml")
    context = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    record = replace(record_of("-"), messages=context)
    assert PromptTemplate("plain").render_prompt(tokenizer, record) == "a\nb</s>\n\nc\n"
    text = resolve_template(tokenizer).render_prompt(tokenizer, record)
    assert text.endswith("<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n")
    assert text.count("<|im_start|>assistant") == 2


# --- conversations: which of their tokens are learnt


@pytest.fixture(scope="module")
def conversation_of():
    """A record of a conversation of a user and the assistant in turns."""

    def make(*contents, system=None):
        turns = [Message(("user", "assistant")[index % 2], text) for index, text in enumerate(contents)]
        head = [] if system is None else [Message("system", system)]
        return Record("r", (*head, *turns[:-1]), turns[-1].content, None, {}, "r:1")

    return make


def runs(mask):
    """The ranges in which a mask is true."""
    edges = [index for index, (a, b) in enumerate(pairwise([False, *mask, False])) if a != b]
    return list(zip(edges[::2], edges[1::2], strict=True))


EXCHANGES = st.lists(TEXT, min_size=2, max_size=8).filter(lambda texts: len(texts) % 2 == 0)
# Of each template: how an answer looks in its text.
ANSWER = {
    "chatml": "{}<|im_end|>",
    "marked": "{}<|im_end|>",
    "trimming": "{}<|im_end|>",
    "no-system": "{}<|im_end|>",
    "llama-2": " {} </s>",
    None: "{}</s>",
}
TRIMS = {"trimming", "llama-2"}


@pytest.mark.parametrize("name", ANSWER)
@settings(deadline=None, max_examples=30)
@given(contents=EXCHANGES, system=st.none() | TEXT)
def test_what_is_learnt_is_every_answer_with_its_end(tokenizer_of, conversation_of, name, contents, system):
    tokenizer = tokenizer_of(name, "bos")
    template, record = resolve_template(tokenizer), conversation_of(*contents, system=system)
    encoded = template.encode_example(tokenizer, record, 10_000, loss_on="all")
    answers = [text.strip() if name in TRIMS else text for text in contents[1::2]]
    assert not encoded.rewritten
    assert (encoded.lost, encoded.truncated) == (0, 0)
    learnt = [decode(tokenizer, encoded.input_ids[start:stop]) for start, stop in runs(encoded.label_mask)]
    expected = [ANSWER[name].format(answer) for answer in answers]
    if name is None:  # plain text has no token of its own before an answer, and one may reach over the border
        assert all(
            whole.endswith(found) and found.endswith("</s>") for found, whole in zip(learnt, expected, strict=True)
        )
    else:
        assert learnt == expected
    assert list(encoded.input_ids[: encoded.prompt_length]) == template.encode_prompt(tokenizer, record)
    last = template.encode_example(tokenizer, record, 10_000)
    assert last.input_ids == encoded.input_ids
    assert runs(last.label_mask) == runs(encoded.label_mask)[-1:]


@pytest.mark.parametrize("name", ["chatml", "llama-2"])
@settings(deadline=None, max_examples=30)
@given(contents=EXCHANGES, system=st.none() | TEXT)
def test_each_answer_follows_what_inference_would_have_shown(tokenizer_of, conversation_of, name, contents, system):
    tokenizer = tokenizer_of(name)
    template, record = resolve_template(tokenizer), conversation_of(*contents, system=system)
    encoded = template.encode_example(tokenizer, record, 10_000, loss_on="all")
    for turn, (start, _) in enumerate(runs(encoded.label_mask)):
        so_far = conversation_of(*contents[: 2 * turn + 2], system=system)
        assert list(encoded.input_ids[:start]) == template.encode_prompt(tokenizer, so_far)


@pytest.mark.parametrize("name", ["chatml", "trimming", "llama-2", None])
@settings(deadline=None, max_examples=40)
@given(contents=EXCHANGES, max_length=st.integers(2, 120))
def test_cutting_keeps_labels_on_their_tokens_and_counts_what_is_lost(
    tokenizer_of, conversation_of, name, contents, max_length
):
    tokenizer = tokenizer_of(name)
    template, record = resolve_template(tokenizer), conversation_of(*contents)
    whole = template.encode_example(tokenizer, record, 10_000, loss_on="all")
    encoded = template.encode_example(tokenizer, record, max_length, loss_on="all")
    turns = [whole.input_ids[start:stop] for start, stop in whole.earlier]
    kept = [encoded.input_ids[start:stop] for start, stop in encoded.earlier]
    assert kept == turns[encoded.lost :]
    assert len(encoded.label_mask) == len(encoded.input_ids) <= max_length
    assert encoded.lost == 0 or encoded.truncated > 0
    assert all(start < stop <= encoded.prompt_length for start, stop in encoded.earlier)
    assert all(encoded.label_mask[encoded.prompt_length :])
    # The token before an answer asks for it, and is there too.
    asking = [whole.input_ids[start - 1] for start, _ in whole.earlier]
    assert [encoded.input_ids[start - 1] for start, _ in encoded.earlier] == asking[encoded.lost :]


def test_a_template_that_rewrites_earlier_answers_leaves_the_last_to_learn(tokenizer_of, conversation_of):
    tokenizer = tokenizer_of("reasoning")
    template = resolve_template(tokenizer)
    record = conversation_of("a", "<think>\nhm\n</think>\n\nb", "c", "d", system="be kind")
    encoded = template.encode_example(tokenizer, record, 1000, loss_on="all")
    assert encoded.rewritten
    assert len(runs(encoded.label_mask)) == 1
    [note] = encoding_notes([encoded, replace(encoded, rewritten=False)], 1000)
    assert "1 of 2 rows are learnt by their last answer alone" in note
    single = template.encode_example(tokenizer, conversation_of("a", "b"), 1000, loss_on="all")
    assert not single.rewritten


def test_a_greeting_before_any_question_answers_nothing(tokenizer_of, conversation_of):
    tokenizer = tokenizer_of("chatml")
    record = conversation_of("a", "b", "c", "d")
    record = replace(record, messages=(Message("assistant", "hello"), *record.messages))
    encoded = resolve_template(tokenizer).encode_example(tokenizer, record, 1000, loss_on="all")
    learnt = [decode(tokenizer, encoded.input_ids[start:stop]) for start, stop in runs(encoded.label_mask)]
    assert learnt == ["b<|im_end|>", "d<|im_end|>"]


def test_labels_are_the_learnt_tokens(tokenizer_of, conversation_of):
    tokenizer = tokenizer_of()
    encoded = PromptTemplate("plain").encode_example(tokenizer, conversation_of("a", "b", "c", "d"), 99, loss_on="all")
    assert decode(tokenizer, encoded.input_ids) == "a\nb</s>\n\nc\nd</s>"
    shown = [tokenizer.decode(label) if label >= 0 else "." for label in encoded.labels(-1)]
    assert "".join(shown).replace(".", "") == "b</s>d</s>"


def test_what_is_not_learnt_is_told():
    example = EncodedExample((1, 2, 3), 2, 5, lost=2)
    notes = encoding_notes([example, EncodedExample((1,), 1, 0), EncodedExample((1, 2), 1, 0)], 3)
    assert notes == (
        "1 of 3 rows were longer than 3 tokens and were cut",
        "1 rows lost their whole completion to truncation and were left out",
        "2 earlier answers were cut and are not learnt",
    )
    assert encoding_notes([EncodedExample((1, 2), 1, 0)], 3) == ()
