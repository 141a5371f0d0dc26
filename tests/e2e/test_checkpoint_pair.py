"""score-heads between two checkpoints on disk, in a process of its own, whose memory is what is looked at."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

LAYERS, HIDDEN = 16, 1024
LAYER_BYTES = 3 * HIDDEN * HIDDEN * 2  # q, k and v of one layer, bfloat16


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A base model that is nearly all attention, and a task model."""
    folder = tmp_path_factory.mktemp("pair")
    config = LlamaConfig(
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        hidden_size=HIDDEN,
        intermediate_size=16,
        vocab_size=64,
    )
    for seed, name in enumerate(("base", "task")):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / name)
    return folder


def peak_bytes(out, *words):
    command = (sys.executable, "-m", "p2d_cli", "score-heads", *map(str, words), "--out", str(out), "--quiet")
    subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return json.loads((out / "manifest.json").read_text())["peak_memory_gib"]["host"] * 2**30


@pytest.mark.skipif("P2D_SLOW" not in os.environ, reason="writes and reads gigabytes; P2D_SLOW=1 runs it")
def test_two_checkpoints_never_stand_in_memory_together(checkpoints, tmp_path):
    # Random heads of the same model: what Python, torch and the model's outline take.
    without = peak_bytes(tmp_path / "random", "--model", checkpoints / "base", "--method", "random")
    pair = ("--model", checkpoints / "base", "--task-model", checkpoints / "task")
    peak = peak_bytes(tmp_path / "pad", *pair, "--weights", "qkv")
    assert peak - without < 1.5 * LAYERS * LAYER_BYTES + LAYER_BYTES
