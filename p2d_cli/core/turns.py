"""Where the answer stands in a turn of the assistant, whether a chat template or a model wrote the turn.

A turn is more than its answer. Templates write a role header, an empty think block or a closing tag around it, and
reasoning models think before they answer. Metrics, likelihoods and readout look at the answer alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

REASONING: tuple[tuple[str, str], ...] = (
    ("<think>", "</think>"),  # DeepSeek R1, Qwen3, SmolLM3, OLMo, MiniMax and most others
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),  # gpt-oss (harmony)
    ("<|channel>thought", "<channel|>"),  # Gemma 4
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A Reasoning
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("<thought>", "</thought>"),  # EXAONE Deep
    ("<reasoning>", "</reasoning>"),  # Reka Flash 3
    ("◁think▷", "◁/think▷"),  # Kimi
)
"""How model families open and close the block in which they think."""


@dataclass(frozen=True)
class TurnFrame:
    """What stands around an answer."""

    lead: str = ""
    """What the template writes between the prompt and the answer."""
    tail: str = ""
    """What it writes between the answer and the token that ends the turn."""
    end: str | None = None
    """The token that ends the turn; `None` where the template writes none."""
    opened: str | None = None
    """What closes the think block that the prompt leaves open, if it does."""
    specials: frozenset[str] = frozenset()
    """Texts of the tokenizer's special tokens."""

    @property
    def marks(self) -> frozenset[str]:
        """Special tokens that tell where the answer begins; a decoded text must keep them to be taken apart."""
        around = [self.lead, self.tail, *(mark for pair in REASONING for mark in pair)]
        return frozenset(token for token in self.specials if any(token in text for text in around))

    def closes(self, turn: str) -> bool:
        """Whether a turn ends with a token that no answer holds."""
        return any(turn.endswith(token) for token in (self.end, *self.specials) if token)

    def find_answer(self, turn: str) -> int | None:
        """Return where the answer begins in a turn; `None` if the turn ends inside its think block."""
        start = self._behind_lead(turn)
        if start is None:
            return _behind_reasoning(turn, 0, self.opened)
        return start if _has_reasoning(self.lead) else _behind_reasoning(turn, start, None)

    def answer(self, turn: str) -> str:
        """Return the answer of a turn, empty where the model was still thinking."""
        start = self.find_answer(turn)
        if start is None:
            return ""
        text = turn[start:]
        if self.end is not None:
            text = text.partition(self.end)[0]
        if self.tail.strip() and text.rstrip().endswith(self.tail.strip()):
            text = text.rstrip().removesuffix(self.tail.strip())
        for mark in self.marks:
            text = text.replace(mark, "")
        return text

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
        if not self.lead.strip():
            return None
        bare = self.lead.strip()
        begin = len(turn) - len(turn.lstrip())
        if turn.startswith(bare, begin):
            return _skip_space(turn, begin + len(bare))
        # What a model writes before the lead (its reasoning, say) is no answer; ordinary words may repeat by chance.
        found = turn.find(bare) if any(mark in bare for mark in self.marks) or _has_reasoning(bare) else -1
        return None if found < 0 else _skip_space(turn, found + len(bare))


def frame_of(turn: str, mark: str, *, prompt: str, added: Iterable[str], specials: Iterable[str]) -> TurnFrame:
    """Take apart the turn that a template writes around a mark in the place of an answer.

    Args:
        turn: what the template writes behind the prompt; nothing is known of one in which the mark is not found once.
        mark: stands for the answer.
        prompt: what stands before the turn.
        added: texts of all tokens that the tokenizer keeps whole, special or not.
        specials: texts of its special tokens.
    """
    bare = prompt.rstrip()
    opened = next((closing for opening, closing in REASONING if bare.endswith(opening)), None)
    if turn.count(mark) != 1:
        return TurnFrame(opened=opened, specials=frozenset(specials))
    lead, _, behind = turn.partition(mark)
    places = [(behind.find(token), -len(token), token) for token in added if token.strip() and token in behind]
    position, _, end = min(places) if places else (len(behind), 0, None)
    return TurnFrame(lead, behind[:position], end, opened, frozenset(specials))


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
            if start < 0 or is_inside or not whole.startswith(head) or rest.startswith((opening, closing)):
                continue
            block = prompt[start:].split()
            if block == [opening]:
                return f"\n{closing}\n\n{rest}"
            if block in ([opening, closing], [opening + closing], [closing]):
                return rest
    return None


def without_reasoning(text: str) -> str:
    """Return an answer without the think block before it; as it is if that block does not end."""
    start = _behind_reasoning(text, 0, None)
    return text[start or 0 :]


def _behind_reasoning(turn: str, start: int, opened: str | None) -> int | None:
    """Return where the think blocks that begin at `start` end, `None` if the last one does not."""
    if opened is not None:
        return _behind(turn, opened, start)
    begin = _skip_space(turn, start)
    for opening, closing in REASONING:
        if turn.startswith(opening, begin):
            behind = _behind(turn, closing, begin)
            return None if behind is None else _behind_reasoning(turn, behind, None)
    # A block whose opening stands in the prompt or was lost; one that is opened later belongs to the answer.
    for opening, closing in REASONING:
        found = turn.find(closing, start)
        if found >= 0 and opening not in turn[start:found]:
            return _skip_space(turn, found + len(closing))
    return start


def _behind(turn: str, closing: str, start: int) -> int | None:
    found = turn.find(closing, start)
    return None if found < 0 else _skip_space(turn, found + len(closing))


def _has_reasoning(text: str) -> bool:
    return any(opening in text or closing in text for opening, closing in REASONING)


def _skip_space(text: str, position: int) -> int:
    return position + len(text[position:]) - len(text[position:].lstrip())
