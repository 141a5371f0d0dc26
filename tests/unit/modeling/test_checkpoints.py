from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from p2d_cli.errors import ArtifactError
from p2d_cli.modeling.checkpoints import CheckpointReader, read_layer_weights, skeleton
from p2d_cli.modeling.layouts import layer_weights, model_layout


@pytest.fixture
def saved(tiny_model, tmp_path):
    """Factory: a saved family, in shards if asked for."""

    def save(family: str, **options):
        tiny_model(family).save_pretrained(tmp_path / family, **options)
        return tmp_path / family

    return save


def assert_same(one, other):
    for name in ("q_HdD", "k_GdD", "v_GdD"):
        assert torch.equal(getattr(one, name), getattr(other, name))


def test_streamed_weights_equal_those_of_the_model(saved, tiny_model, family):
    folder = saved(family)
    model = tiny_model(family)
    layout = model_layout(skeleton(folder))
    assert layout == model_layout(model)
    reader = CheckpointReader(folder)
    for layer in layout:
        number = layer.layer
        assert_same(read_layer_weights(reader, layout, number), layer_weights(layout, number, model.get_parameter))


def test_a_skeleton_holds_no_weights(saved):
    assert all(parameter.is_meta for parameter in skeleton(saved("llama")).parameters())


def test_shards_are_read_like_one_file(saved, tiny_model):
    folder = saved("qwen3", max_shard_size="12KB")
    assert (folder / "model.safetensors.index.json").exists()
    model = tiny_model("qwen3")
    reader = CheckpointReader(folder)
    assert set(reader._file_of) == set(model.state_dict())
    layout = model_layout(model)
    for layer in layout:
        number = layer.layer
        assert_same(read_layer_weights(reader, layout, number), layer_weights(layout, number, model.get_parameter))


@pytest.mark.parametrize("prefix", ["", "outer.transformer."])
def test_a_missing_or_extra_prefix_is_tolerated(saved, tiny_model, prefix):
    folder = saved("gpt2")
    stored = load_file(folder / "model.safetensors")
    renamed = {prefix + name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    model = tiny_model("gpt2")
    layout, reader = model_layout(model), CheckpointReader(folder)
    for layer in (0, 1):
        assert_same(read_layer_weights(reader, layout, layer), layer_weights(layout, layer, model.get_parameter))


def test_stored_dtype_is_kept(tiny_model, tmp_path):
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    assert CheckpointReader(tmp_path).tensor("model.layers.0.self_attn.q_proj.weight").dtype == torch.bfloat16


def test_missing_and_ambiguous_names(saved):
    folder = saved("llama")
    reader = CheckpointReader(folder)
    with pytest.raises(ArtifactError, match=r"no tensor model\.layers\.7"):
        reader.tensor("model.layers.7.self_attn.q_proj.weight")
    twice = {"a.x.weight": torch.zeros(1), "b.x.weight": torch.zeros(1)}
    save_file(twice, folder / "model.safetensors")
    with pytest.raises(ArtifactError, match="several"):
        CheckpointReader(folder).tensor("x.weight")


def test_a_smaller_model_is_refused(saved, tiny_model, tmp_path):
    tiny_model("llama", num_attention_heads=2, num_key_value_heads=2, head_dim=8).save_pretrained(tmp_path / "small")
    layout = model_layout(tiny_model("llama"))
    with pytest.raises(ArtifactError, match="another shape"):
        read_layer_weights(CheckpointReader(tmp_path / "small"), layout, 0)


def test_damaged_files_are_named(saved):
    folder = saved("llama", max_shard_size="12KB")
    shards = sorted(set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values()))
    (folder / shards[1]).write_bytes(b"\x00" * 64)
    with pytest.raises(ArtifactError, match=shards[1]):
        CheckpointReader(folder)
