"""The same training by p2d and by trl's SFTTrainer: seconds, memory and loss of LoRA and of full fine-tuning.

    python -m venv TRL && TRL/bin/pip install torch==2.13.0 trl peft   # an environment of its own, torch as p2d has it
    python tests/benchmarks/peers.py --model MODEL --data TRAIN --held-out TEST --peer-python TRL/bin/python --out OUT
        [--rows 256] [--held-out-rows 200] [--epochs 3] [--batch-size 16] [--dtype auto] [--device auto] [--threads N]
        [--lora-lr 3e-3] [--full-lr 3e-4] [--heads-lr RATE] [--template auto] [--repeats 1] [--arms ARM ...]

TRAIN and TEST are JSON Lines of `prompt` and `completion`, of which some rows are drawn at random, always the same.
Both learn the very same tokens and labels: p2d's template makes them, and trl is given them as `input_ids` and
`completion_mask`, with `completion_only_loss`. Rows an update, epochs, rates, schedule, warm-up, clipping, AdamW,
LoRA's rank, alpha and targets, threads and precision are the same; neither packs rows nor recomputes activations. All
else is as each has it by default: p2d groups rows by length, for one.

Each training is a process of its own. `seconds` are those of training, from the loaded model on; `total` those of the
process, from imports to what was saved; `peak` is the most memory that it had resident, or on a GPU allocated. `loss`
is the mean of the last epoch's updates. The held-out loss is `p2d eval`'s, for all of them. A third training of p2d's
is that of a tenth of the heads, evenly spread over the upper half of the layers, a fourth that of a tenth of the MLPs'
channels there. With `--repeats` all are trained in turn so often, and the quickest counts. `OUT/peers.json` holds all
figures.

Targets: p2d takes at most 0.45 of trl's seconds and 0.70 of its memory, and heads at most 0.45 of the seconds of p2d's
own full fine-tuning, at a held-out loss no higher than LoRA's.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ARMS = ("trl-lora", "p2d-lora", "trl-full", "p2d-full", "p2d-heads", "p2d-channels")
RANK, ALPHA, PROJECTIONS = 16, 32, ("q", "k", "v")
WARMUP_RATIO = 0.03
OF_SCOPE: dict[str, dict[str, Any]] = {
    # As the peer's LoRA; heads have the defaults.
    "lora": {
        "lora-rank": RANK, "lora-alpha": ALPHA, "lora-targets": ",".join(PROJECTIONS), "lora-scaling": "plain"
    },
    "channels": {"channels": 0.1, "projections": "none"},
}  # fmt: skip
GIB = 2**30
TARGETS = (
    ("seconds", "p2d-lora", "trl-lora", 0.45),
    ("seconds", "p2d-full", "trl-full", 0.45),
    ("peak_gib", "p2d-lora", "trl-lora", 0.70),
    ("peak_gib", "p2d-full", "trl-full", 0.70),
    ("seconds", "p2d-heads", "p2d-full", 0.45),
    ("held_out_loss", "p2d-heads", "p2d-lora", 1.0),
)
"""What of which training is to be at most so much of another's."""


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    rows = cut(options.data, options.rows, options.out / "rows.jsonl")
    if any(arm.startswith("trl") for arm in options.arms):
        child(options, sys.executable, "tokens", {"model": options.model, "rows": str(rows)} | shown(options), "tokens")
    if {"p2d-heads", "p2d-channels"} & {*options.arms}:
        score_heads(options)
    runs = [(arm, train(options, arm, rows)) for _ in range(options.repeats) for arm in options.arms]
    results = {
        arm: min((run for name, run in runs if name == arm), key=lambda run: run["seconds"]) for arm in options.arms
    }
    if options.held_out is not None:
        held_out = cut(options.held_out, options.held_out_rows, options.out / "held_out.jsonl")
        for arm, result in results.items():
            result["held_out_loss"] = held_out_loss(options, arm, held_out)
    report(options, results)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    for name in ("model", "data"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--held-out")
    parser.add_argument("--peer-python", help="Python of the environment with trl; without it p2d is measured alone")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--held-out-rows", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--lora-lr", type=float, default=3e-3)
    parser.add_argument("--full-lr", type=float, default=3e-4)
    parser.add_argument("--heads-lr", type=float, help="by default p2d's own")
    parser.add_argument("--template", default="auto", choices=["auto", "chat", "plain"])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    options = parser.parse_args(arguments)
    if options.peer_python is None:
        options.arms = [arm for arm in options.arms if not arm.startswith("trl")]
    return options


def cut(source: str, count: int, path: Path) -> str:
    """Write some rows of a file, and return where; data sets are often sorted by their answers."""
    with Path(source).open(encoding="utf-8") as stream:
        lines = list(stream)
    lines = random.Random(0).sample(lines, min(count, len(lines)))
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


