"""How much memory mine-data takes for a pool of a hundred thousand rows and for one of a million.

    python tests/benchmarks/pool_memory.py --model MODEL --out FILE

Each run is a process of its own, on generated rows of about 300 characters, with the target rows of the fixture. `loss`
stands for the methods that read rows with a model; its tokenizer and its forward pass are replaced by cheap ones, so
that what is around them is measured: reading, batching, the journal, ranking and writing. What is measured is the
largest resident set of the process, beside that of the same command on a pool of a hundred rows: what Python, the
libraries and the model take.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FIXTURES = Path(__file__).parents[2] / "fixtures"
METHODS = ("random", "lexical", "loss")
WORDS = ("river", "amber", "quiet", "seven", "lantern", "orbit", "maple", "signal", "harbour", "violet")
FAKE_SCORER = """
import resource, sys
import numpy as np
import p2d_cli.modeling.generation as generation
generation.score_completions = lambda model, examples, pad: (
    [-float(len(ids) % 97) for ids, _ in examples], [len(ids) - start for ids, start in examples])
from p2d_cli.data.prompts import EncodedExample
from p2d_cli.engine.reader import Reader
Reader.examples = lambda reader, records: [
    EncodedExample(tuple(map(len, record.text.split(" "))), 30, 0) for record in records]
from p2d_cli.cli.app import app
try:
    app(sys.argv[1:])
except SystemExit as end:
    if end.code:
        raise
sys.stdout.write(f"\\n{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", default=str(FIXTURES / "tiny-model"))
    parser.add_argument("--rows", type=int, nargs="+", default=[100, 100_000, 1_000_000])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for rows in sorted(options.rows):
            pool = write_pool(Path(folder) / f"{rows}.jsonl", rows)
            for method in options.methods:
                runs.append(measure(options, pool, rows, method, Path(folder) / "subset"))
                print(runs[-1], flush=True)
            pool.unlink()
    report = {"bytes_a_row": {method: bytes_a_row(runs, method) for method in options.methods}, "runs": runs}
    print(text := json.dumps(report, indent=2))
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")


def write_pool(path: Path, rows: int) -> Path:
    with path.open("w", encoding="utf-8") as stream:
        for number in range(rows):
            words = " ".join(WORDS[(number * step + step) % 10] for step in range(1, 40))
            row = {"id": f"row-{number}", "prompt": f"{words} {number % 5000}", "completion": f"answer {number % 700}"}
            stream.write(json.dumps(row) + "\n")
    return path


def measure(options: argparse.Namespace, pool: Path, rows: int, method: str, out: Path) -> dict[str, object]:
    words = [
        "mine-data",
        "--model",
        options.model,
        "--pool",
        str(pool),
        "--target",
        str(FIXTURES / "data/target.jsonl"),
    ]
    words += ["--method", method, "--count", str(min(options.count, rows)), "--out", str(out), "--force", "--quiet"]
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", FAKE_SCORER, *words], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    peak_mib = int(done.stdout.rsplit("\n", 1)[1]) / 1024
    seconds = round(time.perf_counter() - started, 1)
    return {
        "method": method, "rows": rows, "pool_mib": round(pool.stat().st_size / 2**20, 1),
        "peak_mib": round(peak_mib, 1), "seconds": seconds,
    }  # fmt: skip


def bytes_a_row(runs: list[dict[str, object]], method: str) -> float | None:
    """Return how much the peak grows with each row, from the second largest pool to the largest."""
    mine = [run for run in runs if run["method"] == method]
    if len(mine) < 2:
        return None
    small, large = mine[-2], mine[-1]
    grown = float(str(large["peak_mib"])) - float(str(small["peak_mib"]))
    return round(grown * 2**20 / (int(str(large["rows"])) - int(str(small["rows"]))), 1)


if __name__ == "__main__":
    main()
