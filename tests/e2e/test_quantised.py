"""Checkpoints as they are shipped: mxfp4 is plain once it is loaded, bitsandbytes stays packed, the rest is refused."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from p2d_cli.engine import tuning
from p2d_cli.modeling.head_adapter import attach_heads, load_adapter
from p2d_cli.modeling.loading import load_model
from p2d_cli.modeling.model_files import locate_model
from p2d_cli.modeling.quantised import tensor_shapes

FIXTURES = Path(__file__).parent.parent.parent / "fixtures"
IDS = torch.arange(5, 30)[None]
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
"""What three bits stand for; a fourth is the sign."""
OF_BLOCK, BIAS = 32, 127
GPT_OSS = {
    "vocab_size": 370,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def to_mxfp4(weight_EIO):
    """Quantise experts `[E, in, out]`: codes by twos in bytes, exponents, and what the two stand for."""
    weight = weight_EIO.float().transpose(1, 2)
    grouped = weight.reshape(*weight.shape[:2], -1, OF_BLOCK)
    exponents = grouped.abs().amax(-1, keepdim=True).clamp(min=1e-30).log2().floor() - 2
    scaled = grouped / 2**exponents
    codes = (scaled.abs()[..., None] - E2M1).abs().argmin(-1)
    values = torch.where(scaled < 0, -E2M1[codes], E2M1[codes]) * 2**exponents
    codes = codes + 8 * (scaled < 0)
    blocks = codes[..., 0::2] + 16 * codes[..., 1::2]
    plain = values.reshape(weight.shape).transpose(1, 2).contiguous()
    return blocks.to(torch.uint8), (exponents[..., 0] + BIAS).to(torch.uint8), plain


@pytest.fixture(scope="module")
def mxfp4(tmp_path_factory, tiny_folder):
    """A gpt-oss in mxfp4, and the same one in plain weights."""
    out = tmp_path_factory.mktemp("mxfp4")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**GPT_OSS)).bfloat16()
    packed, plain = {}, {}
    for name, tensor in model.state_dict().items():
        if name.endswith(("gate_up_proj", "down_proj")):
            packed[f"{name}_blocks"], packed[f"{name}_scales"], values = to_mxfp4(tensor)
            plain[name] = values.to(tensor.dtype)
        else:
            packed[name] = plain[name] = tensor
    kept = {"modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"]}
    settings = {"quantization_config": {"quant_method": "mxfp4"} | kept}
    for folder, tensors, more in ((out / "mxfp4", packed, settings), (out / "plain", plain, {})):
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        # As gpt-oss is shipped: without a word on the precision of the rest.
        config = {name: value for name, value in model.config.to_dict().items() if name not in {"dtype", "torch_dtype"}}
        config["architectures"] = ["GptOssForCausalLM"]
        (folder / "config.json").write_text(json.dumps(config | more))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tiny_folder / name, folder)
    return out / "mxfp4", out / "plain"


BITS = {
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "8bit": {"load_in_8bit": True},
}


@pytest.fixture(scope="module", params=BITS)
def packed(request, tmp_path_factory, tiny_folder):
    """The fixture's model as bitsandbytes stores it."""
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("packed") / request.param
    settings = transformers.BitsAndBytesConfig(**BITS[request.param])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_folder, quantization_config=settings, device_map={"": "cpu"}, dtype=torch.float32
    )
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_folder / name, folder)
    return folder


@pytest.fixture
def no_weights(monkeypatch):
    """Fails the test where weights are read."""
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("the weights were read")
    )


@pytest.fixture
def run(p2d, few, tmp_path):
    """Run a command on a model, with what it reads given by name; it must end with `code`."""

    def command(*words, model, out, code=0, more=()):
        given = {"--target": few["target"], "--pool": few["pool"], "--data": few["test"]}
        filled = [part for word in words for part in ([word, given[word]] if word in given else [word])]
        done = p2d(filled[0], "--model", model, *filled[1:], "--dtype", "float32", "--out", tmp_path / out, *more)
        assert done.code == code, done.said
        return done

    return command


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def perplexity(folder):
    return json.loads((folder / "metrics.json").read_text())["perplexity"]["value"]


