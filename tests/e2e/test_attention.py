"""--attn-implementation, through the commands: other kernels find the same, and one that is not there is refused."""

import json

import numpy as np
import plain_flash
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

PRECISIONS = {"eager": ("float32", 1e-4), "flash": ("bfloat16", 0.05)}
"""What other kernels are compared in with sdpa, and how near they come; flash attention has no float32."""


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


def losses(folder):
    log = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in log if "loss" in entry]


@pytest.fixture(params=PRECISIONS)
def both(request, p2d, tiny_folder, tmp_path):
    """Run a command by sdpa, and by eager or flash attention; both folders, and how near they should be."""
    dtype, near = PRECISIONS[request.param]
    other = request.getfixturevalue("flash_kernel") if request.param == "flash" else request.param

    def run(*words):
        for kernel, out in (("sdpa", "usual"), (other, "other")):
            given = ("--model", tiny_folder, "--dtype", dtype, "--attn-implementation", kernel)
            done = p2d(words[0], *given, *words[1:], "--out", tmp_path / out)
            assert done.code == 0, done.said
        one, two = manifest(tmp_path / "usual"), manifest(tmp_path / "other")
        assert one["key"] == two["key"], "what computes the attention is no part of the result"
        assert two["config"]["attn_implementation"] == {"value": other, "origin": "flag"}
        return tmp_path / "usual", tmp_path / "other", near

    return run


@pytest.mark.parametrize("method", ["readout", "contrast", "taylor"])
def test_heads_score_alike(both, few, method):
    *folders, near = both(
        *("score-heads", "--target", few["target"], "--pool", few["pool"], "--method", method, "--episodes", 8),
        *("--background", 20),
    )
    one, two = (load_file(folder / "head_scores.safetensors")["scores"] for folder in folders)
    assert np.abs(one - two).mean() <= near * np.abs(one).mean()


@pytest.mark.parametrize("affinity", ["readout", "attention"])
def test_rows_score_alike(both, pipeline, few, affinity):
    *folders, near = both(
        *("mine-data", "--heads", pipeline / "heads", "--target", few["target"], "--pool", few["pool"]),
        *("--affinity", affinity, "--background", 20, "--floor-quantile", 0, "--refine", 1),
    )
    one, two = (pq.read_table(folder / "pool_scores.parquet")["score"].to_numpy() for folder in folders)
    assert np.abs(one - two).mean() <= 2 * near * np.abs(one).mean()


@pytest.mark.parametrize("scope", ["heads", "full"])
def test_training_loses_alike(both, pipeline, few, scope):
    heads = ("--heads", pipeline / "heads") if scope == "heads" else ()
    *folders, near = both(
        *("train", "--data", few["target"], "--eval-data", few["test"], "--scope", scope, *heads),
        *("--epochs", 2, "--batch-size", 4),
    )
    one, two = map(losses, folders)
    assert two == pytest.approx(one, rel=near)
    looks = [manifest(folder)["summary"]["best_eval_loss"] for folder in folders]
    assert looks[1] == pytest.approx(looks[0], rel=near)


def test_answers_are_alike(both, pipeline, few, tmp_path):
    (tmp_path / "choices.json").write_text('["a", "b c d e"]')
    *folders, near = both(
        *("eval", "--adapter", pipeline / "adapter", "--data", few["test"], "--choices", tmp_path / "choices.json"),
        *("--metric", "exact_match,accuracy,perplexity", "--max-new-tokens", 4),
    )
    one, two = (json.loads((folder / "metrics.json").read_text()) for folder in folders)
    assert two["perplexity"]["value"] == pytest.approx(one["perplexity"]["value"], rel=near)
    generated = [pq.read_table(folder / "predictions.parquet")["generated"].to_pylist() for folder in folders]
    assert sum(a == b for a, b in zip(*generated, strict=True)) >= 0.8 * len(generated[0])


