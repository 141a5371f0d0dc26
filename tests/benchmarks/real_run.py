"""The five commands by hand on a real model and a real task, then the same as a recipe.

    python tests/benchmarks/real_run.py --model MODEL --train TRAIN --test TEST --out OUT [--contrast-pool ROWS] ...

First `p2d score-heads`, `mine-data`, `train`, `eval` and, on all rows, full fine-tuning as the measured reference, each
as a user would type it. Then a recipe with the same settings, which finds those artifacts up to date and adds `pad`
heads and the control of random heads on random rows. `OUT/results.json` holds every command, its seconds as seen from
outside, and the report; `OUT/run/report` the report itself. Nothing is chosen by looking at the test rows.

The target rows are drawn from the train rows. Heads are contrasted against `--contrast-pool`, by default the train
rows themselves; rows of other tasks say more about what sets this task apart.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TARGET_ROWS = 64


def main() -> None:
    options = parse()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    target = draw_target(options.train, out / "target.jsonl", options.seed)
    results = [run(command) for command in commands(options, target, out / "run")]
    recipe = write_recipe(options, target, out)
    results.append(run(["p2d", "run", str(recipe), "--json"]))
    report = json.loads((out / "run" / "report" / "aer.json").read_text(encoding="utf-8"))
    document = {"settings": {k: str(v) for k, v in vars(options).items()}, "commands": results, "report": report}
    save_results(document, options, out / "results.json")
    print((out / "run" / "report" / "aer.md").read_text(encoding="utf-8"))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    for name in ("model", "train", "test"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--contrast-pool", help="rows to tell the task from; default: the train rows")
    parser.add_argument("--template", default="auto")
    parser.add_argument("--epochs", default="3")
    parser.add_argument("--affinity", default="auto", choices=["auto", "readout", "attention"])
    parser.add_argument("--draws", default="2")
    parser.add_argument("--heads-lr", default="1e-3")
    parser.add_argument("--full-lr", default="1e-4")
    parser.add_argument("--max-new-tokens", default="64")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def draw_target(train: str, path: Path, seed: int) -> Path:
    """Write some train rows, drawn by chance, that describe the task."""
    lines = [line for line in Path(train).read_text(encoding="utf-8").split("\n") if line]
    chosen = random.Random(seed).sample(lines, TARGET_ROWS)
    path.write_text("\n".join(chosen) + "\n", encoding="utf-8")
    return path


def commands(options: argparse.Namespace, target: Path, out: Path) -> list[list[str]]:
    """The stages as typed by hand, into the folders where the recipe will look for them."""
    seed, pool = str(options.seed), options.contrast_pool or options.train
    heads, subset, all_rows = (str(out / f"{name}-s{seed}") for name in ("heads/contrast", "subset/p2d", "subset/full"))
    tuned, tuned_scores = (str(out / kind / f"heads-contrast-p2d-s{seed}") for kind in ("adapter", "evaluation"))
    whole, whole_scores = (str(out / kind / f"full-full-s{seed}") for kind in ("adapter", "evaluation"))
    common = ["--seed", seed, "--template", options.template]
    model = ["--model", options.model, *common]
    mining = ["--pool", options.train, "--target", str(target), "--ratio", "0.1", "--draws", options.draws]
    training = ["train", *model, "--epochs", options.epochs]
    scoring = [*common, "--data", options.test, "--max-new-tokens", options.max_new_tokens]
    contrast = ["--method", "contrast", "--target", str(target), "--pool", pool]
    by_heads = ["--method", "p2d", "--heads", heads, "--affinity", options.affinity]
    trained_heads = ["--scope", "heads", "--heads", heads, "--data", subset, "--lr", options.heads_lr]
    lines = [
        ["score-heads", *model, *contrast, "--out", heads],
        ["mine-data", *model, *by_heads, *mining, "--out", subset],
        [*training, *trained_heads, "--out", tuned],
        ["eval", "--model", options.model, "--adapter", tuned, *scoring, "--out", tuned_scores],
        ["mine-data", *model, "--method", "full", *mining, "--out", all_rows],
        [*training, "--scope", "full", "--data", all_rows, "--lr", options.full_lr, "--out", whole],
        ["eval", "--model", whole, *scoring, "--out", whole_scores],
        ["report-aer", tuned_scores, "--reference", whole_scores, "--out", str(out.parent / "report-by-hand")],
    ]
    return [["p2d", *line, "--json"] for line in lines]


def write_recipe(options: argparse.Namespace, target: Path, out: Path) -> Path:
    """Write the recipe that says the same."""
    recipe = out / "recipe.toml"
    pool = options.contrast_pool or options.train
    given = {"target": target, "train": options.train, "test": options.test, "contrast": pool}
    path = {name: json.dumps(str(value)) for name, value in given.items()}
    recipe.write_text(
        f"""\
name = "real run"
out = {json.dumps(str(out / "run"))}

[defaults]
model = {json.dumps(options.model)}
seed = {options.seed}
template = "{options.template}"

[score-heads]
method = "contrast"
target = {path["target"]}
pool = {path["contrast"]}

[mine-data]
target = {path["target"]}
pool = {path["train"]}
ratio = 0.1
affinity = "{options.affinity}"
draws = {options.draws}

[train]
epochs = {options.epochs}
lr = {options.heads_lr}

[eval]
data = {path["test"]}
max_new_tokens = {options.max_new_tokens}

[grid]
heads = ["contrast", "pad"]
data = ["p2d"]

[reference]
lr = {options.full_lr}
""",
        encoding="utf-8",
    )
    return recipe


def save_results(document: dict[str, Any], options: argparse.Namespace, path: Path) -> None:
    """Write the results with the names of the options in place of this machine's paths."""
    text = json.dumps(document, indent=2, ensure_ascii=False)
    paths = {name: str(getattr(options, name) or "") for name in ("contrast_pool", "train", "test", "model", "out")}
    for name, value in sorted(paths.items(), key=lambda item: -len(item[1])):
        if value:
            text = text.replace(value, name.upper())
    path.write_text(text + "\n", encoding="utf-8")


def run(command: list[str]) -> dict[str, Any]:
    """Run one command and return what it printed, with the seconds it took from outside."""
    print("$", " ".join(command), file=sys.stderr, flush=True)
    start = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    seconds = time.monotonic() - start
    print(f"  exit {done.returncode}, {seconds:.1f} s", file=sys.stderr, flush=True)
    if done.returncode:
        raise SystemExit(done.stdout or done.returncode)
    result = json.loads(done.stdout)
    return {"command": command, "seconds": round(seconds, 2)} | {
        name: result[name] for name in ("status", "summary") if name in result
    }


if __name__ == "__main__":
    main()