READOUT = ("score-heads", "--method", "readout", "--target", "--pool")
TRAIN = ("train", "--epochs", 2, "--batch-size", 4, "--data")
PERPLEXITY = ("eval", "--metric", "perplexity", "--data")


# --- mxfp4


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 0.0), (torch.bfloat16, 0.02)])
def test_mxfp4_is_what_its_codes_and_scales_stand_for(mxfp4, dtype, tolerance):
    quantised, plain = (load_model(folder, dtype=dtype, device="cpu") for folder in mxfp4)
    expected = plain.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in quantised.state_dict().items())
    torch.testing.assert_close(logits(quantised), logits(plain), atol=tolerance, rtol=0.0)
    assert tensor_shapes(locate_model(str(mxfp4[0]))) == tensor_shapes(locate_model(str(mxfp4[1])))


def test_stages_take_mxfp4_for_the_plain_weights_that_it_stands_for(run, mxfp4, tmp_path):
    quantised = mxfp4[0]
    for model in mxfp4:
        run(*READOUT, model=model, out=f"heads-{model.name}")
        run(*TRAIN, "--scope", "full", "--max-steps", 2, model=model, out=f"full-{model.name}")
    for name in ("heads-{}/head_scores.safetensors", "full-{}/model.safetensors"):
        one, other = (load_file(tmp_path / name.format(model.name)) for model in mxfp4)
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert "quantization_config" not in json.loads((tmp_path / "full-mxfp4/config.json").read_text())
    run("mine-data", "--target", "--pool", "--heads", tmp_path / "heads-mxfp4", model=quantised, out="subset")
    run(*TRAIN, "--heads", tmp_path / "heads-mxfp4", "--max-steps", 2, model=quantised, out="adapter")
    run(*PERPLEXITY, "--adapter", tmp_path / "adapter", model=quantised, out="evaluation")


def test_what_is_written_of_mxfp4_is_a_plain_checkpoint(p2d, run, mxfp4, tmp_path):
    run(*TRAIN, "--scope", "lora", "--max-steps", 2, model=mxfp4[0], out="adapter")
    assert p2d("export", tmp_path / "adapter", "--out", tmp_path / "merged").code == 0
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert ("quantization_config" in config, config["dtype"]) == (False, "bfloat16")
    base = transformers.AutoModelForCausalLM.from_pretrained(mxfp4[1], dtype=torch.float32)
    adapted = load_adapter(base, tmp_path / "adapter")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), logits(adapted), atol=0.02, rtol=0.02)
    shapes = {name: tensor.shape for name, tensor in merged.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in load_file(mxfp4[1] / "model.safetensors").items()}


def test_a_plan_counts_mxfp4_as_large_as_it_becomes(run, mxfp4):
    def plan(model):
        return run(*TRAIN, "--scope", "lora", model=model, out="x", more=("--dry-run", "--json")).json["plan"]

    one, other = (plan(model) for model in mxfp4)
    assert one["memory"] == other["memory"]
    assert one["memory"]["weights"] == 4 * sum(math.prod(shape) for shape in tensor_shapes_of(mxfp4[1]))


def tensor_shapes_of(folder):
    return [tensor.shape for tensor in load_file(folder / "model.safetensors").values()]


# --- bitsandbytes


@pytest.fixture(scope="module")
def lora(p2d, packed, few, tmp_path_factory):
    """A LoRA that was trained on the packed model."""
    out = tmp_path_factory.mktemp("lora") / packed.name
    done = p2d(*TRAIN, few["test"], "--model", packed, "--scope", "lora", "--dtype", "float32", "--out", out)
    assert done.code == 0, done.said
    return out


def summary_of(folder):
    return json.loads((folder / "manifest.json").read_text())["summary"]


