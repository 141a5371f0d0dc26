"""How rows are put together: in training, and as packs, a prompt with several answers that are read as one sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MEGABATCHES = 50
"""Training sorts rows by length within so many batches; the order of the batches stays random."""


@dataclass(frozen=True)
class Pack:
    """A prompt, and answers to it that are read together."""

    prompt_ids: tuple[int, ...]
    """At least one token."""
    answers: tuple[tuple[int, ...], ...]

    @property
    def length(self) -> int:
        """Tokens of the sequence; the last one of an answer predicts nothing and is left out."""
        return len(self.prompt_ids) + sum(map(read_tokens, self.answers))

    @property
    def scored(self) -> int:
        """Tokens of the answers."""
        return sum(map(len, self.answers))


def read_tokens(answer: Sequence[int]) -> int:
    """Return how many tokens of an answer are read: the last one predicts nothing."""
    return max(len(answer) - 1, 0)


def split_into_packs(examples: Sequence[tuple[Sequence[int], int]], *, token_budget: int) -> list[tuple[Pack, range]]:
    """Put neighbouring examples that have their prompt in common into packs.

    Args:
        examples: `(token ids of prompt and answer, number of prompt tokens)`; the answers to one prompt are neighbours.
        token_budget: Largest pack. An example that is longer by itself gets a pack of its own.

    Returns:
        The packs in order, each with the positions of its answers in `examples`.
    """
    packs: list[tuple[Pack, range]] = []
    for index, (ids, prompt_length) in enumerate(examples):
        prompt_ids, answer = tuple(ids[:prompt_length]), tuple(ids[prompt_length:])
        if packs:
            last, places = packs[-1]
            if last.prompt_ids == prompt_ids and last.length + read_tokens(answer) <= token_budget:
                packs[-1] = Pack(prompt_ids, (*last.answers, answer)), range(places.start, index + 1)
                continue
        packs.append((Pack(prompt_ids, (answer,)), range(index, index + 1)))
    return packs
