"""The pipeline through its command line, and its artifacts through the libraries that others would use."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from p2d_cli.modeling.generation import Continuations


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


@pytest.fixture
def base(tiny_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)


def logits(model):
    with torch.no_grad():
        return model(torch.arange(1, 40)[None]).logits


def same_logits(a, b):
    """Equal to 1e-5 of the largest: float32 sums in another order differ by that much."""
    return (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_heads_open_with_safetensors(pipeline):
    tensors = load_file(pipeline / "heads" / "head_scores.safetensors")
    layers, heads = tensors["scores"].shape
    assert tensors["selected"].sum() == -(-layers * heads // 10)
    # Trained heads are spread over the upper half of the layers; others read rows, of the first and most layers.
    assert tensors["selected"].sum(axis=1).tolist() == [0, 0, 2, 2]
    assert all(tensors["selected"][layer, tensors["scores"][layer].argmax()] for layer in (2, 3))
    assert tensors["reads_all"].sum(axis=1).tolist() == [heads, heads, 0, 0]
    assert tensors["reads_best"].sum() == round(0.1 * 16 / 12 * layers * heads + 0.5)  # more, as the target has 12 rows
    assert not tensors["reads_best"][3].any()
    assert tensors["repeats"].shape == (1, layers, heads)


def test_subset_opens_with_pyarrow_and_holds_the_best_rows(pipeline, few):
    subset = pq.read_table(pipeline / "subset" / "subset.parquet").to_pylist()
    scores = pq.read_table(pipeline / "subset" / "pool_scores.parquet").to_pylist()
    pool = {row["id"]: row for row in map(json.loads, few["pool"].read_text().splitlines())}
    assert len(scores) == len(pool) == 60
    summary = json.loads((pipeline / "subset" / "manifest.json").read_text())["summary"]
    floor = summary["floor_score"]
    kept = min(6, sum(row["score"] >= floor for row in scores))
    assert len(subset) == summary["rows_selected"] == kept > 0
    ranked = sorted(scores, key=lambda row: row["rank"])
    assert [row["id"] for row in subset] == [row["id"] for row in ranked[:kept]]
    read_on = [row["score"] for row in scores if row["score"] is not None and not math.isnan(row["score"])]
    assert len(read_on) == sum(row["draws"] for row in scores) < len(scores)
    assert all({key: row[key] for key in pool[row["id"]]} == pool[row["id"]] for row in subset)
    assert [row["score"] for row in subset] == sorted(read_on, reverse=True)[:kept]


def test_the_adapter_is_an_ordinary_peft_folder(pipeline, base, tiny_folder):
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    plain = logits(base)
    adapted = PeftModel.from_pretrained(base, pipeline / "adapter")
    changed = logits(adapted)
    assert not torch.allclose(plain, changed, atol=1e-4), "training changed nothing"
    merged = adapted.merge_and_unload(safe_merge=True)
    assert same_logits(logits(merged), changed)
    heads = load_file(pipeline / "heads" / "head_scores.safetensors")["selected"]
    config = json.loads((tiny_folder / "config.json").read_text())
    group_size = config["num_attention_heads"] // config["num_key_value_heads"]
    head_dim = config["head_dim"]
    for name, weight in merged.state_dict().items():
        part = next((part for part in "qkvo" if f"{part}_proj" in name), None)
        across = 0 if part == "o" else -1  # a head owns columns of o
        differs = (weight != before[name]).any(dim=across) if weight.ndim > 1 else weight != before[name]
        allowed = torch.zeros(len(differs), dtype=torch.bool)
        if part is not None:
            layer = int(name.split("layers.")[1].split(".")[0])
            for head in np.flatnonzero(heads[layer]):
                unit = head if part in "qo" else head // group_size
                allowed[unit * head_dim : (unit + 1) * head_dim] = True
        assert not (differs & ~allowed).any(), f"{name} changed outside of the selected heads"


def test_full_training_writes_an_ordinary_model(pipeline, base):
    full = AutoModelForCausalLM.from_pretrained(pipeline / "full", dtype=torch.float32)
    assert not torch.equal(full.model.embed_tokens.weight, base.model.embed_tokens.weight)
    assert AutoTokenizer.from_pretrained(pipeline / "full")("abc")["input_ids"]


def test_predictions_are_kept(pipeline, few):
    predictions = pq.read_table(pipeline / "evaluation" / "predictions.parquet").to_pylist()
    metrics = json.loads((pipeline / "evaluation" / "metrics.json").read_text())
    assert len(predictions) == 10
    assert [row["reference"] for row in predictions] == [
        json.loads(line)["completion"] for line in few["test"].read_text().splitlines()
    ]
    assert metrics["exact_match"]["value"] == np.mean([row["exact_match"] for row in predictions])
    assert metrics["exact_match"]["low"] <= metrics["exact_match"]["value"] <= metrics["exact_match"]["high"]


def test_the_report_is_the_arithmetic_of_the_manifests(pipeline):
    report = json.loads((pipeline / "report" / "aer.json").read_text())
    ours = next(row for row in report["rows"] if not row["is_reference"])
    stages = {name: manifest_of(pipeline / name)["seconds"] for name in ("heads", "subset", "adapter", "full")}
    uncharged = {"load", "compile", "evaluate"}
    charged = {name: sum(v for k, v in seconds.items() if k not in uncharged) for name, seconds in stages.items()}
    assert report["reference"]["seconds"] == pytest.approx(charged["full"], abs=1e-4)
    spent = charged["heads"] + charged["subset"] + charged["adapter"]
    assert ours["aer"] == pytest.approx(spent / charged["full"], rel=1e-4)
    assert ours["speedup"] == pytest.approx(1 / ours["aer"], rel=1e-6)
    assert ours["str_ratio"] == pytest.approx((charged["heads"] + charged["subset"]) / charged["full"], rel=1e-4)
    for name in ("aer.md", "aer.html", "aer.png"):
        assert (pipeline / "report" / name).stat().st_size > 500
    assert not report["reference"]["extrapolated"]


def test_manifests_say_what_made_them(pipeline):
    manifest = manifest_of(pipeline / "adapter")
    assert manifest["schema"] == "p2d.adapter/1"
    assert manifest["config"]["epochs"] == {"value": 2.0, "origin": "flag"}
    assert manifest["config"]["schedule"] == {"value": "cosine", "origin": "default"}
    assert set(manifest["inputs"]) == {"model", "heads", "data"}
    assert [entry["stage"] for entry in manifest["ledger"]] == ["score-heads", "mine-data", "train"]
    assert manifest["summary"]["trained_parameters"] > 0
    assert manifest["seconds"]["train"] > 0
    assert manifest["peak_memory_gib"]["host"] > 0
    assert set(manifest["outputs"]) >= {"adapter_config.json", "adapter_model.safetensors", "training_log.jsonl"}


def test_pictures_are_drawn(pipeline):
    for picture in ("heads/heads.png", "subset/scores.png", "adapter/loss.png", "report/aer.png"):
        assert (pipeline / picture).read_bytes().startswith(b"\x89PNG")


# --- skipping and redoing


def test_a_second_identical_invocation_is_skipped(p2d, pipeline, commands):
    for name, command in commands[1].items():
        before = (pipeline / name / "manifest.json").stat()
        done = p2d(*command, "--json")
        assert (done.code, done.json["status"]) == (0, "up-to-date"), name
        assert (pipeline / name / "manifest.json").stat().st_mtime_ns == before.st_mtime_ns


def test_the_skip_imports_no_torch(pipeline, commands):
    command = [str(word) for word in commands[1]["adapter"]]
    code = (
        "import sys; from p2d_cli.cli.app import app\n"
        f"sys.argv = ['p2d', *{command!r}]\n"
        "try: app()\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "up to date" in done.stdout


def test_touching_is_no_change_but_another_byte_is(p2d, pipeline, commands, few, tmp_path):
    command = commands[1]["evaluation"]
    os.utime(few["test"])
    assert p2d(*command, "--json").json["status"] == "up-to-date"
    changed = tmp_path / "test.jsonl"
    changed.write_text(few["test"].read_text() + '{"prompt": "a new row", "completion": "x"}\n')
    other = [changed if word == few["test"] else word for word in command]
    refused = p2d(*other)
    assert refused.code == 73
    assert "differs in input data" in refused.said


def test_other_settings_are_noticed_and_named(p2d, pipeline, commands):
    done = p2d(*commands[1]["adapter"], "--epochs", 1)
    assert done.code == 73
    assert "setting epochs" in done.said
    assert "--force" in done.said


def test_run_settings_do_not_matter(p2d, pipeline, commands):
    done = p2d(*commands[1]["heads"], "--token-budget", 512, "--json")
    assert done.json["status"] == "up-to-date"


def test_force_redoes_it_with_the_same_bytes(p2d, pipeline, commands):
    before = manifest_of(pipeline / "heads")
    assert p2d(*commands[1]["heads"], "--force", "--json").json["status"] == "done"
    after = manifest_of(pipeline / "heads")
    assert before["outputs"]["head_scores.safetensors"] == after["outputs"]["head_scores.safetensors"]
    assert p2d(*commands[1]["subset"], "--json").json["status"] == "up-to-date"


def test_dry_run_does_nothing(p2d, commands, pipeline, tmp_path):
    command = [tmp_path / "new" if word == commands[0] / "subset" else word for word in commands[1]["subset"]]
    done = p2d(*command, "--dry-run", "--json")
    assert (done.code, done.json["status"]) == (0, "would-run")
    assert set(done.json["inputs"]) == {"model", "heads", "pool", "target"}
    assert not (tmp_path / "new").exists()
    assert p2d(*commands[1]["subset"], "--dry-run", "--json").json["status"] == "would-skip"


def test_print_config_shows_origins(p2d, commands, monkeypatch):
    monkeypatch.setenv("P2D_WARMUP_RATIO", "0.5")
    done = p2d(*commands[1]["adapter"], "--print-config", "--json")
    assert done.json["warmup_ratio"] == {"value": 0.5, "origin": "variable"}
    assert done.json["epochs"]["origin"] == "flag"


# --- inspect and export


@pytest.mark.parametrize("name", ["heads", "subset", "adapter", "evaluation", "full", "report"])
def test_inspect_verifies_and_shows(p2d, pipeline, name):
    done = p2d("inspect", pipeline / name)
    assert done.code == 0
    assert "artifact" in done.out
    assert "inputs" in done.out
    assert "cost" in done.out
    assert p2d("inspect", pipeline / name, "--json").json["verified"] is True


def test_inspect_draws_heads_and_rows(p2d, pipeline):
    heads = p2d("inspect", pipeline / "heads").out
    assert sum(heads.count(2 * mark) for mark in "#ABC") == 4
    assert "heads of the first 2 layers read all rows" in heads
    rows = p2d("inspect", pipeline / "subset").out
    assert "best rows" in rows


def test_export_gives_a_plain_model_with_the_adapters_logits(p2d, pipeline, base, tiny_folder, tmp_path):
    done = p2d("export", pipeline / "adapter", "--out", tmp_path / "plain", "--dtype", "float32")
    assert done.code == 0, done.said
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, pipeline / "adapter")
    assert same_logits(logits(plain), logits(adapted))
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "plain" / name).read_bytes() == (tiny_folder / name).read_bytes()
    assert p2d("eval", "--model", tmp_path / "plain", "--data", pipeline / "subset", "--limit", 2,
               "--max-new-tokens", 4, "--out", tmp_path / "scores").code == 0  # fmt: skip


# --- methods and scopes


@pytest.mark.parametrize("method", ["pad", "taylor", "random", "uniform"])
def test_head_methods(p2d, tiny_folder, few, tmp_path, method):
    command = ("score-heads", "--model", tiny_folder, "--method", method, "--out", tmp_path / "heads")
    rows = ("--target", few["target"]) if method in {"pad", "taylor"} else ()
    done = p2d(*command, *rows, "--repeats", 2, "--proxy-samples", 6, "--dtype", "float32", "--json")
    assert done.code == 0, done.said
    assert done.json["summary"]["heads_selected"] == 4
    tensors = load_file(tmp_path / "heads" / "head_scores.safetensors")
    assert np.isfinite(tensors["scores"]).all()
    if method != "uniform":
        assert tensors["repeats"].shape[0] == 2
        assert not np.array_equal(tensors["repeats"][0], tensors["repeats"][1])
        assert done.json["summary"]["repeatability"]["draws"] == 2


def test_pad_between_two_models_needs_weights_alone(p2d, pipeline, tiny_folder, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).symlink_to(tiny_folder / name)
    done = p2d("score-heads", "--model", bare, "--task-model", pipeline / "full", "--out", tmp_path / "h", "--json")
    assert done.code == 0, done.said
    assert done.json["summary"]["method"] == "pad"
    assert load_file(tmp_path / "h" / "head_scores.safetensors")["scores"].max() > 0
    assert manifest_of(tmp_path / "h")["ledger"][0]["stage"] == "train", "making the task model is charged"


@pytest.mark.parametrize(
    "method", ["data-whisperer", "random", "loss", "ifd", "embedding", "lexical", "coverage", "full"]
)
def test_data_methods(p2d, tiny_folder, few, tmp_path, method):
    done = p2d(
        *("mine-data", "--model", tiny_folder, "--pool", few["pool"], "--target", few["target"], "--dtype", "float32"),
        *("--method", method, "--count", 7, "--out", tmp_path / "subset", "--json"),
    )
    assert done.code == 0, done.said
    assert done.json["summary"]["rows_selected"] == (60 if method == "full" else 7)
    scores = pq.read_table(tmp_path / "subset" / "pool_scores.parquet")["score"].to_numpy()
    assert np.isfinite(scores).all()
    assert method == "full" or len(set(scores)) > 5


@pytest.mark.parametrize("extra", [("--perf", "generate", "--max-new-tokens", "4"), ("--perf", "none"), ()])
def test_mining_without_target_rows_and_other_judgements(p2d, pipeline, tiny_folder, few, tmp_path, extra):
    done = p2d(
        *("mine-data", "--model", tiny_folder, "--pool", few["pool"], "--heads", pipeline / "heads"),
        *("--dtype", "float32", "--queries", 2, "--draws", 1, *extra, "--out", tmp_path / "subset", "--json"),
    )
    assert done.code == 0, done.said
    scores = pq.read_table(tmp_path / "subset" / "pool_scores.parquet")["score"].to_numpy()
    assert len(set(scores[np.isfinite(scores)])) > 10


@pytest.mark.parametrize("scope", ["attention", "lora"])
def test_other_scopes(p2d, tiny_folder, few, tmp_path, scope):
    train = ("train", "--model", tiny_folder, "--data", few["target"], "--scope", scope, "--max-steps", 2)
    done = p2d(*train, "--batch-size", 4, "--accumulation", 2, "--checkpointing", "--out", tmp_path / "a", "--json")
    assert done.code == 0, done.said
    assert done.json["summary"]["updates"] == 2
    assert done.json["summary"]["updates_planned"] == 9
    model = ("--model", tiny_folder, "--adapter", tmp_path / "a") if scope == "lora" else ("--model", tmp_path / "a")
    evaluate = ("eval", *model, "--data", few["target"], "--limit", 3, "--max-new-tokens", 4)
    assert p2d(*evaluate, "--out", tmp_path / "e").code == 0


def test_all_metrics(p2d, tiny_folder, tmp_path):
    data = tmp_path / "rows.jsonl"
    rows = [{"question": f"what is {n}?", "answer": f"#### {n}", "choices": ["#### 1", "#### 2"]} for n in (1, 2)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = p2d(
        *("eval", "--model", tiny_folder, "--data", data, "--out", tmp_path / "e", "--json", "--dtype", "float32"),
        *("--metric", "exact_match,token_f1", "--metric", "number_match", "--metric", "rougeL"),
        *("--metric", "accuracy", "--metric", "perplexity", "--max-new-tokens", 4),
    )
    assert done.code == 0, done.said
    metrics = done.json["summary"]["metrics"]
    assert list(metrics) == [
        "exact_match", "token_f1", "number_match", "number_match_strict", "rougeL", "accuracy", "perplexity",
    ]  # fmt: skip
    assert metrics["perplexity"]["value"] > 1
    table = pq.read_table(tmp_path / "e" / "predictions.parquet")
    assert set(table["choice"].to_pylist()) <= {"#### 1", "#### 2"}


def test_answers_without_a_number_are_wrong_and_counted(p2d, tiny_folder, tmp_path, monkeypatch):
    answers = iter(["#### 1,234", "I make it $7.0", "no idea", "#### none, perhaps 3"])

    def answer(_model, _tokenizer, _prompts, **_settings):
        return Continuations([next(answers)], [False], 1)

    monkeypatch.setattr("p2d_cli.modeling.generation.generate_greedy", answer)
    data = tmp_path / "rows.jsonl"
    references = ("#### 1234", "#### 7", "#### 5", "#### 3")
    data.write_text("".join(json.dumps({"question": "?", "answer": text}) + "\n" for text in references))
    done = p2d(
        *("eval", "--model", tiny_folder, "--data", data, "--metric", "number_match", "--token-budget", 1),
        *("--out", tmp_path / "e"),
    )
    assert done.code == 0, done.said
    table = pq.read_table(tmp_path / "e" / "predictions.parquet").to_pydict()
    assert sorted(zip(table["reference"], table["number_match"], table["number_match_strict"], strict=True)) == [
        ("#### 1234", 1.0, 1.0), ("#### 3", 1.0, 0.0), ("#### 5", 0.0, 0.0), ("#### 7", 1.0, 0.0),
    ]  # fmt: skip
    assert "number_match_unparsed: 1" in done.out
    assert "number_match_strict_unparsed: 3" in done.out


def test_full_fine_tuning_cut_short_is_extrapolated(p2d, tiny_folder, few, tmp_path):
    train = ("train", "--model", tiny_folder, "--data", few["pool"], "--scope", "full", "--dtype", "float32")
    assert p2d(*train, "--batch-size", 16, "--max-steps", 2, "--out", tmp_path / "short").code == 0
    evaluate = ("eval", "--model", tmp_path / "short", "--data", few["test"], "--limit", 2, "--max-new-tokens", 2)
    assert p2d(*evaluate, "--out", tmp_path / "e").code == 0
    done = p2d("report-aer", tmp_path / "e", "--reference", tmp_path / "e", "--out", tmp_path / "r", "--json")
    assert done.json["summary"]["reference"]["extrapolated"] is True
    assert done.json["summary"]["reference"]["planned_steps"] == 12


def test_mixed_precision_is_refused_unless_allowed(p2d, pipeline, tiny_folder, few, tmp_path):
    train = ("train", "--model", tiny_folder, "--data", few["target"], "--scope", "lora", "--dtype", "bfloat16")
    assert p2d(*train, "--epochs", 2, "--out", tmp_path / "a").code == 0
    evaluate = ("eval", "--model", tiny_folder, "--adapter", tmp_path / "a", "--data", few["test"], "--limit", 2)
    assert p2d(*evaluate, "--max-new-tokens", 2, "--out", tmp_path / "e").code == 0
    report = ("report-aer", tmp_path / "e", "--reference", pipeline / "full-evaluation", "--out", tmp_path / "r")
    refused = p2d(*report)
    assert refused.code == 2
    assert "precision is bfloat16" in refused.said
    assert not (tmp_path / "r").exists()
    allowed = p2d(*report, "--allow-mixed")
    assert allowed.code == 0
    assert "!" in allowed.out


@pytest.mark.parametrize(
    ("spearman", "jaccard", "warned"),
    [(0.9, 0.8, False), (0.9, 0.06, True), (0.1, 0.8, True), (float("nan"), 0.8, True)],
)
def test_inspect_warns_of_a_ranking_no_better_than_chance(p2d, copy_of, spearman, jaccard, warned):
    folder = copy_of("heads")
    manifest = json.loads((folder / "manifest.json").read_text())
    agreement = {"mean_spearman": spearman, "mean_jaccard": jaccard, "chance_jaccard": 0.05, "draws": 3}
    manifest.pop("digest", None)
    manifest["summary"]["repeatability"] = agreement
    (folder / "manifest.json").write_text(json.dumps(manifest))
    done = p2d("inspect", folder)
    assert done.code == 0, done.said
    assert f"overlap {jaccard:.2f} (chance 0.05)" in done.said
    assert ("hardly better than chance" in done.said) == warned
