"""train that is interrupted, watches held-out rows, or meets numbers that are none."""

import importlib.util
import json
import math
import os
import re
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

from p2d_cli.artifacts import checkpoints
from p2d_cli.cli import terminal
from p2d_cli.engine import tuning as stage
from p2d_cli.modeling.completion_trainer import CompletionTrainer

SCOPES = {
    "heads": ("--heads", "HEADS", "--projections", "q,k,v,o"),
    "attention": ("--scope", "attention"),
    "lora": ("--scope", "lora", "--lora-dropout", 0.1),
    "full": ("--scope", "full"),
}


@pytest.fixture
def words(pipeline, tiny_folder, few, tmp_path):
    """The command of a scope: 8 updates in two epochs, each of two micro-batches."""

    def make(scope, out, *more):
        given = [pipeline / "heads" if word == "HEADS" else word for word in SCOPES[scope]]
        common = ("--model", tiny_folder, "--dtype", "float32", "--data", few["test"], "--epochs", 2, "--seed", 3)
        batches = ("--batch-size", 4, "--accumulation", 2, "--checkpoint-minutes", 0, "--weight-decay", 0.1)
        return "train", *common, *batches, *given, *more, "--out", tmp_path / out

    return make


def weights(folder):
    return load_file(next(iter(folder.glob("*model.safetensors"))))


def same(first, second):
    one, other = weights(first), weights(second)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def log_of(folder):
    return [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


def interrupt_after(monkeypatch, updates):
    """Ctrl-C once the checkpoint behind so many updates has been sealed; counts from now."""
    done = []

    def seal(folder, progress):
        checkpoints.seal_checkpoint(folder, progress)
        done.append(folder)
        if len(done) == updates:
            raise KeyboardInterrupt

    monkeypatch.setattr(stage, "seal_checkpoint", seal)
    return done


@pytest.mark.parametrize("scope", SCOPES)
def test_an_interrupted_training_ends_with_the_same_bits(p2d, words, scope, tmp_path, monkeypatch):
    assert p2d(*words(scope, "undisturbed")).code == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)  # within the first epoch
        assert p2d(*words(scope, "disturbed")).code == 130
        assert not (tmp_path / "disturbed").exists()
        interrupt_after(patch, 2)  # within the second
        assert p2d(*words(scope, "disturbed")).code == 130
    done = p2d(*words(scope, "disturbed"))
    assert done.code == 0
    assert "going on from checkpoint-4" in done.said
    assert same(tmp_path / "undisturbed", tmp_path / "disturbed")
    assert log_of(tmp_path / "undisturbed") == log_of(tmp_path / "disturbed")
    one, other = (manifest_of(tmp_path / name) for name in ("undisturbed", "disturbed"))
    assert one["summary"] == other["summary"]
    assert one["tokens"] == other["tokens"]
    assert not list(tmp_path.glob(".*unfinished*"))


def damage_byte(folder):
    path = next(iter(folder.glob("*model.safetensors")))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut_file(folder):
    path = folder / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:100])


