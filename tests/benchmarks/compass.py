"""How well each head score and affinity finds the rows of a target in a mixed pool: precision at R, and what it costs.

    python tests/benchmarks/compass.py --model MODEL --pool POOL --target NAME QUERY RELEVANCE [--target ...] --out OUT

QUERY are rows of the target, RELEVANCE a JSON file whose `relevant` lists the ids of the pool rows of the same task; R
is their number. Every combination of `--heads` and `--affinity` is run through the command line, as are the `--methods`
without heads. `OUT/compass.json` holds all figures; nothing that selects reads RELEVANCE.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq


def main() -> None:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    for name, query, relevance in options.target:
        relevant = set(json.loads(Path(relevance).read_text(encoding="utf-8"))["relevant"])
        for method in options.heads:
            heads = options.out / f"{name}-heads-{method}"
            scored = p2d(
                options, "score-heads", "--method", method, "--target", query, "--pool", options.pool, out=heads
            )
            for affinity in options.affinity:
                extra = ("--heads", str(heads), "--affinity", affinity)
                figures = mine(options, f"{name}-{method}-{affinity}", query, relevant, *extra)
                results.append({"target": name, "heads": method, "score_heads": scored["seconds"]} | figures)
        for method in options.methods:
            results.append(
                {"target": name, "heads": None} | mine(options, f"{name}-{method}", query, relevant, "--method", method)
            )
        (options.out / "compass.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    for row in results:
        print(f"{row['target']:<14} {row['heads'] or '-':<10} {row['selection']:<40} {row['precision']:.3f}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--pool", required=True)
    parser.add_argument("--target", nargs=3, action="append", required=True, metavar=("NAME", "QUERY", "RELEVANCE"))
    parser.add_argument("--heads", nargs="*", default=["readout", "contrast", "uniform"])
    parser.add_argument("--affinity", nargs="*", default=["readout"])
    parser.add_argument("--methods", nargs="*", default=["lexical"])
    parser.add_argument("--template", default="plain")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def mine(options: argparse.Namespace, name: str, query: str, relevant: set[str], *extra: str) -> dict[str, Any]:
    """Mine as many rows as are relevant, and count how many of them are."""
    out = options.out / f"{name}-subset"
    count = ("--count", str(len(relevant)))
    done = p2d(options, "mine-data", "--target", query, "--pool", options.pool, *count, *extra, out=out)
    ids = pq.read_table(out / "subset.parquet").to_pydict()["id"]
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    return {
        "selection": " ".join(word for word in extra if not word.startswith(str(options.out))),
        "precision": sum(row in relevant for row in ids) / len(relevant),
        "relevant": len(relevant),
        "tokens": manifest["tokens"],
        "seconds": done["seconds"],
    }


def p2d(options: argparse.Namespace, stage: str, *words: str, out: Path) -> dict[str, Any]:
    line = ["p2d", stage, "--model", options.model, "--template", options.template, *words, "--out", str(out), "--json"]
    print("$", " ".join(line), file=sys.stderr, flush=True)
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout or done.returncode)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


if __name__ == "__main__":
    main()
