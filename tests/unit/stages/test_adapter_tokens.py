"""Which tokens an adapter's folder brings that its model's tokenizer does not have."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

from p2d_cli.stages.adapters import has_new_tokens


@pytest.fixture
def model(tiny_folder, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_folder / name, folder)
    return folder


def saved_again(model, folder, *tokens):
    """As trl saves a tokenizer beside an adapter."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([*tokens])
    tokenizer.save_pretrained(folder)
    return folder


def test_a_tokenizer_that_was_saved_again_is_the_same(model, tmp_path):
    assert has_new_tokens(saved_again(model, tmp_path / "a"), model) is None


def test_an_added_token_is_new(model, tmp_path):
    assert has_new_tokens(saved_again(model, tmp_path / "a", "<tool>"), model) == "<tool>"


def test_a_token_that_the_model_names_beside_its_tokenizer_is_not_new(model, tmp_path):
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": "<fill>"}))
    adapter = saved_again(model, tmp_path / "a")
    assert "<fill>" in (adapter / "tokenizer.json").read_text()
    assert "<fill>" not in (model / "tokenizer.json").read_text()
    assert has_new_tokens(adapter, model) is None


def test_a_token_with_another_id_is_new(model, tmp_path):
    adapter = saved_again(model, tmp_path / "a")
    described = json.loads((adapter / "tokenizer.json").read_text())
    words = described["model"]["vocab"]
    words[70], words[71] = words[71], words[70]
    (adapter / "tokenizer.json").write_text(json.dumps(described))
    assert has_new_tokens(adapter, model) in {words[70][0], words[71][0]}


def test_a_folder_without_a_tokenizer_brings_none(model, tmp_path):
    assert has_new_tokens(tmp_path, model) is None
    assert has_new_tokens(model, tmp_path) is None
