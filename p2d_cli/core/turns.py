"""Where the answer stands in a turn of the assistant, whether a chat template or a model wrote the turn.

A turn is more than its answer. Templates write a role header, an empty think block or a closing tag around it, and
reasoning models think before they answer. Metrics, likelihoods and readout look at the answer alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

Block = tuple[str, str]
"""How a think block is opened and closed."""

THINK: Block = ("<think>", "</think>")
"""DeepSeek R1, Qwen3, SmolLM3, OLMo, MiniMax and most others."""
REASONING: tuple[Block, ...] = (
    THINK,
    ("<|channel|>analysis<|message|>", "<|start|>assistant"),  # gpt-oss (harmony), before its final or commentary turn
    ("<|channel>thought", "<channel|>"),  # Gemma 4
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A Reasoning
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("<thought>", "</thought>"),  # EXAONE Deep
    ("<reasoning>", "</reasoning>"),  # Reka Flash 3
    ("◁think▷", "◁/think▷"),  # Kimi
)


@dataclass(frozen=True)
class TurnFrame:
    """What stands around an answer."""

    lead: str = ""
    """What the template writes between the prompt and the answer."""
    tail: str = ""
    """What it writes between the answer and the token that ends the turn."""
    ends: tuple[str, ...] = ()
    """The tokens that end a turn, that of a plain answer first; none where the template writes none."""
    opened: str | None = None
    """What closes the think block that the prompt leaves open, if it does."""
    blocks: tuple[Block, ...] = ()
    """The think blocks that the template knows."""
    specials: frozenset[str] = frozenset()
    """Texts of the tokenizer's special tokens."""

    @cached_property
    def marks(self) -> frozenset[str]:
        """Special tokens that tell where the answer begins; a decoded text must keep them to be taken apart."""
        around = "\0".join([self.lead, self.tail, *(mark for block in REASONING for mark in block)])
        return frozenset(token for token in self.specials if token in around)

    def closes(self, turn: str) -> bool:
        """Whether a turn ends with a token that no answer holds."""
        return turn.endswith((*self.ends, *self.specials))

    def find_answer(self, turn: str) -> int | None:
        """Return where the answer begins in a turn; `None` if the turn ends inside its think block."""
        start = self._behind_lead(turn)
        if start is None:
            start = self._behind_reasoning(turn, 0, self.opened)
            return None if start is None else start + self._lead_at(turn, start)
        is_whole = any(mark in self.lead for block in REASONING for mark in block)
        return start if is_whole else self._behind_reasoning(turn, start, None)

    def answer(self, turn: str) -> str:
        """Return the answer of a turn, empty where the model was still thinking."""
        start = self.find_answer(turn)
        if start is None:
            return ""
        text = turn[start:]
        text = text[: min([len(text), *(found for end in self.ends if (found := text.find(end)) >= 0)])]
        if self.tail.strip() and text.rstrip().endswith(self.tail.strip()):
            text = text.rstrip().removesuffix(self.tail.strip())
        for mark in self.marks:
            text = text.replace(mark, "")
        return text

    def without_reasoning(self, content: str) -> str:
        """Return an answer as a row gives it without the think block before it; whole if that block does not end."""
        return content[self._behind_reasoning(content, 0, None) or 0 :]

    def has_begun(self, turn: str) -> bool:
        """Whether a turn that is being written has come to its answer."""
        start = self.find_answer(turn)
        if start is None:
            return False
        rest = turn[start:].lstrip()
        if not rest and (self.lead or start):
            return False
        openings = (self.lead.strip(), *(opening for opening, _ in REASONING))
        return not (rest and any(opening.startswith(rest) for opening in openings if opening))

    def _behind_lead(self, turn: str) -> int | None:
        bare = self.lead.strip()
        if not bare:
            return None
        begin = _skip_space(turn, 0)
        if turn.startswith(bare, begin):
            return _skip_space(turn, begin + len(bare))
        # What a model writes before the lead (its reasoning, say) is no answer; ordinary words may repeat by chance.
        marks = (*self.marks, *(mark for block in REASONING for mark in block))
        return _behind(turn, bare, 0) if any(mark in bare for mark in marks) else None

    def _lead_at(self, turn: str, start: int) -> int:
        """Return how long the lead is that stands there, with the white space behind it."""
        bare = self.lead.strip()
        return _skip_space(turn, start + len(bare)) - start if bare and turn.startswith(bare, start) else 0

    def _behind_reasoning(self, turn: str, start: int, opened: str | None) -> int | None:
        """Return where the think blocks that begin at `start` end, `None` if the last one does not."""
        if opened is not None:
            return _behind(turn, opened, start)
        begin = _skip_space(turn, start)
        for block in REASONING:
            if turn.startswith(block[0], begin):
                behind = _behind(turn, block[1], begin)
                if behind is not None:
                    return self._behind_reasoning(turn, behind, None)
                # Tags that the model is not known to think in may be words of its answer.
                return None if block in (THINK, *self.blocks) else start
        # A block whose opening stands in the prompt or was lost; one that is opened later belongs to the answer.
        for opening, closing in self.blocks:
            found = turn.find(closing, start)
            if found >= 0 and opening not in turn[start:found]:
                return _skip_space(turn, found + len(closing))
        return start


