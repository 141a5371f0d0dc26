"""Models that a stage cannot use are refused before their weights are read, by a dry run as by the run itself."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from p2d_cli.modeling.model_files import locate_model
from p2d_cli.modeling.suitability import _ordinary_layout

SMALL = {
    "vocab_size": 370,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HYBRID = SMALL | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
LATENT = SMALL | {
    "num_key_value_heads": 4,
    "first_k_dense_replace": 2,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}


def save(config, folder, tokenizer):
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder)
    return folder


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory, tiny_folder):
    """A model with attention in one of its two layers."""
    return save(transformers.Lfm2Config(**HYBRID), tmp_path_factory.mktemp("hybrid"), tiny_folder)


@pytest.fixture(scope="module")
def latent(tmp_path_factory, tiny_folder):
    """A model whose attention has no heads that own rows."""
    return save(transformers.DeepseekV2Config(**LATENT), tmp_path_factory.mktemp("latent"), tiny_folder)


@pytest.fixture(scope="module")
def sinks(tmp_path_factory, tiny_folder):
    """A model whose attention has sinks."""
    changes = {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}
    config = transformers.GptOssConfig(**(SMALL | changes))
    return save(config, tmp_path_factory.mktemp("sinks"), tiny_folder)


@pytest.fixture
def no_weights(monkeypatch):
    """Fails the test where weights are read."""

    def read(*_, **__):
        pytest.fail("the weights were read")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", read)


def ask(p2d, model, few, out, *words, dry):
    given = {"--target": few["target"], "--pool": few["pool"], "--data": few["test"]}
    filled = [part for word in words for part in ([word, given[word]] if word in given else [word])]
    return p2d(filled[0], "--model", model, *filled[1:], "--dtype", "float32", "--out", out, *(["--dry-run"] * dry))


def refused(done, *words, code=65):
    assert done.code == code, done.said
    for word in words:
        assert str(word) in done.said, f"{word!r} is not in: {done.said}"


BY_HEADS = {
    "random": ("score-heads", "--method", "random"),
    "uniform": ("score-heads", "--method", "uniform"),
    "pad": ("score-heads", "--method", "pad", "--target"),
    "taylor": ("score-heads", "--method", "taylor", "--target"),
    "readout": ("score-heads", "--method", "readout", "--target", "--pool"),
    "contrast": ("score-heads", "--method", "contrast", "--target", "--pool"),
    "data-whisperer": ("mine-data", "--method", "data-whisperer", "--pool", "--target"),
}


@pytest.mark.parametrize("words", BY_HEADS.values(), ids=BY_HEADS)
@pytest.mark.parametrize("dry", [False, True], ids=["run", "dry"])
def test_heads_that_are_not_there(p2d, latent, few, tmp_path, no_weights, words, dry):
    done = ask(p2d, latent, few, tmp_path / "o", *words, dry=dry)
    refused(done, "cannot tell the attention heads of deepseek_v2 apart", "into a latent (MLA)", "--scope lora")
    assert not list(tmp_path.iterdir())


WITHOUT_HEADS = {
    "loss": ("mine-data", "--method", "loss", "--pool", "--count", 4),
    "embedding": ("mine-data", "--method", "embedding", "--pool", "--target", "--count", 4),
    "lexical": ("mine-data", "--method", "lexical", "--pool", "--target", "--count", 4),
    "lora": ("train", "--scope", "lora", "--max-steps", 1, "--data"),
    "attention": ("train", "--scope", "attention", "--max-steps", 1, "--data"),
    "full": ("train", "--scope", "full", "--max-steps", 1, "--data"),
    "eval": ("eval", "--limit", 2, "--max-new-tokens", 2, "--data"),
    "perplexity": ("eval", "--limit", 2, "--metric", "perplexity", "--data"),
}


@pytest.mark.parametrize("words", WITHOUT_HEADS.values(), ids=WITHOUT_HEADS)
def test_what_reads_no_heads_works_on_a_model_without_them(p2d, latent, few, tmp_path, words):
    for dry in (True, False):
        done = ask(p2d, latent, few, tmp_path / "o", *words, dry=dry)
        assert done.code == 0, done.said


def test_layers_without_attention_have_no_heads_to_ask_for(p2d, hybrid, few, tmp_path):
    scored = ask(p2d, hybrid, few, tmp_path / "o", *BY_HEADS["random"], "--layers", "0-0", dry=False)
    refused(scored, "asks for 1 heads; layers 0-0 have 0", code=2)
    mined = ask(p2d, hybrid, few, tmp_path / "o", *BY_HEADS["data-whisperer"], "--layer", 0, dry=False)
    refused(mined, "--layer 0: that layer of the model has no attention", "choose one of 1", code=2)


def test_attention_sinks_rule_nothing_out(p2d, sinks, few, tmp_path):
    for name in ("contrast", "data-whisperer"):
        for dry in (True, False):
            done = ask(p2d, sinks, few, tmp_path / name, *BY_HEADS[name], dry=dry)
            assert done.code == 0, done.said


@pytest.mark.parametrize("dry", [False, True], ids=["run", "dry"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "t5"}, "an encoder-decoder model"),
        ({"model_type": "bert"}, "it is an encoder"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "are quantised (AWQ)"),
        ({"num_attention_heads": 5}, "not a valid model config"),
        ({"hidden_act": "wow"}, "cannot build the model"),
        ({"rope_parameters": {"rope_type": "nothing", "rope_theta": 1.0}}, "cannot build the model"),
        ({"num_hidden_layers": None}, "not a valid model config"),
        ({"text_config": 3}, "its text_config is not a JSON object"),
    ],
)
def test_configs_that_are_of_no_use(p2d, tiny_folder, few, tmp_path, no_weights, changes, message, dry):
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | changes
    (model / "config.json").write_text(json.dumps(config))
    for words in (WITHOUT_HEADS["eval"], WITHOUT_HEADS["lora"], BY_HEADS["taylor"]):
        refused(ask(p2d, model, few, tmp_path / "o", *words, dry=dry), message)


def test_a_layer_count_of_zero_has_no_heads(p2d, tiny_folder, few, tmp_path):
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {"num_hidden_layers": 0}
    (model / "config.json").write_text(json.dumps(config))
    for dry in (True, False):
        refused(
            ask(p2d, model, few, tmp_path / "o", *BY_HEADS["random"], dry=dry),
            "expected an attention in each of its 0 layers",
        )


def test_quantised_weights_are_not_compared_as_if_they_were_plain(p2d, tiny_folder, few, tmp_path):
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (model / "config.json").write_text(json.dumps(config))
    for dry in (True, False):
        words = ("score-heads", "--method", "pad", "--task-model", model)
        refused(ask(p2d, tiny_folder, few, tmp_path / "o", *words, dry=dry), "are quantised (FP8)")


# --- tokens that the model has no embedding for


@pytest.fixture(scope="module")
def larger_tokenizer(tmp_path_factory, tiny_folder):
    """The fixture's model, and a tokenizer with two tokens more than it has embeddings."""
    folder = tmp_path_factory.mktemp("larger") / "model"
    shutil.copytree(tiny_folder, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(folder)
    return folder


READERS = {
    "train": ("train", "--scope", "full", "--max-steps", 1, "--data"),
    "eval": ("eval", "--limit", 2, "--max-new-tokens", 2, "--data"),
    "perplexity": ("eval", "--limit", 2, "--metric", "perplexity", "--data"),
    "loss": ("mine-data", "--method", "loss", "--pool", "--count", 4),
    "embedding": ("mine-data", "--method", "embedding", "--pool", "--target", "--count", 4),
    "data-whisperer": BY_HEADS["data-whisperer"],
    "readout": BY_HEADS["readout"],
    "taylor": BY_HEADS["taylor"],
    "contrast": (*BY_HEADS["contrast"], "--episodes", 2),
}
IM = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
IM += "{% if add_generation_prompt %}<|im_start|>{% endif %}"


@pytest.mark.parametrize("words", READERS.values(), ids=READERS)
def test_tokens_beyond_the_embeddings_are_refused_with_both_numbers(p2d, larger_tokenizer, few, tmp_path, words):
    template = tmp_path / "im.jinja"
    template.write_text(IM)
    words = (*words, "--chat-template", template)
    for dry in (True, False):
        done = ask(p2d, larger_tokenizer, few, tmp_path / "o", *words, dry=dry)
        refused(done, ".jsonl:", "'<|im_start|>' has the id 370", "ids up to 371, the model has 370 embeddings")


@pytest.mark.parametrize("name", ["loss", "eval", "train"])
def test_a_larger_tokenizer_is_no_fault_where_no_row_has_its_tokens(p2d, larger_tokenizer, few, tmp_path, name):
    for dry in (True, False):
        done = ask(p2d, larger_tokenizer, few, tmp_path / "o", *READERS[name], dry=dry)
        assert done.code == 0, done.said


@pytest.mark.parametrize("name", ["pad_token", "eos_token"])
def test_padding_and_end_beyond_the_embeddings(p2d, larger_tokenizer, few, tmp_path, name):
    model = shutil.copytree(larger_tokenizer, tmp_path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text()) | {name: "<|im_end|>"}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    for dry in (True, False):
        for words in (READERS["train"], READERS["loss"]):
            done = ask(p2d, model, few, tmp_path / "o", *words, dry=dry)
            refused(done, f"the tokenizer's {name}", "'<|im_end|>' has the id 371", "370 embeddings")


# --- files


@pytest.mark.parametrize("dry", [False, True], ids=["run", "dry"])
def test_an_empty_tokenizer_is_not_made_up(p2d, tiny_folder, few, tmp_path, dry):
    """transformers gives a folder with nothing but a class's name an empty tokenizer: all answers would be wrong."""
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    refused(ask(p2d, model, few, tmp_path / "o", *READERS["eval"], dry=dry), "has no tokenizer")


@pytest.mark.parametrize("dry", [False, True], ids=["run", "dry"])
def test_a_missing_package_for_the_tokenizer(p2d, tiny_folder, few, tmp_path, monkeypatch, dry):
    monkeypatch.setattr("p2d_cli.modeling.model_files._is_installed", lambda module: module != "sentencepiece")
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    (model / "tokenizer.json").rename(model / "tokenizer.model")
    done = ask(p2d, model, few, tmp_path / "o", *READERS["eval"], dry=dry)
    refused(done, "reading it takes sentencepiece", "pip install sentencepiece", code=69)


# --- devices


EVERYWHERE = {**READERS, **{name: BY_HEADS[name] for name in ("random", "uniform")}} | {
    "lora": WITHOUT_HEADS["lora"],
    "random rows": ("mine-data", "--method", "random", "--pool", "--count", 4),
    "lexical": WITHOUT_HEADS["lexical"],
    "coverage": ("mine-data", "--method", "coverage", "--pool", "--count", 4),
    "all rows": ("mine-data", "--method", "full", "--pool"),
}


@pytest.mark.parametrize("words", EVERYWHERE.values(), ids=EVERYWHERE)
def test_a_device_that_is_not_there_is_refused_everywhere(p2d, tiny_folder, few, tmp_path, monkeypatch, words):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for dry in (True, False):
        for device, code in (("cuda", 69), ("mps", 69), ("xpu", 2)):
            done = ask(p2d, tiny_folder, few, tmp_path / "o", *words, "--device", device, dry=dry)
            refused(done, device, code=code)


def test_a_recipe_refuses_a_device_that_is_not_there(p2d, monkeypatch, tmp_path, tiny_folder):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    recipe = tiny_folder.parent / "quickstart.toml"
    for extra in (["--dry-run"], []):
        refused(p2d("run", recipe, "--device", "cuda", "--out", tmp_path / "r", *extra), "cuda", code=69)


# --- the short way, which needs no torch


def test_the_short_way_agrees_with_the_modules(tiny_folder, tmp_path):
    from p2d_cli.modeling.checkpoints import skeleton
    from p2d_cli.modeling.layouts import model_layout
    from p2d_cli.modeling.token_ids import count_embeddings

    files, empty = locate_model(str(tiny_folder)), skeleton(tiny_folder)
    assert _ordinary_layout(files) == model_layout(empty)
    assert files.config["vocab_size"] == count_embeddings(empty) == 370


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 3},
        {"num_hidden_layers": 5},
        {"head_dim": 8},
        {"vocab_size": 371},
        {"hidden_act": "gelu"},
        {"dtype": "int4"},
        {"layer_types": ["full_attention"] * 4},
        {"rope_parameters": {"rope_type": "yarn"}},
        {"model_type": "gemma2"},
    ],
)
def test_the_short_way_is_taken_only_where_nothing_is_in_doubt(tiny_folder, tmp_path, changes):
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | changes
    (model / "config.json").write_text(json.dumps(config))
    assert _ordinary_layout(locate_model(str(model))) is None


def test_a_projection_of_another_shape_is_in_doubt(tiny_folder, tmp_path):
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.3.self_attn.o_proj.weight"
    tensors[name] = tensors[name][:, 1:].contiguous()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert _ordinary_layout(locate_model(str(model))) is None
