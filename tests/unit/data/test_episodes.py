from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from p2d_cli.data.chat_templates import resolve_template
from p2d_cli.data.episodes import (
    duplicate_groups,
    encode_episode,
    plan_contrast,
    plan_mining,
    plan_self_mining,
)
from p2d_cli.data.prompts import PromptTemplate
from p2d_cli.data.records import Message
from p2d_cli.errors import DataError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=25).filter(str.strip)
WORDS = st.lists(st.sampled_from(["apples", "Paris", "é", "12", "song"]), min_size=1, max_size=6).map(" ".join)
TEMPLATES = ["chatml", "trimming", "no-system", "default-system", "system-last", "reasoning", None]


def different(count, start=0):
    return np.arange(start, start + count)


def decode(tokenizer, encoded, mask):
    ids = [token for token, chosen in zip(encoded.input_ids, mask, strict=True) if chosen]
    return tokenizer.decode(ids, skip_special_tokens=False)


# --- planning


def test_rows_that_say_the_same_share_a_group(record_of):
    pool = [record_of("a  b", "c"), record_of("x"), record_of("A b", "C")]
    pool_groups, target_groups = duplicate_groups(pool, [record_of("X", "YES"), record_of("a b", "d")])
    assert pool_groups.tolist() == [0, 1, 0]
    assert target_groups.tolist() == [1, 2]
    assert duplicate_groups(pool)[1].tolist() == []