def test_flash_attention_packs_rows_unless_told_not_to(p2d, flash_kernel, tiny_folder, few, tmp_path):
    words = ("train", "--model", tiny_folder, "--data", few["pool"], "--dtype", "bfloat16", "--max-steps", 2, "--force")
    words += ("--batch-size", 16)
    flash = ("--attn-implementation", flash_kernel, "--out", tmp_path / "a")

    def tokens(*more):
        planned = p2d(*words, *more, "--dry-run", "--json").json["plan"]["tokens"]
        plain_flash.ROWS_AT_ONCE.clear()
        assert p2d(*words, *more).code == 0
        made = manifest(tmp_path / "a")
        assert made["summary"]["packing"] == (16 in plain_flash.ROWS_AT_ONCE)
        return planned, made["tokens"]

    packed = tokens(*flash)
    assert 16 in plain_flash.ROWS_AT_ONCE
    assert tokens(*flash, "--packing") == packed
    padded = tokens(*flash, "--no-packing")
    assert all(few < many for few, many in zip(packed, padded, strict=True))
    assert tokens("--out", tmp_path / "a") == padded


def test_a_model_that_mixes_packed_rows_pads_them(p2d, flash_kernel, tiny_folder, few, tmp_path, monkeypatch):
    monkeypatch.setattr("p2d_cli.modeling.training_batches.keeps_rows_apart", lambda _: False)
    words = ("train", "--model", tiny_folder, "--data", few["target"], "--dtype", "bfloat16", "--max-steps", 1)
    flash = ("--attn-implementation", flash_kernel)
    assert p2d(*words, *flash, "--out", tmp_path / "a").code == 0
    assert manifest(tmp_path / "a")["summary"]["packing"] is False
    done = p2d(*words, *flash, "--packing", "--out", tmp_path / "b")
    assert done.code == 2
    assert "does not keep the rows of a packed sequence apart" in done.said


STAGES = {
    "score-heads": ("--target", "target", "--pool", "pool"),
    "mine-data": ("--method", "loss", "--pool", "pool"),
    "train": ("--data", "target"),
    "eval": ("--data", "test"),
}
MISSING = {
    "flash_attention_2": ("runs on cuda, and this run is on cpu", "leave out --attn-implementation"),
    "kernels-community/attention": ("needs the package kernels", "pip install 'kernels"),
}


@pytest.mark.parametrize("dry", [False, True], ids=["run", "dry"])
@pytest.mark.parametrize("name", MISSING)
@pytest.mark.parametrize("stage", STAGES)
def test_a_kernel_that_is_not_there_is_refused_before_weights_are_read(
    p2d, tiny_folder, few, tmp_path, monkeypatch, stage, name, dry
):
    monkeypatch.setattr("p2d_cli.modeling.loading.load_model", lambda *_, **__: pytest.fail("the weights were read"))
    monkeypatch.setattr("p2d_cli.modeling.attention_kernels.is_kernels_available", lambda: False)
    rows = [few.get(word, word) for word in STAGES[stage]]
    words = (stage, "--model", tiny_folder, *rows, "--attn-implementation", name, "--device", "cpu")
    done = p2d(*words, "--out", tmp_path / "o", *(["--dry-run"] * dry))
    assert done.code == 69, done.said
    for told in (name, *MISSING[name]):
        assert told in done.said
    assert not list(tmp_path.iterdir())


def test_a_word_that_names_no_attention_is_a_usage_error(p2d, tiny_folder, few, tmp_path):
    for word in ("flash", "flash_attention_5", "flex_attention", "a/b/c", ""):
        done = p2d(
            *("eval", "--model", tiny_folder, "--data", few["test"]),
            *("--attn-implementation", word, "--out", tmp_path / "o"),
        )
        assert done.code == 2, word
        assert "expected auto, sdpa, eager, flash_attention_2" in done.said


def test_a_recipe_sets_it_for_all_stages(p2d, tiny_folder, few, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'[defaults]\nmodel = "{tiny_folder}"\nattn-implementation = "KERNEL"\ndevice = "cpu"\n'
        f'[score-heads]\ntarget = "{few["target"]}"\npool = "{few["pool"]}"\n'
        f'[mine-data]\ntarget = "{few["target"]}"\npool = "{few["pool"]}"\n'
        f'[train]\nepochs = 1\n[eval]\ndata = "{few["test"]}"\n[grid]\nheads = ["readout"]\ndata = ["p2d"]\n'
    )
    recipe.write_text(recipe.read_text().replace("KERNEL", "eager"))
    assert p2d("run", recipe, "--out", tmp_path / "o", "--dry-run").code == 0
    recipe.write_text(recipe.read_text().replace("eager", "flash_attention_2"))
    done = p2d("run", recipe, "--out", tmp_path / "o", "--dry-run")
    assert done.code == 69
    assert "flash_attention_2 runs on cuda" in done.said
