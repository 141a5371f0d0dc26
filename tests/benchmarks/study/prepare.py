"""Cut the rows that the study's recipes read, and put the model beside them.

    python tests/benchmarks/study/prepare.py --model MODEL --data DATA

DATA holds a folder with `train.jsonl` and `test.jsonl` for each single task; `mixed_pool` with `pool.jsonl` and, for
each target, `targets/NAME/query.jsonl`, `test.jsonl` and `relevance.json`; and `big_pool` with `pool.jsonl` and
`targets/NAME.relevance.json`. Everything is written to `data` beside this file, where the recipes look for it. No row
is in two of the parts: what describes the task (`target`; for the pools 8 rows a seed, and 64), what is chosen from
(`pool`), what settings are chosen by (`held-out`), and what is looked at once, at the end (`test`).
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

SINGLE_TASKS = ("banking77", "snips_parse")
SINGLE = {"pool": 1000, "target": 64, "held-out": 64}
TEST_ROWS = 200
TARGETS = ("banking77", "snips_parse", "commonsense_qa", "disfl_qa")
FEW, SEEDS = 8, 3
"""Target rows, and how often others of them are drawn: the first of a target's rows, the next, and so on."""
HERE = Path(__file__).parent


def main() -> None:
    options = parse()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    link(options.model, out / "model")
    for task in SINGLE_TASKS:
        cut_single(options.data / task, out / task)
    for pool in ("mixed", "big"):
        link(options.data / f"{pool}_pool" / "pool.jsonl", out / pool / "pool.jsonl")
    for target in TARGETS:
        cut_target(options.data, target, out)


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


def cut_target(source: Path, target: str, out: Path) -> None:
    """Take what describes a target of the pools, its test rows, and which rows of the pools are of it."""
    folder = source / "mixed_pool" / "targets" / target
    out /= Path("targets") / target
    queries = lines_of(folder / "query.jsonl")
    write(out / "query-64.jsonl", queries)
    for seed in range(SEEDS):
        write(out / f"query-8-{seed}.jsonl", queries[FEW * seed : FEW * (seed + 1)])
    write(out / "test.jsonl", lines_of(folder / "test.jsonl")[:TEST_ROWS])
    link(folder / "relevance.json", out / "mixed.json")
    link(source / "big_pool" / "targets" / f"{target}.relevance.json", out / "big.json")


def link(source: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    place.symlink_to(source.resolve())


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
