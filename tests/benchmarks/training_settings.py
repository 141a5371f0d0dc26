"""What is worth training, at which rate, and with how many rows an update: by the loss of held-out answers.

    python tests/benchmarks/training_settings.py --model MODEL --task NAME ROWS [--task ...] --out OUT
        [--arms heads lora full ...] [--rates 0.3 1 3] [--batch-sizes 4] [--rows 200] [--seeds 3] [--held-out-rows 100]

The arms: `heads`, a tenth of all heads, evenly spread over the upper half of the layers, q,k,v,o; `heads-qkv`, without
the output projection; `heads-all-layers`, over all layers; `channels`, as many weights in evenly spread channels of the
MLPs of the upper half (a channel is a row of gate and of up projection and the column of the down projection, as in
S2FT, arXiv:2412.06289), trained as the same exact LoRA; `both`, half of `heads` and of `channels`; `sum`, all of both;
`lora`, on all linear layers; `lora-attention`; `full`. `--rates` are multiples of an arm's default. 3 epochs.

The held-out rows are drawn from ROWS and never trained on; the loss is in nats a token of their answers.
OUT/training_settings.json grows as results come, and what is there is not measured again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from readout_rules import open_reader

from p2d_cli.core.head_layout import ProjectionName, weights_of
from p2d_cli.core.head_selection import candidate_heads, select_uniform
from p2d_cli.engine.reader import ModelReader
from p2d_cli.engine.training_defaults import default_learning_rate
from p2d_cli.engine.tuning import TokenizedRows
from p2d_cli.modeling.channels import channel_placements
from p2d_cli.modeling.head_adapter import attach_lora, attach_rows, prepare_full, trainable_share
from p2d_cli.modeling.layouts import model_layout
from p2d_cli.modeling.loading import load_model
from p2d_cli.modeling.training import TrainingPlan, train
from p2d_cli.modeling.training_batches import TrainingRow

SHARE = 0.1
PROJECTIONS: tuple[ProjectionName, ...] = ("q", "k", "v", "o")
EPOCHS = 3.0
HELD_OUT_SEED = 99


def main() -> None:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    options.pool = options.task[0][1]
    path = options.out / "training_settings.json"
    results: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    reader = open_reader(options)
    for name, source in options.task:
        rows, held_out = split(reader, source, options.held_out_rows)
        settings = itertools.product(
            range(options.seeds), options.rows, options.batch_sizes, options.arms, options.rates
        )
        for seed, count, batch_size, arm, factor in settings:
            where = {"task": name, "seed": seed, "rows": count, "batch": batch_size, "arm": arm, "factor": factor}
            if any(row | where == row for row in results):
                continue
            order = np.random.default_rng(seed).permutation(len(rows))[:count]
            results.append(where | measure(options, where, [rows[place] for place in order], held_out))
            path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            print(json.dumps(results[-1]), flush=True)
    show(results)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--task", nargs=2, action="append", required=True, metavar=("NAME", "ROWS"))
    parser.add_argument("--arms", nargs="*", default=["heads", "channels", "both", "lora"])
    parser.add_argument("--rates", nargs="*", type=float, default=[1.0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch-sizes", nargs="*", type=int, default=[4])
    parser.add_argument("--rows", nargs="*", type=int, default=[200])
    parser.add_argument("--held-out-rows", type=int, default=100)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def split(reader: ModelReader, path: str, count: int) -> tuple[list[TrainingRow], list[TrainingRow]]:
    """Return the tokenized rows of a file but `count`, drawn at random, and those."""
    inputs = reader.job.inputs
    records = inputs.read(inputs.rows("target", path)).records
    examples = reader.examples(records, "all")
    rows = TokenizedRows(tuple(records), tuple(examples), 0, ()).to_training()
    order = np.random.default_rng(HELD_OUT_SEED).permutation(len(rows))
    return [rows[place] for place in order[count:]], [rows[place] for place in order[:count]]


def measure(
    options: argparse.Namespace, where: dict[str, Any], rows: list[TrainingRow], held_out: list[TrainingRow]
) -> dict[str, Any]:
    torch.manual_seed(where["seed"])
    dtype = getattr(torch, options.dtype)
    model = load_model(options.model, dtype=dtype, device="cpu")
    width = model.config.get_text_config().hidden_size
    model, rate = prepared(model, where["arm"], width)
    plan = TrainingPlan(
        epochs=EPOCHS, max_steps=None, learning_rate=rate * where["factor"], batch_size=where["batch"], accumulation=1,
        schedule="cosine", warmup_ratio=0.03, weight_decay=0.0, max_grad_norm=1.0, autocast=options.dtype, device="cpu",
        seed=where["seed"], checkpointing=False, trackers=(),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        started = time.perf_counter()
        train(model, rows, plan, pad_id=0, scratch=Path(scratch))
        seconds = time.perf_counter() - started
    return {
        "rate": plan.learning_rate,
        "trained": trainable_share(model).trained,
        "seconds": seconds,
        "loss": held_out_loss(model, held_out, dtype),
    }


def prepared(model: Any, arm: str, width: int) -> tuple[Any, float]:
    """Return the model with what the arm trains, and the default rate."""
    if arm == "full":
        prepare_full(model)
        return model, default_learning_rate("full", width)
    if arm.startswith("lora"):
        targets = PROJECTIONS if arm == "lora-attention" else ("all-linear",)
        return attach_lora(model, 16, 32, targets), default_learning_rate("lora", width)
    layout = model_layout(model)
    rate = default_learning_rate("heads", width, SHARE)
    exists_LH = layout.geometry.exists_LH
    layers = None if arm == "heads-all-layers" else f"{layout.num_layers // 2}-{layout.num_layers - 1}"
    count = round((SHARE / 2 if arm == "both" else SHARE) * exists_LH.sum())
    heads_LH = select_uniform(count, candidate_heads(layers, exists_LH))
    placed = layout.placements(heads_LH, PROJECTIONS[:3] if arm == "heads-qkv" else PROJECTIONS)
    if arm.startswith("heads"):
        return attach_rows(model, placed), rate
    config, lowest = model.config.get_text_config(), layout.num_layers // 2
    channels = weights_of(placed) / (3 * config.hidden_size) / (layout.num_layers - lowest)
    beside = channel_placements(model, channels / config.intermediate_size, lowest)
    return attach_rows(model, beside if arm == "channels" else placed | beside), rate


@torch.no_grad()
def held_out_loss(model: Any, rows: list[TrainingRow], dtype: torch.dtype) -> float:
    """Return the mean loss of the answer tokens, one row at a time."""
    model.eval()
    total, count = 0.0, 0
    for row in rows:
        ids, labels = torch.tensor([row.input_ids]), torch.tensor(row.labels)[1:]
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits_TV = model(input_ids=ids).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits_TV, labels, ignore_index=-100, reduction="sum"))
        count += int((labels != -100).sum())
    return total / count


def show(results: list[dict[str, Any]]) -> None:
    """Print mean loss and seconds over seeds, by all else."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in results:
        groups[row["task"], row["rows"], row["batch"], row["arm"], row["factor"]].append(row)
    print(f"{'task':<16}{'rows':>5}{'batch':>6} {'arm':<17}{'rate':>8}{'loss':>9}{'spread':>8}{'seconds':>9}  weights")
    for (task, count, batch, arm, _), rows in groups.items():
        losses = [row["loss"] for row in rows]
        spread = np.std(losses, ddof=1) if len(rows) > 1 else float("nan")
        seconds = np.median([row["seconds"] for row in rows])
        print(
            f"{task:<16}{count:>5}{batch:>6} {arm:<17}{rows[0]['rate']:>8.2g}{np.mean(losses):>9.4f}{spread:>8.4f}"
            f"{seconds:>9.1f}{rows[0]['trained']:>12,}"
        )


if __name__ == "__main__":
    main()
