"""A model that is divided over devices, some of it on disk, does what the whole one does."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from p2d_cli.modeling import loading
from p2d_cli.modeling.loading import load_model

PLACES = {
    "model.embed_tokens": "disk",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.layers.2": "cpu",
    "model.layers.3": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}


@pytest.fixture
def divided(monkeypatch):
    """Let `--device-map auto` divide the fixture as if memory were scarce; tells how often it did."""
    loads = []

    def load(folder, *, device_map, **options):
        loads.append(device_map)
        return load_model(folder, device_map=device_map and PLACES, **options)

    monkeypatch.setattr(loading, "load_model", load)
    return loads


@pytest.fixture
def both(p2d, divided, tmp_path):
    """Run a command with the whole model and with the divided one; the folders of both results."""

    def run(*words):
        for name, options in (("whole", ()), ("divided", ("--device-map", "auto"))):
            done = p2d(*words, *options, "--dtype", "float32", "--out", tmp_path / name)
            assert done.code == 0, done.said
        assert divided[-1] == "auto"
        return tmp_path / "whole", tmp_path / "divided"

    return run


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


@pytest.mark.parametrize("method", ["readout", "contrast", "taylor"])
def test_heads_score_alike(both, tiny_folder, few, method):
    whole, divided = both(
        *("score-heads", "--model", tiny_folder, "--target", few["target"], "--pool", few["pool"]),
        *("--method", method, "--episodes", 8, "--token-budget", 512),
    )
    scores = [load_file(folder / "head_scores.safetensors")["scores"] for folder in (whole, divided)]
    np.testing.assert_array_equal(*scores)
    assert manifest(whole)["key"] == manifest(divided)["key"], "where a model lies is no part of the result"
    assert manifest(divided)["summary"]["device_map"] == {"cpu": 4, "disk": 4}


@pytest.mark.parametrize("affinity", ["readout", "attention"])
def test_rows_score_alike(both, pipeline, tiny_folder, few, affinity):
    folders = both(
        *("mine-data", "--model", tiny_folder, "--heads", pipeline / "heads", "--target", few["target"]),
        *("--pool", few["pool"], "--affinity", affinity, "--token-budget", 1024),
    )
    scores = [pq.read_table(folder / "pool_scores.parquet")["score"].to_numpy() for folder in folders]
    np.testing.assert_array_equal(*scores)


def test_hidden_states_are_alike(both, tiny_folder, few):
    folders = both(
        *("mine-data", "--model", tiny_folder, "--method", "embedding"),
        *("--target", few["target"], "--pool", few["pool"]),
    )
    scores = [pq.read_table(folder / "pool_scores.parquet")["score"].to_numpy() for folder in folders]
    np.testing.assert_array_equal(*scores)


def test_evaluations_with_an_adapter_are_alike(both, pipeline, tiny_folder, few, tmp_path):
    (tmp_path / "choices.json").write_text('["a", "b"]')
    folders = both(
        *("eval", "--model", tiny_folder, "--adapter", pipeline / "adapter", "--data", few["test"]),
        *("--metric", "exact_match,accuracy,perplexity", "--choices", tmp_path / "choices.json"),
        *("--max-new-tokens", 3),
    )
    rows = [pq.read_table(folder / "predictions.parquet").to_pylist() for folder in folders]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"modules_to_save": ["norm"]}], ids=str)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_a_divided_model_takes_plain_loras_only(p2d, divided, tiny_folder, few, tmp_path, settings):
    """Other tensors would stay without values, or on other devices than their modules."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], **settings)
    get_peft_model(model, config).save_pretrained(tmp_path / "a")
    evaluate = ("eval", "--model", tiny_folder, "--adapter", tmp_path / "a", "--data", few["test"], "--limit", 2)
    done = p2d(*evaluate, "--max-new-tokens", 2, "--device-map", "auto", "--out", tmp_path / "e")
    assert divided
    assert done.code == 65
    assert "leave out --device-map" in done.said
    assert p2d(*evaluate, "--max-new-tokens", 2, "--out", tmp_path / "e").code == 0


def test_training_is_refused_with_the_way_that_there_is(p2d, tiny_folder, few, tmp_path):
    done = p2d(
        *("train", "--model", tiny_folder, "--data", few["pool"], "--device-map", "auto", "--out", tmp_path / "a"),
    )
    assert done.code == 2
    assert "FSDP" in done.said


def test_a_proxy_is_not_tuned_in_parts(p2d, divided, tiny_folder, few, tmp_path):
    done = p2d(
        *("score-heads", "--model", tiny_folder, "--target", few["target"], "--method", "pad"),
        *("--device-map", "auto", "--out", tmp_path / "h"),
    )
    assert divided
    assert done.code == 2
    assert "--method pad tunes the model's attention" in done.said


def test_several_processes_do_not_divide_a_model(p2d, tiny_folder, few, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = p2d(
        *("score-heads", "--model", tiny_folder, "--target", few["target"], "--pool", few["pool"]),
        *("--device-map", "auto", "--out", tmp_path / "h"),
    )
    assert done.code == 2
    assert "2 processes" in done.said


def test_a_device_beside_it_is_refused(p2d, tiny_folder, few, tmp_path):
    done = p2d(
        *("score-heads", "--model", tiny_folder, "--target", few["target"], "--pool", few["pool"]),
        *("--device-map", "auto", "--device", "cpu", "--out", tmp_path / "h"),
    )
    assert done.code == 2
    assert "excludes --device cpu" in done.said
