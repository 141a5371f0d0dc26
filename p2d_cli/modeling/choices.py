"""How likely a model finds each of many answers to one prompt, which is read once for all of them.

A pack is one sequence: a prompt, and behind it the answers in a row. The attention mask shows each answer the prompt
and itself, and its position ids go on from the prompt's end, so each is computed as if it alone stood there. Other than
with a cache of the prompt that is copied for every answer, no keys are copied and short answers need no padding.

Axes: B batch, T tokens of a pack, n positions whose logits are kept, V vocabulary, m scored tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from p2d_cli.core.batches import Pack, read_tokens
from p2d_cli.errors import ModelError
from p2d_cli.modeling.layouts import is_recurrent, model_layout, plain_model
from p2d_cli.modeling.likelihood import answer_logits_only, log_normalizer, padded
from p2d_cli.modeling.loading import input_device

_PADDING, _PROMPT = -1, 0
# These take a mask for each pair of tokens; flash attention does not.
_MASKED_KERNELS = frozenset({"sdpa", "eager"})


def can_pack(model: Any, longest: int) -> bool:
    """Say whether a model computes packed answers, with a prompt up to `longest` tokens, as it computes them alone.

    That takes attention whose mask and positions are all that a token knows of its place: no recurrent or latent
    layers, no bias by distance, no window of attention that is shorter than a sequence.
    """
    try:
        model_layout(model)
    except ModelError:
        return False
    if is_recurrent(model):  # beside attention, or in its place
        return False
    config = plain_model(model).config.get_text_config()
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return config._attn_implementation in _MASKED_KERNELS and all(not window or longest <= window for window in windows)


@torch.no_grad()
def score_pack_batch(model: Any, packs: Sequence[Pack], pad_id: int) -> list[float]:
    """Compute the log-likelihood of each answer of each pack in turn, in one forward; `pad_id` is any token.

    The model is in eval mode and `can_pack` holds for it. Returns nats, 0 for an empty answer.
    """
    rows, scored, answers = [_Row(pack) for pack in packs], [], 0
    for number, row in enumerate(rows):
        scored += [(number, place, token, answers + answer) for place, token, answer in row.scored]
        answers += len(packs[number].answers)
    row_m, place_m, token_m, answer_m = torch.tensor(scored, dtype=torch.long).reshape(-1, 4).unbind(dim=1)
    input_ids_BT = padded([row.ids for row in rows], pad_id)
    keep_BT = torch.zeros_like(input_ids_BT, dtype=torch.bool)
    keep_BT[row_m, place_m] = True
    index_BT = (keep_BT.flatten().cumsum(dim=0) - 1).reshape(keep_BT.shape)

    device = input_device(model)
    with answer_logits_only(model, keep_BT):
        logits_nV = model(
            input_ids=input_ids_BT.to(device),
            attention_mask=_mask(padded([row.owners for row in rows], _PADDING).to(device), model.dtype),
            position_ids=padded([row.positions for row in rows], 0).to(device),
            use_cache=False,
        ).logits[0]
    index_m = index_BT[row_m, place_m].to(logits_nV.device)
    logprob_m = logits_nV[index_m, token_m.to(logits_nV.device)].float() - log_normalizer(logits_nV)[index_m]
    sums = torch.zeros(answers, dtype=torch.float64)
    totals: list[float] = sums.index_add(0, answer_m, logprob_m.double().cpu()).tolist()
    return totals


class _Row:
    """A pack, token by token."""

    def __init__(self, pack: Pack) -> None:
        start = len(pack.prompt_ids)
        self.ids = list(pack.prompt_ids)
        self.positions = list(range(start))
        self.owners = [_PROMPT] * start
        """0 for the prompt, k for its k-th answer."""
        self.scored: list[tuple[int, int, int]] = []
        """(position that predicts, token, number of the answer)."""
        for number, answer in enumerate(pack.answers):
            behind, read = len(self.ids), read_tokens(answer)
            # The prompt's end predicts the first token, if there is one, and each token that is read the one after it.
            places = (start - 1, *range(behind, behind + read))
            self.scored += [(place, token, number) for place, token in zip(places, answer, strict=False)]
            self.ids += answer[:read]
            self.positions += range(start, start + read)
            self.owners += [number + 1] * read


def _mask(owner_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what is added to the scores, `[B, 1, T, T]`: a token sees the prompt, and its own answer up to itself."""
    # Padding sees itself: a row of the softmax that sees nothing would be NaN.
    same_BTT = owner_BT[:, :, None] == owner_BT[:, None, :]
    to_prompt_BTT = (owner_BT[:, None, :] == _PROMPT) & (owner_BT[:, :, None] != _PADDING)
    hidden_B1TT = ~(same_BTT | to_prompt_BTT).tril()[:, None]
    return torch.zeros_like(hidden_B1TT, dtype=dtype).masked_fill(hidden_B1TT, torch.finfo(dtype).min)
