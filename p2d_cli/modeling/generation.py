"""What a model says, how likely it finds a given answer, and how it represents a text, for one batch of rows.

Axes: B batch, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from p2d_cli.core.turns import TurnFrame
from p2d_cli.modeling.layouts import plain_model
from p2d_cli.modeling.likelihood import completion_log_likelihood, finite_logits, forward_inputs, output_embedding
from p2d_cli.modeling.loading import input_device

# A character has at most 4 bytes, hence tokens; the rest allows for tokens that decode to nothing.
_TOKENS_PER_CHARACTER = 4
_SPARE_TOKENS = 8


def generate_greedy(
    model: Any,
    tokenizer: Any,
    prompt_ids: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: tuple[str, ...] = (),
    names: Sequence[str] = (),
    frames: Sequence[TurnFrame] = (),
) -> tuple[list[str], int]:
    """Continue prompts, taking the most likely token each time.

    The sampling settings, penalties and length limits of the model's own `generation_config` are left out of account;
    its end-of-sequence tokens count, as do the tokenizer's and those with which the template ends a turn.

    Args:
        model: A Hugging Face causal LM in eval mode, or a PEFT model around one.
        tokenizer: The model's tokenizer.
        prompt_ids: Token ids of each prompt.
        max_new_tokens: Limit of each continuation.
        stop: Strings that end an answer; in what stands before it they are passed over. They may be the text of a
            special token.
        names: What an error calls each prompt.
        frames: What stands around the answer to each prompt; nothing without.

    Returns:
        The turns, cut before the first stop string of the answer and without special tokens but those that tell where
        the answer begins; and the number of tokens generated for them in all, those that ended a text included.

    Raises:
        NonFiniteError: The logits of a token are not finite.
        ModelError: The model has no output embedding.
    """
    plain = plain_model(model)
    stop = tuple(string for string in stop if string)
    frames = frames or [TurnFrame()] * len(prompt_ids)
    config = _greedy_config(plain, tokenizer, max_new_tokens, frames)
    input_ids_BT, attention_mask_BT = _padded_left(prompt_ids, config.pad_token_id)
    stopper, device = _StopStrings(tokenizer, stop, frames, *input_ids_BT.shape), input_device(plain)
    with torch.no_grad(), _neutral_defaults(plain), finite_logits(plain, names):
        output_BT = plain.generate(
            input_ids_BT.to(device),
            attention_mask=attention_mask_BT.to(device),
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([stopper] if stop else []),
        )
    new_ids = stopper.generated(output_BT, config.eos_token_id)
    turns = decode_turns(tokenizer, new_ids, frames)
    return [_cut(turn, stop, frame) for turn, frame in zip(turns, frames, strict=True)], sum(
        len(ids) for ids in new_ids
    )


def decode_turns(tokenizer: Any, new_ids: Sequence[Sequence[int]], frames: Sequence[TurnFrame]) -> list[str]:
    """Decode without special tokens, but for those that tell where the answer begins."""
    special = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    kept = [
        [token for token in ids if special.get(token) is None or special[token] in frame.marks]
        for ids, frame in zip(new_ids, frames, strict=True)
    ]
    texts: list[str] = tokenizer.batch_decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return texts


def score_completions(
    model: Any, examples: Sequence[tuple[Sequence[int], int]], pad_id: int
) -> tuple[list[float], list[int]]:
    """Score completions by their log-likelihood given their prompts.

    Args:
        model: A Hugging Face causal LM in eval mode, or a PEFT model around one.
        examples: `(token ids of prompt and completion, number of prompt tokens)` of each row.
        pad_id: Any token id.

    Returns:
        The sum of the completion tokens' log-probabilities in nats of each row, and the number of these tokens.

    Raises:
        ModelError: The model has no output embedding.
    """
    device = input_device(model)
    input_ids_BT, attention_mask_BT = _padded_right([ids for ids, _ in examples], pad_id, device)
    prompt_length_B = torch.tensor([prompt_length for _, prompt_length in examples], device=device)
    answer_mask_BT = torch.arange(input_ids_BT.shape[1], device=device) >= prompt_length_B[:, None]
    sums_B, counts_B = completion_log_likelihood(model, input_ids_BT, attention_mask_BT, answer_mask_BT)
    return sums_B.tolist(), counts_B.tolist()


def mean_hidden_states(model: Any, ids: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """Average over each row's tokens the hidden states that the output embedding reads.

    Args:
        model: A Hugging Face causal LM in eval mode, or a PEFT model around one.
        ids: Token ids of each row, at least one.
        pad_id: Any token id.

    Returns:
        The means, `[B, D]` float32 on the CPU.

    Raises:
        ModelError: The model has no output embedding.
    """
    input_ids_BT, attention_mask_BT = _padded_right(ids, pad_id, input_device(model))
    hidden_BTD = _last_hidden_states(model, forward_inputs(input_ids_BT, attention_mask_BT)).float()
    weight_BT = (attention_mask_BT / attention_mask_BT.sum(dim=1, keepdim=True)).to(hidden_BTD)
    return torch.einsum("BTD,BT->BD", hidden_BTD, weight_BT).cpu()


class _StopStrings(StoppingCriteria):
    """Ends each row of a batch at the first stop string in its answer.

    The criterion of transformers looks at the prompt's end as well, and prepares the whole vocabulary beforehand.
    """

    def __init__(
        self, tokenizer: Any, stop: tuple[str, ...], frames: Sequence[TurnFrame], batch: int, prompt_length: int
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._frames = frames
        self._begun_at: list[int | None] = [None] * batch
        """Before which new token of each row its answer has begun."""
        self._prompt_length = prompt_length
        self._window = _TOKENS_PER_CHARACTER * max(map(len, stop), default=0) + _SPARE_TOKENS
        self._stopped_at: list[int | None] = [None] * batch

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """`[B]` bool: the rows that have a stop string by now."""
        del scores
        new_ids_BT = input_ids[:, self._prompt_length :]
        self._look_for_answers(new_ids_BT)
        running = [
            row for row, length in enumerate(self._stopped_at) if length is None and self._begun_at[row] is not None
        ]
        tails = [new_ids_BT[row, self._begun_at[row] :][-self._window :].tolist() for row in running]
        # Special tokens are part of the text here, so that a stop string can be one.
        for row, text in zip(running, self._decode(tails), strict=True):
            if any(stop in text for stop in self._stop):
                self._stopped_at[row] = new_ids_BT.shape[1]
        stopped = [length is not None for length in self._stopped_at]
        return torch.tensor(stopped, device=input_ids.device, dtype=torch.bool)

    def _decode(self, rows: list[list[int]]) -> list[str]:
        # Some versions of transformers take no rows for one row without tokens.
        texts: list[str] = self._tokenizer.batch_decode(rows) if rows else []
        return texts

    def _look_for_answers(self, new_ids_BT: Tensor) -> None:
        waiting = [row for row, begun_at in enumerate(self._begun_at) if begun_at is None]
        for row, turn in zip(waiting, self._decode(new_ids_BT[waiting].tolist()), strict=True):
            if self._frames[row].has_begun(turn):
                self._begun_at[row] = new_ids_BT.shape[1] - 1

    def generated(self, output_BT: Tensor, eos_ids: Sequence[int] | None) -> list[list[int]]:
        """Take the new tokens of each row, up to the one that ended it."""
        rows = []
        for tokens, length in zip(output_BT[:, self._prompt_length :].tolist(), self._stopped_at, strict=True):
            ends = [position + 1 for position, token in enumerate(tokens) if token in (eos_ids or ())]
            rows.append(tokens[: min([len(tokens), *ends[:1], *([] if length is None else [length])])])
        return rows


def end_ids(model: Any, tokenizer: Any, frames: Sequence[TurnFrame]) -> list[int]:
    """Return the tokens that end a generation: the model's own, the tokenizer's, and the template's ends of a turn."""
    own = model.generation_config.eos_token_id
    own_ids = own if isinstance(own, list) else [own]
    turn_ids = [tokenizer.convert_tokens_to_ids(end) for end in sorted({end for frame in frames for end in frame.ends})]
    return sorted({token for token in (*own_ids, tokenizer.eos_token_id, *turn_ids) if token is not None})


