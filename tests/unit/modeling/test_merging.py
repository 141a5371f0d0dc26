"""Adapters of other tools: p2d applies them as PEFT does, merges them, and what it writes answers as they do."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from p2d_cli.errors import ArtifactError
from p2d_cli.modeling.head_adapter import load_adapter
from p2d_cli.modeling.layouts import plain_model
from p2d_cli.modeling.merging import PROBED_TOKENS, answer, merge, probe_tokens, require_same_answers, round_weights
from p2d_cli.stages.adapters import APPLIED_TYPES

# PEFT warns of much that it then does all the same.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

IDS = torch.arange(4, 16)[None]
TARGETS = ("q_proj", "v_proj")
# What PEFT asks of a config beyond its targets, for modules as small as these.
SETTINGS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 100},
    "FROD": {},
    "IA3": {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "OFT": {"r": 4, "oft_block_size": 0},
    "ROAD": {"group_size": 8},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [5, 7]},
    "VBLORA": {"vector_length": 16},
    "WAVEFT": {"n_frequency": 100},
}
UNMERGEABLE = {"BEFT", "LILY"}

EMBEDDING_ADAPTERS: dict[str, dict[str, Any]] = {
    "LoRA on embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "LoRA on the output layer": {"target_modules": ["q_proj", "lm_head"]},
    "LoRA on both": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "LoRA on both, tied": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "DoRA on embeddings": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "saved embeddings": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved output layer": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "both saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "both saved, tied": {
        "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True,
    },
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 9]},
}  # fmt: skip
LORAS: dict[str, dict[str, Any]] = {
    "DoRA": {"target_modules": ["q_proj"], "use_dora": True},
    "rsLoRA": {"target_modules": ["q_proj"], "use_rslora": True},
    "biases": {"target_modules": ["q_proj"], "bias": "all"},
    "norms": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    "patterns": {"target_modules": ["q_proj", "k_proj"], "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"k_proj": 5}},
    "all linear": {"target_modules": "all-linear"},
    "PiSSA": {"target_modules": ["q_proj"], "init_lora_weights": "pissa"},
    "parameters": {"target_modules": [], "target_parameters": ["self_attn.q_proj.weight"]},
}


def saved(model: Any, config: Any, folder: Path) -> torch.Tensor:
    """Save an adapter with random weights as PEFT does, and return the logits that PEFT has for it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, config)
        generator = torch.Generator().manual_seed(0)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        adapted.save_pretrained(str(folder))
        return logits(adapted.eval())


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS).logits
    return found


def assert_merged(model: Any, folder: Path, expected: torch.Tensor) -> Any:
    """The merged model, and the written one as transformers loads it, answer as the adapter does."""
    adapted = load_adapter(model, folder)
    torch.testing.assert_close(logits(plain_model(adapted)), expected, atol=1e-5, rtol=1e-5)
    merged = merge(adapted)
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(folder / "merged")
    written = AutoModelForCausalLM.from_pretrained(folder / "merged").eval()
    torch.testing.assert_close(logits(written), expected, atol=1e-4, rtol=1e-4)
    return written


@pytest.mark.parametrize("kind", APPLIED_TYPES)
def test_every_kind_that_is_taken_is_applied_and_merged(tiny_model, tmp_path, kind):
    kinds = {peft_type.value: peft_type for peft_type in peft.PeftType}
    if kind not in kinds:
        pytest.skip(f"this PEFT has no {kind}")
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[kinds[kind]]
    rank = {"r": 4} if "r" in config_class.__dataclass_fields__ else {}
    settings = {"target_modules": [*TARGETS], **rank} | SETTINGS.get(kind, {})
    plain = tiny_model("llama", tie_word_embeddings=True)
    before = logits(plain)
    expected = saved(plain, config_class(task_type="CAUSAL_LM", **settings), tmp_path)
    assert (expected - before).abs().max() > 1e-3
    if kind in UNMERGEABLE:
        adapted = load_adapter(tiny_model("llama", tie_word_embeddings=True), tmp_path)
        torch.testing.assert_close(logits(plain_model(adapted)), expected, atol=1e-5, rtol=1e-5)
        with pytest.raises(ArtifactError, match="cannot merge"):
            merge(adapted)
    else:
        assert_merged(tiny_model("llama", tie_word_embeddings=True), tmp_path, expected)


@pytest.mark.parametrize("settings", LORAS.values(), ids=LORAS)
def test_every_kind_of_lora_is_merged(tiny_model, tmp_path, settings):
    expected = saved(tiny_model("qwen2"), LoraConfig(task_type="CAUSAL_LM", r=4, **settings), tmp_path)
    assert_merged(tiny_model("qwen2"), tmp_path, expected)


