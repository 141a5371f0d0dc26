"""Few-shot episodes: which rows meet in them, and their tokens.

An episode shows some demos, each a prompt with its completion, and then queries with their reference answers. How
much the queries' tokens attend to each demo's is what p2d weighs rows and heads by (as Data Whisperer does for
rows, arXiv:2505.12212).

Legend: N pool rows, Q target rows, S demos of an episode, T tokens.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2d_cli.data.prompts import PromptTemplate, Span, fold_system
from p2d_cli.data.records import Message, Record
from p2d_cli.errors import DataError

Groups = NDArray[np.int64]
"""A number for each row; rows that say the same share it."""

_Turns = tuple[Message, ...]
_SEPARATOR = "\n\n"
_SWAPS = 2000
_CUTS = 8


@dataclass(frozen=True)
class Episode:
    """Which rows meet, by their positions in the pool and among the targets."""

    demos: tuple[int, ...]
    """Pool rows, in the order shown; the one at slot `target_demo` is a target row."""
    queries: tuple[int, ...]
    """Target rows (pool rows, where the pool queries itself)."""
    target_demo: int | None
    """The slot whose demo comes from the targets (contrast only)."""
    draw: int
    """The round of dealing that the episode belongs to."""


@dataclass(frozen=True)
class EncodedEpisode:
    """An episode as T tokens; the masks have one entry a token."""

    input_ids: tuple[int, ...]
    segment_ids: tuple[int, ...]
    """The demo that the token belongs to, from 0 in the order shown, or -1."""
    query_mask: tuple[bool, ...]
    """Tokens of the queries, from prompt to answer."""
    answer_mask: tuple[bool, ...]
    """Tokens of the reference answers alone; one run a query."""
    truncated_demos: int
    """Demos that were cut to fit."""


# --- planning


def duplicate_groups(records_a: Sequence[Record], records_b: Sequence[Record] = ()) -> tuple[Groups, Groups]:
    """Give each row of two lists a number, such that rows that say the same share it.

    Prompt and completion are compared without regard to case and white space.
    """
    numbers: dict[str, int] = {}

    def number(records: Sequence[Record]) -> Groups:
        return np.array([numbers.setdefault(record.plain_text, len(numbers)) for record in records], dtype=np.int64)

    return number(records_a), number(records_b)


def plan_mining(
    num_pool: int,
    num_targets: int,
    *,
    demos: int,
    queries: int,
    draws: int,
    rng: np.random.Generator,
    pool_groups: Groups,
    target_groups: Groups,
) -> list[Episode]:
    """Deal the pool into episodes, `draws` times over, and the targets to them as queries.

    In each draw every pool row is a demo once, with other neighbours than before; only the last episode of a draw
    is filled up with rows that have been dealt. Targets are used evenly. A query never meets its duplicate.

    Args:
        num_pool: N.
        num_targets: Q.
        demos: demos an episode, S.
        queries: different queries an episode.
        draws: how often the pool is dealt.
        rng: source of all chance.
        pool_groups: `[N]`, see `duplicate_groups`.
        target_groups: `[Q]`.

    Raises:
        DataError: too few rows, or duplicates that leave some row no query.
    """
    _require_rows("the pool", num_pool, demos, "demos")
    _require_rows("the target", num_targets, queries, "queries")
    deck = _Deck(target_groups, rng, "target")
    plan = []
    for draw in range(draws):
        hands = _deal(list(range(num_pool)), demos, rng)
        _separate(hands, pool_groups.tolist(), Counter(target_groups.tolist()), num_targets - queries, rng)
        for hand in hands:
            asked = deck.take(queries, avoid={int(pool_groups[row]) for row in hand})
            plan.append(Episode(demos=tuple(hand), queries=tuple(asked), target_demo=None, draw=draw))
    return plan


def plan_self_mining(
    num_pool: int, *, demos: int, queries: int, draws: int, rng: np.random.Generator, pool_groups: Groups
) -> list[Episode]:
    """Deal the pool into episodes whose queries come from the pool as well, as Data Whisperer does.

    Each draw parts the pool anew into two folds, duplicates together, and the rows of one query those of the
    other. Arguments as in `plan_mining`; an episode's `queries` are positions in the pool.

    Raises:
        DataError: too few different rows for two folds.
    """
    _require_rows("half of the pool", num_pool // 2, demos, "demos")
    plan = []
    for draw in range(draws):
        first, second = _two_folds(pool_groups, rng)
        for shown, asking in ((first, second), (second, first)):
            _require_rows("half of the pool", len(shown), demos, "demos")
            _require_rows("half of the pool", len(asking), queries, "queries")
            deck = _Deck(pool_groups[asking], rng, "pool")
            for hand in _deal(shown, demos, rng):
                asked = tuple(asking[index] for index in deck.take(queries, avoid=set()))
                plan.append(Episode(demos=tuple(hand), queries=asked, target_demo=None, draw=draw))
    return plan


def plan_contrast(
    num_targets: int,
    num_pool: int,
    *,
    demos: int,
    episodes: int,
    rng: np.random.Generator,
    pool_groups: Groups,
    target_groups: Groups,
) -> list[Episode]:
    """Plan so many episodes in which one target demo stands among pool demos, and another target row asks.

    The target demo's slot is random; no two of target demo, query and pool demos (but for two pool demos) are
    duplicates. Targets and pool rows are used evenly. Arguments as in `plan_mining`; `demos` counts the target demo.

    Raises:
        DataError: too few pool rows, or fewer than two different target rows.
    """
    _require_rows("the pool", num_pool, demos - 1, "demos beside the target's")
    if (different := len(np.unique(target_groups))) < 2:
        raise DataError(
            f"expected at least two different target rows, one to show and one to ask; found {num_targets} rows, "
            f"{different} different",
            hint="give more target rows",
        )
    shown, asked = _Deck(target_groups, rng, "target"), _Deck(target_groups, rng, "target")
    others = _Deck(pool_groups, rng, "pool")
    plan = []
    for _ in range(episodes):
        [demo] = shown.take(1, avoid=set())
        [query] = asked.take(1, avoid={int(target_groups[demo])})
        hand = others.take(demos - 1, avoid={int(target_groups[demo]), int(target_groups[query])})
        slot = int(rng.integers(demos))
        hand.insert(slot, demo)
        plan.append(Episode(demos=tuple(hand), queries=(query,), target_demo=slot, draw=0))
    return plan


def _require_rows(what: str, found: int, needed: int, role: str) -> None:
    if found < needed:
        message = f"{what} has {found} rows; an episode needs {needed} {role}"
        raise DataError(message, hint=f"give more rows, or ask for fewer {role}")


def _deal(rows: Sequence[int], size: int, rng: np.random.Generator) -> list[list[int]]:
    """Shuffle the rows and cut them into hands; the last is filled up with rows of the others."""
    order = [rows[index] for index in rng.permutation(len(rows))]
    hands = [order[start : start + size] for start in range(0, len(order), size)]
    missing = size - len(hands[-1])
    dealt = order[: len(order) - len(hands[-1])]
    hands[-1] += [dealt[index] for index in rng.permutation(len(dealt))[:missing]]
    return hands


def _separate(
    hands: list[list[int]], groups: Sequence[int], copies: Counter[int], spare: int, rng: np.random.Generator
) -> None:
    """Swap demos between hands, in place, until each hand leaves enough targets that none of its demos duplicates.

    Args:
        hands: rows of the pool.
        groups: of all rows of the pool.
        copies: how many targets there are of each group.
        spare: how many targets an episode can do without.
        rng: source of all chance.
    """

    def blocked(hand: Sequence[int]) -> int:
        return sum(copies[group] for group in {groups[row] for row in hand})

    for position, hand in enumerate(hands):
        attempts = 0
        while blocked(hand) > spare:
            attempts += 1
            if attempts > _SWAPS or len(hands) == 1:
                raise DataError(
                    "too many pool rows duplicate target rows: an episode with them has no query left",
                    hint="take the target rows out of the pool, give more target rows, or lower --demos",
                )
            index = int(rng.integers(len(hands) - 1))
            other = hands[index + (index >= position)]
            here, there = int(rng.integers(len(hand))), int(rng.integers(len(other)))
            given, got = hand[here], other[there]
            # Only a duplicate of a target is worth a swap, and no row may repeat, nor either hand get worse.
            if copies[groups[given]] == 0 or got in hand or given in other:
                continue
            new_hand = [*hand[:here], got, *hand[here + 1 :]]
            new_other = [*other[:there], given, *other[there + 1 :]]
            if blocked(new_hand) <= blocked(hand) and blocked(new_other) <= max(spare, blocked(other)):
                hand[here], other[there] = got, given


def _two_folds(groups: Groups, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """Part rows into two folds of nearly equal size, no group in both; the largest groups are placed first."""
    members: dict[int, list[int]] = {}
    for row, group in enumerate(groups.tolist()):
        members.setdefault(group, []).append(row)
    together = list(members.values())
    shuffled = [together[index] for index in rng.permutation(len(together))]
    first: list[int] = []
    second: list[int] = []
    for rows in sorted(shuffled, key=len, reverse=True):
        (first if len(first) <= len(second) else second).extend(rows)
    return first, second


class _Deck:
    """Rows in shuffled rounds: every row once before any a second time, as far as exclusions allow."""

    def __init__(self, groups: Groups, rng: np.random.Generator, what: str) -> None:
        self._groups = groups
        self._rng = rng
        self._what = what
        self._rows: deque[int] = deque()

    def take(self, count: int, *, avoid: set[int]) -> list[int]:
        """Return `count` different rows of none of these groups; rows passed over come first the next time."""
        taken: list[int] = []
        passed: list[int] = []
        fresh = 0
        while len(taken) < count:
            if not self._rows:
                fresh += 1
                if fresh > 2:
                    raise DataError(
                        f"the {self._what} rows that are no duplicates of an episode's other rows are too few: "
                        f"expected {count}, found {len(taken)}",
                        hint=f"give more different {self._what} rows",
                    )
                self._rows.extend(self._rng.permutation(len(self._groups)).tolist())
            row = self._rows.popleft()
            (passed if int(self._groups[row]) in avoid or row in taken else taken).append(row)
        self._rows.extendleft(reversed(passed))
        return taken


# --- tokens


def encode_episode(
    template: PromptTemplate,
    tokenizer: Any,
    demos: Sequence[Record],
    queries: Sequence[Record],
    *,
    max_length: int,
) -> EncodedEpisode:
    r"""Turn an episode into tokens, with the demo, query or answer that each token belongs to.

    Chat templates get one conversation with a turn pair a row; plain text has `{prompt}\n{completion}\n\n` a row.
    The text ends with the last answer. It is tokenized once, and a token belongs to the row whose characters it
    overlaps, from the first of the prompt's content to the last of the completion's: what the template writes
    between rows belongs to none. A system message that all rows share stands once before them, otherwise each
    row's stands with its prompt.

    Plain text for a tokenizer without BOS starts with a blank line. Models send attention to the first token
    whatever it is (an attention sink), and it must not be one of the first demo's.

    An episode that is too long has its long demos cut to equal length: the prompt at its end first, and the
    completion's end only where the prompt alone does not suffice. Queries are never cut.

    Args:
        template: how rows are shown.
        tokenizer: a fast tokenizer.
        demos: S rows, in the order to be shown.
        queries: at least one row.
        max_length: largest T.

    Raises:
        DataError: the queries alone do not fit; the chat template cannot be taken apart; a tokenizer without
            offsets.
    """
    if not tokenizer.is_fast:
        raise DataError("few-shot episodes need a fast tokenizer, one that tells each token's characters")
    for record in (*demos, *queries):
        turns = (*record.messages, record.answer)
        if record.tools or any("tool_calls" in turn.parts or turn.role == "tool" for turn in turns):
            raise DataError(
                f"{record.where}: few-shot episodes cannot show tools and their calls",
                hint="let heads read rows one at a time: --affinity readout, and score-heads --method readout",
            )
    system, rows = _conversation(template, tokenizer, [*demos, *queries])
    cut: set[int] = set()
    for _ in range(_CUTS):
        located = _locate(template, tokenizer, system, rows)
        if len(located.input_ids) <= max_length:
            return _mask(located, len(demos), len(cut))
        shorter = _shorten_demos(rows, located, len(demos), max_length, queries[0].where)
        cut |= {row for row, new in enumerate(shorter) if new != rows[row]}
        rows = shorter
    message = f"the demos for {queries[0].where} cannot be cut to --max-length {max_length}"
    raise DataError(message, hint="raise --max-length or lower --demos")


def _conversation(
    template: PromptTemplate, tokenizer: Any, records: Sequence[Record]
) -> tuple[list[Message], list[_Turns]]:
    """Return the system message that all rows share, if they do, and the turns of each row, its completion last."""
    shared = {record.system for record in records}
    apart = len(shared) == 1 and shared != {None} and template.takes_system(tokenizer)
    rows = []
    for record in records:
        turns = template.conversation(tokenizer, record)
        if apart:
            turns = [turn for turn in turns if turn.role != "system"]
        elif any(turn.role == "system" for turn in turns):
            turns = fold_system(turns)
        rows.append((*turns, record.answer))
    return [Message("system", shared.pop() or "")] if apart else [], rows


@dataclass(frozen=True)
class _Located:
    """An episode's text and tokens, and the characters of each message's content, row by row."""

    text: str
    input_ids: tuple[int, ...]
    offsets_T2: NDArray[np.int64]
    spans: tuple[tuple[Span, ...], ...]

    def tokens_in(self, span: Span) -> NDArray[np.bool_]:
        """Return `[T]`, true for tokens that overlap these characters."""
        starts_T, stops_T = self.offsets_T2.T
        inside_T: NDArray[np.bool_] = (starts_T < span[1]) & (stops_T > span[0])
        return inside_T

    def tokens_of(self, row: int) -> NDArray[np.bool_]:
        """Return `[T]`, true for tokens from the first of a row's contents to the last."""
        return self.tokens_in((self.spans[row][0][0], self.spans[row][-1][1]))


