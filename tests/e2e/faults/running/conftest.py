"""Faults that are injected into the real command line, in this process."""

import contextlib
import os
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_forward_pre_hook

from p2d_cli.errors import UnavailableError

SMALL = {"pool": 16, "target": 8, "test": 6}
"""Rows of each kind: enough for several batches of a few rows."""


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    """Pictures take most of the time of such small runs."""

    def missing(*args, **kwargs):
        raise UnavailableError("not in these tests")

    for name in ("head_heatmap", "score_histogram", "loss_curve", "aer_scatter"):
        monkeypatch.setattr(f"p2d_cli.reporting.plots.{name}", missing)


@pytest.fixture(scope="session")
def small(rows, tmp_path_factory):
    """Still smaller cuts of the fixture's rows."""
    folder = tmp_path_factory.mktemp("small")
    for name, count in SMALL.items():
        lines = rows[name].read_text(encoding="utf-8").split("\n")[:count]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "choices.json").write_text('["alpha", "bravo charlie", "delta"]')
    return {name: folder / f"{name}.jsonl" for name in SMALL} | {"choices": folder / "choices.json"}


SCORING = {
    "pad": ("--method", "pad", "--proxy-batch-size", 4, "--proxy-epochs", 1),
    "taylor": ("--method", "taylor", "--token-budget", 50),
    "contrast": ("--method", "contrast", "--episodes", 6),
    "readout": ("--method", "readout"),
}
MINING = {
    "attention": ("--heads", "HEADS", "--affinity", "attention"),
    "readout": ("--heads", "HEADS", "--background", 6),
    "generate": ("--heads", "HEADS", "--affinity", "attention", "--perf", "generate", "--max-new-tokens", 3),
    "loss": ("--method", "loss"),
    "ifd": ("--method", "ifd"),
    "embedding": ("--method", "embedding"),
}
TRAINING = {
    "heads": ("--heads", "HEADS"),
    "lora": ("--scope", "lora", "--lora-dropout", 0.1),
    "held-out": ("--heads", "HEADS", "--eval-data", "TARGET", "--eval-steps", 2, "--patience", 3),
    "full": ("--scope", "full"),
}
EVALUATION = {
    "answers": ("--metric", "exact_match", "--max-new-tokens", 3),
    "accuracy": ("--metric", "accuracy", "--choices", "CHOICES"),
    "perplexity": ("--metric", "perplexity"),
}
STAGES = {"score-heads": SCORING, "mine-data": MINING, "train": TRAINING, "eval": EVALUATION}
WORK = [(stage, name) for stage, works in STAGES.items() for name in works]


def named(work):
    return "-".join(work)


SLOW = pytest.mark.skipif("P2D_SLOW" not in os.environ, reason="one more of a kind; P2D_SLOW=1 runs it")


def quickly(works, *names):
    """Mark the pieces of work of other names as slow."""
    return [work if work[1] in names else pytest.param(work, marks=SLOW, id=named(work)) for work in works]


@pytest.fixture
def words(pipeline, tiny_folder, small):
    """The command of a piece of work, in several batches; training makes 6 updates of two micro-batches."""

    def make(work, out, *more, model=tiny_folder):
        stage, name = work
        rows = {
            "score-heads": ("--target", small["target"], "--pool", small["pool"], "--token-budget", 100),
            "mine-data": ("--target", small["target"], "--pool", small["pool"], "--token-budget", 100),
            "train": (
                *("--data", small["test"], "--epochs", 2, "--batch-size", 2, "--accumulation", 1),
                *("--lr", 0.01, "--seed", 3),
            ),
            "eval": ("--data", small["test"], "--token-budget", 60),
        }[stage]
        stands_for = {"HEADS": pipeline / "heads", "CHOICES": small["choices"], "TARGET": small["target"]}
        given = [stands_for.get(word, word) for word in STAGES[stage][name]]
        return stage, "--model", model, "--dtype", "float32", *rows, *given, *more, "--out", out

    return make


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """Each piece of work done once without a fault, for all faults to be compared with."""
    folder, done = tmp_path_factory.mktemp("undisturbed"), {}

    def make(p2d, words, work, *more):
        key = (*work, *map(str, more))
        if key not in done:
            done[key] = folder / str(len(done))
            ended = p2d(*words(work, done[key], *more))
            assert ended.code == 0, ended.said
        return done[key]

    return make


def results(folder):
    """Every number and text that an artifact says, with the exact bits of floats."""
    found = {path.name: pq.read_table(path).to_pydict() for path in folder.glob("*.parquet")}
    for path in folder.glob("*.safetensors"):
        found[path.name] = {
            name: (tensor.dtype, tensor.shape, bytes(tensor.contiguous().view(torch.uint8).numpy()))
            for name, tensor in load_file(path).items()
        }
    for name in ("metrics.json", "training_log.jsonl", "adapter_config.json"):
        if (folder / name).exists():
            found[name] = (folder / name).read_text()
    return str(found)  # NaN equals itself in here


def leftovers(out):
    """What a command left beside its output."""
    return sorted(path.name for path in out.parent.glob(f".{out.name}.*"))


@contextlib.contextmanager
def at_forward(count, act, *, kind="Embedding"):
    """Call `act(inputs)` in front of forward pass number `count` of a model, counted by its input embedding."""
    seen = 0

    def hook(module, inputs):
        nonlocal seen
        if type(module).__name__ == kind and torch.is_tensor(inputs[0]):
            seen += 1
            if count is None or seen == count:
                act(inputs)

    handle = register_module_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def send(number):
    return lambda *_: os.kill(os.getpid(), number)


@pytest.fixture
def broken_model(tiny_folder, tmp_path):
    """Copy the tiny model with a NaN in one of its tensors."""

    def make(tensor="model.layers.1.self_attn.v_proj.weight", value=float("nan")) -> Path:
        from safetensors.torch import save_file

        folder = shutil.copytree(tiny_folder, tmp_path / "broken")
        path = folder / "model.safetensors"
        weights = load_file(path)
        weights[tensor][0, 0] = value
        save_file(weights, path, metadata={"format": "pt"})
        return folder

    return make
