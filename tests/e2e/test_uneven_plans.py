"""What a dry run says of models whose layers differ, beside what the run then trains and writes."""

import json
import shutil

import pytest
import transformers

SIZES = {
    "vocab_size": 384, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GATED = SIZES | {
    "head_dim": 16, "layer_types": ["linear_attention", "full_attention"] * 2, "linear_num_value_heads": 4,
    "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
SHARED = SIZES | {
    "head_dim": 8, "global_head_dim": 16, "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 384, "hidden_size_per_layer_input": 8, "sliding_window": 8,
}  # fmt: skip
# It stores what is no parameter beside its weights.
STORED = SIZES | {"head_dim": 8, "num_local_experts": 2, "layer_types": ["full_attention", "linear_attention"] * 2}
KINDS = {
    "gated": ("Qwen3_5TextConfig", GATED),
    "shared": ("Gemma4TextConfig", SHARED),
    "stored": ("MiniMaxConfig", STORED),
}


@pytest.fixture(params=KINDS)
def model(request, tmp_path, tiny_folder):
    """A model folder of each kind."""
    name, values = KINDS[request.param]
    if not hasattr(transformers, name):
        pytest.skip(f"this transformers has no {name}")
    folder = tmp_path / "model"
    transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**values)).save_pretrained(folder)
    for path in tiny_folder.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


@pytest.mark.parametrize("scope", ["heads", "lora", "full"])
def test_a_plan_counts_what_is_trained(p2d, model, few, tmp_path, scope):
    heads, out = tmp_path / "heads", tmp_path / "out"
    words = ["train", "-m", model, "--data", few["test"], "--scope", scope, "--max-steps", 1, "--out", out]
    words += ["--projections", "q,k,v,o"] if scope != "full" else []
    if scope == "heads":
        assert p2d("score-heads", "-m", model, "--method", "random", "--ratio", 0.3, "--out", heads).code == 0
        words += ["--heads", heads]
    plan = p2d(*words, "--dry-run", "--json").json["plan"]
    done = p2d(*words)
    assert done.code == 0, done.said
    trained = json.loads((out / "manifest.json").read_text())["summary"]["trained_parameters"]
    assert f"of {trained:,} parameters" in plan["notes"][0]
    if scope != "full":
        adapter = out / "adapter_model.safetensors"
        assert plan["disk"]["artifact"] == pytest.approx(adapter.stat().st_size, rel=0.3)


@pytest.mark.parametrize("model", ["shared"], indirect=True)
def test_heads_without_keys_of_their_own_are_refused_by_plan_and_run_alike(p2d, model, few, tmp_path):
    heads, out = tmp_path / "heads", tmp_path / "out"
    scored = p2d("score-heads", "-m", model, "--method", "random", "--ratio", 0.3, "--layers", "2-3", "--out", heads)
    assert scored.code == 0, scored.said
    words = ("train", "-m", model, "--heads", heads, "--data", few["test"], "--projections", "k,v", "--out", out)
    for more in (["--dry-run"], []):
        done = p2d(*words, *more)
        assert done.code == 2
        assert "take keys and values from other layers" in done.said
