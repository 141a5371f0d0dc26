"""Models of text and images: what of them is text, and that all else is written as it is stored."""

from __future__ import annotations

import json
import os

import composites
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from p2d_cli.core.batches import Pack
from p2d_cli.errors import ModelError, UsageError
from p2d_cli.modeling.attention_capture import require_capturable
from p2d_cli.modeling.checkpoints import CheckpointReader, skeleton
from p2d_cli.modeling.choices import can_pack, score_pack_batch
from p2d_cli.modeling.generation import score_completions
from p2d_cli.modeling.head_adapter import prepare_full
from p2d_cli.modeling.layouts import PROJECTIONS, model_layout
from p2d_cli.modeling.likelihood import forward_inputs, padded
from p2d_cli.modeling.loading import auto_model_name, load_model
from p2d_cli.modeling.model_class import model_class, why_not_causal
from p2d_cli.modeling.model_files import locate_model
from p2d_cli.modeling.saving import save_plain_model
from p2d_cli.modeling.text_part import is_of_text, text_parameters
from p2d_cli.modeling.training_batches import require_packing

OTHER_PARTS = ("vision", "visual", "multi_modal", "audio", "connector", "image_newline")
WITHOUT_HEADS = {"qwen3_5", "qwen3_5_moe", "mllama", "lfm2_vl"}
"""Families with layers that have no attention of their own."""
QUICK = ("mistral3", "qwen2_5_vl", "qwen3_5", "gemma4", "llama4", "paligemma", "idefics3")
"""Families that differ in the names that they are stored by, in positions, or in attention; P2D_SLOW=1 takes all."""
PACKED = {"mistral3", "qwen3_vl", "gemma3", "llama4"}
NOT_PACKED = {"qwen2_5_vl", "qwen3_5", "lfm2_vl"}


def stored(folder):
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def is_other(name):
    return any(part in name for part in OTHER_PARTS) or name.startswith("mtp.")


def same_bits(found, expected):
    return found.dtype == expected.dtype and torch.equal(
        found.flatten().view(torch.uint8), expected.flatten().view(torch.uint8)
    )


