"""What a training step costs, as ratios within one run: heads against full, LoRA, and the floor under them.

    python tests/benchmarks/training.py --model MODEL --out OUT [--rounds 6] [--device cpu]

The floor of a selection of heads is the same forward, and the gradients of the activations down to the lowest trained
layer, where a single scalar is trained. (a) times single steps of 16 x 96 tokens, the variants in turn, and counts
their FLOPs; (b) runs `p2d train` on such rows, with a step of the floor after each of its updates, as a machine's speed
changes: what lies between two floors is an update with data loading, Trainer and log. Memory is that of the command
undisturbed.

`OUT/training.json` holds all figures.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback

from p2d_cli.config import TrainConfig, resolve
from p2d_cli.core.head_selection import select_uniform
from p2d_cli.engine.stage_run import RunOptions
from p2d_cli.modeling import training
from p2d_cli.modeling.head_adapter import (
    attach_heads,
    attach_lora,
    prepare_full,
    trainable_share,
    unfreeze_attention,
)
from p2d_cli.modeling.layouts import layout_geometry, model_layout
from p2d_cli.modeling.likelihood import answer_logits_only
from p2d_cli.modeling.loading import load_model, resolve_dtype
from p2d_cli.runtime.hardware import describe_hardware, synchronizer
from p2d_cli.stages import train

ROWS, TOKENS, ANSWER = 16, 96, 32
UPDATES = 6
WORDS = ("the", "of", "and", "to", "in", "is", "that", "for", "it", "as")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    dtype = resolve_dtype("auto", options.device)
    variants = {name: build(options, dtype) for name, build in BUILDERS.items()}
    results = {
        "hardware": describe_hardware(options.device)["label"],
        "dtype": str(dtype),
        "steps": steps(options, variants, dtype),
    }
    print(json.dumps(results, indent=2), flush=True)
    floors = {name: variant for name, variant in variants.items() if name.startswith("floor-")}
    del variants
    results["commands"] = commands(options, floors, dtype)
    print(json.dumps(results["commands"], indent=2), flush=True)
    text = json.dumps(results, indent=2, sort_keys=True) + "\n"
    (options.out / "training.json").write_text(text, encoding="utf-8")


# --- (a) single steps


@dataclass
class Variant:
    """A model in the state that it is trained in."""

    model: Any
    optimizer: torch.optim.Optimizer
    share: float


def steps(options: argparse.Namespace, variants: dict[str, Variant], dtype: torch.dtype) -> dict[str, Any]:
    batch = make_batch(variants["full"].model.config.vocab_size, options.device)
    best = time_steps(options, variants, dtype, batch)
    flops = {name: count_flops(variant, batch, dtype) for name, variant in variants.items()}
    return {
        name: {
            "seconds": best[name],
            "of_full": best[name] / best["full"],
            "of_its_floor": best[name] / best[f"floor-{name.partition('-')[2]}"] if name.startswith("heads-") else None,
            "gigaflops": flops[name] / 1e9,
            "flops_of_full": flops[name] / flops["full"],
            "trainable_share": variants[name].share,
        }
        for name in variants
    }


def time_steps(
    options: argparse.Namespace, variants: dict[str, Variant], dtype: torch.dtype, batch: dict[str, torch.Tensor]
) -> dict[str, float]:
    """Return the seconds of each variant's quickest step, in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(options.rounds + 1):  # the first round warms up
        for name, variant in variants.items():
            seconds[name].append(timed_step(variant, batch, dtype, options.device))
    return {name: min(values[1:]) for name, values in seconds.items()}


def heads_of(layout: Any, kind: str) -> np.ndarray:
    """Select a tenth of the heads: spread over all layers, or over the upper half."""
    shape = layout_geometry(layout)
    skipped = shape.num_layers // 2 if kind == "upper" else 0
    candidates_LH = shape.exists_LH & (np.arange(shape.num_layers) >= skipped)[:, None]
    return select_uniform(shape.head_budget(0.1), candidates_LH)


def build_heads(kind: str) -> Callable[[argparse.Namespace, torch.dtype], Variant]:
    def build(options: argparse.Namespace, dtype: torch.dtype) -> Variant:
        model = load_model(options.model, dtype=dtype, device=options.device)
        return finish(attach_heads(model, heads_of(model_layout(model), kind), ("q", "k", "v")))

    return build


def build_floor(kind: str) -> Callable[[argparse.Namespace, torch.dtype], Variant]:
    def build(options: argparse.Namespace, dtype: torch.dtype) -> Variant:
        model = load_model(options.model, dtype=dtype, device=options.device)
        model.requires_grad_(False)
        layout = model_layout(model)
        lowest = int(np.flatnonzero(heads_of(layout, kind).any(axis=1))[0])
        scalar = torch.nn.Parameter(torch.zeros((), device=options.device))
        model.register_parameter("scalar", scalar)
        module = model.get_submodule(layout[lowest].q.module)
        module.register_forward_hook(lambda _module, _inputs, output: output + scalar.to(output.dtype))
        return finish(model)

    return build


def build_lora(options: argparse.Namespace, dtype: torch.dtype) -> Variant:
    return finish(attach_lora(load_model(options.model, dtype=dtype, device=options.device), 16, 32, "qkv", 0.0))


def build_whole(prepare: Callable[[Any], None]) -> Callable[[argparse.Namespace, torch.dtype], Variant]:
    def build(options: argparse.Namespace, dtype: torch.dtype) -> Variant:
        model = load_model(options.model, dtype=dtype, device=options.device)
        prepare(model)
        return finish(model)

    return build


def finish(model: Any) -> Variant:
    share = trainable_share(model).share
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Variant(model.train(), torch.optim.AdamW(trained, lr=1e-6), share)


