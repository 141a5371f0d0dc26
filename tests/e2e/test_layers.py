"""score-heads --layers: whatever the method, heads of other layers are not selected."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file


@pytest.fixture(scope="module")
def score(p2d, tiny_folder, few, tmp_path_factory):
    folder = tmp_path_factory.mktemp("layers")

    def run(method, *options):
        rows = () if method in {"random", "uniform"} else ("--target", few["target"], "--pool", few["pool"])
        out = folder / "-".join(["heads", method, *map(str, options)]).replace("--", "")
        small = ("--episodes", 8, "--proxy-samples", 8)
        return p2d(
            "score-heads", "--model", tiny_folder, "--method", method, *rows, *small, *options, "--out", out
        ), out

    return run


def selected(folder):
    return load_file(folder / "head_scores.safetensors")["selected"].astype(bool)


@pytest.mark.parametrize("method", ["readout", "contrast", "pad", "taylor", "random", "uniform"])
def test_heads_are_taken_from_these_layers_alone(score, method):
    done, out = score(method, "--layers", "1-2", "--ratio", 0.4)
    assert done.code == 0, done.said
    chosen = selected(out)
    assert chosen.sum() == int(np.ceil(0.4 * chosen.size))
    assert chosen[1:3].sum() == chosen.sum()
    layers = json.loads((out / "manifest.json").read_text())["summary"]["layers_touched"]
    assert layers == 2


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--layers", "2-9"), "found 2-9"),
        (("--layers", "3-3", "--ratio", 0.9), "asks for"),
        (("--layers", "upper"), "expected auto, all, or the first and the last layer"),
    ],
)
def test_layers_that_cannot_be(score, options, told):
    done, out = score("random", *options)
    assert (done.code, told in done.said) == (2, True), done.said
    assert not out.exists()
