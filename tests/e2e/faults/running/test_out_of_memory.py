"""Too little memory: smaller pieces of the same work, and the same results."""

import json
import signal

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from p2d_cli.errors import is_out_of_memory
from p2d_cli.modeling.completion_trainer import CompletionTrainer

from .conftest import SLOW, at_forward, leftovers, named, quickly, results, send  # noqa: TID252 - tests are no package

CPU_ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "68719476736 bytes. Error code 12 (Cannot allocate memory)"
)
ERRORS = {
    "cuda": torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    "torch": torch.OutOfMemoryError("XPU out of memory."),
    "cpu": RuntimeError(CPU_ALLOCATOR),
    "python": MemoryError(),
}


def holds(rows, error=ERRORS["cuda"]):
    """Let no forward pass hold more rows."""

    def act(inputs):
        if inputs[0].shape[0] > rows:
            raise error

    return at_forward(None, act)


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


BATCH_OF_FOUR = ("--batch-size", 4, "--epochs", 3)


def fails_at(monkeypatch, update, rows, error=ERRORS["cuda"]):
    """Let the memory hold `rows` rows from an update on, as where its rows are the longest."""
    compute = CompletionTrainer._completion_loss

    def limited(self, model, inputs):
        if self.state.global_step >= update - 1 and len(inputs["labels"]) > rows:
            raise error
        return compute(self, model, inputs)

    monkeypatch.setattr(CompletionTrainer, "_completion_loss", limited)


@pytest.mark.parametrize(
    ("kind", "update"),
    [("cuda", 3), ("cpu", 2), pytest.param("torch", 1, marks=SLOW), pytest.param("python", 5, marks=SLOW)],
)
def test_training_begins_anew_with_a_smaller_micro_batch(p2d, words, undisturbed, kind, update, tmp_path, monkeypatch):
    work = ("train", "heads")
    expected = undisturbed(p2d, words, work, *BATCH_OF_FOUR, "--accumulation", 2)
    fails_at(monkeypatch, update, 2, ERRORS[kind])
    done = p2d(*words(work, tmp_path / "out", *BATCH_OF_FOUR))
    assert done.code == 0, done.said
    assert "out of memory with micro-batches of 4 rows: beginning anew with 2, 2 of them an update" in done.said
    assert results(tmp_path / "out") == results(expected)
    summary = manifest_of(tmp_path / "out")["summary"]
    assert (summary["micro_batch_asked"], summary["micro_batch"]) == (4, 2)
    assert summary["updates"] == manifest_of(expected)["summary"]["updates"] == 6


@pytest.mark.parametrize("name", [pytest.param("lora", marks=SLOW), "held-out"])
def test_down_to_a_single_row(p2d, words, undisturbed, name, tmp_path, monkeypatch):
    """With dropout's random numbers, and with the held-out rows' memory too."""
    work = ("train", name)
    expected = undisturbed(p2d, words, work, *BATCH_OF_FOUR, "--accumulation", 4)
    fails_at(monkeypatch, 2, 1)
    done = p2d(*words(work, tmp_path / "out", *BATCH_OF_FOUR))
    assert done.code == 0, done.said
    assert results(tmp_path / "out") == results(expected)
    assert manifest_of(tmp_path / "out")["summary"]["micro_batch"] == 1


@SLOW
def test_a_batch_that_halves_cannot_divide(p2d, words, tmp_path, monkeypatch):
    fails_at(monkeypatch, 1, 2)
    done = p2d(*words(("train", "heads"), tmp_path / "out", "--batch-size", 6, "--epochs", 1))
    assert done.code == 0, done.said
    assert manifest_of(tmp_path / "out")["summary"]["micro_batch"] == 1, "of 6, 3 and 2 rows, 3 do not fit"


def test_a_row_too_many(p2d, words, tmp_path, monkeypatch):
    fails_at(monkeypatch, 2, 0, ERRORS["cpu"])
    done = p2d(*words(("train", "heads"), tmp_path / "out", *BATCH_OF_FOUR))
    assert done.code == 70
    assert "out of memory with a single row" in done.said
    assert "can't allocate memory" in done.said
    assert "--max-length" in done.said
    assert "--checkpointing" in done.said
    assert not (tmp_path / "out").exists()


def test_a_model_that_does_not_fit_is_not_tried_again_with_fewer_rows(p2d, words, tmp_path, monkeypatch):
    loaded = []

    def load(*_, **__):
        loaded.append(1)
        raise MemoryError("of weights")

    monkeypatch.setattr("p2d_cli.modeling.loading.load_model", load)
    done = p2d(*words(("train", "lora"), tmp_path / "out", *BATCH_OF_FOUR))
    assert done.code == 70
    assert len(loaded) == 1
    assert "micro-batch" not in done.said


