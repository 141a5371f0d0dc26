"""What a model says, how likely it finds a given answer, and how it represents a text, for one batch of rows.

Axes: B batch, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from p2d_cli.core.turns import TurnFrame
from p2d_cli.modeling.layouts import is_recurrent, plain_model
from p2d_cli.modeling.likelihood import (
    completion_log_likelihood,
    finite_logits,
    forward_inputs,
    output_embedding,
    padded,
)
from p2d_cli.modeling.loading import input_device

# A character has at most 4 bytes, hence tokens; the rest allows for tokens that decode to nothing.
_TOKENS_PER_CHARACTER = 4
_SPARE_TOKENS = 8
_PROBED_TOKENS = 8
_READS_PADDING: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


@dataclass(frozen=True)
class Continuations:
    """What a model wrote behind prompts."""

    texts: list[str]
    """The turns, cut before the first stop string of the answer and without special tokens but those that mark where
    the answer begins."""
    cut: list[bool]
    """Whether each ended at the limit of new tokens, and not by a token or a string that ends an answer."""
    tokens: int
    """Tokens generated for them in all, those that ended a text included."""


def generate_greedy(
    model: Any,
    tokenizer: Any,
    prompt_ids: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: tuple[str, ...] = (),
    names: Sequence[str] = (),
    frames: Sequence[TurnFrame] = (),
) -> Continuations:
    """Continue prompts, taking the most likely token each time.

    The sampling settings, penalties and length limits of the model's own `generation_config` are left out of account;
    its end-of-sequence tokens count, as do the tokenizer's and those with which the template ends a turn.

    Args:
        model: in eval mode, see `p2d_cli.modeling.likelihood`.
        tokenizer: the model's.
        prompt_ids: token ids of each prompt.
        max_new_tokens: limit of each continuation.
        stop: strings, of special tokens too, that end an answer; in the turn before it they are passed over.
        names: what an error calls each prompt.
        frames: what a turn has around the answer to each prompt; nothing without.

    Raises:
        NonFiniteError: the logits of a token are not finite.
    """
    plain = plain_model(model)
    stop = tuple(string for string in stop if string)
    frames = frames or [TurnFrame()] * len(prompt_ids)
    names = names or [f"row {number} of {len(prompt_ids)}" for number in range(1, len(prompt_ids) + 1)]
    if len(set(map(len, prompt_ids))) > 1 and reads_padding(plain):
        return _by_length(model, tokenizer, prompt_ids, names, frames, max_new_tokens=max_new_tokens, stop=stop)
    eos_ids = end_ids(plain, tokenizer, frames)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (eos_ids or [0])[0]
    make_config: Any = GenerationConfig  # which transformers leaves untyped
    config = make_config(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos_ids or None,
        pad_token_id=pad_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    # `generate` fills what a call leaves open from the model's own defaults.
    neutral = replaced(plain, generation_config=make_config())
    input_ids_BT, attention_mask_BT = _batch(prompt_ids, pad_id, input_device(plain), "left")
    stopper = _StopStrings(tokenizer, stop, frames, *input_ids_BT.shape)
    with torch.no_grad(), neutral, finite_logits(plain, names):
        output_BT = plain.generate(
            input_ids_BT,
            attention_mask=attention_mask_BT,
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([stopper] if stop else []),
        )
    new_ids = stopper.generated(output_BT, eos_ids)
    turns = decode_turns(tokenizer, new_ids, frames)
    return Continuations(
        texts=[_cut(turn, stop, frame) for turn, frame in zip(turns, frames, strict=True)],
        cut=[not stopper.has_ended(row) and ids[-1] not in eos_ids for row, ids in enumerate(new_ids)],
        tokens=sum(map(len, new_ids)),
    )


def _by_length(
    model: Any,
    tokenizer: Any,
    prompt_ids: Sequence[Sequence[int]],
    names: Sequence[str],
    frames: Sequence[TurnFrame],
    **options: Any,
) -> Continuations:
    """Continue prompts of one length after those of another, so that none is padded."""
    texts, cut, tokens = [""] * len(prompt_ids), [False] * len(prompt_ids), 0
    for length in sorted(set(map(len, prompt_ids))):
        rows = [row for row, ids in enumerate(prompt_ids) if len(ids) == length]
        found = generate_greedy(
            model,
            tokenizer,
            [prompt_ids[row] for row in rows],
            names=[names[row] for row in rows],
            frames=[frames[row] for row in rows],
            **options,
        )
        tokens += found.tokens
        for row, text, is_cut in zip(rows, found.texts, found.cut, strict=True):
            texts[row], cut[row] = text, is_cut
    return Continuations(texts, cut, tokens)


def reads_padding(model: Any) -> bool:
    """Say whether what stands before a row changes how the model reads it, although the mask hides it.

    Attention is masked, but a recurrence has to leave padding out by itself, and not every family's does
    (RecurrentGemma's, in transformers 5.24). Such a model reads a short row alone and behind padding, once.
    """
    if model not in _READS_PADDING:
        _READS_PADDING[model] = is_recurrent(model) and _differs_behind_padding(model)
    return _READS_PADDING[model]


@torch.no_grad()
def _differs_behind_padding(model: Any) -> bool:
    count = model.get_input_embeddings().num_embeddings
    ids = [number % count for number in range(1, _PROBED_TOKENS + 1)]
    last = []
    for padding in (0, _PROBED_TOKENS):
        ids_1T, mask_1T = _batch([ids, [0] * (len(ids) + padding)], 0, input_device(model), "left")
        last.append(model(**forward_inputs(ids_1T[:1], mask_1T[:1])).logits[0, -1].float())
    allowed = 1e-3 if model.dtype == torch.float32 else 5e-2
    return bool((last[1] - last[0]).norm() > allowed * last[0].norm())


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
    """Score completions, `(token ids of prompt and completion, number of prompt tokens)`, by their log-likelihood.

    The model is in eval mode, and `pad_id` any token. Returns the sum of the log-probabilities of each completion's
    tokens in nats, and the number of these tokens.
    """
    device = input_device(model)
    input_ids_BT, attention_mask_BT = _batch([ids for ids, _ in examples], pad_id, device)
    prompt_length_B = torch.tensor([prompt_length for _, prompt_length in examples], device=device)
    answer_mask_BT = torch.arange(input_ids_BT.shape[1], device=device) >= prompt_length_B[:, None]
    sums_B, counts_B = completion_log_likelihood(model, input_ids_BT, attention_mask_BT, answer_mask_BT)
    return sums_B.tolist(), counts_B.tolist()


@torch.no_grad()
def mean_hidden_states(model: Any, ids: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """Average over each row's tokens the hidden states that the output embedding reads, `[B, 2, D]` float32 on the CPU.

    In the first mean all tokens count alike; in the second the first token counts once, the second twice, and so on
    (Muennighoff 2022, SGPT).

    All families have them there, and no logits are computed. The model is in eval mode, each row has a token, and
    `pad_id` is any.
    """
    input_ids_BT, attention_mask_BT = _batch(ids, pad_id, input_device(model))
    seen: list[Tensor] = []

    def keep_none(_module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_BTD, *rest = arguments
        seen.append(hidden_BTD)
        return (hidden_BTD[:, :0], *rest)

    with output_embedding(model).register_forward_pre_hook(keep_none):
        model(**forward_inputs(input_ids_BT, attention_mask_BT))
    hidden_BTD = seen[0].float()
    counts_BPT = torch.stack([attention_mask_BT, attention_mask_BT.cumsum(dim=1) * attention_mask_BT], dim=1)
    weight_BPT = (counts_BPT / counts_BPT.sum(dim=2, keepdim=True)).to(hidden_BTD)
    return torch.einsum("BTD,BPT->BPD", hidden_BTD, weight_BPT).cpu()


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
        waiting = [row for row, begun_at in enumerate(self._begun_at) if begun_at is None]
        for row, turn in zip(waiting, self._decode(new_ids_BT[waiting].tolist()), strict=True):
            if self._frames[row].has_begun(turn):
                self._begun_at[row] = new_ids_BT.shape[1] - 1
        begun = [row for row, begun_at in enumerate(self._begun_at) if begun_at is not None]
        running = [row for row in begun if self._stopped_at[row] is None]
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

    def has_ended(self, row: int) -> bool:
        """Say whether a stop string ended this row."""
        return self._stopped_at[row] is not None

    def generated(self, output_BT: Tensor, eos_ids: Sequence[int]) -> list[list[int]]:
        """Take the new tokens of each row, up to the one that ended it."""
        rows = []
        for tokens, length in zip(output_BT[:, self._prompt_length :].tolist(), self._stopped_at, strict=True):
            ends = [position + 1 for position, token in enumerate(tokens) if token in eos_ids]
            rows.append(tokens[: min([len(tokens), *ends[:1], *([] if length is None else [length])])])
        return rows


def end_ids(model: Any, tokenizer: Any, frames: Sequence[TurnFrame]) -> list[int]:
    """Return the tokens that end a generation: the model's own, the tokenizer's, and the template's ends of a turn."""
    own = model.generation_config.eos_token_id
    own_ids = own if isinstance(own, list) else [own]
    turn_ids = [tokenizer.convert_tokens_to_ids(end) for end in sorted({end for frame in frames for end in frame.ends})]
    return sorted({token for token in (*own_ids, tokenizer.eos_token_id, *turn_ids) if token is not None})


@contextmanager
def replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Give attributes of an object other values while the block runs."""
    own = {name: getattr(owner, name) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in own.items():
            setattr(owner, name, value)


def _cut(turn: str, stop: tuple[str, ...], frame: TurnFrame) -> str:
    start = frame.find_answer(turn)
    if start is None:
        return turn
    found = [position for position in (turn.find(string, start) for string in stop) if position >= 0]
    return turn[: min(found)] if found else turn


def _batch(
    rows: Sequence[Sequence[int]], pad_id: int, device: torch.device, side: Literal["left", "right"] = "right"
) -> tuple[Tensor, Tensor]:
    """Return ids and attention mask, `[B, T]`."""
    mask = [[1] * len(row) for row in rows]
    return padded(rows, pad_id, side).to(device), padded(mask, 0, side).to(device)
