"""Adapter folders: what lies in them, where they can be taken, and what they become when they are merged."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from p2d_cli.modeling import merging, saving

IDS = torch.arange(1, 40)[None]


def refused(done, code, *texts):
    assert done.code == code, done.said
    for text in texts:
        assert str(text) in done.said, done.said


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def assert_same(found, expected, share=1e-5):
    assert (found - expected).abs().max() <= share * expected.abs().max()


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def edit(folder, **changes):
    (folder / "adapter_config.json").write_text(json.dumps(config_of(folder) | changes))


@pytest.fixture
def eight(tmp_path):
    rows = [{"prompt": f"sort: {n} 1", "completion": f"1 {n}"} for n in range(8)]
    (tmp_path / "eight.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "eight.jsonl"


@pytest.fixture
def foreign(tiny_folder, tmp_path):
    """Factory of a LoRA that PEFT itself saved for the fixture model, with random weights."""

    def make(base=tiny_folder, **settings):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(plain(base), LoraConfig(task_type="CAUSAL_LM", r=4, **settings))
            generator = torch.Generator().manual_seed(0)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
            model.save_pretrained(tmp_path / "foreign")
            return tmp_path / "foreign", logits(model.eval())

    return make


# --- a single update


@pytest.mark.parametrize("more", [("--epochs", 1), ("--max-steps", 1, "--epochs", 9)], ids=["one", "the first of nine"])
@pytest.mark.parametrize("scope", ["heads", "lora", "attention", "full"])
def test_a_single_update_changes_weights(p2d, pipeline, tiny_folder, eight, tmp_path, scope, more):
    heads = ("--heads", pipeline / "heads") if scope == "heads" else ()
    train = ("train", "--model", tiny_folder, "--data", eight, "--dtype", "float32", "--scope", scope, *heads, *more)
    done = p2d(*train, "--batch-size", 16, "--out", tmp_path / "t", "--json")
    assert done.code == 0, done.said
    assert done.json["summary"]["updates"] == 1
    [entry] = map(json.loads, (tmp_path / "t" / "training_log.jsonl").read_text().splitlines())
    assert entry["learning_rate"] > 0
    if scope in {"heads", "lora"}:
        tensors = load_file(tmp_path / "t" / "adapter_model.safetensors")
        for name in {key.rsplit(".lora_", 1)[0] for key in tensors}:
            assert (tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]).abs().max() > 1e-4
    else:
        before, after = (load_file(folder / "model.safetensors") for folder in (tiny_folder, tmp_path / "t"))
        assert any(not torch.equal(before[name], after[name]) for name in before)


# --- what lies in the folder


def test_the_folder_has_tokenizer_card_and_one_rank(p2d, pipeline, tiny_folder):
    folder, manifest = pipeline / "adapter", json.loads((pipeline / "adapter" / "manifest.json").read_text())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (tiny_folder / name).read_bytes()
    assert AutoTokenizer.from_pretrained(folder)("abc") == AutoTokenizer.from_pretrained(tiny_folder)("abc")
    config = config_of(folder)
    rank = manifest["summary"]["adapter_rank"]
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (rank, rank, {}, {})
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {tensor.shape["lora_B" in name] for name, tensor in tensors.items()} == {rank}
    header, text = (folder / "README.md").read_text().split("---\n")[1:3]
    card = yaml.safe_load(header)
    assert card["base_model"] == config["base_model_name_or_path"] == str(tiny_folder.resolve())
    assert card["library_name"] == "peft"
    assert card["tags"] == ["p2d", "lora"]
    assert f"--max-lora-rank {rank}" in text


def test_reported_parameters_are_those_that_were_trained(pipeline, tiny_folder):
    """Rows of zeros are saved, and are neither trained nor counted."""
    summary = json.loads((pipeline / "adapter" / "manifest.json").read_text())["summary"]
    heads = load_file(pipeline / "heads" / "head_scores.safetensors")["selected"]
    model = json.loads((tiny_folder / "config.json").read_text())
    size = model["num_attention_heads"] // model["num_key_value_heads"]
    groups = sum(len({int(head) // size for head in row.nonzero()}) for row in heads)
    assert summary["trained_parameters"] == 2 * (int(heads.sum()) + groups) * model["head_dim"] * model["hidden_size"]


def test_a_path_that_yaml_reads_otherwise_is_quoted(p2d, tiny_folder, eight, tmp_path):
    base = shutil.copytree(tiny_folder, tmp_path / "a base: #1")
    train = ("train", "--model", base, "--data", eight, "--max-steps", 1, "--out", tmp_path / "a")
    assert p2d(*train).code == 0
    assert yaml.safe_load((tmp_path / "a" / "README.md").read_text().split("---\n")[1])["base_model"] == str(base)


def test_the_card_of_a_merged_model(p2d, pipeline, tiny_folder, tmp_path):
    assert p2d("export", pipeline / "adapter", "--out", tmp_path / "x").code == 0
    header, text = (tmp_path / "x" / "README.md").read_text().split("---\n")[1:3]
    assert yaml.safe_load(header)["base_model"] == str(tiny_folder.resolve())
    assert "p2d export" in text
    assert str(pipeline / "adapter") in text


# --- where it can be taken


def test_a_base_given_by_a_relative_path_is_found_from_anywhere(p2d, tiny_folder, eight, tmp_path, monkeypatch):
    shutil.copytree(tiny_folder, tmp_path / "models" / "tiny")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    assert p2d("train", "--model", "models/tiny", "--data", eight, "--epochs", 1, "--out", "a").code == 0
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert p2d("export", "../a", "--out", "x").code == 0
    assert_same(
        logits(plain(tmp_path / "elsewhere" / "x")), logits(PeftModel.from_pretrained(plain(tiny_folder), "../a"))
    )


@pytest.mark.parametrize("named", ["models/tiny", "/no/such/folder", "./tiny"])
def test_a_base_that_is_gone_is_asked_for(p2d, pipeline, tiny_folder, tmp_path, named):
    adapter = shutil.copytree(pipeline / "adapter", tmp_path / "a")
    (adapter / "manifest.json").unlink()
    edit(adapter, base_model_name_or_path=named)
    refused(p2d("export", adapter, "--out", tmp_path / "x"), 69, named, "give --model")
    assert p2d("export", adapter, "--model", tiny_folder, "--out", tmp_path / "x").code == 0


def test_an_evaluation_does_not_depend_on_where_the_base_lay(p2d, tiny_folder, eight, few, tmp_path):
    bases = [shutil.copytree(tiny_folder, tmp_path / name / "tiny") for name in ("one", "other")]
    for base in bases:
        train = ("train", "--model", base, "--data", eight, "--epochs", 1, "--dtype", "float32")
        assert p2d(*train, "--out", base.parent / "a").code == 0
    evaluate = ("eval", "--data", few["test"], "--limit", 2, "--max-new-tokens", 2, "--out", tmp_path / "e", "--json")
    assert p2d(*evaluate, "--model", bases[0], "--adapter", bases[0].parent / "a").json["status"] == "done"
    again = p2d(*evaluate, "--model", bases[1], "--adapter", bases[1].parent / "a")
    assert again.json["status"] == "up-to-date"


def test_another_scaling_is_another_adapter(p2d, tiny_folder, eight, few, tmp_path):
    """The weights alone do not tell: a first update of B moves each value by the rate, whatever alpha is."""
    for name, alpha in (("a", 8), ("b", 32)):
        train = (
            "train",
            "--model",
            tiny_folder,
            "--data",
            eight,
            "--epochs",
            1,
            "--scope",
            "lora",
            "--lora-alpha",
            alpha,
        )
        assert p2d(*train, "--out", tmp_path / name).code == 0
    evaluate = ("eval", "--model", tiny_folder, "--data", few["test"], "--limit", 2, "--max-new-tokens", 2)
    assert p2d(*evaluate, "--adapter", tmp_path / "a", "--out", tmp_path / "e").code == 0
    done = p2d(*evaluate, "--adapter", tmp_path / "b", "--out", tmp_path / "e")
    refused(done, 73, "differs in input adapter")


def test_an_adapter_with_ranks_of_its_own_modules_still_merges(p2d, tiny_folder, tmp_path):
    """As the first release wrote them."""
    golden = tiny_folder.parent / "golden" / "v1" / "adapter"
    assert config_of(golden)["rank_pattern"]
    assert p2d("export", golden, "--model", tiny_folder, "--out", tmp_path / "x").code == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = logits(PeftModel.from_pretrained(plain(tiny_folder), golden).eval())
    assert_same(logits(plain(tmp_path / "x")), expected)
    assert (expected - logits(plain(tiny_folder))).abs().max() > 1e-3


# --- other tools' adapters


@pytest.mark.parametrize(
    ("changes", "texts"),
    [
        *(({"peft_type": kind}, (kind, "does not apply")) for kind in (
            "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT",
            "CARTRIDGE", "POLY", "XLORA", "NEW_KIND",
        )),
        ({"peft_type": None}, ("None", "does not apply")),
        ({"alora_invocation_tokens": [5]}, ("alora_invocation_tokens",)),
        ({"arrow_config": {"top_k": 1}}, ("arrow_config",)),
        ({"layer_replication": [[0, 2], [1, 2]]}, ("layer_replication",)),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_adapters_that_are_more_than_changed_modules_are_refused(
    p2d, pipeline, tiny_folder, few, tmp_path, changes, texts
):
    adapter = shutil.copytree(pipeline / "adapter", tmp_path / "a")
    (adapter / "manifest.json").unlink()
    edit(adapter, **changes)
    evaluate = ("eval", "--model", tiny_folder, "--adapter", adapter, "--data", few["test"], "--out", tmp_path / "e")
    for command in (evaluate, ("export", adapter, "--out", tmp_path / "x")):
        for more in ((), ("--dry-run",)):
            refused(p2d(*command, *more), 65, *texts)
    assert not (tmp_path / "e").exists()
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(("dtype", "share"), [("float32", 1e-5), ("bfloat16", 0.05)])
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [5, 9]},
    ],
    ids=str,
)
def test_an_exported_model_with_changed_embeddings_answers_as_the_adapter(
    p2d, tiny_folder, foreign, tmp_path, settings, dtype, share
):
    """The fixture model ties its output layer to its embeddings."""
    adapter, expected = foreign(**settings)
    done = p2d("export", adapter, "--model", tiny_folder, "--dtype", dtype, "--out", tmp_path / "x")
    assert done.code == 0, done.said
    assert "UserWarning" not in done.said
    assert_same(logits(plain(tmp_path / "x")), expected, share)


@pytest.mark.parametrize("what", ["merged", "written"])
def test_a_model_that_answers_otherwise_is_not_left(p2d, pipeline, tmp_path, monkeypatch, what):
    """Whatever PEFT or transformers get wrong: a change that is lost in merging, or in the folder."""

    def spoilt(call):
        def wrapped(model, *rest, **named):
            result = call(model, *rest, **named)
            spoil = result if what == "merged" else model
            spoil.model.layers[0].mlp.up_proj.weight.data.mul_(0.5)
            if what == "written":
                call(model, *rest, **named)
            return result

        return wrapped

    module, name = (merging, "merge") if what == "merged" else (saving, "save_plain_model")
    monkeypatch.setattr(module, name, spoilt(getattr(module, name)))
    done = p2d("export", pipeline / "adapter", "--out", tmp_path / "x")
    refused(done, 65, "answers otherwise than the adapter", "nothing was written")
    assert not (tmp_path / "x").exists()


def test_tokens_that_were_added_go_with_the_exported_model(p2d, tiny_folder, foreign, few, tmp_path):
    """Within the rows that the embeddings have to spare, as many models' do: PEFT loads it without a word."""
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    model = plain(tiny_folder)
    model.resize_token_embeddings(376)
    model.save_pretrained(base)
    adapter, expected = foreign(base, target_modules=["q_proj"])
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(adapter)
    evaluate = ("eval", "--data", few["test"], "--limit", 2, "--max-new-tokens", 2, "--out", tmp_path / "e")
    done = p2d(*evaluate, "--model", base, "--adapter", adapter)
    refused(done, 65, "'<tool>'", "export the adapter")
    assert p2d("export", adapter, "--model", base, "--out", tmp_path / "x").code == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "x").convert_tokens_to_ids("<tool>") == 370
    assert_same(logits(plain(tmp_path / "x")), expected)
    assert p2d(*evaluate, "--model", tmp_path / "x").code == 0
