from __future__ import annotations

import logging
import string
from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from p2d_cli.modeling.generation import generate_greedy, mean_hidden_states, score_completions
from p2d_cli.modeling.likelihood import forward_inputs

ModelFactory = Callable[..., Any]
CHARACTERS = string.ascii_letters + "012345678"  # with the three special tokens, the 64 ids of the tiny models
LENGTHS = (5, 9, 2, 7, 9)
BATCHINGS = ([[0], [1], [2], [3], [4]], [[0, 1, 2, 3, 4]], [[3, 1], [4, 2, 0]])
NEW_TOKENS = 10


@pytest.fixture
def tokenizer() -> Any:
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {c: i for i, c in enumerate(CHARACTERS, start=3)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 64, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.fixture
def complaints() -> Iterator[list[str]]:
    """Messages of transformers' own logger, which pytest does not see."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


def _generated(model: Any, tokenizer: Any, prompts: Any, batches: Any, **settings: Any) -> tuple[list[str], int]:
    texts, total = [""] * len(prompts), 0
    for indices in batches:
        chosen = [prompts[index] for index in indices]
        found = generate_greedy(model, tokenizer, chosen, **({"max_new_tokens": NEW_TOKENS} | settings))
        for index, text in zip(indices, found.texts, strict=True):
            texts[index] = text
        total += found.tokens
    return texts, total


def _oracle_ids(model: Any, prompt: list[int], ends: tuple[int, ...] = (2,)) -> list[int]:
    """One row, no cache, no padding: the most likely token until an end token."""
    new: list[int] = []
    while len(new) < NEW_TOKENS and not (new and new[-1] in ends):
        with torch.no_grad():
            new.append(int(model(torch.tensor([prompt + new])).logits[0, -1].argmax()))
    return new


def _length_until(stop: tuple[str, ...], ids: list[int], tokenizer: Any) -> int:
    return next((n for n in range(len(ids)) if any(s in tokenizer.decode(ids[:n]) for s in stop)), len(ids))


@pytest.mark.parametrize("batches", BATCHINGS[1:], ids=["all", "two"])
def test_batches_give_what_each_row_gives_alone(
    tiny_model: ModelFactory,
    any_family: str,
    tokenizer: Any,
    prompts: list[list[int]],
    batches: Any,
    complaints: list[str],
) -> None:
    model = tiny_model(any_family)
    texts, total = _generated(model, tokenizer, prompts, batches)
    # Which kernels of a state-space model are not installed is worth knowing.
    assert [complaint for complaint in complaints if "falling back" not in complaint] == []
    expected = [_oracle_ids(model, prompt) for prompt in prompts]
    assert texts == [tokenizer.decode(ids, skip_special_tokens=True) for ids in expected]
    assert total == sum(map(len, expected))
    assert any(texts)


def test_greedy_is_that_of_hugging_face(tiny_model: ModelFactory, tokenizer: Any, prompts: list[list[int]]) -> None:
    model = tiny_model("llama")
    texts, _ = _generated(model, tokenizer, prompts, [[0, 1, 2, 3, 4]])
    for prompt, text in zip(prompts, texts, strict=True):
        ids = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
        )
        assert tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True) == text


@pytest.mark.parametrize("as_list", [True, False])
@pytest.mark.parametrize("batches", BATCHINGS)
def test_end_tokens_of_the_model_and_of_the_tokenizer_both_end_a_row(
    tiny_model: ModelFactory, tokenizer: Any, prompts: list[list[int]], batches: Any, as_list: bool
) -> None:
    model = tiny_model("llama")
    unended = [_oracle_ids(model, prompt, ()) for prompt in prompts]
    own_end, tokenizer_end = unended[0][3], unended[1][2]
    model.generation_config.eos_token_id = [own_end] if as_list else own_end
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(tokenizer_end)
    texts, total = _generated(model, tokenizer, prompts, batches)
    expected = [_oracle_ids(model, prompt, (own_end, tokenizer_end)) for prompt in prompts]
    assert len({len(ids) for ids in expected}) > 1
    assert total == sum(map(len, expected))
    assert texts == [tokenizer.decode(ids, skip_special_tokens=True) for ids in expected]


@pytest.mark.parametrize("batches", BATCHINGS)
def test_stop_strings_cut_the_text_and_end_the_row(
    tiny_model: ModelFactory, tokenizer: Any, prompts: list[list[int]], batches: Any
) -> None:
    model = tiny_model("llama")
    free, all_tokens = _generated(model, tokenizer, prompts, batches)
    # The first two end at the same character; the earlier one's start counts.
    stop = (free[2][2:4], free[2][1:4], free[1][2])
    texts, total = _generated(model, tokenizer, prompts, batches, stop=stop)
    for text, unstopped in zip(texts, free, strict=True):
        ends = [unstopped.index(string) for string in stop if string in unstopped]
        assert text == unstopped[: min(ends, default=len(unstopped))]
    assert [len(text) for text in texts[1:3]] == [2, 1]
    assert texts[4] == free[4] != ""
    lengths = [_length_until(stop, _oracle_ids(model, prompt), tokenizer) for prompt in prompts]
    assert total == sum(lengths) < all_tokens


def test_a_row_is_cut_where_neither_a_token_nor_a_string_ends_it(
    tiny_model: ModelFactory, tokenizer: Any, prompts: list[list[int]]
) -> None:
    """Where it is the last one that the limit allows, it ends the row all the same."""
    model = tiny_model("llama")
    new = [_oracle_ids(model, prompt, ()) for prompt in prompts]
    stop = tokenizer.decode(new[1])[1:3]
    seen = set()
    for limit in range(1, NEW_TOKENS + 1):
        found = generate_greedy(model, tokenizer, prompts, max_new_tokens=limit, stop=(stop,))
        ended = [2 in ids[:limit] or stop in tokenizer.decode(ids[:limit]) for ids in new]
        assert found.cut == [not has_ended for has_ended in ended]
        seen.update(found.cut[:2])
    assert seen == {True, False}


def test_stop_string_ends_the_row_at_once(tiny_model: ModelFactory, tokenizer: Any, prompts: list[list[int]]) -> None:
    free, _ = _generated(tiny_model("llama"), tokenizer, prompts, [[0]])
    assert free[0].index(free[0][1:3]) == 1
    _, total = _generated(tiny_model("llama"), tokenizer, prompts, [[0]], stop=(free[0][1:3],))
    assert total == 3


def test_stop_string_in_or_across_the_end_of_the_prompt_does_not_count(
    tiny_model: ModelFactory, tokenizer: Any, prompts: list[list[int]]
) -> None:
    model, prompt = tiny_model("llama"), tokenizer.decode(prompts[0])
    free, _ = _generated(model, tokenizer, prompts, [[0]])
    assert prompt[-2:] not in free[0]
    stop = (prompt[-2:], prompt[-1] + free[0][0])
    assert stop[1] not in free[0]
    assert _generated(model, tokenizer, prompts, [[0]], stop=stop)[0][0] == free[0]


def test_stop_string_may_be_a_special_token(tiny_model: ModelFactory, tokenizer: Any, prompts: list[list[int]]) -> None:
    model = tiny_model("llama")
    new = _oracle_ids(model, prompts[0])
    special = tokenizer.convert_ids_to_tokens(new[2])
    tokenizer.add_special_tokens({"additional_special_tokens": [special]})
    texts, total = _generated(model, tokenizer, prompts, [[0]], stop=(special, ""))
    first = new.index(new[2])
    assert texts[0] == tokenizer.decode(new[:first])
    assert total == first + 1


def test_generation_settings_of_the_model_neither_matter_nor_warn(
    tiny_model: ModelFactory, tokenizer: Any, prompts: list[list[int]], complaints: list[str]
) -> None:
    model = tiny_model("llama")
    expected = _generated(model, tokenizer, prompts, BATCHINGS[1])
    own = transformers.GenerationConfig(
        do_sample=True,
        temperature=0.3,
        top_p=0.5,
        top_k=7,
        repetition_penalty=9.0,
        max_length=4,
        eos_token_id=2,
    )
    model.generation_config = own
    assert _generated(model, tokenizer, prompts, BATCHINGS[1]) == expected
    assert complaints == []
    assert model.generation_config is own
    assert own.temperature == 0.3


def test_tokenizer_without_padding_or_end(
    tiny_model: ModelFactory, tokenizer: Any, prompts: list[list[int]], complaints: list[str]
) -> None:
    model = tiny_model("llama")
    tokenizer.pad_token = tokenizer.eos_token = None
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    texts, total = _generated(model, tokenizer, prompts, BATCHINGS[1])
    assert complaints == []
    assert texts == [tokenizer.decode(_oracle_ids(model, prompt, ()), skip_special_tokens=True) for prompt in prompts]
    assert total == NEW_TOKENS * len(prompts)


# Raised by peft 0.21 about transformers 5.23.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_a_peft_model_speaks_through_its_adapter(
    tiny_model: ModelFactory, tokenizer: Any, prompts: list[list[int]]
) -> None:
    plain, _ = _generated(tiny_model("llama"), tokenizer, prompts, BATCHINGS[1])
    config = peft.LoraConfig(r=4, target_modules=["v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapted = peft.get_peft_model(tiny_model("llama"), config).eval()
    texts, _ = _generated(adapted, tokenizer, prompts, BATCHINGS[1])
    expected = [_oracle_ids(adapted, prompt) for prompt in prompts]
    assert texts == [tokenizer.decode(ids, skip_special_tokens=True) for ids in expected] != plain


@pytest.mark.parametrize("batches", BATCHINGS)
def test_scores_are_those_of_each_row_alone(tiny_model: ModelFactory, prompts: list[list[int]], batches: Any) -> None:
    model = tiny_model("qwen3")
    examples = list(zip(prompts, (2, 5, 2, 0, 8), strict=True))
    seen = set()
    for indices in batches:
        sums, counts = score_completions(model, [examples[index] for index in indices], pad_id=0)
        for index, value, count in zip(indices, sums, counts, strict=True):
            ids, prompt_length = examples[index]
            with torch.no_grad():
                log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            scored = range(max(prompt_length, 1), len(ids))
            assert count == len(scored)
            assert value == pytest.approx(sum(log_probs[t - 1, ids[t]].item() for t in scored), abs=1e-4)
            seen.add(index)
    assert seen == set(range(len(prompts)))


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("batches", BATCHINGS[:2])
def test_mean_hidden_state_is_that_of_each_row_alone(
    tiny_model: ModelFactory, family: str, prompts: list[list[int]], batches: Any, late: bool
) -> None:
    model = tiny_model(family)
    seen = set()
    for indices in batches:
        means = mean_hidden_states(model, [prompts[index] for index in indices], pad_id=0)[:, int(late)]
        assert means.dtype == torch.float32
        assert not means.requires_grad
        for index, mean in zip(indices, means, strict=True):
            with torch.no_grad():
                hidden = model.base_model(torch.tensor([prompts[index]])).last_hidden_state[0]
            counts = torch.arange(1.0, len(hidden) + 1) if late else torch.ones(len(hidden))
            torch.testing.assert_close(mean, counts @ hidden / counts.sum(), atol=1e-5, rtol=1e-4)
            seen.add(index)
    assert seen == set(range(len(prompts)))
    # The model's logits are whole again.
    ids = torch.tensor([prompts[0]])
    assert model(**forward_inputs(ids, torch.ones_like(ids))).logits.shape == (1, 5, 64)
