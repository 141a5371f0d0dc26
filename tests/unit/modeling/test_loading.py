from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from p2d_cli.errors import DataError, ModelError, UnavailableError, UsageError
from p2d_cli.modeling.light_tokenizer import load_light_tokenizer
from p2d_cli.modeling.loading import (
    ensure_pad_token,
    load_model,
    load_tokenizer,
    quiet_transformers,
    read_config,
    resolve_device,
    resolve_dtype,
)
from p2d_cli.modeling.model_files import locate_model

CPU = torch.device("cpu")


@pytest.fixture
def saved(tiny_model, tmp_path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def make_tokenizer(**special: str) -> transformers.PreTrainedTokenizerFast:
    words = ["[UNK]", "</s>", "<pad>", "one", "two"]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **special)


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_loaded_model_equals_the_saved_one_and_is_ready_for_inference(saved, tiny_model, token_ids):
    model = load_model(saved, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(model(token_ids(2, 7)).logits, tiny_model("llama")(token_ids(2, 7)).logits)
    assert not model.training
    assert model.config._attn_implementation == "sdpa"


def test_dtype_is_that_asked_for(saved):
    model = load_model(str(saved), dtype=torch.bfloat16, device=CPU)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_no_path_of_this_machine_stays_in_the_model(saved):
    model = load_model(saved, dtype=torch.float32, device=CPU)
    assert model.name_or_path == ""
    assert str(saved) not in json.dumps(model.config.to_dict())


def test_a_family_without_sdpa_runs_eagerly(tiny_model, tmp_path, token_ids):
    reference = tiny_model("gemma2")
    reference.save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype=torch.float32, device=CPU)
    assert model.config._attn_implementation == "eager"
    with torch.no_grad():
        torch.testing.assert_close(model(token_ids(2, 9)).logits, reference(token_ids(2, 9)).logits)


def test_loading_is_quiet_and_leaves_the_settings_as_they_were(saved, capfd, caplog):
    before = transformers.logging.get_verbosity()
    edit_config(saved, made_up_key=1)
    load_model(saved, dtype=torch.float32, device=CPU)
    captured = capfd.readouterr()
    assert (captured.out, captured.err, caplog.records) == ("", "", [])
    assert transformers.logging.get_verbosity() == before
    assert transformers.logging.is_progress_bar_enabled()


def test_quiet_block_restores_after_an_error():
    before = transformers.logging.get_verbosity()

    def fail():
        with quiet_transformers():
            assert not transformers.logging.is_progress_bar_enabled()
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert transformers.logging.get_verbosity() == before
    assert transformers.logging.is_progress_bar_enabled()


def test_missing_tensors_are_an_error_and_not_random_values(saved):
    tensors = load_file(saved / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"
    del tensors[name]
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=name):
        load_model(saved, dtype=torch.float32, device=CPU)


def test_tied_output_weights_may_be_absent(tiny_model, tmp_path):
    tiny_model("gemma2").save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model = load_model(tmp_path, dtype=torch.float32, device=CPU)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_truncated_file_is_a_data_error(saved):
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(DataError, match="failed") as caught:
        load_model(saved, dtype=torch.float32, device=CPU)
    assert caught.value.hint


def test_tensors_of_another_shape_are_a_data_error(saved):
    edit_config(saved, intermediate_size=64)
    with pytest.raises(DataError, match="failed"):
        load_model(saved, dtype=torch.float32, device=CPU)


def test_pickle_weights_are_refused_by_name(saved):
    (saved / "model.safetensors").unlink()
    (saved / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"pytorch_model\.bin"):
        load_model(saved, dtype=torch.float32, device=CPU)


def test_remote_code_is_refused(saved):
    edit_config(saved, model_type="my_own", auto_map={"AutoModelForCausalLM": "modeling.MyModel"})
    with pytest.raises(DataError, match="auto_map"):
        load_model(saved, dtype=torch.float32, device=CPU)


def test_remote_code_beside_a_native_class_is_not_run(saved):
    edit_config(saved, auto_map={"AutoModelForCausalLM": "modeling.MyModel"})
    (saved / "modeling.py").write_text("raise SystemExit('this must not run')")
    model = load_model(saved, dtype=torch.float32, device=CPU)
    assert type(model) is transformers.LlamaForCausalLM


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "nothing_known"}, "nothing_known"),
        ({"model_type": "t5"}, "not a causal language model: it is an encoder-decoder model"),
        ({"model_type": "bart"}, "not a causal language model: it is an encoder-decoder model"),
        ({"model_type": "bert"}, "not a causal language model: it is an encoder, whose tokens see those behind them"),
        ({"model_type": "chameleon"}, "transformers has it only as a model of several inputs"),
        ({"model_type": "vit"}, "transformers has no language-modelling class for it"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised.*GPTQ"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "quantised.*AWQ"),
        ({"quantization_config": {"bits": 4}}, "quantised.*unknown method"),
    ],
)
def test_models_that_cannot_be_used_are_refused(saved, changes, message):
    edit_config(saved, **changes)
    with pytest.raises(ModelError, match=message):
        load_model(saved, dtype=torch.float32, device=CPU)


