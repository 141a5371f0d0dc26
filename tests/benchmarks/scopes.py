"""What each scope reaches with its own best learning rate: a search on held-out rows, then the test rows.

    python tests/benchmarks/scopes.py --model MODEL --task NAME TRAIN TEST METRIC ROWS [--task ...]
        --out OUT [--held-out 128] [--test-rows 200] [--epochs 3] [--batch-size 16] [--max-new-tokens 256]
        [--seeds 0] [--scopes heads attention lora full] [--no-sweep NAME ...]

TRAIN and TEST are shuffled once. From the default on, learning rates of `LADDER` are tried on ROWS rows of TRAIN, and
judged by the loss on others of TRAIN, until the best one has a worse one on either side; the test rows are looked at
once, with the best; without --seeds, not at all. A task named by `--no-sweep` takes the rates of the one before it, the
first one the defaults. The heads are `uniform`, a tenth of them. Everything runs through the command line, and what is
there already is kept. `OUT/scopes.json` holds all figures.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from p2d_cli.engine.training_defaults import ANCHOR_RATE

SCOPES = ("heads", "attention", "lora", "full")
SETTINGS = ("held_out", "test_rows", "epochs", "batch_size", "max_new_tokens", "seeds")
LADDER = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


def main() -> None:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    heads = options.out / "heads"
    p2d("score-heads", "--model", options.model, "--method", "uniform", "--out", str(heads))
    sweep: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    best = {scope: ANCHOR_RATE[scope] for scope in SCOPES}
    for name, train, test, metric, count in options.task:
        rows = cut(options, name, train, test, int(count))
        if name not in options.no_sweep:
            for scope in options.scopes:
                tried, best[scope] = climb(ANCHOR_RATE[scope], partial(try_rate, options, name, rows, scope))
                sweep += tried
                write(options, sweep, results)
        for seed in options.seeds:
            results += [judge(options, name, rows, scope, best[scope], seed, metric) for scope in options.scopes]
            write(options, sweep, results)
    for row in results:
        print(row)


def climb(start: float, attempt: Callable[[float], dict[str, Any]]) -> tuple[list[dict[str, Any]], float]:
    """Walk along `LADDER` from `start` to the rate of the lowest held-out loss; what was tried, and that rate."""
    tried = {place: attempt(LADDER[place]) for place in [LADDER.index(start)]}

    def loss(place: int) -> float:
        if place not in range(len(LADDER)):
            return float("inf")
        if place not in tried:
            tried[place] = attempt(LADDER[place])
        return float(tried[place]["held_out_loss"])

    best = LADDER.index(start)
    while (better := min((best - 1, best, best + 1), key=loss)) != best:
        best = better
    return [tried[place] for place in sorted(tried)], LADDER[best]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", required=True)
    parser.add_argument(
        "--task", nargs=5, action="append", required=True, metavar=("NAME", "TRAIN", "TEST", "METRIC", "ROWS")
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--held-out", type=int, default=128)
    parser.add_argument("--test-rows", type=int, default=200)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--scopes", nargs="+", choices=SCOPES, default=SCOPES)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--no-sweep", nargs="*", default=[])
    return parser.parse_args()


def cut(options: argparse.Namespace, name: str, train: str, test: str, count: int) -> dict[str, Path]:
    """Write the rows to learn, those to choose the learning rate by, and those to be tested on."""
    learnt, tested = (Path(path).read_text(encoding="utf-8").strip().split("\n") for path in (train, test))
    for lines in (learnt, tested):
        random.Random(0).shuffle(lines)
    parts = {
        "train": learnt[:count],
        "held-out": learnt[count : count + options.held_out],
        "test": tested[: options.test_rows],
    }
    paths = {part: options.out / f"{name}-{part}.jsonl" for part in parts}
    for part, lines in parts.items():
        paths[part].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return paths


def try_rate(options: argparse.Namespace, name: str, rows: dict[str, Path], scope: str, lr: float) -> dict[str, Any]:
    out = options.out / f"{name}-{scope}-{lr:g}"
    manifest = train(options, rows, scope, lr, 0, out, "--eval-data", str(rows["held-out"]))
    return {
        "task": name,
        "scope": scope,
        "learning_rate": lr,
        "held_out_loss": manifest["summary"]["best_eval_loss"],
        "best_update": manifest["summary"]["best_update"],
        "updates": manifest["summary"]["updates"],
    }


def judge(
    options: argparse.Namespace, name: str, rows: dict[str, Path], scope: str, lr: float, seed: int, metric: str
) -> dict[str, Any]:
    """Train with the chosen learning rate, without held-out rows, and answer the test rows."""
    out = options.out / f"{name}-{scope}-seed{seed}"
    manifest = train(options, rows, scope, lr, seed, out)
    model = (
        ("--model", str(out)) if scope in {"attention", "full"} else ("--model", options.model, "--adapter", str(out))
    )
    evaluation = p2d(
        "eval", *model, "--template", "plain", "--data", str(rows["test"]), "--metric", metric,
        "--max-new-tokens", str(options.max_new_tokens), "--out", f"{out}-evaluation",
    )  # fmt: skip
    return {
        "task": name,
        "scope": scope,
        "seed": seed,
        "learning_rate": lr,
        "train_seconds": manifest["seconds"]["train"],
        "rows": manifest["summary"]["rows"],
        "updates": manifest["summary"]["updates"],
        "peak_gib": manifest["peak_memory_gib"],
        "trainable_share": manifest["summary"]["trainable_share"],
        "metrics": evaluation["summary"]["metrics"],
    }


def train(
    options: argparse.Namespace, rows: dict[str, Path], scope: str, lr: float, seed: int, out: Path, *more: str
) -> dict[str, Any]:
    heads = ("--heads", str(options.out / "heads")) if scope == "heads" else ()
    return p2d(
        "train", "--model", options.model, "--template", "plain", "--data", str(rows["train"]), "--scope", scope,
        *heads, "--lr", f"{lr:g}", "--epochs", f"{options.epochs:g}", "--batch-size", str(options.batch_size),
        "--seed", str(seed), *more, "--out", str(out),
    )  # fmt: skip


def p2d(*words: str) -> dict[str, Any]:
    """Run a command, and return the manifest of what it made."""
    print("$ p2d", *words, flush=True)
    subprocess.run(["p2d", *words, "-q"], check=True, stdout=subprocess.PIPE)
    manifest: dict[str, Any] = json.loads((Path(words[-1]) / "manifest.json").read_text(encoding="utf-8"))
    return manifest


def write(options: argparse.Namespace, sweep: Iterable[Any], results: Iterable[Any]) -> None:
    document = {
        "settings": {name: getattr(options, name) for name in SETTINGS},
        "sweep": list(sweep),
        "results": list(results),
    }
    (options.out / "scopes.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
