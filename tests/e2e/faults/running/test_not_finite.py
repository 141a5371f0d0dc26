"""What is not a number is found before anything is selected by it or written, and named."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.modules.module import register_module_forward_hook

from .conftest import WORK, leftovers, named, quickly  # noqa: TID252 - tests are no package

NAMED = {"attention": "episode", "generate": "episode", "contrast": "episode", "pad": "step 2"}
"""What is named, where it is not a row by its file and line."""


def refused(done, out, *words):
    assert done.code == 70, done.said
    for word in (*words, "finite" if "is nan" not in done.said else "nan"):
        assert word in done.said, f"{word!r} is not in: {done.said}"
    assert not out.exists()


@pytest.mark.parametrize(
    ("stage", "name", "value"),
    [
        ("score-heads", "readout", math.nan),
        ("mine-data", "embedding", math.inf),
        ("train", "lora", -math.inf),
        ("eval", "answers", math.nan),
    ],
)
def test_a_weight_of_the_model(p2d, words, broken_model, stage, name, value, tmp_path):
    tensor = "model.layers.1.self_attn.v_proj.weight"
    line = words((stage, name), tmp_path / "out", model=broken_model(tensor, value))
    refused(p2d(*line), tmp_path / "out", tensor, "broken")


def test_a_weight_of_the_task_model(p2d, tiny_folder, broken_model, tmp_path):
    models = ("--model", tiny_folder, "--task-model", broken_model("model.layers.2.self_attn.k_proj.weight"))
    done = p2d("score-heads", *models, "--out", tmp_path / "out")
    refused(done, tmp_path / "out", "model.layers.2.self_attn.k_proj.weight", "broken")


def test_a_weight_of_the_adapter(p2d, words, copy_of, tmp_path):
    adapter = copy_of("adapter")
    (adapter / "manifest.json").unlink()  # as one that was made elsewhere
    weights = load_file(adapter / "adapter_model.safetensors")
    name = min(weights)
    weights[name][0, 0] = math.nan
    save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    done = p2d(*words(("eval", "perplexity"), tmp_path / "out", "--adapter", adapter))
    refused(done, tmp_path / "out", name.removesuffix(".weight"), "loading the adapter")


@pytest.mark.parametrize(
    "work",
    quickly(WORK, "pad", "taylor", "contrast", "readout", "loss", "generate", "lora", "answers", "accuracy"),
    ids=named,
)
def test_an_activation(p2d, words, work, tmp_path):
    """The weights are in order, and one row of the second forward pass is not, as if it had overflowed."""
    seen = 0

    def hook(module, inputs, output):
        nonlocal seen
        if type(module).__name__ == "Embedding":
            seen += 1
            if seen == 2:
                output = output.clone()
                output[-1] = math.nan
                return output
        return None

    handle = register_module_forward_hook(hook)
    try:
        done = p2d(*words(work, tmp_path / "out"))
    finally:
        handle.remove()
    refused(done, tmp_path / "out")
    assert NAMED.get(work[1], ".jsonl:" if work[0] != "score-heads" else "") in done.said
    assert not any("draft" in name for name in leftovers(tmp_path / "out"))


@pytest.mark.parametrize("name", ["heads", "full"])
def test_a_trained_weight(p2d, words, name, tmp_path, monkeypatch):
    """The last update can spoil weights without any loss to show for it."""
    from p2d_cli.modeling import training

    train = training.train

    def spoil(model, *args, **kwargs):
        record = train(model, *args, **kwargs)
        with torch.no_grad():
            next(weight for weight in model.parameters() if weight.requires_grad)[0] = math.inf
        return record

    monkeypatch.setattr(training, "train", spoil)
    done = p2d(*words(("train", name), tmp_path / "out"))
    refused(done, tmp_path / "out", "saving the", "weight")


def test_a_score(p2d, words, tmp_path, monkeypatch):
    """Of a method that computes it from values that are in order."""
    from p2d_cli.methods.rows.lexical import Lexical

    score = Lexical.score

    def spoilt(method):
        scored = score(method)
        scored.scores[4] = math.nan
        return scored

    monkeypatch.setattr(Lexical, "score", spoilt)
    line = words(("mine-data", "loss"), tmp_path / "out")
    done = p2d(*line[:-2], "--method", "lexical", *line[-2:])
    refused(done, tmp_path / "out", "the lexical score of", "pool.jsonl:5")
