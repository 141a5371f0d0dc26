"""p2d doctor: what it says of a model, and that this is what the stages then do."""

import json
import shutil

import pytest
import transformers

SIZES = {
    "vocab_size": 384, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
HYBRID = SIZES | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
LATENT = SIZES | {
    "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8, "first_k_dense_replace": 2,
}  # fmt: skip


@pytest.fixture
def described(tmp_path, tiny_folder):
    """Makes a model folder with a config and a tokenizer, and nothing else."""

    def make(config):
        config.save_pretrained(tmp_path / "model")
        for path in tiny_folder.glob("tokenizer*"):
            shutil.copy(path, tmp_path / "model")
        return tmp_path / "model"

    return make


def test_a_model_that_can_do_everything(p2d, tiny_folder):
    done = p2d("doctor", "--model", tiny_folder)
    assert done.code == 0
    assert "weights are here" in done.out
    assert "not " not in done.out.split("weights are here")[1]


def test_a_hybrid_is_told_by_its_config_alone(p2d, described):
    folder = described(transformers.Lfm2Config(**HYBRID))
    done = p2d("doctor", "--model", folder)
    assert "4 heads in 1 of 2 layers" in done.out
    assert "its weights are not here" in done.out
    found = json.loads(p2d("doctor", "--model", folder, "--json").out)
    assert found["geometry"]["num_heads"] == [0, 4]
    assert not any(one["reason"] for one in found["abilities"])


def test_what_heads_rule_out_is_told_with_the_reason_and_the_rest_is_not(p2d, described):
    folder = described(transformers.DeepseekV2Config(**LATENT))
    found = json.loads(p2d("doctor", "--model", folder, "--json").out)
    assert found["geometry"] is None
    possible = {(one["stage"], one["what"]) for one in found["abilities"] if not one["reason"]}
    assert {("train", "lora"), ("train", "attention"), ("train", "full"), ("eval", "eval")} <= possible
    assert {("mine-data", "loss"), ("mine-data", "embedding"), ("mine-data", "lexical")} <= possible
    assert not {("train", "heads"), ("score-heads", "readout"), ("mine-data", "p2d (readout)")} & possible
    shown = p2d("doctor", "--model", folder).out
    assert "not score-heads; mine-data data-whisperer, p2d (readout), p2d (attention); train heads:" in shown
    assert "compressed into a latent" in shown


def test_a_quantised_model_is_told_as_such(p2d, described):
    config = transformers.LlamaConfig(**SIZES, quantization_config={"quant_method": "gptq", "bits": 4})
    done = p2d("doctor", "--model", described(config))
    assert done.code == 0
    assert "quantised (GPTQ)" in done.out
    assert "use the unquantised" not in done.out.split("\n")[0]


@pytest.mark.parametrize("layers", [-1, 10**6])
def test_no_model_has_so_many_layers(p2d, described, layers):
    folder = described(transformers.Lfm2Config(**HYBRID))
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": layers, "layer_types": None}
    (folder / "config.json").write_text(json.dumps(config))
    found = json.loads(p2d("doctor", "--model", folder, "--json").out)
    possible = {one["stage"] for one in found["abilities"] if not one["reason"]}
    assert possible == {"mine-data"}, "what reads no model"


def test_what_is_no_model_is_an_error(p2d, tmp_path):
    assert p2d("doctor", "--model", tmp_path / "nothing").code == 69
    (tmp_path / "config.json").write_text("{")
    assert p2d("doctor", "--model", tmp_path).code == 65