def rows(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, composites.IMAGE_TOKEN, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture(params=composites.FAMILIES if "P2D_SLOW" in os.environ else QUICK)
def folder(request, composite, tmp_path):
    """A float32 checkpoint of each family in turn."""
    return composite(request.param, tmp_path / request.param, torch.float32)


@torch.no_grad()
def test_every_family_reads_text_and_is_written_as_it_was(folder, tmp_path):
    family = folder.name
    reference = composites.build(family)
    model = load_model(folder, dtype=torch.bfloat16, device="cpu")
    assert type(model) is type(reference) is type(skeleton(folder))

    belongs = is_of_text(model, model.state_dict())
    assert {name for name, of_text in belongs.items() if not of_text} == {name for name in belongs if is_other(name)}
    if family not in WITHOUT_HEADS:
        modules = [layer.projection(part).module for layer in model_layout(model) for part in PROJECTIONS]
        assert len(modules) == 4 * model.config.get_text_config().num_hidden_layers
        assert not any(is_other(module) for module in modules)

    # written in another precision than stored, and one text weight changed
    next(text_parameters(model)).add_(1)
    save_plain_model(model, locate_model(str(folder)), tmp_path / "written")
    before, after = stored(folder), stored(tmp_path / "written")
    assert set(after) == set(before)
    assert all(same_bits(after[name], before[name]) for name in before if is_other(name))
    assert {tensor.dtype for name, tensor in after.items() if not is_other(name)} == {torch.bfloat16}
    configs = [json.loads((place / "config.json").read_text()) for place in (folder, tmp_path / "written")]
    assert configs[0]["architectures"] == configs[1]["architectures"]
    assert configs[0]["model_type"] == configs[1]["model_type"] == family
    assert (tmp_path / "written" / "preprocessor_config.json").is_file()
    again = getattr(transformers, auto_model_name(model)).from_pretrained(tmp_path / "written", dtype=torch.bfloat16)
    assert all(map(torch.equal, again.parameters(), model.parameters()))

    # the same logits alone and padded on either side, and while it is trained; an image's token is but a token
    model = load_model(folder, dtype=torch.float32, device="cpu")
    texts = rows(4, 12, 7)
    alone = [reference(input_ids=torch.tensor([row]), use_cache=False).logits[0] for row in texts]
    for side in ("left", "right"):
        mask = padded([[1] * len(row) for row in texts], 0, side)
        found = model(**forward_inputs(padded(texts, 0, side), mask)).logits
        for row, expected in enumerate(alone):
            torch.testing.assert_close(found[row][mask[row].bool()], expected, atol=1e-4, rtol=1e-4)
    found = model.train()(input_ids=torch.tensor([[*texts[1], composites.IMAGE_TOKEN, 7]])).logits[0]
    torch.testing.assert_close(found[: len(texts[1])], alone[1], atol=1e-4, rtol=1e-4)
    assert found.isfinite().all()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma4"])
def test_only_the_text_part_becomes_trainable(family):
    model = composites.build(family, torch.bfloat16)
    prepare_full(model)
    for name, parameter in model.named_parameters():
        expected = (False, torch.bfloat16) if is_other(name) else (True, torch.float32)
        assert (parameter.requires_grad, parameter.dtype) == expected, name


@pytest.mark.parametrize("family", sorted(PACKED | NOT_PACKED))
def test_packing_is_refused_where_rows_would_mix(family, composite, tmp_path):
    model = load_model(composite(family, tmp_path, torch.float32), dtype=torch.float32, device="cpu")
    if family in PACKED:
        require_packing(model)
        return
    with pytest.raises(UsageError, match=f"{family} does not keep the rows of a packed sequence apart"):
        require_packing(model)


@pytest.mark.parametrize("family", ["mistral3", "qwen2_5_vl", "glm4v", "llama4"])
def test_packed_answers_score_as_they_do_alone(family, composite, tmp_path):
    model = load_model(composite(family, tmp_path, torch.float32), dtype=torch.float32, device="cpu")
    prompt, *answers = rows(5, 2, 3, 1)
    assert can_pack(model, 12)
    require_capturable(model)
    alone, _ = score_completions(model, [(prompt + answer, len(prompt)) for answer in answers], 0)
    assert score_pack_batch(model, [Pack(tuple(prompt), tuple(map(tuple, answers)))], 0) == pytest.approx(
        alone, abs=1e-4
    )


# --- what is stored in other ways


def test_heads_that_transformers_does_not_know_are_kept(composite, tmp_path):
    folder = composite("qwen3_5", tmp_path / "base", torch.bfloat16)
    extra = {"mtp.fc.weight": torch.arange(12.0).reshape(3, 4)}
    save_file(stored(folder) | extra, folder / "model.safetensors", metadata={"format": "pt"})
    save_plain_model(load_model(folder, dtype=torch.float32, device="cpu"), locate_model(str(folder)), tmp_path / "out")
    assert same_bits(stored(tmp_path / "out")["mtp.fc.weight"], extra["mtp.fc.weight"])


def test_a_tied_head_that_is_stored_as_well_is_not_kept(composite, tmp_path):
    """It would be that of before the training."""
    folder = composite("gemma3", tmp_path / "base", torch.float32)
    tensors = stored(folder)
    tied = {"language_model.lm_head.weight": tensors["language_model.model.embed_tokens.weight"].clone()}
    save_file(tensors | tied, folder / "model.safetensors", metadata={"format": "pt"})
    model = load_model(folder, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1)
    save_plain_model(model, locate_model(str(folder)), tmp_path / "out")
    again = load_model(tmp_path / "out", dtype=torch.float32, device="cpu")
    assert torch.equal(again.get_output_embeddings().weight, model.get_input_embeddings().weight)


def test_shards_come_out_as_shards_with_an_index(composite, tmp_path):
    folder = composite("gemma3", tmp_path / "base", torch.float32)
    expected = stored(folder)
    model = load_model(folder, dtype=torch.float32, device="cpu")
    for path in folder.glob("*.safetensors"):
        path.unlink()
    model.save_pretrained(folder, max_shard_size="150KB")
    save_plain_model(model, locate_model(str(folder)), tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    places = {name: path.name for path in (tmp_path / "out").glob("*.safetensors") for name in load_file(path)}
    assert index["weight_map"] == places
    assert set(places) == set(expected)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    assert len(list(folder.glob("*.safetensors"))) > 2


def test_a_checkpoint_with_names_of_its_own_is_written_whole(composite, tmp_path):
    """Saved from the model without its head."""
    folder = composite("gemma3", tmp_path / "base", torch.float32)
    load_model(folder, dtype=torch.float32, device="cpu").model.save_pretrained(tmp_path / "bare")
    model = load_model(tmp_path / "bare", dtype=torch.float32, device="cpu")
    save_plain_model(model, locate_model(str(tmp_path / "bare")), tmp_path / "out")
    again = load_model(tmp_path / "out", dtype=torch.float32, device="cpu")
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))
    assert len(stored(tmp_path / "out")) == len(stored(tmp_path / "bare"))


@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl", "llama4", "idefics3"])
def test_single_weights_are_found_under_the_names_they_are_stored_by(family, composite, tmp_path):
    reader, model = CheckpointReader(composite(family, tmp_path, torch.float32)), composites.build(family)
    for layer in model_layout(skeleton(tmp_path)):
        for part in PROJECTIONS:
            name = layer.projection(part).weight_name
            assert torch.equal(reader.tensor(name), model.get_parameter(name))


# --- which class


def test_the_architecture_that_the_checkpoint_names_goes_first():
    config = transformers.Llama4Config()
    assert model_class(config).built.__name__ == "Llama4ForConditionalGeneration"
    config.architectures = ["Llama4ForCausalLM"]
    assert model_class(config).built.__name__ == "Llama4ForCausalLM"
    assert model_class(transformers.LlamaConfig()).auto is transformers.AutoModelForCausalLM


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("blip-2", "it reads no text without pixel_values"),
        ("chameleon", "without a text model of its own"),
        ("florence2", "an encoder-decoder model"),
        ("diffusion_gemma", "it writes blocks of text by diffusion"),
        ("qwen2_5_omni", "without a text model of its own"),
        ("siglip", "no language-modelling class"),
    ],
)
def test_what_has_no_text_part_to_train_is_refused(model_type, reason):
    assert reason in why_not_causal(transformers.CONFIG_MAPPING[model_type]())


def test_a_checkpoint_without_a_text_part_is_refused_by_name(composite, tmp_path):
    folder = composite("llava", tmp_path, torch.float32)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "blip-2"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="not a causal language model: it reads no text without pixel_values"):
        load_model(folder, dtype=torch.float32, device="cpu")
