"""What works with which model family: the table of tests/families, every step of it, line by line.

    python tests/benchmarks/families.py --out OUT.json [--only NAME ...]
    python tests/benchmarks/families.py --out OUT.json --before BEFORE.json


For each family a tiny random model is made, scored, mined with, trained, exported and evaluated, and what must hold is
checked: see tests/families/family_path.py. A step ends as `ok`, `refused: WHY`, `wrong: WHAT`, `crash: WHAT`, or `-`
where there is nothing to do or an earlier step left nothing to go on with. OUT.json is written after every family, and
families that it has are kept. To see what an older p2d does, run this with that one's folder as PYTHONPATH. With
`--before` nothing is run: two such files are shown side by side, a sign a step.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "families")]

from conftest import run_p2d  # noqa: E402  # the tests' folder is on the path from here on
from family_path import STEPS, Case, disagreements, examine, no_extras  # noqa: E402
from family_table import Family, families  # noqa: E402

SIGNS = {"ok": "+", "-": ".", "refused": "r", "wrong": "W", "crash": "C"}


def main() -> None:
    options = parse()
    found = json.loads(options.out.read_text()) if options.out.is_file() else {"families": {}}
    if options.before is not None:
        side_by_side(json.loads(options.before.read_text())["families"], found["families"])
        return
    found |= {"versions": {name: version(name) for name in ("transformers", "peft", "torch")}}
    for place, step in enumerate(STEPS):
        print("|" * place + f"+ {step}")
    with no_extras():
        for family in families():
            if (options.only and family.name not in options.only) or family.name in found["families"]:
                continue
            found["families"][family.name] = row = measure(family)
            options.out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
            print("".join(SIGNS[sign(end)] for end in row["steps"].values()), family.name, f"{row['seconds']} s")
    summarise(found["families"])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--before", type=Path)
    return parser.parse_args()


def measure(family: Family) -> dict[str, Any]:
    """How each step ends, and where that is not what the table says."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        steps = examine(Case(family, Path(folder), run_p2d))
    return {
        "model_type": family.model_type,
        "steps": {step: end.replace(folder, "FOLDER") for step, end in steps.items()},
        "unexpected": list(disagreements(family, steps)),
        "seconds": round(time.perf_counter() - started, 1),
    }


def sign(end: str) -> str:
    return end.split(":", 1)[0]


def side_by_side(before: dict[str, Any], after: dict[str, Any]) -> None:
    print("A sign a step: " + ", ".join(STEPS))
    print("+ ok, r refused with the reason, W wrong without a word, C crash, . nothing to do\n")
    for name, row in after.items():
        signs = ("".join(SIGNS[sign(found[name]["steps"][step])] for step in STEPS) for found in (before, after))
        print(f"{name:22} {'  '.join(signs)}  {'' if not row['unexpected'] else 'NOT as the table says'}".rstrip())
    for what, found in (("before", before), ("after", after)):
        print(f"{what}: {sum(not row['unexpected'] for row in found.values())} of {len(found)} as the table says")


def summarise(rows: dict[str, Any]) -> None:
    print()
    for step in STEPS:
        counts = Counter(sign(row["steps"][step]) for row in rows.values())
        print(f"{step:22}", "  ".join(f"{counts[name]:4} {name}" for name in SIGNS))
    met = sum(not row["unexpected"] for row in rows.values())
    print(f"\n{met} of {len(rows)} families do what the table says.")
    for name, row in rows.items():
        for step in row["unexpected"]:
            print(f"  {name}: {step}: {row['steps'][step]}")


if __name__ == "__main__":
    main()