def _locate(template: PromptTemplate, tokenizer: Any, system: list[Message], rows: Sequence[_Turns]) -> _Located:
    """Render and tokenize; the last answer is written as it is behind what the template writes before answers."""
    turns = [turn for row in rows for turn in row]
    placed = template.place(tokenizer, [*system, *turns[:-1]])
    adds_bos = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"][0]
    blank = "" if template.name == "chat" or adds_bos else _SEPARATOR
    answer = turns[-1].content
    text = blank + placed.text + template.simple_frame(tokenizer).lead + answer
    spans = iter(
        [
            *((start + len(blank), stop + len(blank)) for start, stop in placed.spans[len(system) :]),
            (len(text) - len(answer), len(text)),
        ]
    )
    input_ids, offsets = template.tokenize(tokenizer, text)
    by_row = tuple(tuple(islice(spans, len(row))) for row in rows)
    return _Located(text, tuple(input_ids), np.array(offsets, dtype=np.int64).reshape(-1, 2), by_row)


def _mask(located: _Located, num_demos: int, truncated: int) -> EncodedEpisode:
    segments_T = np.full(len(located.input_ids), -1, dtype=np.int64)
    query_T = np.zeros(len(located.input_ids), dtype=np.bool_)
    answer_T = query_T.copy()
    for row, spans in enumerate(located.spans):
        mine_T = located.tokens_of(row) & (segments_T == -1) & ~query_T
        if row < num_demos:
            segments_T[mine_T] = row
        else:
            query_T |= mine_T
            mine_T &= located.tokens_in(spans[-1])
            answer_T |= mine_T
        if not mine_T.any():
            raise DataError("the tokenizer's offsets are wrong: a row of an episode has no token of its own")
    return EncodedEpisode(
        input_ids=located.input_ids,
        segment_ids=tuple(segments_T.tolist()),
        query_mask=tuple(query_T.tolist()),
        answer_mask=tuple(answer_T.tolist()),
        truncated_demos=truncated,
    )