DAMAGES = {
    "a flipped bit": damage_byte,
    "a truncated file": cut_file,
    "a missing file": lambda folder: (folder / "scheduler.pt").unlink(),
    "no seal": lambda folder: (folder / checkpoints.SEAL_NAME).unlink(),
    "half a seal": lambda folder: (folder / checkpoints.SEAL_NAME).write_text('{"files": {'),
}


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.skipif("P2D_SLOW" not in os.environ, reason="faults/test_damage.py is quicker; P2D_SLOW=1 runs it")
def test_a_damaged_checkpoint_is_passed_over(p2d, words, kind, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        done = interrupt_after(patch, 3)
        assert p2d(*words("heads", "disturbed")).code == 130
    DAMAGES[kind](done[-1])
    again = p2d(*words("heads", "disturbed"))
    assert again.code == 0
    assert "not going on from checkpoint-3" in again.said
    assert "going on from checkpoint-2" in again.said
    assert p2d(*words("heads", "undisturbed")).code == 0
    assert same(tmp_path / "undisturbed", tmp_path / "disturbed")


def test_force_starts_anew(p2d, words, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        assert p2d(*words("heads", "disturbed")).code == 130
    assert "going on" not in p2d(*words("heads", "disturbed", "--force")).said


@pytest.mark.parametrize("there", [False, True], ids=["nothing-there", "redone"])
def test_an_interrupted_redo_goes_on(p2d, words, there, tmp_path, monkeypatch):
    """As the message promises: --force discards what an ordinary run left, and not what --force itself left."""
    assert p2d(*words("heads", "undisturbed")).code == 0
    if there:
        assert p2d(*words("heads", "x")).code == 0
    forced = words("heads", "x", "--force")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        assert p2d(*forced).code == 130
    assert p2d(*forced, "--dry-run", "--json").json["plan"]["resume"] == ["train: from update 2"]
    done = p2d(*forced)
    assert "going on from checkpoint-2" in done.said
    assert same(tmp_path / "undisturbed", tmp_path / "x")
    assert "going on" not in p2d(*forced).said


def test_a_forced_dry_run_resumes_no_ordinary_run(p2d, words, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        assert p2d(*words("heads", "x")).code == 130
    plan = p2d(*words("heads", "x", "--dry-run", "--force", "--json")).json["plan"]
    assert plan["resume"] == []


def test_the_best_weights_on_held_out_rows_are_kept(p2d, words, few, tmp_path):
    """A learning rate that is far too high gets worse and worse; the first look is the best, and training stops."""
    held_out = ("--eval-data", few["test"], "--eval-steps", 1, "--patience", 2)
    done = p2d(*words("heads", "best", *held_out, "--lr", 3.0, "--schedule", "constant", "--epochs", 9), "--json")
    assert done.code == 0
    log = log_of(tmp_path / "best")
    looks = {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry}
    untrained = looks.pop(0)
    best = min(looks, key=looks.get)
    summary = manifest_of(tmp_path / "best")["summary"]
    assert (summary["best_update"], summary["best_eval_loss"]) == (best, looks[best])
    assert summary["untrained_eval_loss"] == untrained
    assert summary["updates"] == best + 2 < summary["updates_planned"]
    [cost] = [cost for cost in manifest_of(tmp_path / "best")["ledger"] if cost["stage"] == "train"]
    assert cost["steps_done"] == cost["steps_planned"] == best + 2, "it is whole, and no report scales its time"
    again = p2d(*words("heads", "short", "--lr", 3.0, "--schedule", "constant", "--epochs", 9, "--max-steps", best))
    assert again.code == 0
    assert same(tmp_path / "best", tmp_path / "short")


def test_the_loss_on_held_out_rows_is_that_of_eval(p2d, words, few, tiny_folder, tmp_path):
    """Before the first update too, where it is that of the model alone."""
    held_out = ("--eval-data", few["target"])
    assert p2d(*words("heads", "adapter", *held_out)).code == 0
    summary = manifest_of(tmp_path / "adapter")["summary"]
    common = ("--model", tiny_folder, "--dtype", "float32", "--data", few["target"], "--metric", "perplexity")
    adapter = ("--adapter", tmp_path / "adapter")
    for name, more in (("best_eval_loss", adapter), ("untrained_eval_loss", ())):
        assert p2d("eval", *common, *more, "--out", tmp_path / name).code == 0
        perplexity = json.loads((tmp_path / name / "metrics.json").read_text())["perplexity"]["value"]
        assert summary[name] == pytest.approx(math.log(perplexity), 1e-4)


@pytest.mark.parametrize(("steps", "looks"), [((), [0, 3, 6]), (("--eval-steps", 4), [0, 4, 6])])
def test_looks_are_taken_before_the_first_update_and_behind_the_last_and_are_planned(
    p2d, words, few, tmp_path, steps, looks
):
    line = words("lora", "x", "--eval-data", few["target"], *steps)
    planned = p2d(*line, "--dry-run", "--json").json["plan"]
    work = next(work for work in planned["works"] if work["name"] == "look at held-out rows")
    assert work["rows"] == 12 * len(looks)
    assert p2d(*line).code == 0
    log = log_of(tmp_path / "x")
    assert [entry["step"] for entry in log if "eval_loss" in entry] == looks
    assert log[0].keys() == {"step", "epoch", "eval_loss"}
    assert p2d(*words("lora", "y")).code == 0
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[: looks[1]] == [entry["loss"] for entry in log_of(tmp_path / "y")][: looks[1]], (
        "dropout's draws are the same"
    )


# --- channels beside heads


@pytest.mark.parametrize("projections", ["q,k,v,o", "none"])
def test_channels_are_planned_trained_and_told(p2d, words, tmp_path, projections):
    line = words("heads", "x", "--channels", 0.1, "--projections", projections)
    [noted] = [note for note in p2d(*line, "--dry-run", "--json").json["plan"]["notes"] if "parameters" in note]
    done = p2d(*line, "--json")
    assert done.code == 0, done.said
    summary = manifest_of(tmp_path / "x")["summary"]
    assert noted.startswith(f"6 updates of {summary['trained_parameters']:,} parameters, ")
    assert noted.endswith(f", peak lr {summary['learning_rate']:g}")
    assert summary["channels"] == 0.1
    names = {name.split(".")[-4] for name in weights(tmp_path / "x")}
    assert names == ({"mlp"} if projections == "none" else {"mlp", "self_attn"})
    told = "only 10% of the channels" if projections == "none" else "heads and 10% of the channels"
    assert f", {told}, " in p2d("inspect", tmp_path / "x").said


def test_channels_are_exported_as_they_answer(p2d, words, tmp_path, few):
    assert p2d(*words("heads", "x", "--channels", 0.1)).code == 0
    assert p2d("export", tmp_path / "x", "--out", tmp_path / "merged").code == 0
    model, rows = evaluated(words, few)
    assert p2d("eval", "--adapter", tmp_path / "x", *model, *rows, "--out", tmp_path / "a").code == 0
    assert p2d("eval", "--model", tmp_path / "merged", *rows, "--out", tmp_path / "m").code == 0
    losses = [metrics_of(tmp_path / name)["perplexity"]["value"] for name in ("a", "m")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def evaluated(words, few):
    """The model and the rows of an evaluation."""
    line = list(words("full", "x"))
    return ("--model", line[line.index("--model") + 1]), (
        "--data",
        few["target"],
        "--metric",
        "perplexity",
        "--dtype",
        "float32",
    )


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_channels_are_of_heads_alone(p2d, words, tmp_path):
    """Other scopes have none, and their key says so."""
    assert p2d(*words("full", "x")).code == 0
    assert p2d(*words("full", "x", "--channels", 0.1, "--json")).json["status"] == "up-to-date"
    done = p2d(*words("heads", "y", "--projections", "none"))
    assert done.code == 2
    assert "or train --channels alone" in done.said


# --- what a user is told


def warnings_of(folder):
    return manifest_of(folder)["summary"]["warnings"]


def test_few_updates_and_a_far_rate_are_told_by_the_plan_and_by_the_result(p2d, words, tmp_path):
    line = words("heads", "x", "--lr", 0.5)
    few, far = "6 updates are few to learn from", "--lr 0.5 is 185 times the default of such a training, 0.0027"
    planned = p2d(*line, "--dry-run").said
    done = p2d(*line)
    inspected = p2d("inspect", tmp_path / "x")
    for said in (planned, done.said, inspected.said):
        assert said.count(few) == said.count(far) == 1, said
    assert done.err.count("few to learn from") == 0, "once, and not as a note besides"
    assert p2d(*line).out.count(few) == 1, "what is up to date is told of as well"


def test_what_does_nothing_is_told_by_the_plan_and_by_the_result(p2d, words, few, pipeline, tmp_path):
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(few["test"].read_bytes())
    told = [
        "of no use with scope lora: --heads",
        "--lora-rank 200 is more than any adapted module can use: rank 128 changes as much",
        "all rows of --eval-data are in --data too: the loss that chooses the weights is on rows that are learnt",
    ]
    line = words("lora", "x", "--lora-rank", 200, "--heads", pipeline / "heads", "--eval-data", copy, "--max-steps", 1)
    planned = p2d(*line, "--dry-run").said
    assert p2d(*line).code == 0
    assert all(said in planned and said in warnings_of(tmp_path / "x") for said in told), planned


def test_batch_size_rate_and_layers_computed_once_are_shown(p2d, words, tmp_path):
    line = words("heads", "x", "--lr", 0.001)
    planned = p2d(*line, "--dry-run").said
    assert "parameters, batch size 4, peak lr 0.001" in planned
    assert re.search(r"[123] frozen layers? computed once a row: \d+ KiB of outputs kept", planned)
    done = p2d(*line)
    for said in (done.said, p2d("inspect", tmp_path / "x").said):
        assert "rows, batch size 4, peak lr 0.001" in said
        assert re.search(r"\(\d\.\d\d%\), [123] frozen layers? computed once a row", said)
    probed = p2d(*words("lora", "y", "--lr", "probe"), "--dry-run").said
    assert "peak lr 0.001, 0.003 or 0.009" in probed


def test_an_ordinary_training_is_told_nothing_of(p2d, words, few, tmp_path):
    assert p2d(*words("heads", "x", "--epochs", 10, "--eval-data", few["target"])).code == 0
    assert manifest_of(tmp_path / "x")["summary"]["updates"] == 30
    assert warnings_of(tmp_path / "x") == []
    # A whole model that is cut short is a reference, for its cost.
    short = ("--epochs", 10, "--max-steps", 5)
    assert p2d(*words("full", "y", *short)).code == p2d(*words("heads", "z", *short)).code == 0
    assert warnings_of(tmp_path / "y") == []
    assert "5 updates are few" in warnings_of(tmp_path / "z")[0]


def test_a_training_that_makes_the_model_worse_is_told_as_such(p2d, words, few, tmp_path):
    worse = ("--lr", 3.0, "--schedule", "constant", "--epochs", 10)
    done = p2d(*words("full", "held-out", *worse, "--eval-data", few["test"]))
    summary = manifest_of(tmp_path / "held-out")["summary"]
    untrained, best = summary["untrained_eval_loss"], summary["best_eval_loss"]
    assert best > untrained
    told = f"its loss there is {untrained:.3f}, the lowest after any update {best:.3f}"
    assert done.out.count(told) == 1
    assert f"held-out loss {untrained:.3f} untrained, {best:.3f} after update {summary['best_update']}" in done.out
    assert p2d(*words("full", "blind", *worse)).out.count("the loss rose, from ") == 1
    losses = [entry["loss"] for entry in log_of(tmp_path / "blind")]
    first, last = losses[0], np.mean(losses[-10:])
    assert warnings_of(tmp_path / "blind")[-1] == (
        f"the loss rose, from {first:.3f} in the first update to {last:.3f} in the last 10 updates: try a lower --lr"
    )


@pytest.mark.parametrize("looks", [("--eval-data",), ()])
def test_weights_that_answer_with_nan_are_not_written(p2d, words, few, tmp_path, looks):
    """The rate is such that the first update, whose own loss is finite, ruins them."""
    held_out = (*looks, few["test"]) if looks else ()
    done = p2d(*words("heads", "x", "--lr", 1e30, "--max-steps", 1, *held_out))
    assert done.code == 70
    assert "nothing was written" in done.said
    assert not (tmp_path / "x").exists()


def test_a_late_look_that_finds_nan_costs_nothing_that_was_good(p2d, words, few, tmp_path, monkeypatch):
    compute = CompletionTrainer._completion_loss

    def poisoned(self, model, inputs):
        total, count, outputs = compute(self, model, inputs)
        is_late = not model.training and self.state.global_step > 3
        return (total * math.nan if is_late else total), count, outputs

    monkeypatch.setattr(CompletionTrainer, "_completion_loss", poisoned)
    done = p2d(*words("heads", "x", "--eval-data", few["test"]))
    assert done.code == 0, done.said
    assert manifest_of(tmp_path / "x")["summary"]["best_update"] == 3
    [told] = [warning for warning in warnings_of(tmp_path / "x") if "finite" in warning]
    assert told == "the held-out loss was not finite after update 6; weights that gave a finite one are kept"
    assert log_of(tmp_path / "x")[-1]["eval_loss"] is None


def test_a_log_shows_loss_rate_and_speed(p2d, words, few, monkeypatch):
    monkeypatch.setattr(terminal, "SECONDS_BETWEEN_LINES", 0.0)
    lines = p2d(*words("heads", "x", "--eval-data", few["target"])).err.splitlines()
    shown = [line for line in lines if "train (heads): " in line]
    assert len(shown) == 6 + 3
    figures = r"loss \d+\.\d{3} · lr \d\.\de[-+]\d\d · [\d,]+ tokens/s"
    assert re.fullmatch(r"\d\d:\d\d:\d\d train \(heads\): 0/6, \d+ s; held-out \d\.\d{3}", shown[0])
    for number, line in enumerate(shown[1:4], start=1):
        assert re.search(rf" {number}/6, .*; {figures} · held-out \d\.\d{{3}}$", line)
    assert shown[4].split("; ")[0].split(": ")[1][:3] == "3/6", "the look behind the first epoch"
    told = {line.rpartition("held-out ")[2] for line in shown}
    assert len(told) == 3


def test_an_interrupted_early_stopping_ends_the_same(p2d, words, few, tmp_path, monkeypatch):
    more = ("--eval-data", few["target"], "--eval-steps", 2, "--patience", 2, "--lr", 0.1)
    assert p2d(*words("heads", "undisturbed", *more)).code == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        assert p2d(*words("heads", "disturbed", *more)).code == 130
    assert p2d(*words("heads", "disturbed", *more)).code == 0
    assert same(tmp_path / "undisturbed", tmp_path / "disturbed")
    assert log_of(tmp_path / "undisturbed") == log_of(tmp_path / "disturbed")


def test_held_out_settings_need_held_out_rows(p2d, words):
    done = p2d(*words("heads", "x", "--patience", 2))
    assert done.code == 2
    assert "--patience needs --eval-data" in done.said


def test_a_loss_that_is_no_number_stops_before_the_update_and_names_its_rows(p2d, words, few, tmp_path, monkeypatch):
    compute, calls = CompletionTrainer._completion_loss, []

    def poisoned(self, model, inputs):
        total, count, outputs = compute(self, model, inputs)
        calls.append(inputs["names"])
        return (total * math.nan if len(calls) == 4 else total), count, outputs

    monkeypatch.setattr(CompletionTrainer, "_completion_loss", poisoned)
    done = p2d(*words("heads", "x"))
    assert done.code == 70
    assert "the loss of update 2 is nan" in done.said
    assert all(f"test.jsonl:{name.rsplit(':', 1)[1]}" in done.said for name in calls[3])
    assert not (tmp_path / "x").exists()


def test_a_gradient_that_is_no_number_stops_before_the_update(p2d, words, tmp_path, monkeypatch):
    step = Trainer.training_step

    def poisoned(self, model, *arguments):
        loss = step(self, model, *arguments)
        if self.state.global_step == 1:
            next(parameter for parameter in model.parameters() if parameter.grad is not None).grad[0, 0] = math.inf
        return loss

    monkeypatch.setattr(CompletionTrainer, "training_step", poisoned)
    done = p2d(*words("heads", "x"))
    assert done.code == 70
    assert "the gradient of update 2 is not finite" in done.said
    assert done.said.strip().endswith("try: lower --lr"), "it is trained in float32 already"
    done = p2d(*words("heads", "x"), "--dtype", "bfloat16")
    assert "try: lower --lr, or try --dtype float32" in done.said


def test_accumulation_changes_nothing_but_memory(p2d, words, tmp_path):
    assert p2d(*words("full", "two")).code == 0
    assert p2d(*words("full", "one", "--accumulation", 1)).code == 0
    for first, second in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(np.allclose(one[name], two[name], atol=1e-5) for name in one)


def test_packing_changes_nothing_but_padding(p2d, words, few, tmp_path):
    def on_pool(*given):
        return [few["pool"] if word == few["test"] else word for word in given]

    assert p2d(*on_pool(*words("heads", "packed", "--packing", "--batch-size", 12))).code == 0
    assert p2d(*on_pool(*words("heads", "padded", "--batch-size", 12))).code == 0
    for first, second in zip(log_of(tmp_path / "packed"), log_of(tmp_path / "padded"), strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)
    assert manifest_of(tmp_path / "packed")["tokens"] < manifest_of(tmp_path / "padded")["tokens"]


def test_other_settings_do_not_discard_what_an_interrupted_run_has_finished(p2d, words, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        assert p2d(*words("heads", "x")).code == 130
    [left] = tmp_path.glob(".*unfinished*")
    other = words("heads", "x", "--lr", 1e-3, "--max-steps", 2)
    for more in ((), ("--dry-run",)):
        done = p2d(*other, *more)
        assert done.code == 73
        assert f"has left 2 updates of another {tmp_path / 'x'}: it differs in setting lr (not set" in done.said
        assert "setting max_steps (not set there, 2 now)" in done.said
        assert "--force to discard it" in done.said
        assert left.exists()
    assert "2 updates, is discarded" in p2d(*other, "--force").said
    assert not left.exists()


def test_what_has_kept_nothing_is_removed(p2d, words, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(stage.Tuning, "_earlier", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        assert p2d(*words("heads", "x")).code == 130
    assert len(list(tmp_path.glob(".*unfinished*"))) == 1
    assert p2d(*words("heads", "x", "--lr", 1e-3)).code == 0
    assert not list(tmp_path.glob(".*unfinished*"))


@pytest.mark.parametrize("scope", ["heads", "lora"])
def test_a_base_model_in_four_bits(p2d, words, scope, tiny_folder, few, tmp_path):
    """The adapter of a quantised base is an ordinary one, counts the same share, and goes on the plain base."""
    pytest.importorskip("bitsandbytes")
    assert p2d(*words(scope, "four", "--base-quantization", "4bit")).code == 0
    assert p2d(*words(scope, "plain")).code == 0
    four, plain = (manifest_of(tmp_path / name)["summary"] for name in ("four", "plain"))
    assert four["trainable_share"] == plain["trainable_share"]
    assert four["total_parameters"] == plain["total_parameters"]
    assert four["first_loss"] != plain["first_loss"]
    assert four["first_loss"] == pytest.approx(plain["first_loss"], rel=0.2)
    assert four["final_loss"] < four["first_loss"]
    assert weights(tmp_path / "four").keys() == weights(tmp_path / "plain").keys()
    common = ("--model", tiny_folder, "--data", few["target"], "--metric", "perplexity", "--out", tmp_path / "e")
    assert p2d("eval", *common, "--adapter", tmp_path / "four").code == 0


def test_four_bits_freeze_what_full_training_moves(p2d, words):
    done = p2d(*words("full", "x", "--base-quantization", "4bit"))
    assert done.code == 2
    assert "--base-quantization 4bit freezes the weights that --scope full trains" in done.said


def test_four_bits_without_bitsandbytes(p2d, words, monkeypatch):
    find = importlib.util.find_spec
    missing = {"bitsandbytes"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name in missing else find(name, *more))
    done = p2d(*words("heads", "x", "--base-quantization", "4bit"))
    assert done.code == 69
    assert "pip install bitsandbytes" in done.said


def test_rates_are_tried_beforehand(p2d, words, few, tmp_path, monkeypatch):
    """Each on rows that lend themselves, or on those to look at; what an interrupted run has tried is kept."""
    plain = words("heads", "plain")
    assert p2d(*plain).code == 0
    rate = manifest_of(tmp_path / "plain")["summary"]["learning_rate"]
    for out, more in (("lent", ()), ("held-out", ("--eval-data", few["target"]))):
        done = p2d(*words("heads", out, "--lr", "probe", *more))
        assert done.code == 0, done.said
        manifest = manifest_of(tmp_path / out)
        tried = manifest["summary"]["lr_probe"]
        assert [float(name) for name in tried] == pytest.approx([rate / 3, rate, 3 * rate], rel=0.05)
        best = min(tried, key=tried.get)
        assert manifest["summary"]["learning_rate"] == float(best)
        assert f"{best} is taken" in done.said
        assert manifest["seconds"]["probe"] > 0
        plan = p2d(*words("heads", "planned", "--lr", "probe", *more), "--dry-run", "--json").json["plan"]
        works = {work["name"]: work for work in plan["works"]}
        # Six updates, and no more for each rate.
        assert works["train"]["backward_passes"] == {"lent": 10 + 3 * 12, "held-out": 10 + 3 * 10}[out]
        assert plan["tokens"] == manifest["tokens"]
        looks = {"lent": 3 * 1, "held-out": 3 * 6 + 3 * 6}  # of two rows, and of twelve
        assert works["look at held-out rows"]["passes"] == looks[out]
        assert re.search(rf"try rate {best}: 6/6, .*; loss .* · held-out {tried[best]:.3f}", done.err)
        listed = ", ".join(f"{loss:.3f} at {name}" for name, loss in tried.items())
        for said in (done.out, p2d("inspect", tmp_path / out).out):
            assert f"rates tried, by held-out loss: {listed}" in said
    assert manifest_of(tmp_path / "lent")["tokens"] > 2 * manifest_of(tmp_path / "plain")["tokens"]
    calls, plain_try = [], stage.Tuning._try

    def counted(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain_try(self, *arguments)

    monkeypatch.setattr(stage.Tuning, "_try", counted)
    command = words("heads", "again", "--lr", "probe")
    assert p2d(*command).code == 130
    assert p2d(*command).code == 0
    assert len(calls) == 4
    assert same(tmp_path / "again", tmp_path / "lent")
    spent = [manifest_of(tmp_path / name)["tokens"] for name in ("again", "lent")]
    assert spent[0] == spent[1]


def test_too_few_rows_for_a_probe_are_warned_of(p2d, words, few, tmp_path):
    lines = few["test"].read_text().splitlines(keepends=True)
    (tmp_path / "three.jsonl").write_text("".join(lines[:3]))
    line = [tmp_path / "three.jsonl" if word == few["test"] else word for word in words("heads", "x", "--lr", "probe")]
    assert "too few rows to hold any out" in p2d(*line, "--dry-run").said
    done = p2d(*line)
    assert done.code == 0, done.said
    assert "--lr probe: too few rows to hold any out; the default rate is taken" in done.out
    assert "--lr probe" in " ".join(manifest_of(tmp_path / "x")["summary"]["warnings"])


def test_a_rate_that_diverges_is_not_taken(p2d, words, tmp_path, monkeypatch):
    plain = CompletionTrainer._completion_loss

    def diverge(self, model, inputs):
        total, *rest = plain(self, model, inputs)
        return (total * torch.nan if self.args.learning_rate > 3.1e-3 else total), *rest

    monkeypatch.setattr(CompletionTrainer, "_completion_loss", diverge)
    done = p2d(*words("lora", "lora", "--lr", "probe"))
    assert done.code == 0, done.said
    tried = manifest_of(tmp_path / "lora")["summary"]["lr_probe"]
    assert tried["0.009"] is None
    assert "diverged at 0.009" in done.said


def test_a_rate_by_another_rule_makes_an_artifact_of_its_own(p2d, words, monkeypatch):
    """In wider models than the anchor's, whose rate version 0.1.0 took for all."""
    former, named = words("heads", "former"), words("heads", "named", "--lr", "1e-3")
    assert p2d(*former).code == p2d(*named).code == 0
    monkeypatch.setattr("p2d_cli.stages.train.ANCHOR_WIDTH", 8)
    done = p2d(*former)
    assert done.code == 73
    assert "it differs in setting lr_rule" in done.said
    assert p2d(*former, "--force").code == 0
    for command in (former, named):
        assert p2d(*command, "--json").json["status"] == "up-to-date"


def test_an_update_has_as_many_rows_as_leave_sixty(p2d, tiny_folder, few, pipeline, tmp_path):
    """Of 16 rows in so many epochs; the plan says the same."""
    rows = ("--data", few["test"], "--heads", pipeline / "heads")
    common = ("train", "--model", tiny_folder, "--dtype", "float32", *rows)
    for epochs, size in ((1, 2), (60, 16)):
        words = (*common, "--epochs", epochs, "--max-steps", 2, "--out", tmp_path / str(epochs))
        [work] = p2d(*words, "--dry-run", "--json").json["plan"]["works"]
        assert p2d(*words).code == 0
        summary = manifest_of(tmp_path / str(epochs))["summary"]
        assert summary["batch_size"] == summary["micro_batch"] == size
        assert work["passes"] == 2


def test_a_lora_adapts_all_linear_layers(p2d, words, tmp_path):
    for name, more, modules in (
        ("all", (), {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("attention", ("--lora-targets", "attention"), {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("former", ("--projections", "q,v"), {"q_proj", "v_proj"}),
        ("named", ("--lora-targets", "k"), {"k_proj"}),
    ):
        done = p2d(*words("lora", name, *more))
        assert done.code == 0, done.said
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert {target.rsplit(".", 1)[-1] for target in config["target_modules"]} == modules
        assert (config["r"], config["lora_alpha"]) == (16, 32)
        again = p2d(*words("lora", name, *more), "--json")
        assert again.json["status"] == "up-to-date"
    assert p2d(*words("lora", "bad", "--lora-targets", "all-linear,q")).code == 2


def test_a_tracker_is_told(p2d, words, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    assert p2d(*words("heads", "x", "--tracker", "tensorboard")).code == 0
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    told = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert told == [(entry["step"], pytest.approx(entry["loss"])) for entry in log_of(tmp_path / "x")]