def shown(options: argparse.Namespace) -> dict[str, Any]:
    """Return how p2d is to show rows, and in what it is to compute."""
    return {"template": options.template, "dtype": options.dtype, "device": options.device}


# --- one training, in a process of its own


def train(options: argparse.Namespace, arm: str, rows: str) -> dict[str, Any]:
    peer, _, trained = arm.partition("-")
    scope = "heads" if trained == "channels" else trained
    rate = getattr(options, f"{scope}_lr")
    print(f"{arm} ...", flush=True)
    if peer == "p2d":
        given = {
            "model": options.model, "data": rows, "scope": scope, "lr": rate, "epochs": options.epochs,
            "batch-size": options.batch_size, "warmup-ratio": WARMUP_RATIO, "schedule": "cosine",
            "out": options.out / arm, **OF_SCOPE.get(trained, {}),
            "heads": options.out / "heads" if scope == "heads" else None,
        }  # fmt: skip
        words = ["train", *flags(given | shown(options)), "--force", "--quiet"]
        result = child(options, sys.executable, "p2d", {"words": words}, arm)
        return result | of_manifest(options.out / arm, options)
    tokens = json.loads((options.out / "tokens.json").read_text(encoding="utf-8"))
    settings = {
        "model": options.model, "scope": scope, "lr": rate, "epochs": options.epochs, "out": str(options.out / arm),
        "batch_size": options.batch_size, "dtype": tokens["dtype"], "device": tokens["device"],
        "tokens": str(options.out / "tokens.jsonl"),
    }  # fmt: skip
    return child(options, options.peer_python, "trl", settings, arm)


