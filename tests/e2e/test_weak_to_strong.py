"""A smaller model chooses the rows that a larger one is trained on, and the report charges both."""

import json
import shutil

import pytest


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


@pytest.fixture(scope="module")
def small(tiny_folder, tmp_path_factory):
    """A model of another shape with the fixture's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("models") / "small"
    config = AutoConfig.from_pretrained(tiny_folder)
    config.num_hidden_layers, config.hidden_size, config.intermediate_size = 2, 64, 96
    config.num_attention_heads, config.num_key_value_heads = 4, 2
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_folder / name, folder)
    return folder


@pytest.fixture(scope="module")
def other_tokenizer(small, tmp_path_factory):
    """The small model with a tokenizer that knows one more token."""
    folder = shutil.copytree(small, tmp_path_factory.mktemp("models") / "other")
    described = json.loads((folder / "tokenizer.json").read_text())
    described["added_tokens"].append({**described["added_tokens"][-1], "id": 369, "content": "<new>"})
    (folder / "tokenizer.json").write_text(json.dumps(described))
    return folder


@pytest.fixture(scope="module")
def small_heads(p2d, small, few, tmp_path_factory):
    out = tmp_path_factory.mktemp("weak") / "heads"
    done = p2d(
        *("score-heads", "--model", small, "--target", few["target"], "--pool", few["pool"]),
        *("--dtype", "float32", "--out", out),
    )
    assert done.code == 0, done.said
    return out


@pytest.fixture
def mine(p2d, tiny_folder, few, tmp_path):
    def run(scorer, heads, *options):
        return p2d(
            *("mine-data", "--model", tiny_folder, "--scorer-model", scorer, "--heads", heads, *options),
            *("--target", few["target"], "--pool", few["pool"], "--dtype", "float32", "--out", tmp_path / "subset"),
        )

    return run


def test_the_small_model_reads_the_large_one_learns_and_both_are_charged(
    p2d, mine, small, small_heads, pipeline, tiny_folder, few, tmp_path
):
    done = mine(small, small_heads)
    assert done.code == 0, done.said
    assert f"read by {small}" in done.said
    subset = manifest(tmp_path / "subset")
    scored_by = subset["summary"]["scorer_model"]
    assert subset["model"]["digest"] == manifest(pipeline / "heads")["model"]["digest"]
    assert scored_by["digest"] == manifest(small_heads)["model"]["digest"] != subset["model"]["digest"]
    assert subset["summary"]["scorer_tokenizer"] == "same"
    trained = p2d(
        *("train", "--model", tiny_folder, "--data", tmp_path / "subset", "--heads", pipeline / "heads"),
        *("--epochs", 2, "--dtype", "float32", "--out", tmp_path / "adapter"),
    )
    assert trained.code == 0, trained.said
    evaluated = p2d(
        *("eval", "--model", tiny_folder, "--adapter", tmp_path / "adapter", "--data", few["test"]),
        *("--dtype", "float32", "--max-new-tokens", 2, "--out", tmp_path / "evaluation"),
    )
    assert evaluated.code == 0, evaluated.said
    report = p2d(
        *("report-aer", tmp_path / "evaluation", "--reference", pipeline / "full-evaluation"),
        *("--out", tmp_path / "report"),
    )
    assert report.code == 0, report.said
    assert "^ a smaller model chose the rows" in report.said
    row = next(row for row in manifest(tmp_path / "report")["summary"]["rows"] if not row["is_reference"])
    assert row["scorer_model"] == str(small)
    spent = sum(
        seconds
        for folder in (small_heads, pipeline / "heads")
        for phase, seconds in manifest(folder)["seconds"].items()
        if phase != "load"
    )
    assert row["score_heads_seconds"] == pytest.approx(spent), "the heads of both models"
    assert row["mixed"] == []
    assert "chosen by a smaller model" in (tmp_path / "report" / "aer.md").read_text()


def test_heads_of_the_model_that_does_not_read_are_refused(mine, small, pipeline):
    done = mine(small, pipeline / "heads")
    assert done.code == 65
    assert "made with another model" in done.said
    assert "--scorer-model is:" in done.said


def test_another_tokenizer_is_refused_unless_it_is_asked_for(mine, other_tokenizer, p2d, few, tmp_path):
    heads = tmp_path / "heads"
    p2d("score-heads", "--model", other_tokenizer, "--method", "uniform", "--out", heads)
    done = mine(other_tokenizer, heads)
    assert done.code == 65
    assert "--model: " in done.said
    assert "370 tokens" in done.said
    assert "371 tokens" in done.said
    asked = mine(other_tokenizer, heads, "--allow-other-tokenizer")
    assert asked.code == 0, asked.said
    assert manifest(tmp_path / "subset")["summary"]["scorer_tokenizer"] == "other"


def test_another_chat_template_is_the_same_vocabulary(mine, small, p2d, tmp_path):
    folder = shutil.copytree(small, tmp_path / "chatty")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["model_max_length"] = 77
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    p2d("score-heads", "--model", folder, "--method", "uniform", "--out", tmp_path / "heads")
    assert mine(folder, tmp_path / "heads").code == 0
    assert manifest(tmp_path / "subset")["summary"]["scorer_tokenizer"] == "same vocabulary"


def test_methods_that_read_no_model_take_no_scorer(mine, small, small_heads, tmp_path):
    assert mine(small, small_heads, "--method", "random").code == 0
    assert "scorer_model" not in manifest(tmp_path / "subset")["inputs"]


def test_a_recipe_scores_the_heads_of_both(p2d, small, tiny_folder, few, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f"""\
out = "{tmp_path / "out"}"
controls = false
[defaults]
model = "{tiny_folder}"
dtype = "float32"
target = "{few["target"]}"
pool = "{few["pool"]}"
[score-heads]
method = "readout"
[mine-data]
scorer-model = "{small}"
[train]
epochs = 1
max_steps = 1
[eval]
data = "{few["test"]}"
max_new_tokens = 1
limit = 2
"""
    )
    done = p2d("run", recipe, "--json")
    assert done.code == 0, done.said
    heads = {path.name: manifest(path)["model"]["source"] for path in (tmp_path / "out" / "heads").iterdir()}
    assert heads == {"readout-s0": str(tiny_folder), "readout-scorer-s0": str(small)}
    rows = manifest(tmp_path / "out" / "report")["summary"]["rows"]
    assert [row["scorer_model"] for row in rows if not row["is_reference"]] == [str(small)]
