from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch

from p2d_cli.core.batches import Pack, split_into_packs
from p2d_cli.modeling.choices import can_pack, score_pack_batch
from p2d_cli.modeling.generation import score_completions

ModelFactory = Callable[..., Any]
PROMPT_LENGTHS = (5, 1, 9, 3)
ANSWER_LENGTHS = ((1, 4, 2), (3,), (2, 2, 1, 6, 3), (1,))


@pytest.fixture
def packs() -> list[Pack]:
    generator = torch.Generator().manual_seed(4)

    def draw(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 64, (length,), generator=generator).tolist())

    return [
        Pack(draw(prompt), tuple(draw(answer) for answer in answers))
        for prompt, answers in zip(PROMPT_LENGTHS, ANSWER_LENGTHS, strict=True)
    ]


def _examples(packs: list[Pack]) -> list[tuple[tuple[int, ...], int]]:
    return [(pack.prompt_ids + answer, len(pack.prompt_ids)) for pack in packs for answer in pack.answers]


def _plain(model: Any, packs: list[Pack]) -> list[float]:
    """One unpadded sequence an answer."""
    examples = _examples(packs)
    return [score_completions(model, [example], pad_id=0)[0][0] for example in examples]


@pytest.mark.parametrize("kernel", ["own", "eager"])
def test_packed_answers_are_as_likely_as_each_alone(
    tiny_model: ModelFactory, family: str, packs: list[Pack], kernel: str
) -> None:
    windows = {"sliding_window": 15} if family in {"mistral", "gemma2", "gemma3_text"} else {}
    model = tiny_model(family, **windows)
    if kernel == "eager":
        model.set_attn_implementation("eager")
    assert can_pack(model, 15)
    together = score_pack_batch(model, packs, pad_id=0)
    assert together == pytest.approx(_plain(model, packs), abs=1e-5)
    alone = [value for pack in packs for value in score_pack_batch(model, [pack], pad_id=0)]
    assert alone == pytest.approx(together, abs=1e-5)


def test_answers_are_packed_only_where_they_are_as_likely_as_alone(
    tiny_model: ModelFactory, uneven_family: str, packs: list[Pack]
) -> None:
    model = tiny_model(uneven_family, **({"sliding_window": 15} if "gemma4" in uneven_family else {}))
    # MiniMax has a state that transformers does not mark.
    assert can_pack(model, 15) == (uneven_family.startswith("gemma4"))
    if can_pack(model, 15):
        assert score_pack_batch(model, packs, pad_id=0) == pytest.approx(_plain(model, packs), abs=1e-5)


def test_what_cannot_be_packed_is_told(tiny_model: ModelFactory) -> None:
    for family in ("mistral", "gemma2", "gemma3_text"):
        model = tiny_model(family)
        assert can_pack(model, 6)
        assert not can_pack(model, 7), "the window of 6 tokens would slide"
    model = tiny_model("llama")
    assert can_pack(model, 10**6)
    model.config._attn_implementation = "flash_attention_2"
    assert not can_pack(model, 6)
    model = tiny_model("llama")
    model._is_stateful = True  # transformers' mark of a recurrent state beside attention
    assert not can_pack(model, 6)
    model = tiny_model("llama")
    model.config.model_type = "falcon"
    assert not can_pack(model, 6)


# Raised by peft 0.21 about transformers 5.23.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_a_peft_model_is_packed_with_its_adapter(tiny_model: ModelFactory, packs: list[Pack]) -> None:
    plain = score_pack_batch(tiny_model("llama"), packs, pad_id=0)
    config = peft.LoraConfig(r=4, target_modules=["v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = peft.get_peft_model(tiny_model("llama"), config).eval()
    assert can_pack(model, 15)
    adapted = score_pack_batch(model, packs, pad_id=0)
    assert adapted == pytest.approx(_plain(model, packs), abs=1e-5)
    assert adapted != pytest.approx(plain, abs=1e-2)


def test_an_answer_without_tokens_scores_nothing(tiny_model: ModelFactory) -> None:
    model = tiny_model("llama")
    empty, full = score_pack_batch(model, [Pack((5, 6), ((), (7, 8)))], pad_id=0)
    assert empty == 0.0
    assert [full] == pytest.approx(_plain(model, [Pack((5, 6), ((7, 8),))]), abs=1e-5)
    assert score_pack_batch(model, [Pack((5, 6), ((), ()))], pad_id=0) == [0.0, 0.0]


def test_the_prompt_is_read_once_for_all_its_answers(tiny_model: ModelFactory, packs: list[Pack]) -> None:
    model, read = tiny_model("llama"), []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].shape))
    score_pack_batch(model, packs, pad_id=0)
    assert read == [(4, max(pack.length for pack in packs))]
    assert [pack.length for pack in packs] == [5 + 0 + 3 + 1, 1 + 2, 9 + 1 + 1 + 0 + 5 + 2, 3]


def test_examples_with_one_prompt_share_a_pack(packs: list[Pack]) -> None:
    examples = _examples(packs)
    found = split_into_packs(examples, token_budget=100)
    assert [pack for pack, _ in found] == packs
    assert [index for _, places in found for index in places] == list(range(len(examples)))


@pytest.mark.parametrize("budget", [1, 10, 13])
def test_packs_keep_to_the_budget(packs: list[Pack], budget: int) -> None:
    examples = _examples(packs)
    found = split_into_packs(examples, token_budget=budget)
    assert _examples([pack for pack, _ in found]) == examples
    assert [index for _, places in found for index in places] == list(range(len(examples)))
    assert all(pack.length <= budget or len(pack.answers) == 1 for pack, _ in found)
    assert len(found) > len(packs)
