"""Channels of MLPs are trained beside heads: their rows and columns, no others, and in a form that PEFT loads."""

import numpy as np
import pytest
import torch
from peft import PeftModel

from p2d_cli.errors import ModelError
from p2d_cli.modeling.channels import channel_outputs, channel_placements
from p2d_cli.modeling.head_adapter import attach_heads, freeze_placing, save_adapter
from p2d_cli.modeling.layouts import decoder_blocks, is_transposed

SELECTED = np.zeros((2, 4), dtype=bool)
SELECTED[1, 1] = True
FAMILIES = ["llama-gqa", "llama-mqa", "qwen3", "gemma2", "phi3", "gpt2", "gpt_neox", "olmo2"]


def learn(model, ids):
    """A few large steps."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=3.0)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return model.eval()


def silence(model, channels):
    """Let these channels say nothing, by the columns that lead out of them in the second layer."""
    [name] = [name for name in channel_outputs(model) if ".1." in name]
    down = model.get_submodule(name)
    with torch.no_grad():
        (down.weight.T if is_transposed(down) else down.weight)[:, channels] = 0
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_what_changes_is_what_the_channels_own(tiny_model, token_ids, family, tmp_path):
    """With the channels silent and the heads' weights as they were, nothing of what was trained is left."""
    ids, base = token_ids(3, 9), tiny_model(family)
    model = attach_heads(tiny_model(family), SELECTED, ("q", "k", "v", "o"), 0.25)
    before = base(input_ids=ids).logits
    torch.testing.assert_close(model(input_ids=ids).logits, before, atol=1e-6, rtol=0)
    trained = learn(model, ids)(input_ids=ids).logits
    save_adapter(model, tmp_path, None)
    again = PeftModel.from_pretrained(tiny_model(family), tmp_path).eval()
    torch.testing.assert_close(again(input_ids=ids).logits, trained, atol=1e-5, rtol=1e-5)

    merged = again.merge_and_unload()
    placed = channel_placements(base, 0.25, 1)
    [channels] = {place.rows for place in placed.values() if place.on_input}
    assert len(channels) == round(0.25 * next(place.size for place in placed.values() if place.on_input))
    for name, weight in base.named_parameters():
        module = name.removesuffix(".weight")
        changed = not torch.equal(merged.get_parameter(name), weight)
        if module in placed:
            assert changed, name
        else:
            merged.get_parameter(name).data.copy_(weight)
            assert ".0." not in name or not changed, name
    assert (merged(input_ids=ids).logits - before).abs().max() > 1e-3
    silent = silence(base, list(channels))(input_ids=ids).logits
    torch.testing.assert_close(silence(merged, list(channels))(input_ids=ids).logits, silent, atol=1e-6, rtol=0)


def test_an_adapter_of_channels_can_be_trained_on(tiny_model, token_ids, tmp_path):
    model = attach_heads(tiny_model("llama-gqa"), SELECTED, ("q",), 0.5)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sum(".mlp." in name for name in trained) == 3
    save_adapter(learn(model, token_ids(2, 6)), tmp_path, None)
    again = PeftModel.from_pretrained(tiny_model("llama-gqa"), tmp_path, is_trainable=True)
    freeze_placing(again)
    assert {name for name, parameter in again.named_parameters() if parameter.requires_grad} == trained


def test_at_least_one_channel_is_trained_and_no_lower_layer(tiny_model):
    model = tiny_model("llama-gqa")
    placed = channel_placements(model, 1e-6, 1)
    assert {len(place.rows) for place in placed.values()} == {1}
    assert len(placed) == 3
    assert len(channel_placements(model, 1.0, 0)) == 3 * len(decoder_blocks(model))


def test_channels_can_be_trained_alone(tiny_model):
    model = attach_heads(tiny_model("llama-gqa"), SELECTED, (), 0.5)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 3
    assert all(".layers.1.mlp." in name for name in trained)


@pytest.mark.parametrize("family", ["qwen3_next", "mimo_v2_flash"])
def test_experts_are_refused_by_name(tiny_model, family):
    with pytest.raises(ModelError, match=f"--channels: layer 1 of {family} has experts"):
        channel_placements(tiny_model(family), 0.1, 1)