def test_what_was_learnt_about_memory_outlives_a_stop(p2d, words, undisturbed, tmp_path, monkeypatch):
    work = ("train", "lora")
    expected = undisturbed(p2d, words, work, *BATCH_OF_FOUR, "--accumulation", 2)
    with monkeypatch.context() as patch:
        fails_at(patch, 3, 2)
        with at_forward(9, send(signal.SIGTERM)):  # 2 before, the third fails, the others are half updates
            assert p2d(*words(work, tmp_path / "out", *BATCH_OF_FOUR)).code == 75
        again = p2d(*words(work, tmp_path / "out", *BATCH_OF_FOUR))
    assert again.code == 0
    assert "out of memory" not in again.said
    assert "going on from checkpoint-" in again.said
    assert results(tmp_path / "out") == results(expected)
    summary = manifest_of(tmp_path / "out")["summary"]
    assert (summary["micro_batch_asked"], summary["micro_batch"]) == (4, 2)
    assert not leftovers(tmp_path / "out")


@pytest.mark.parametrize("problem", ERRORS.values(), ids=ERRORS)
def test_what_says_that_memory_ran_out(problem):
    assert is_out_of_memory(problem)


@pytest.mark.parametrize(
    "problem", [RuntimeError("size mismatch"), ValueError("out of memory"), OSError("disk")], ids=repr
)
def test_what_says_something_else(problem):
    assert not is_out_of_memory(problem)


# --- reading rows

READING = [
    ("score-heads", "pad"),
    ("mine-data", "readout"),
    ("mine-data", "generate"),
    ("mine-data", "ifd"),
    ("mine-data", "embedding"),
    ("eval", "answers"),
    ("eval", "accuracy"),
    ("eval", "perplexity"),
]


def numbers(folder):
    """The columns and tensors of an artifact."""
    from safetensors.numpy import load_file

    found = {}
    for path in folder.glob("*.parquet"):
        found |= {f"{path.name}:{name}": column for name, column in pq.read_table(path).to_pydict().items()}
    for path in folder.glob("*.safetensors"):
        found |= {name: tensor.tolist() for name, tensor in load_file(path).items()}
    return found


@pytest.mark.parametrize("work", quickly(READING, "pad", "generate", "answers", "accuracy", "embedding"), ids=named)
def test_batches_are_read_in_parts(p2d, words, undisturbed, work, tmp_path):
    roomy = ("--token-budget", 400) if work[1] == "generate" else ()  # several episodes a batch
    expected = undisturbed(p2d, words, work, *roomy)
    with holds(1):
        done = p2d(*words(work, tmp_path / "out", *roomy))
    assert done.code == 0, done.said
    if work[0] != "score-heads":
        assert "out of memory; going on with batches cut into" in done.said
        assert manifest_of(tmp_path / "out")["summary"]["out_of_memory"] > 0
    one, other = numbers(expected), numbers(tmp_path / "out")
    assert one.keys() == other.keys()
    for name, values in one.items():
        if isinstance(values[0], str):
            assert other[name] == values
        else:
            assert np.allclose(np.array(values, float), np.array(other[name], float), atol=1e-4, equal_nan=True), name
    assert manifest_of(tmp_path / "out")["tokens"] <= manifest_of(expected)["tokens"], "failed attempts do not count"


@pytest.mark.parametrize("work", [("mine-data", "loss"), ("eval", "answers"), ("score-heads", "pad")], ids=named)
def test_a_row_that_does_not_fit_alone_is_named(p2d, words, work, tmp_path):
    with holds(0, ERRORS["cpu"]):
        done = p2d(*words(work, tmp_path / "out"))
    assert done.code == 70
    assert "out of memory" in done.said
    assert "--token-budget" in done.said
    assert {"mine-data": "pool.jsonl:", "eval": "test.jsonl:", "score-heads": ""}[work[0]] in done.said
    assert not (tmp_path / "out").exists()


def test_a_model_that_does_not_fit(p2d, words, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    def load(*args, **kwargs):
        raise RuntimeError(CPU_ALLOCATOR)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    done = p2d(*words(("eval", "perplexity"), tmp_path / "out"))
    assert done.code == 70
    assert "out of memory: [enforce fail" in done.said
    assert "more memory" in done.said
