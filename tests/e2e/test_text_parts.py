"""Checkpoints of text and images through the stages: their text is scored, mined, trained and exported, and no more."""

from __future__ import annotations

import json
import os

import composites
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

IDS = torch.arange(5, 30)[None]
OTHER_PARTS = ("vision", "visual", "multi_modal")
DTYPES = {"gemma3": ("float32", "bfloat16"), "llama4": ("bfloat16", "float32")}
if "P2D_SLOW" in os.environ:
    DTYPES |= dict.fromkeys(["mistral3", "qwen2_5_vl", "qwen3_vl", "gemma4", "internvl"], ("bfloat16", "float32"))
"""In which precision each family is stored here, and in which it is trained."""


@pytest.fixture(scope="module", params=sorted(DTYPES))
def family(request):
    return request.param


@pytest.fixture(scope="module")
def work(p2d, family, composite, rows, tmp_path_factory):
    """A folder with the stages of one family: heads, subset, adapter and its export, attention, full."""
    out = tmp_path_factory.mktemp(family)
    stored, trained = DTYPES[family]
    base = composite(family, out / "base", getattr(torch, stored))
    pool, target = cut(rows["pool"], out / "pool.jsonl", 12), cut(rows["target"], out / "target.jsonl", 4)
    common = ("--model", base, "--dtype", trained)
    train = ("train", *common, "--data", out / "subset", "--max-steps", 1, "--batch-size", 2)
    steps = [
        ("score-heads", *common, "--method", "readout", "--target", target, "--pool", pool, "--out", out / "heads"),
        (
            *("mine-data", *common, "--target", target, "--pool", pool, "--heads", out / "heads"),
            *("--affinity", "attention", "--ratio", 0.5, "--out", out / "subset"),
        ),
        (*train, "--scope", "heads", "--heads", out / "heads", "--checkpointing", "--out", out / "adapter"),
        (*train, "--scope", "attention", "--out", out / "attention"),
        (*train, "--scope", "full", "--out", out / "full"),
        ("export", out / "adapter", "--dtype", trained, "--out", out / "exported"),
        *(
            ("eval", "--model", model, "--dtype", "float32", "--data", target, *more, "--out", out / f"eval-{name}")
            for name, model, more in (
                ("adapter", base, ("--adapter", out / "adapter", "--max-new-tokens", 3)),
                ("full", out / "full", ("--max-new-tokens", 3)),
            )
        ),
    ]
    for step in steps:
        done = p2d(*step)
        assert done.code == 0, f"{step}: {done.said}"
    return out


def cut(source, path, count):
    path.write_text("".join(source.read_text(encoding="utf-8").splitlines(keepends=True)[:count]), encoding="utf-8")
    return path


def stored(folder):
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def is_other(name):
    return any(part in name for part in OTHER_PARTS)


def load(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    if type(model).__name__.startswith("Llama4"):
        model.language_model.register_forward_hook(composites.add_no_images)
    return model


@pytest.mark.parametrize("written", ["exported", "attention", "full"])
def test_what_is_written_is_of_the_same_class_with_all_else_as_it_was(work, family, written):
    before, after = stored(work / "base"), stored(work / written)
    assert set(before) == set(after)
    others = [name for name in before if is_other(name)]
    assert len(others) > 10
    for name in others:
        assert before[name].dtype == after[name].dtype
        assert torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)), name
    assert {str(after[name].dtype) for name in after if not is_other(name)} == {f"torch.{DTYPES[family][1]}"}
    configs = [json.loads((work / name / "config.json").read_text()) for name in ("base", written)]
    assert [config["model_type"] for config in configs] == [family] * 2
    assert configs[0]["architectures"] == configs[1]["architectures"]
    assert (work / written / "preprocessor_config.json").is_file()
    again = load(work / written)
    with torch.no_grad():
        assert again(input_ids=IDS).logits.isfinite().all()


@torch.no_grad()
def test_peft_alone_says_what_the_export_says(work):
    found = load(work / "exported")(input_ids=IDS).logits
    expected = PeftModel.from_pretrained(load(work / "base"), work / "adapter")(input_ids=IDS).logits
    rounded = 0.03 if json.loads((work / "exported" / "config.json").read_text())["dtype"] == "bfloat16" else 1e-4
    assert (found - expected).abs().max() <= rounded * expected.abs().max()
    assert (expected - load(work / "base")(input_ids=IDS).logits).abs().max() > 0


def test_an_adapter_changes_the_text_alone(work):
    names = load_file(work / "adapter" / "adapter_model.safetensors")
    assert names
    assert not any(is_other(name) for name in names)


def test_an_adapter_of_others_that_reaches_into_the_tower_is_exported_whole(p2d, work, family, tmp_path):
    if family not in {"gemma3", "llama4"}:
        pytest.skip("its tower calls its projections otherwise")
    model = get_peft_model(load(work / "base"), LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    model.save_pretrained(tmp_path / "foreign")
    done = p2d("export", tmp_path / "foreign", "--model", work / "base", "--dtype", "float32", "--out", tmp_path / "x")
    assert done.code == 0, done.said
    before, after = stored(work / "base"), stored(tmp_path / "x")
    touched = {name for name in before if is_other(name) and not torch.equal(before[name].float(), after[name].float())}
    assert touched == {name for name in before if is_other(name) and name.endswith("q_proj.weight")} != set()
    merged, written = model.merge_and_unload().state_dict(), load(tmp_path / "x").state_dict()
    assert all(torch.allclose(merged[name], written[name], atol=1e-6) for name in merged)


def test_cards_name_the_class_that_loads_all_parts(work, family):
    auto = "AutoModelForCausalLM" if family.startswith("gemma") else "AutoModelForImageTextToText"
    for name in ("adapter", "full", "exported"):
        assert f"{auto}.from_pretrained(" in (work / name / "README.md").read_text()


@pytest.mark.parametrize("family", ["qwen2_5_vl"], scope="module")
def test_packing_is_refused_where_rows_would_mix(p2d, composite, few, tmp_path, family):
    base = composite(family, tmp_path / "base", torch.float32)
    done = p2d(
        "train", "--model", base, "--data", few["target"], "--scope", "lora", "--packing", "--out", tmp_path / "t"
    )
    assert done.code == 2
    assert "--packing: qwen2_5_vl does not keep the rows of a packed sequence apart" in done.said