def child(options: argparse.Namespace, python: str, work: str, settings: dict[str, Any], name: str) -> dict[str, Any]:
    """Do a work in a process of its own, and return what it tells, and the seconds that it took in all."""
    asked, told, said = (options.out / f"{name}{end}" for end in (".asked.json", ".json", ".log"))
    asked.write_text(json.dumps(settings), encoding="utf-8")
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(options.threads))
    started = time.perf_counter()
    with said.open("w", encoding="utf-8") as log:
        done = subprocess.run(
            [python, __file__, "--child", work, str(asked), str(told)],
            env={**os.environ, **threads, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    seconds = time.perf_counter() - started
    if done.returncode:
        sys.exit(f"{name} failed, see {said}")
    found: dict[str, Any] = json.loads(told.read_text(encoding="utf-8"))
    return found | {"total_seconds": seconds}


def flags(settings: dict[str, Any]) -> list[str]:
    return [word for name, value in settings.items() if value is not None for word in (f"--{name}", str(value))]


def score_heads(options: argparse.Namespace) -> None:
    """Take a tenth of the heads, evenly spread over the upper half of the layers."""
    config = json.loads((Path(options.model) / "config.json").read_text(encoding="utf-8"))
    layers = config["num_hidden_layers"]
    p2d(
        "score-heads", "--model", options.model, "--method", "uniform", "--layers", f"{layers // 2}-{layers - 1}",
        "--out", str(options.out / "heads"),
    )  # fmt: skip


def of_manifest(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return what `p2d train` tells of a training."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    log = [json.loads(line) for line in (folder / "training_log.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    return {"seconds": manifest["seconds"]["train"], "loss": last_epoch(losses, options.epochs)}


def last_epoch(losses: Sequence[float], epochs: int) -> float:
    last = losses[-max(len(losses) // epochs, 1) :]
    return math.fsum(last) / len(last)


def held_out_loss(options: argparse.Namespace, arm: str, held_out: str) -> float:
    """Return the mean loss of held-out answers' tokens, in nats, by `p2d eval`."""
    folder, out = options.out / arm, options.out / f"{arm}-evaluation"
    model = {"model": folder} if arm.endswith("full") else {"model": options.model, "adapter": folder}
    p2d("eval", *flags(model | shown(options)), "--data", held_out, "--metric", "perplexity", "--out", str(out))
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    return math.log(metrics["perplexity"]["value"])


def p2d(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "p2d_cli", *words, "--force", "--quiet"], check=True, stdout=subprocess.PIPE)


# --- what is told


def report(options: argparse.Namespace, results: dict[str, dict[str, Any]]) -> None:
    print(f"\n{'training':12}{'seconds':>9}{'total':>9}{'peak GiB':>10}{'loss':>8}{'held-out':>10}")
    for arm, one in results.items():
        cells = (one["seconds"], ".1f", 9), (one["total_seconds"], ".1f", 9), (one["peak_gib"], ".2f", 10)
        losses = (one["loss"], ".3f", 8), (one.get("held_out_loss"), ".3f", 10)
        line = "".join(
            ("" if value is None else format(value, form)).rjust(width) for value, form, width in (*cells, *losses)
        )
        print(f"{arm:12}{line}")
    checks = [check for check in (compare(results, *target) for target in TARGETS) if check is not None]
    for one in checks:
        print(f"{one['what']}: {one['found']:.2f}, at most {one['at_most']:.2f} {'' if one['met'] else ' NOT MET'}")
    document = {
        "settings": {name: value for name, value in vars(options).items() if name not in {"out", "peer_python"}},
        "results": results,
        "targets": checks,
    }
    path = options.out / "peers.json"
    path.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def compare(
    results: dict[str, dict[str, Any]], what: str, arm: str, other: str, at_most: float
) -> dict[str, Any] | None:
    """Return what a training takes as a share of another one; None if one of them was not measured."""
    ours, theirs = (results.get(name, {}).get(what) for name in (arm, other))
    if ours is None or theirs is None:
        return None
    share = ours / theirs
    return {"what": f"{what} of {arm} / {other}", "found": share, "at_most": at_most, "met": share <= at_most}


# --- in the processes


def in_child(work: str, asked: str, told: str) -> None:
    settings = json.loads(Path(asked).read_text(encoding="utf-8"))
    found = {"tokens": write_tokens, "p2d": train_with_p2d, "trl": train_with_trl}[work](settings)
    found |= {"peak_gib": peak_gib(), "versions": versions("torch", "transformers", "peft", "trl", "p2d-cli")}
    Path(told).write_text(json.dumps(found), encoding="utf-8")


def write_tokens(settings: dict[str, Any]) -> dict[str, Any]:
    """Write the rows as `p2d train` learns them, for trl, and tell the precision and device that p2d takes."""
    from p2d_cli.config import TrainConfig, resolve
    from p2d_cli.engine.reader import ModelReader
    from p2d_cli.engine.stage_run import RunOptions, StageRun
    from p2d_cli.engine.tuning import TokenizedRows
    from p2d_cli.modeling.loading import resolve_device, resolve_dtype

    given = {name: settings[name] for name in ("model", "template")}
    config = resolve(TrainConfig, flags=given | {"data": settings["rows"], "out": "unused"}, environ={})
    job = StageRun("train", config, RunOptions())
    reader = ModelReader(job, job.inputs.model(settings["model"]))
    records = job.inputs.read(job.inputs.rows("data", settings["rows"])).records
    rows = [
        {"input_ids": list(one.input_ids), "completion_mask": [int(label >= 0) for label in one.labels(-100)]}
        for one in TokenizedRows.read(reader, records).examples
    ]
    path = Path(settings["rows"]).with_name("tokens.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    device = resolve_device(settings["device"])
    return {"device": device.type, "dtype": str(resolve_dtype(settings["dtype"], device)).removeprefix("torch.")}


def train_with_p2d(settings: dict[str, Any]) -> dict[str, Any]:
    from p2d_cli.cli.app import app

    try:
        app(settings["words"])
    except SystemExit as end:
        if end.code:
            raise
    return {}


def train_with_trl(settings: dict[str, Any]) -> dict[str, Any]:
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    is_lora = settings["scope"] == "lora"
    # As p2d does: a frozen base in the precision of the computation, weights that are trained in float32.
    dtype = getattr(torch, settings["dtype"] if is_lora else "float32")
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    rows = load_dataset("json", data_files=settings["tokens"], split="train", cache_dir=settings["out"] + "-cache")
    updates = settings["epochs"] * math.ceil(len(rows) / settings["batch_size"])
    config = SFTConfig(
        output_dir=settings["out"],
        per_device_train_batch_size=settings["batch_size"],
        num_train_epochs=settings["epochs"],
        learning_rate=settings["lr"],
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(WARMUP_RATIO * updates),
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=settings["dtype"] == "bfloat16",
        use_cpu=settings["device"] == "cpu",
        dataloader_pin_memory=settings["device"] != "cpu",
        gradient_checkpointing=False,
        packing=False,
        completion_only_loss=True,
        max_length=None,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
    )
    targets = [f"{name}_proj" for name in PROJECTIONS]
    adapter = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=adapter if is_lora else None,
    )
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    trainer.train()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    trainer.save_model(settings["out"])
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"seconds": seconds, "loss": last_epoch(losses, settings["epochs"])}


def peak_gib() -> float:
    """Return the most memory that this process had: allocated on a GPU, or else resident."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return float(torch.cuda.max_memory_allocated() / GIB)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def versions(*packages: str) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        in_child(*sys.argv[2:])
    else:
        main()