def _greedy_config(model: Any, tokenizer: Any, max_new_tokens: int, frames: Sequence[TurnFrame]) -> GenerationConfig:
    eos_ids = end_ids(model, tokenizer, frames)
    pad_id = tokenizer.pad_token_id
    return GenerationConfig(  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos_ids or None,
        pad_token_id=pad_id if pad_id is not None else (eos_ids or [0])[0],
        bos_token_id=tokenizer.bos_token_id,
    )


@contextmanager
def _neutral_defaults(model: Any) -> Iterator[None]:
    """Put the model's own generation defaults aside: `generate` fills what a call leaves open from them."""
    own = model.generation_config
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
    try:
        yield
    finally:
        model.generation_config = own


def _cut(turn: str, stop: tuple[str, ...], frame: TurnFrame) -> str:
    start = frame.find_answer(turn)
    if start is None:
        return turn
    found = [position for position in (turn.find(string, start) for string in stop) if position >= 0]
    return turn[: min(found)] if found else turn


@torch.no_grad()
def _last_hidden_states(model: Any, inputs: dict[str, Any]) -> Tensor:
    """`[B, T, D]`, read at the output embedding, where all families have them; no logits are computed."""
    seen: list[Tensor] = []

    def keep_none(_module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_BTD, *rest = arguments
        seen.append(hidden_BTD)
        return (hidden_BTD[:, :0], *rest)

    handle = output_embedding(model).register_forward_pre_hook(keep_none)
    try:
        model(**inputs)
    finally:
        handle.remove()
    return seen[0]


def _padded_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids = [[pad_id] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def _padded_right(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids = [list(row) + [pad_id] * (longest - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