@pytest.mark.parametrize("settings", EMBEDDING_ADAPTERS.values(), ids=EMBEDDING_ADAPTERS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_tied_embeddings_part_where_the_adapter_changes_them(tiny_model, tmp_path, settings, tied):
    """Gemma 2 scales its embeddings, which a change of them has to go through as well."""
    family = "gemma2" if tied else "llama"
    model = tiny_model(family, tie_word_embeddings=tied)
    expected = saved(model, LoraConfig(task_type="CAUSAL_LM", r=4, **settings), tmp_path)
    written = assert_merged(tiny_model(family, tie_word_embeddings=tied), tmp_path, expected)
    ends = (written.get_input_embeddings().weight, written.get_output_embeddings().weight)
    assert written.config.tie_word_embeddings == torch.equal(*ends)


def test_embeddings_that_the_adapter_leaves_alone_stay_tied(tiny_model, tmp_path):
    saved(tiny_model("gemma2"), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]), tmp_path)
    merged = merge(load_adapter(tiny_model("gemma2"), tmp_path))
    assert merged.config.tie_word_embeddings
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight


def test_a_tensor_that_belongs_nowhere_is_refused(tiny_model, tmp_path):
    """PEFT would leave it out without a word."""
    saved(tiny_model("llama"), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file(load_file(path) | {"base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.ones(4, 32)}, path)
    with pytest.raises(ArtifactError, match=r"1 of its tensors belong nowhere, the first is .*layers\.7"):
        load_adapter(tiny_model("llama"), tmp_path)


def test_an_adapter_of_a_resized_vocabulary_is_refused_until_the_model_is_resized(tiny_model, tmp_path):
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    expected = saved(tiny_model("llama", vocab_size=70), config, tmp_path)
    with pytest.raises(ArtifactError, match=r"size mismatch.*70") as refused:
        load_adapter(tiny_model("llama"), tmp_path)
    assert "resize_token_embeddings" in (refused.value.hint or "")
    assert_merged(tiny_model("llama", vocab_size=70), tmp_path, expected)


@pytest.mark.parametrize("step", ["load_adapter", "merge_and_unload"])
def test_too_little_memory_is_no_fault_of_the_adapter(tiny_model, tmp_path, monkeypatch, step):
    saved(tiny_model("llama"), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]), tmp_path)

    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    adapted = load_adapter(tiny_model("llama"), tmp_path)
    monkeypatch.setattr(adapted if step == "merge_and_unload" else PeftModel, step, fail, raising=False)
    with pytest.raises(torch.OutOfMemoryError):
        merge(adapted) if step == "merge_and_unload" else load_adapter(tiny_model("llama"), tmp_path)


# --- the comparison


def test_the_probe_has_the_tokens_whose_embeddings_change(tiny_model, tmp_path):
    settings = {"target_modules": ["q_proj"], "trainable_token_indices": [5, 9]}
    saved(tiny_model("gemma2"), LoraConfig(task_type="CAUSAL_LM", r=4, **settings), tmp_path)
    ids = probe_tokens(load_adapter(tiny_model("gemma2"), tmp_path))
    assert ids.shape == (1, PROBED_TOKENS)
    assert {5, 9} <= set(ids[0].tolist())


def test_the_probe_spreads_over_the_vocabulary(tiny_model, tmp_path):
    saved(tiny_model("llama"), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]), tmp_path)
    assert probe_tokens(load_adapter(tiny_model("llama"), tmp_path))[0].tolist() == [*range(0, 64, 4)]


@pytest.mark.parametrize(("error", "refused"), [(1e-5, False), (1e-2, True), (float("nan"), True)])
def test_answers_may_differ_by_rounding_alone(error, refused):
    expected = torch.linspace(-8, 8, 64).reshape(4, 16)
    found = expected.clone()
    found[2, 3] += 8 * error
    if not refused:
        require_same_answers(found, expected, "merging")
        return
    with pytest.raises(ArtifactError, match="merging gives a model that answers otherwise than the adapter"):
        require_same_answers(found, expected, "merging")


def test_another_vocabulary_is_another_answer():
    with pytest.raises(ArtifactError, match="17 logits a token where the adapter has 16"):
        require_same_answers(torch.zeros(4, 17), torch.zeros(4, 16), "merging")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rounded_weights_compute_what_is_written(tiny_model, tmp_path, dtype):
    model = tiny_model("gemma2")
    round_weights(model, dtype)
    rounded = logits(model)
    model.to(dtype).save_pretrained(tmp_path)
    written = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    torch.testing.assert_close(logits(written), rounded, atol=1e-5, rtol=1e-5)


def test_answers_are_float32_of_a_single_pass(tiny_model):
    model = tiny_model("llama").to(torch.bfloat16)
    found = answer(model, IDS)
    assert found.dtype == torch.float32
    assert torch.equal(found, logits(model)[0].float())