def known_blocks(template: str) -> tuple[Block, ...]:
    """Return the think blocks that the source of a chat template names."""
    return tuple(block for block in REASONING if block[1] in template and (block[0] in template or block == THINK))


def frame_of(
    turn: str,
    mark: str,
    *,
    prompt: str,
    added: Iterable[str],
    specials: frozenset[str],
    blocks: tuple[Block, ...] = (),
) -> TurnFrame:
    """Take apart the turn that a template writes around a mark in the place of an answer.

    Args:
        turn: what the template writes behind the prompt; nothing is known of one in which the mark is not found once.
        mark: stands for the answer.
        prompt: what stands before the turn.
        added: texts of all tokens that the tokenizer keeps whole, special or not.
        specials: texts of its special tokens.
        blocks: the think blocks that the template knows.
    """
    bare = prompt.rstrip()
    opened = next((closing for opening, closing in REASONING if bare.endswith(opening)), None)
    if turn.count(mark) != 1:
        return TurnFrame(opened=opened, blocks=blocks, specials=specials)
    lead, _, behind = turn.partition(mark)
    places = [(behind.find(token), -len(token), token) for token in added if token.strip() and token in behind]
    position, _, end = min(places) if places else (len(behind), 0, "")
    return TurnFrame(lead, behind[:position], (end,) if end else (), opened, blocks, specials)


def split_turn(prompt: str, whole: str) -> str | None:
    """Return what a model has to write behind the prompt so that the conversation is the answered one.

    Some templates write a think block into the prompt that the answered conversation does not show. Where they only
    open it (DeepSeek R1's distillations), the model has to close it first; where they write it whole, to go on behind
    it.

    Args:
        prompt: the conversation up to where the model answers.
        whole: the answered conversation.

    Returns:
        The turn; `None` if the template changes the conversation in another way once it is answered.
    """
    if whole.startswith(prompt):
        return whole[len(prompt) :]
    for opening, closing in REASONING:
        for start in (prompt.rfind(opening), prompt.rfind(closing)):
            rest = whole[max(start, 0) :].lstrip("\n")
            head = prompt[: max(start, 0)]
            is_inside = head.rstrip().endswith(opening)
            if start < 0 or is_inside or not whole.startswith(head) or rest.startswith(opening):
                continue
            block = prompt[start:].split()
            if block == [opening]:
                return rest if rest.startswith(closing) else f"\n{closing}\n\n{rest}"
            if rest.startswith(closing):
                continue
            if block in ([opening, closing], [opening + closing], [closing]):
                return rest
    return None


def _behind(turn: str, closing: str, start: int) -> int | None:
    found = turn.find(closing, start)
    return None if found < 0 else _skip_space(turn, found + len(closing))


def _skip_space(text: str, position: int) -> int:
    return position + len(text[position:]) - len(text[position:].lstrip())
