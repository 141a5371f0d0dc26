"""Cut the rows that the study's recipes read, and put the model beside them.

    python tests/benchmarks/study/prepare.py --model MODEL --data DATA

DATA holds a folder with `train.jsonl` and `test.jsonl` for each single task, and `mixed_pool` with `pool.jsonl` and,
for each target, `targets/NAME/query.jsonl`, `test.jsonl` and `relevance.json`. Everything is written to `data` beside
this file, where the recipes look for it. Rows are shuffled once with a fixed seed, and no row is in two of the parts:
what describes the task (`target`), what is chosen from (`pool`), what settings are chosen by (`held-out`), and what is
looked at once, at the end (`test`).
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from pathlib import Path

SINGLE_TASKS = ("banking77", "snips_parse")
SINGLE = {"pool": 1000, "target": 64, "held-out": 64}
TEST_ROWS = 200
MIXED_TARGETS = ("snips_parse", "banking77", "gsm8k")
MIXED_POOL_ROWS = 1312
"""An eighth of the mixed pool, so that the whole of it can be trained on as well."""
HERE = Path(__file__).parent


def main() -> None:
    options = parse()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    model = out / "model"
    model.unlink(missing_ok=True)
    model.symlink_to(options.model.resolve())
    for task in SINGLE_TASKS:
        cut_single(options.data / task, out / task)
    cut_mixed(options.data / "mixed_pool", out / "mixed")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=HERE / "data")
    return parser.parse_args()


def cut_single(source: Path, out: Path) -> None:
    """Part a task's own train rows, and take some of its test rows."""
    train, test = shuffled(source / "train.jsonl"), shuffled(source / "test.jsonl")
    start = 0
    for part, count in SINGLE.items():
        write(out / f"{part}.jsonl", train[start : start + count])
        start += count
    write(out / "test.jsonl", test[:TEST_ROWS])


def cut_mixed(source: Path, out: Path) -> None:
    """Take the pool and a part of it, and of each target what belongs to it."""
    whole = shuffled(source / "pool.jsonl")
    pool = whole[:MIXED_POOL_ROWS]
    write(out / "whole_pool.jsonl", whole)
    write(out / "pool.jsonl", pool)
    for target in MIXED_TARGETS:
        folder = source / "targets" / target
        write(out / target / "query.jsonl", lines_of(folder / "query.jsonl"))
        write(out / target / "test.jsonl", shuffled(folder / "test.jsonl")[:TEST_ROWS])
        shutil.copyfile(folder / "relevance.json", out / target / "relevance.json")
        relevant = set(json.loads((folder / "relevance.json").read_text(encoding="utf-8"))["relevant"])
        print(f"mixed pool: {sum(json.loads(line)['id'] in relevant for line in pool)} of {len(pool)} rows of {target}")


def shuffled(path: Path) -> list[str]:
    lines = lines_of(path)
    random.Random(0).shuffle(lines)
    return lines


def lines_of(path: Path) -> list[str]:
    # Rows may hold other line separators, on which str.splitlines would break.
    return [line for line in path.read_text(encoding="utf-8").split("\n") if line]


def write(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
