from __future__ import annotations

import pytest
import torch

from p2d_cli.errors import ModelError
from p2d_cli.modeling.token_ids import KnownIds, checked_ids, count_embeddings


class FakeTokenizer:
    """Knows the tokens t0 to t5."""

    pad_token_id: int | None = 0
    eos_token_id: int | None = None

    def get_vocab(self):
        return {f"t{number}": number for number in range(6)}

    def convert_ids_to_tokens(self, number):
        return f"t{number}"


def test_only_ids_that_are_shown_are_refused():
    known = KnownIds(FakeTokenizer(), 4)
    known.require("rows.jsonl:1", [0, 3])
    known.require("rows.jsonl:2", [])
    assert not known.are_all
    message = r"rows\.jsonl:3: the token 't4' has the id 4, .* ids up to 5, the model has 4 embeddings"
    with pytest.raises(ModelError, match=message):
        known.require("rows.jsonl:3", [1, 4, 5])


def test_a_model_that_knows_all_tokens_refuses_none():
    known = KnownIds(FakeTokenizer(), 6)
    assert known.are_all
    known.require("row", [5])


@pytest.mark.parametrize("name", ["pad_token", "eos_token"])
def test_special_tokens_are_known(monkeypatch, name):
    monkeypatch.setattr(FakeTokenizer, f"{name}_id", 5)
    with pytest.raises(ModelError, match=f"the tokenizer's {name}: the token 't5' has the id 5"):
        KnownIds(FakeTokenizer(), 5)


def test_ids_of_another_library_are_checked_on_their_way(tiny_model):
    model, known = tiny_model("llama", vocab_size=4), KnownIds(FakeTokenizer(), 4)
    assert count_embeddings(model) == 4
    with torch.no_grad():
        with checked_ids(model, known, "a row of lm-eval"):
            model(torch.tensor([[1, 3]]))
            with pytest.raises(ModelError, match="a row of lm-eval: the token 't4' has the id 4"):
                model(torch.tensor([[1, 4]]))
        with pytest.raises(IndexError):
            model(torch.tensor([[1, 4]]))


def test_a_model_without_embeddings_has_no_count(tiny_model):
    model = tiny_model("llama")
    model.set_input_embeddings(None)
    assert count_embeddings(model) is None