BUILDERS: dict[str, Callable[[argparse.Namespace, torch.dtype], Variant]] = {
    "full": build_whole(prepare_full),
    "attention": build_whole(unfreeze_attention),
    "lora": build_lora,
    "heads-spread": build_heads("spread"),
    "floor-spread": build_floor("spread"),
    "heads-upper": build_heads("upper"),
    "floor-upper": build_floor("upper"),
}


def make_batch(vocabulary: int, device: str) -> dict[str, torch.Tensor]:
    ids_BT = torch.randint(5, vocabulary, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    predicts_BT = torch.zeros(ROWS, TOKENS, dtype=torch.bool)
    predicts_BT[:, -ANSWER - 1 : -1] = True
    return {"ids": ids_BT.to(device), "predicts": predicts_BT.to(device)}


def step(variant: Variant, batch: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """One update, as Trainer does it."""
    loss_of(variant, batch, dtype).backward()
    trained = variant.optimizer.param_groups[0]["params"]
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    variant.optimizer.step()
    variant.optimizer.zero_grad()


def loss_of(variant: Variant, batch: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    ids_BT, predicts_BT = batch["ids"], batch["predicts"]
    autocast = torch.autocast(ids_BT.device.type, dtype=dtype, enabled=dtype != torch.float32)
    with autocast, answer_logits_only(variant.model, predicts_BT):
        logits_nV = variant.model(input_ids=ids_BT, use_cache=False).logits[0]
    return torch.nn.functional.cross_entropy(logits_nV.float(), ids_BT[predicts_BT.roll(1, dims=1)])


def count_flops(variant: Variant, batch: dict[str, torch.Tensor], dtype: torch.dtype) -> int:
    with FlopCounterMode(display=False) as counter:
        loss_of(variant, batch, dtype).backward()
    variant.optimizer.zero_grad()
    return int(counter.get_total_flops())


# --- (b) the whole command


class Beside(TrainerCallback):
    """Times the updates of a training, and a step of the floor after each of them."""

    def __init__(self, floor: Callable[[], float]) -> None:
        self._floor = floor
        self._since = time.perf_counter()
        self.updates: list[float] = []
        self.floors: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.updates.append(time.perf_counter() - self._since)
        self.floors.append(self._floor())
        self._since = time.perf_counter()


def commands(options: argparse.Namespace, floors: dict[str, Variant], dtype: torch.dtype) -> dict[str, Any]:
    rows = write_rows(options.out / "rows.jsonl")
    batch = make_batch(next(iter(floors.values())).model.config.vocab_size, options.device)
    figures = {}
    for name in ("full", "heads-spread", "heads-upper", "lora"):
        scope, _, kind = name.partition("-")
        settings = {
            "model": options.model,
            "data": str(rows),
            "template": "plain",
            "max_length": TOKENS,
            "batch_size": ROWS,
            "epochs": 1,
            "scope": scope,
            "device": options.device,
            "out": options.out / f"run-{name}",
        }
        if scope == "heads":
            settings["heads"] = str(make_heads(options, kind))
        floor = floors[f"floor-{kind or 'spread'}"]
        beside = Beside(partial(timed_step, floor, batch, dtype, options.device))
        train_beside(settings, beside)
        # The first update warms up.
        pairs = list(zip(beside.updates, beside.floors, strict=True))[1:]
        figures[name] = {
            "seconds_an_update": [update for update, _ in pairs],
            "floor_seconds_after_it": [after for _, after in pairs],
            "of_the_floor": float(np.median([update / after for update, after in pairs])),
            "floor": kind or "spread",
            "peak_gib": train_alone(settings)["peak_memory_gib"],
        }
    return figures


def timed_step(variant: Variant, batch: dict[str, torch.Tensor], dtype: torch.dtype, device: str) -> float:
    wait = synchronizer(device)
    wait()
    start = time.perf_counter()
    step(variant, batch, dtype)
    wait()
    return time.perf_counter() - start


def train_beside(settings: dict[str, Any], beside: Beside) -> None:
    """Run the stage `train` in this process, with one more callback."""

    class Watched(training.CompletionTrainer):
        def __init__(self, *args: Any, callbacks: list[TrainerCallback], **more: Any) -> None:
            super().__init__(*args, callbacks=[*callbacks, beside], **more)

    with patch.object(training, "CompletionTrainer", Watched):
        train.run(resolve(TrainConfig, flags=settings, recipe={}), RunOptions(force=True))


def write_rows(path: Path) -> Path:
    """Write rows whose words are a token each: prompts that are cut to the length of a row, answers of `ANSWER`."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as stream:
        for _ in range(ROWS * UPDATES):
            prompt, answer = (" ".join(draw.choices(WORDS, k=count)) for count in (TOKENS, ANSWER - 1))
            stream.write(json.dumps({"prompt": prompt, "completion": answer}) + "\n")
    return path


def train_alone(settings: dict[str, Any]) -> dict[str, Any]:
    """Run `p2d train` in a process of its own, and return its manifest."""
    p2d("train", *(word for key, value in settings.items() for word in (f"--{key.replace('_', '-')}", str(value))))
    manifest: dict[str, Any] = json.loads((settings["out"] / "manifest.json").read_text(encoding="utf-8"))
    return manifest


def make_heads(options: argparse.Namespace, kind: str) -> Path:
    folder = options.out / f"heads-{kind}"
    layers = json.loads((Path(options.model) / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    upper = ["--layers", f"{layers // 2}-{layers - 1}"] if kind == "upper" else []
    p2d("score-heads", "--model", options.model, "--method", "uniform", *upper, "--out", str(folder))
    return folder


def p2d(*words: str) -> None:
    subprocess.run(["p2d", *words, "--force", "-q"], check=True, stdout=subprocess.PIPE)


if __name__ == "__main__":
    main()
