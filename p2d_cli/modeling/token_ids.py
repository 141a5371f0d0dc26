"""Token ids that a model has no embedding for: its tokenizer may know more tokens than it does. Imports no torch.

A tokenizer that is larger than the model is no fault by itself: some checkpoints list added tokens that no text has.
What is refused are the ids that a stage would show the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from p2d_cli.errors import ModelError

_HINT = "give the model with its own tokenizer, or add the embeddings (resize_token_embeddings) and save it again"


class KnownIds:
    """Refuses token ids beyond the embeddings of a model, of which there are `num_embeddings`.

    Raises:
        ModelError: the tokenizer's padding or end-of-text token is beyond them.
    """

    def __init__(self, tokenizer: Any, num_embeddings: int) -> None:
        self._tokenizer = tokenizer
        self._count = num_embeddings
        for name in ("pad_token", "eos_token"):
            self.require(f"the tokenizer's {name}", [getattr(tokenizer, f"{name}_id", None) or 0])

    @property
    def are_all(self) -> bool:
        """Whether the model has an embedding for every token that the tokenizer knows."""
        return self.highest < self._count

    @cached_property
    def highest(self) -> int:
        """The highest id that the tokenizer knows."""
        return max(self._tokenizer.get_vocab().values(), default=-1)

    def require(self, where: str, ids: Sequence[int]) -> None:
        """Raise ModelError for the first id beyond the embeddings; `where` names the place that it comes from."""
        if self.are_all or max(ids, default=0) < self._count:
            return
        wrong = next(token for token in ids if token >= self._count)
        raise ModelError(
            f"{where}: the token {self._tokenizer.convert_ids_to_tokens(wrong)!r} has the id {wrong}, which the model"
            f" does not know: its tokenizer knows ids up to {self.highest}, the model has {self._count} embeddings",
            hint=_HINT,
        )


def count_embeddings(model: Any) -> int | None:
    """Return how many tokens a model has input embeddings for; None if it has none."""
    try:
        embedding = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None
    return None if getattr(embedding, "weight", None) is None else int(embedding.weight.shape[0])


@contextmanager
def checked_ids(model: Any, known: KnownIds, where: str) -> Iterator[None]:
    """Apply `known.require` to the ids that reach the model in the block, for rows that another library encodes."""

    def check(_module: Any, inputs: tuple[Any, ...]) -> None:
        if inputs:
            known.require(where, inputs[0].flatten().tolist())

    if known.are_all:
        yield
        return
    with model.get_input_embeddings().register_forward_pre_hook(check):
        yield