def test_a_missing_model_is_unavailable(tmp_path):
    with pytest.raises(UnavailableError):
        read_config(locate_model(str(tmp_path / "nothing")))


def test_tokenizer_round_trip_and_padding(saved):
    make_tokenizer(eos_token="</s>").save_pretrained(saved)
    tokenizer = load_tokenizer(saved)
    assert tokenizer("one two one")["input_ids"] == [3, 4, 3]
    ensure_pad_token(tokenizer)
    assert tokenizer.pad_token == "</s>"


def test_an_own_padding_token_is_kept():
    tokenizer = make_tokenizer(eos_token="</s>", pad_token="<pad>")
    ensure_pad_token(tokenizer)
    assert tokenizer.pad_token == "<pad>"


def test_a_tokenizer_with_nothing_to_pad_with_is_refused():
    with pytest.raises(DataError, match="end-of-text"):
        ensure_pad_token(make_tokenizer())


def test_a_folder_without_tokenizer_is_a_data_error(saved):
    with pytest.raises(DataError, match="tokenizer"):
        load_tokenizer(saved)


def test_a_tokenizer_without_vocabulary_is_no_tokenizer(saved):
    """transformers makes an empty one of it, which turns every text into nothing."""
    (saved / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    with pytest.raises(DataError, match=r"has no tokenizer: there is no tokenizer\.json"):
        load_tokenizer(saved)


@pytest.mark.parametrize(
    ("content", "absent", "packages"),
    [
        (b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02", {"sentencepiece"}, "sentencepiece"),
        (b"\n\x0e\n\x05<unk>\x15", {"sentencepiece", "google.protobuf"}, "sentencepiece protobuf"),
        (b"IQ== 0\nIg== 1\n", {"tiktoken"}, "tiktoken"),
    ],
)
def test_a_package_that_reads_the_tokenizer_is_named(saved, monkeypatch, content, absent, packages):
    def is_installed(module):
        return module not in absent

    monkeypatch.setattr("p2d_cli.modeling.model_files._is_installed", is_installed)
    (saved / "tokenizer.model").write_bytes(content)
    for load in (load_tokenizer, lambda folder: load_light_tokenizer(locate_model(str(folder)))):
        with pytest.raises(UnavailableError, match=r"in tokenizer\.model, without a tokenizer\.json") as caught:
            load(saved)
        assert caught.value.hint == f"pip install {packages}"


def test_a_gguf_is_called_one(saved, tmp_path):
    weights = tmp_path / "llama-q4.gguf"
    weights.write_bytes(b"GGUF\x03\x00")
    for spec in (weights, tmp_path):
        with pytest.raises(DataError, match=r"llama-q4\.gguf.* is a GGUF file, the format of llama\.cpp") as caught:
            locate_model(str(spec))
        assert "safetensors" in str(caught.value.hint)
    (saved / "model.safetensors").rename(saved / "model.gguf")
    with pytest.raises(DataError, match="GGUF"):
        locate_model(str(saved))


def test_a_folder_named_as_a_gguf_is_none(saved):
    (saved / "model.safetensors").unlink()
    (saved / "old.gguf").mkdir()
    with pytest.raises(DataError, match=r"has no model\.safetensors"):
        locate_model(str(saved))


def test_a_gguf_without_its_ending_is_called_one(tmp_path):
    (tmp_path / "model").write_bytes(b"GGUF\x03\x00")
    with pytest.raises(DataError, match="is a GGUF file"):
        locate_model(str(tmp_path / "model"))


def test_auto_dtype_follows_the_hardware(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    assert resolve_dtype("auto", CPU) == torch.bfloat16
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "amx_bf16": False}, raising=False)
    assert resolve_dtype("auto", "cpu") == torch.float32
    assert resolve_dtype("auto", "mps") == torch.float32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert resolve_dtype("auto", "cuda:0") == torch.float32


def test_named_dtypes():
    assert [resolve_dtype(name, CPU) for name in ("float32", "bfloat16", "float16")] == [
        torch.float32,
        torch.bfloat16,
        torch.float16,
    ]
    with pytest.raises(UsageError, match="int8") as caught:
        resolve_dtype("int8", CPU)
    assert "bfloat16" in str(caught.value.hint)


def test_auto_device_prefers_an_accelerator(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert resolve_device("auto") == CPU
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto").type == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto").type == "cuda"


def test_devices_that_are_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert resolve_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(UnavailableError, match="cuda:1"):
        resolve_device("cuda:1")
    for name in ("gpu", "meta", "cuda:x"):
        with pytest.raises(UsageError, match="unknown device"):
            resolve_device(name)