def test_packed_weights_are_read_and_are_the_base_of_adapters(run, packed, lora, tmp_path):
    run(*READOUT, model=packed, out="heads")
    for method in ("contrast", "taylor"):
        run("score-heads", "--method", method, "--target", "--pool", "--episodes", 8, model=packed, out=method)
    run("mine-data", "--target", "--pool", "--heads", tmp_path / "heads", model=packed, out="subset")
    run(*TRAIN, "--heads", tmp_path / "heads", model=packed, out="of-heads")
    run(*PERPLEXITY, model=packed, out="before")
    before = perplexity(tmp_path / "before")
    for adapter in (tmp_path / "of-heads", lora):
        summary = summary_of(adapter)
        assert summary["final_loss"] < summary["first_loss"]
        assert all(tensor.is_floating_point() for tensor in load_file(adapter / "adapter_model.safetensors").values())
        run(*PERPLEXITY, "--adapter", adapter, model=packed, out=f"after-{adapter.name}")
        assert perplexity(tmp_path / f"after-{adapter.name}") < before


def test_an_adapter_of_packed_weights_has_the_form_of_any_other(run, lora, tiny_folder, tmp_path):
    run(*TRAIN, "--scope", "lora", "--max-steps", 1, model=tiny_folder, out="plain")
    for figure in ("total_parameters", "trained_parameters"):
        assert summary_of(lora)[figure] == summary_of(tmp_path / "plain")[figure]
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (lora, tmp_path / "plain"))
    assert {name: tensor.shape for name, tensor in one.items()} == {name: each.shape for name, each in other.items()}


def test_peft_alone_answers_as_p2d_does_on_packed_weights(packed, lora):
    from peft import PeftModel

    ours = logits(load_adapter(load_model(packed, dtype=torch.float32, device="cpu"), lora))
    base = transformers.AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    before = logits(base)
    theirs = logits(PeftModel.from_pretrained(base, lora).eval())
    # Equal to the bit but where bitsandbytes multiplies in bfloat16 once a model has answered before.
    apart = (ours - theirs).abs().max()
    assert apart <= 0.02 * theirs.abs().max()
    assert (ours - before).abs().max() > 5 * apart


@pytest.mark.parametrize("projections", ["qkvo", "o"])
def test_gradients_through_packed_weights_are_those_of_the_weights_they_stand_for(packed, projections):
    """8 bits quantise the activations too, so theirs are only nearly so."""
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    model = load_model(packed, dtype=torch.float32, device="cpu")
    plain = load_model(FIXTURES / "tiny-model", dtype=torch.float32, device="cpu")
    with torch.no_grad():
        for name, module in model.named_modules():
            if type(module).__name__ in {"Linear4bit", "Linear8bitLt"}:
                weight = dequantize_bnb_weight(module.weight, getattr(module, "state", None))
                plain.get_submodule(name).weight.copy_(weight)
    heads_LH = np.zeros((4, 8), dtype=bool)
    heads_LH[1:, ::3] = True
    gradients = []
    for each in (model, plain):
        adapted = attach_heads(each, heads_LH, tuple(projections))
        adapted(input_ids=IDS, labels=IDS).loss.backward()
        found = [weight.grad for weight in adapted.parameters() if weight.requires_grad]
        gradients.append(torch.cat([gradient.flatten() for gradient in found]))
    likeness = torch.nn.functional.cosine_similarity(*gradients, dim=0)
    # With AVX-512 BF16 bitsandbytes multiplies packed weights in bfloat16.
    assert likeness > (0.999 if packed.name == "4bit" else 0.99)


def test_a_plan_counts_packed_weights_as_they_are_packed(run, packed, tiny_folder):
    def plan(*words, model):
        return run(*words, model=model, out="x", more=("--dry-run", "--json")).json["plan"]["memory"]

    assert tensor_shapes(locate_model(str(packed))) == tensor_shapes(locate_model(str(tiny_folder)))
    model = load_model(packed, dtype=torch.float32, device="cpu")
    for words in (READOUT, (*TRAIN, "--scope", "lora"), PERPLEXITY):
        found, plain = plan(*words, model=packed), plan(*words, model=tiny_folder)
        assert {name: size for name, size in found.items() if name != "weights"} == {
            name: size for name, size in plain.items() if name != "weights"
        }
        # transformers counts the packed weights, not the scales beside them, and buffers too.
        assert found["weights"] == pytest.approx(model.get_memory_footprint(return_buffers=False), rel=0.1)
        assert found["weights"] < 0.4 * plain["weights"]


NEED_PLAIN = {
    "--scope attention": ("train", "--scope", "attention", "--data"),
    "--scope full": ("train", "--scope", "full", "--data"),
    "--method pad": ("score-heads", "--method", "pad", "--target"),
}