def _shorten_demos(
    rows: Sequence[_Turns], located: _Located, num_demos: int, max_length: int, where: str
) -> list[_Turns]:
    """Cut the longest demos to one common number of tokens, such that the episode should fit."""
    lengths = [int(located.tokens_of(row).sum()) for row in range(num_demos)]
    fixed = len(located.input_ids) - sum(lengths)
    cap = _equal_share(lengths, max_length - fixed)
    shorter = list(rows)
    for row, length in enumerate(lengths):
        if length <= cap:
            continue
        if (cut := _cut_row(rows[row], located, located.spans[row], length - cap)) is None:
            raise DataError(
                f"the query {where} takes {fixed} of {max_length} tokens, which leaves no room for {num_demos} demos",
                hint="raise --max-length, or lower --demos or --queries",
            )
        shorter[row] = cut
    return shorter


def _equal_share(lengths: Sequence[int], room: int) -> int:
    """Return the largest cap under which the lengths, none above it, sum to at most `room`; 0 if there is none."""
    for rank, length in enumerate(sorted(lengths)):
        share = room // (len(lengths) - rank)
        if share < length:
            return max(share, 0)
        room -= length
    return max(lengths, default=0)


def _cut_row(turns: _Turns, located: _Located, spans: Sequence[Span], surplus: int) -> _Turns | None:
    """Cut so many tokens: from the end of the last prompt turn, then of those before it, then of the completion.

    Every turn keeps a token; `None` where that leaves too many.
    """
    cut = list(turns)
    for index in (*reversed(range(len(turns) - 1)), len(turns) - 1):
        tokens = np.flatnonzero(located.tokens_in(spans[index]))
        kept = max(len(tokens) - surplus, 1)
        if kept >= len(tokens):
            continue
        surplus -= len(tokens) - kept
        # Bytes of one character are tokens with the same offsets: cut before the first that goes.
        stop = min(located.offsets_T2[tokens[kept - 1], 1], located.offsets_T2[tokens[kept], 0])
        cut[index] = replace(turns[index], content=located.text[spans[index][0] : max(stop, spans[index][0])])
    return None if surplus else tuple(cut)