@settings(deadline=None)
@given(
    num_pool=st.integers(1, 40),
    num_targets=st.integers(1, 12),
    demos=st.integers(1, 6),
    queries=st.integers(1, 3),
    draws=st.integers(1, 3),
    shared=st.integers(0, 12),
    seed=st.integers(0, 99),
)
def test_mining_deals_every_row_and_never_asks_a_duplicate(num_pool, num_targets, demos, queries, draws, shared, seed):
    shared = min(shared, num_pool, num_targets)
    groups = {"pool_groups": different(num_pool), "target_groups": different(num_targets, num_pool - shared)}

    def plan():
        rng = np.random.default_rng(seed)
        return plan_mining(num_pool, num_targets, demos=demos, queries=queries, draws=draws, rng=rng, **groups)

    if num_pool < demos or num_targets < queries:
        with pytest.raises(DataError, match=r"has \d+ rows"):
            plan()
        return
    try:
        episodes = plan()
    except DataError:
        # Only where the demos of one episode could duplicate so many targets that too few are left.
        assert min(shared, demos) > num_targets - queries
        return
    assert episodes == plan()
    for draw in range(draws):
        dealt = Counter(row for episode in episodes if episode.draw == draw for row in episode.demos)
        assert set(dealt) == set(range(num_pool))
        assert sum(dealt.values()) == -(-num_pool // demos) * demos
        assert max(dealt.values()) <= 2
    for episode in episodes:
        assert len(set(episode.demos)) == demos
        assert len(set(episode.queries)) == queries
        shown = set(groups["pool_groups"][list(episode.demos)])
        assert not shown & set(groups["target_groups"][list(episode.queries)])
        assert episode.target_demo is None


@settings(deadline=None)
@given(num_targets=st.integers(2, 20), queries=st.integers(1, 2), seed=st.integers(0, 99))
def test_targets_are_used_evenly(num_targets, queries, seed):
    rng = np.random.default_rng(seed)
    groups = {"pool_groups": different(60), "target_groups": different(num_targets, 60)}
    plan = plan_mining(60, num_targets, demos=5, queries=queries, draws=2, rng=rng, **groups)
    uses = Counter(row for episode in plan for row in episode.queries)
    counts = [uses[row] for row in range(num_targets)]
    assert max(counts) - min(counts) <= 1


def test_draws_give_other_neighbours():
    rng = np.random.default_rng(0)
    groups = {"pool_groups": different(50), "target_groups": different(4, 50)}
    plan = plan_mining(50, 4, demos=5, queries=1, draws=2, rng=rng, **groups)
    assert {frozenset(e.demos) for e in plan if e.draw == 0}.isdisjoint({frozenset(e.demos) for e in plan if e.draw})


def test_demos_that_block_all_targets_together_are_parted():
    # Two targets, each with twenty copies in the pool: no episode may hold copies of both.
    pool_groups = np.array([0] * 20 + [1] * 20 + list(range(2, 62)))
    rng = np.random.default_rng(0)
    groups = {"pool_groups": pool_groups, "target_groups": np.array([0, 1])}
    for episode in plan_mining(100, 2, demos=5, queries=1, draws=2, rng=rng, **groups):
        shown = set(pool_groups[list(episode.demos)])
        assert not {0, 1} <= shown
        assert episode.queries[0] not in shown


def test_a_row_that_duplicates_the_only_target_has_no_query():
    groups = {"pool_groups": different(20), "target_groups": np.array([3])}
    with pytest.raises(DataError, match="no query left"):
        plan_mining(20, 1, demos=2, queries=1, draws=1, rng=np.random.default_rng(0), **groups)


@settings(deadline=None)
@given(
    groups=st.lists(st.integers(0, 30), min_size=1, max_size=40),
    demos=st.integers(1, 4),
    queries=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_self_mining_asks_rows_of_the_other_fold(groups, demos, queries, seed):
    pool_groups = np.array(groups)
    rng = np.random.default_rng(seed)
    options = {"demos": demos, "queries": queries, "draws": 2, "rng": rng, "pool_groups": pool_groups}
    largest = max(Counter(groups).values())
    # The smaller fold is at most half of the pool, or what the largest group leaves, and at least half of that.
    if min(len(groups) // 2, len(groups) - largest) < max(demos, queries):
        with pytest.raises(DataError, match="half of the pool"):
            plan_self_mining(len(groups), **options)
        return
    assume((len(groups) - largest) / 2 >= max(demos, queries))
    plan = plan_self_mining(len(groups), **options)
    for draw in range(2):
        shown = [set(episode.demos) for episode in plan if episode.draw == draw]
        assert set().union(*shown) == set(range(len(groups)))
    for episode in plan:
        assert not set(pool_groups[list(episode.demos)]) & set(pool_groups[list(episode.queries)])
        assert len(set(episode.queries)) == queries


@settings(deadline=None)
@given(
    num_targets=st.integers(2, 10),
    num_pool=st.integers(6, 30),
    demos=st.integers(2, 4),
    shared=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_contrast_shows_one_target_and_asks_another(num_targets, num_pool, demos, shared, seed):
    pool_groups, target_groups = different(num_pool), different(num_targets, num_pool - min(shared, num_targets))
    plan = plan_contrast(
        num_targets,
        num_pool,
        demos=demos,
        episodes=30,
        rng=np.random.default_rng(seed),
        pool_groups=pool_groups,
        target_groups=target_groups,
    )
    assert len(plan) == 30
    for episode in plan:
        target = target_groups[episode.demos[episode.target_demo]]
        others = [row for slot, row in enumerate(episode.demos) if slot != episode.target_demo]
        meeting = [target, target_groups[episode.queries[0]], *pool_groups[others]]
        assert len(episode.demos) == demos
        assert len(set(meeting)) == demos + 1
    shown = Counter(episode.demos[episode.target_demo] for episode in plan)
    assert max(shown.values()) - min(shown[row] for row in range(num_targets)) <= 1


def test_contrast_uses_every_slot():
    groups = {"pool_groups": different(50), "target_groups": different(5, 50)}
    plan = plan_contrast(5, 50, demos=4, episodes=80, rng=np.random.default_rng(0), **groups)
    assert {episode.target_demo for episode in plan} == {0, 1, 2, 3}


def test_contrast_needs_two_different_targets():
    groups = {"pool_groups": different(50), "target_groups": np.array([7, 7, 7])}
    with pytest.raises(DataError, match="3 rows, 1 different"):
        plan_contrast(3, 50, demos=4, episodes=8, rng=np.random.default_rng(0), **groups)


def test_small_pools_are_named():
    groups = {"pool_groups": different(3), "target_groups": different(5, 3)}
    with pytest.raises(DataError, match="the pool has 3 rows; an episode needs 5 demos"):
        plan_mining(3, 5, demos=5, queries=1, draws=1, rng=np.random.default_rng(0), **groups)
    with pytest.raises(DataError, match="the pool has 3 rows"):
        plan_contrast(5, 3, demos=5, episodes=1, rng=np.random.default_rng(0), **groups)
    with pytest.raises(DataError, match="half of the pool has 1 rows"):
        plan_self_mining(3, demos=2, queries=1, draws=1, rng=np.random.default_rng(0), pool_groups=different(3))


# --- tokens


@pytest.mark.parametrize("added", ["none", "bos", "bos-eos"])
@pytest.mark.parametrize("name", TEMPLATES)
@settings(deadline=None, max_examples=20)
@given(rows=st.lists(st.tuples(TEXT, TEXT), min_size=2, max_size=5), queries=st.integers(1, 2))
def test_tokens_belong_to_the_row_they_come_from(tokenizer_of, record_of, name, added, rows, queries):
    tokenizer = tokenizer_of(name, added)
    template = resolve_template(tokenizer)
    records = [record_of(prompt, completion) for prompt, completion in rows]
    demos, asked = records[: len(records) - queries], records[len(records) - queries :]
    encoded = encode_episode(template, tokenizer, demos, asked, max_length=10_000)
    segments = np.array(encoded.segment_ids)
    answers, query = np.array(encoded.answer_mask), np.array(encoded.query_mask)

    for index, record in enumerate(demos):
        text = decode(tokenizer, encoded, segments == index)
        assert record.prompt.strip() in text
        assert record.completion.strip() in text
        assert text.index(record.prompt.strip()) <= text.rindex(record.completion.strip())
        assert np.ptp(np.flatnonzero(segments == index)) + 1 == (segments == index).sum()
    assert [*dict.fromkeys(segments[segments >= 0].tolist())] == list(range(len(demos)))
    assert not query[segments >= 0].any()
    assert not (answers & ~query).any()
    if demos:
        assert np.flatnonzero(query).min() > np.flatnonzero(segments >= 0).max()
    assert answers[-1]
    runs = np.flatnonzero(np.diff(np.concatenate([[0], answers.astype(int)])) == 1)
    assert len(runs) == queries
    for run, record in zip(runs, asked, strict=True):
        stop = run + np.argmin(np.append(answers[run:], False))
        mask = (np.arange(len(answers)) >= run) & (np.arange(len(answers)) < stop)
        assert decode(tokenizer, encoded, mask).strip() == record.completion.strip()
    assert encoded.truncated_demos == 0
    # Position 0 draws attention whatever stands there: it is nobody's.
    assert segments[0] == -1
    assert not query[0]


@pytest.mark.parametrize(
    ("name", "between", "lead"),
    [
        ("chatml", "<|im_end|>\n<|im_start|>assistant\n", "<|im_start|>user\n"),
        ("system-last", " [/INST] ", "<s>[INST] "),
        (None, "\n", "\n\n"),
    ],
)
@settings(deadline=None, max_examples=30)
@given(rows=st.lists(st.tuples(WORDS, WORDS), min_size=2, max_size=5))
def test_segments_hold_contents_and_nothing_around_them(tokenizer_of, record_of, name, between, lead, rows):
    tokenizer = tokenizer_of(name)
    records = [record_of(prompt, completion) for prompt, completion in rows]
    encoded = encode_episode(resolve_template(tokenizer), tokenizer, records[:-1], records[-1:], max_length=10_000)
    segments = np.array(encoded.segment_ids)
    for index, (prompt, completion) in enumerate(rows[:-1]):
        # A leading space of the answer may be part of its first token.
        text = decode(tokenizer, encoded, segments == index)
        assert text.removeprefix(" ").replace(between.rstrip(" "), "|").replace("| ", "|") == f"{prompt}|{completion}"
    assert decode(tokenizer, encoded, encoded.answer_mask).removeprefix(" ") == rows[-1][1]
    assert tokenizer.decode(list(encoded.input_ids), skip_special_tokens=False).startswith(lead)


def test_plain_text_is_one_row_after_the_other(tokenizer_of, record_of):
    rows = [record_of("a", "b"), record_of("c", "d"), record_of("e", "f")]
    texts = {}
    for added in ("none", "bos-eos"):
        tokenizer = tokenizer_of(None, added)
        encoded = encode_episode(PromptTemplate("plain"), tokenizer, rows[:2], rows[2:], max_length=99)
        texts[added] = tokenizer.decode(list(encoded.input_ids), skip_special_tokens=False)
    assert texts == {"none": "\n\na\nb\n\nc\nd\n\ne\nf", "bos-eos": "<s>a\nb\n\nc\nd\n\ne\nf"}


@pytest.mark.parametrize("name", ["chatml", "system-last", None])
def test_a_shared_system_message_stands_once_and_is_nobodys(tokenizer_of, record_of, name):
    tokenizer = tokenizer_of(name)
    rows = [record_of(word, "yes", system="Be kind.") for word in ("one", "two", "three")]
    encoded = encode_episode(resolve_template(tokenizer), tokenizer, rows[:2], rows[2:], max_length=999)
    assert decode(tokenizer, encoded, [True] * len(encoded.input_ids)).count("Be kind.") == 1
    owned = np.array(encoded.segment_ids) >= 0
    assert "kind" not in decode(tokenizer, encoded, owned | np.array(encoded.query_mask))


@pytest.mark.parametrize("name", ["chatml", "no-system", None])
def test_system_messages_of_their_own_stand_with_their_rows(tokenizer_of, record_of, name):
    tokenizer = tokenizer_of(name)
    rows = [record_of("one", system="Be kind."), record_of("two"), record_of("three", system="Be brief.")]
    encoded = encode_episode(resolve_template(tokenizer), tokenizer, rows[:2], rows[2:], max_length=999)
    segments = np.array(encoded.segment_ids)
    assert decode(tokenizer, encoded, segments == 0).startswith("Be kind.\n\none")
    assert decode(tokenizer, encoded, segments == 1).startswith("two")
    assert decode(tokenizer, encoded, encoded.query_mask).startswith("Be brief.\n\nthree")


def test_all_turns_of_a_demo_are_one_segment(tokenizer_of, record_of):
    tokenizer = tokenizer_of("chatml")
    context = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    demo = replace(record_of("-", "d"), messages=context)
    encoded = encode_episode(resolve_template(tokenizer), tokenizer, [demo], [record_of("e")], max_length=999)
    text = decode(tokenizer, encoded, np.array(encoded.segment_ids) == 0)
    assert text.split("<|im_start|>") == [
        "a<|im_end|>\n",
        "assistant\nb<|im_end|>\n",
        "user\nc<|im_end|>\n",
        "assistant\nd",
    ]


@pytest.mark.parametrize("name", ["chatml", "trimming", "default-system", None])
@settings(deadline=None, max_examples=40)
@given(
    rows=st.lists(st.tuples(TEXT, WORDS), min_size=2, max_size=4),
    query=st.tuples(WORDS, WORDS),
    max_length=st.integers(20, 160),
)
def test_long_demos_are_cut_and_counted(tokenizer_of, record_of, name, rows, query, max_length):
    tokenizer = tokenizer_of(name)
    template, asked = resolve_template(tokenizer), [record_of(*query)]
    demos = [record_of(prompt * 3, completion) for prompt, completion in rows]
    whole = encode_episode(template, tokenizer, demos, asked, max_length=10_000)
    smallest = [record_of("a", "b")] * len(demos)
    least = encode_episode(template, tokenizer, smallest, asked, max_length=10_000)
    if len(least.input_ids) > max_length:
        with pytest.raises(DataError, match=r"no room for|cannot be cut"):
            encode_episode(template, tokenizer, demos, asked, max_length=max_length)
        return
    assume(len(least.input_ids) + 4 * len(demos) <= max_length)  # the first character may take four tokens
    encoded = encode_episode(template, tokenizer, demos, asked, max_length=max_length)
    assert len(encoded.input_ids) <= max_length
    assert decode(tokenizer, encoded, encoded.query_mask) == decode(tokenizer, whole, whole.query_mask)
    before, after = Counter(whole.segment_ids), Counter(encoded.segment_ids)
    cut = [index for index in range(len(demos)) if after[index] != before[index]]
    assert encoded.truncated_demos >= len(cut)
    assert (encoded.truncated_demos == 0) == (len(whole.input_ids) <= max_length)
    assert all(after[index] >= 1 for index in range(len(demos)))
    # Short demos pay nothing for long ones: nobody is cut below another's uncut length.
    if cut:
        allowed = max(after[index] for index in cut)
        assert all(after[index] <= allowed + 3 for index in range(len(demos)))


def test_a_cut_demo_loses_the_end_of_its_prompt(tokenizer_of, record_of):
    tokenizer = tokenizer_of()
    long = "How many apples does Anna have? " * 8
    demos = [record_of(long, "She had 12"), record_of("user", "Paris")]
    whole = encode_episode(PromptTemplate("plain"), tokenizer, demos, [record_of("song")], max_length=999)
    room = len(whole.input_ids) - 20
    encoded = encode_episode(PromptTemplate("plain"), tokenizer, demos, [record_of("song")], max_length=room)
    segments = np.array(encoded.segment_ids)
    prompt, completion = decode(tokenizer, encoded, segments == 0).split("\n")
    assert encoded.truncated_demos == 1
    assert long.startswith(prompt)
    assert len(prompt) < len(long)
    assert completion == "She had 12"
    assert decode(tokenizer, encoded, segments == 1) == "user\nParis"


def test_a_completion_that_does_not_fit_by_itself_is_cut_too(tokenizer_of, record_of):
    tokenizer = tokenizer_of()
    demos = [record_of("Anna", "The capital of France is Paris. " * 20)]
    encoded = encode_episode(PromptTemplate("plain"), tokenizer, demos, [record_of("song")], max_length=40)
    text = decode(tokenizer, encoded, np.array(encoded.segment_ids) == 0)
    assert encoded.truncated_demos == 1
    assert len(encoded.input_ids) == 40
    assert "\nThe capital of" in text


def test_queries_that_do_not_fit_are_refused(tokenizer_of, record_of):
    tokenizer = tokenizer_of()
    query = record_of("The capital of France is Paris. " * 20, name="q")
    with pytest.raises(DataError, match=r"the query q:1 takes \d+ of 40 tokens"):
        encode_episode(PromptTemplate("plain"), tokenizer, [record_of("a")], [query], max_length=40)


def test_a_tokenizer_without_offsets_is_refused(record_of):
    class Slow:
        is_fast = False

    with pytest.raises(DataError, match="fast tokenizer"):
        encode_episode(PromptTemplate("plain"), Slow(), [record_of("a")], [record_of("b")], max_length=40)


def test_a_template_that_cannot_be_taken_apart_is_refused(tokenizer_of, record_of):
    tokenizer = tokenizer_of("mangling")
    with pytest.raises(DataError, match="cannot be told apart"):
        encode_episode(resolve_template(tokenizer), tokenizer, [record_of("a")], [record_of("b")], max_length=40)