@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["run", "dry"])
@pytest.mark.parametrize("name", NEED_PLAIN)
def test_what_moves_or_compares_weights_does_not_take_packed_ones(run, packed, no_weights, name, dry):
    done = run(*NEED_PLAIN[name], model=packed, out="x", code=65, more=dry)
    assert f"are quantised (bitsandbytes, {packed.name[0]} bits), and {name} takes plain weights" in done.said
    assert "--base-quantization 4bit" in done.said
    assert "train with --scope heads or lora" in done.said


def test_packed_weights_are_not_merged_with_an_adapter(p2d, lora, no_weights, tmp_path):
    done = p2d("export", lora, "--out", tmp_path / "merged")
    assert (done.code, "p2d export takes plain weights" in done.said) == (65, True), done.said


def test_eight_bits_are_not_sharded(run, packed, no_weights, monkeypatch):
    """FSDP2 makes parameters anew, which those of 8 bits do not allow; it leaves those of 4 bits as they are."""
    monkeypatch.setattr(tuning, "is_sharded", lambda: True)
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT")
    is_refused = packed.name == "8bit"
    code = 2 if is_refused else 0
    done = run(*TRAIN, "--scope", "lora", model=packed, out="x", code=code, more=("--dry-run",))
    assert ("(bitsandbytes, 8 bits), which FSDP2 cannot shard" in done.said) == is_refused


def test_quantised_weights_are_not_quantised_again(run, packed, mxfp4, no_weights):
    for model in (packed, mxfp4[0]):
        for dry in ((), ("--dry-run",)):
            words = (*TRAIN, "--scope", "lora", "--base-quantization", "4bit")
            done = run(*words, model=model, out="x", code=65, more=dry)
            assert "--base-quantization is for plain weights try: leave it out" in done.said


def test_packed_weights_without_bitsandbytes(run, packed, no_weights, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "bitsandbytes" else find(name, *more)
    )
    for dry in ((), ("--dry-run",)):
        done = run(*PERPLEXITY, model=packed, out="x", code=69, more=dry)
        assert "are quantised by bitsandbytes, which is not installed try: pip install bitsandbytes" in done.said


# --- everything else

REFUSED = {
    "FP8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "FP8 of FBGEMM": {"quant_method": "fbgemm_fp8"},
    "FP8 of compressed-tensors": {"quant_method": "compressed-tensors", "format": "float-quantized"},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "GPTQ": {"quant_method": "gptq", "bits": 4},
    "AWQ": {"quant_method": "awq", "bits": 4},
    "HQQ": {"quant_method": "hqq"},
    "torchao": {"quant_method": "torchao"},
    "some_new_one": {"quant_method": "some_new_one"},
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_methods_are_refused_by_name_with_what_to_take_instead(run, tiny_folder, tmp_path, no_weights, name):
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {"quantization_config": REFUSED[name]}
    (model / "config.json").write_text(json.dumps(config))
    for words in (PERPLEXITY, (*TRAIN, "--scope", "lora")):
        for dry in ((), ("--dry-run",)):
            done = run(*words, model=model, out="x", code=65, more=dry)
            assert (
                f"are quantised ({name}); p2d reads plain weights, MXFP4, and 4 or 8 bits of bitsandbytes" in done.said
            )
            assert ("its BF16 release" if "FP8" in name else "the unquantised checkpoint") in done.said


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"load_in_4bit": True}, "its config says that bitsandbytes quantised the weights, and they are plain"),
        ({"load_in_8bit": True}, "its config says that bitsandbytes quantised the weights, and they are plain"),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": "floatx"}, "its bnb_4bit_compute_dtype is 'floatx'"),
        ({}, "without load_in_4bit or load_in_8bit"),
    ],
)
def test_settings_of_bitsandbytes_that_are_of_no_use(p2d, tiny_folder, few, tmp_path, settings, message):
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes"} | settings
    (model / "config.json").write_text(json.dumps(config))
    for more in (["--dry-run"], []):
        done = p2d("eval", "--model", model, "--data", few["test"], "--out", tmp_path / "o", *more)
        assert done.code == 65
        assert message in done.said
