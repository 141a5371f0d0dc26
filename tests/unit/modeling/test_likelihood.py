from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from p2d_cli.errors import ModelError
from p2d_cli.modeling import likelihood
from p2d_cli.modeling.likelihood import (
    answer_logits_only,
    answer_token_logprobs,
    completion_log_likelihood,
    forward_inputs,
    output_embedding,
)

ModelFactory = Callable[..., Any]
LENGTH = 12
ROW_LENGTHS = torch.tensor([12, 7, 9])


def _padded(side: str) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and answer mask of the same three rows; the last has no answer."""
    generator = torch.Generator().manual_seed(0)
    ids, mask, answer = (torch.zeros(3, LENGTH, dtype=torch.long) for _ in range(3))
    for row, length in enumerate(ROW_LENGTHS.tolist()):
        place = slice(LENGTH - length, LENGTH) if side == "left" else slice(0, length)
        ids[row, place] = torch.randint(3, 64, (length,), generator=generator)
        mask[row, place] = 1
        answer[row, place] = (torch.arange(length) >= length - 4) | (torch.arange(length) == 2)
    answer[2] = 0
    return ids, mask, answer.bool()


def _oracle(model: Any, ids: Tensor, mask: Tensor, answer: Tensor) -> tuple[list[float], list[int]]:
    """One unpadded row at a time, all logits."""
    sums, counts = [], []
    for row in range(len(ids)):
        real = mask[row].bool()
        tokens, is_answer = ids[row][real], answer[row][real]
        with torch.no_grad():
            log_probs = model(tokens[None]).logits[0].float().log_softmax(-1)
        positions = [t for t in range(1, len(tokens)) if is_answer[t]]
        sums.append(sum(log_probs[t - 1, tokens[t]].item() for t in positions))
        counts.append(len(positions))
    return sums, counts


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tied", [True, False])
def test_likelihood_is_that_of_full_logits(tiny_model: ModelFactory, family: str, side: str, tied: bool) -> None:
    # The default cap of 30 would not show on logits as small as a random model's.
    overrides = {"final_logit_softcapping": 1.5} if family == "gemma2" else {}
    model = tiny_model(family, tie_word_embeddings=tied, **overrides)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    ids, mask, answer = _padded(side)
    sums, counts = completion_log_likelihood(model, ids, mask, answer)
    expected_sums, expected_counts = _oracle(model, ids, mask, answer)
    assert sums.dtype == torch.float32
    assert not sums.requires_grad
    torch.testing.assert_close(sums, torch.tensor(expected_sums), atol=1e-4, rtol=1e-5)
    assert counts.tolist() == expected_counts == [5, 5, 0]
    assert sums[2] == 0.0


def test_only_kept_positions_reach_the_output_embedding(tiny_model: ModelFactory) -> None:
    model = tiny_model("llama")
    ids, mask, answer = _padded("left")
    widths = []
    with answer_logits_only(model, answer):
        model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].shape))
        logits = model(**forward_inputs(ids, mask)).logits
    assert widths == [(1, 10, 32)]
    assert logits.shape == (1, 10, 64)
    # Behind the block, the model has its full logits again, and those kept were in (row, position) order.
    assert torch.equal(model(**forward_inputs(ids, mask)).logits[answer], logits[0])


def test_hook_is_gone_after_an_error(tiny_model: ModelFactory) -> None:
    model = tiny_model("llama")
    ids, mask, answer = _padded("left")
    with pytest.raises(KeyError, match="inside"), answer_logits_only(model, answer):
        raise KeyError("inside")
    assert model(**forward_inputs(ids, mask)).logits.shape == (3, LENGTH, 64)


@pytest.mark.parametrize("side", ["left", "right"])
def test_first_token_and_padding_are_never_scored(tiny_model: ModelFactory, side: str) -> None:
    ids, mask, _ = _padded(side)
    everything = torch.ones_like(mask, dtype=torch.bool)
    logprobs, scored = answer_token_logprobs(tiny_model("llama"), ids, mask, everything)
    assert scored.sum(1).tolist() == (ROW_LENGTHS - 1).tolist()
    assert not scored[:, 0].any()
    assert (scored <= mask.bool()).all()
    assert (logprobs[scored] < 0).all()
    assert (logprobs[~scored] == 0).all()


def test_no_answers_at_all(tiny_model: ModelFactory) -> None:
    ids, mask, answer = _padded("left")
    sums, counts = completion_log_likelihood(tiny_model("gemma2"), ids, mask, torch.zeros_like(answer))
    assert sums.tolist() == [0.0, 0.0, 0.0]
    assert counts.tolist() == [0, 0, 0]


def test_chunks_of_logits_do_not_show(tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny_model("llama"), _padded("right")
    whole, _ = completion_log_likelihood(model, *inputs)
    monkeypatch.setattr(likelihood, "_ROWS_IN_FP32", 3)
    chunked, _ = completion_log_likelihood(model, *inputs)
    torch.testing.assert_close(chunked, whole)


def test_token_logprobs_carry_the_gradient_of_the_cross_entropy(tiny_model: ModelFactory) -> None:
    model = tiny_model("llama")
    ids, mask, answer = _padded("right")
    logprobs, scored = answer_token_logprobs(model, ids, mask, answer)
    (-logprobs.sum() / scored.sum()).backward()
    gradient = model.model.layers[0].self_attn.q_proj.weight.grad.clone()
    model.zero_grad()
    model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(~answer, -100)).loss.backward()
    torch.testing.assert_close(gradient, model.model.layers[0].self_attn.q_proj.weight.grad)


def test_model_without_output_embedding_is_refused(tiny_model: ModelFactory) -> None:
    with pytest.raises(ModelError, match="llama has no output embedding"):
        output_embedding(transformers.LlamaModel(tiny_model("llama").config))
