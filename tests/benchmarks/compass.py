"""How many of a task's rows are found in a pool, and what it costs beside one bare forward pass over that pool.

    python tests/benchmarks/compass.py --model MODEL --pool POOL --target NAME QUERY RELEVANCE [--target ...] --out OUT
        [--examples 8 64] [--methods p2d rds lexical] [--index] [--bare]

QUERY are rows of the target, of which the first `--examples` are given, RELEVANCE a JSON file whose `relevant` lists
the ids of the pool rows of the same task; R is their number. Everything goes through the command line with defaults,
but for `--count R`. Precision at R is that of the R best rows; what the default cut keeps is told beside it. `--index`
keeps the pool's readings in OUT/index, so that the targets after the first one do not read it; `--bare` times every
50th batch of a forward pass through the layers, and takes the whole pass from its tokens. `rds` reads the pool once,
with the rows of all targets, and each target takes its turns by itself; its seconds are those of that one run.
OUT/compass.json grows as results come, and what is there is not measured again. Nothing that selects reads RELEVANCE.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

EVERY = 50


def main() -> None:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "compass.json"
    results: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    if options.bare and not any(row["method"] == "bare" for row in results):
        results.append(bare_pass(options))
    for examples in options.examples:
        for name, query, relevance in options.target:
            relevant = set(json.loads(Path(relevance).read_text(encoding="utf-8"))["relevant"])
            given = first_rows(Path(query), options.out / f"{name}-{examples}.jsonl", examples)
            for method in options.methods:
                if any((row["target"], row["examples"], row["method"]) == (name, examples, method) for row in results):
                    continue
                if method == "rds":
                    found = take_turns(options, name, examples, relevant)
                else:
                    found = mine(options, f"{name}-{examples}-{method}", method, given, relevant)
                results.append({"target": name, "examples": examples, "method": method} | found)
                path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
                print(json.dumps(results[-1]), flush=True)
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    show(results)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--pool", required=True)
    parser.add_argument("--target", nargs=3, action="append", required=True, metavar=("NAME", "QUERY", "RELEVANCE"))
    parser.add_argument("--examples", nargs="*", type=int, default=[8, 64])
    parser.add_argument("--methods", nargs="*", default=["p2d", "rds", "lexical"])
    parser.add_argument("--index", action="store_true")
    parser.add_argument("--bare", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def first_rows(query: Path, given: Path, count: int) -> Path:
    with query.open(encoding="utf-8") as lines:  # not splitlines(), which parts rows at U+2028 too
        given.write_text("".join(line for _, line in zip(range(count), lines, strict=False)), encoding="utf-8")
    return given


def mine(options: argparse.Namespace, name: str, method: str, given: Path, relevant: set[str]) -> dict[str, Any]:
    """Mine with as many rows as are relevant, and count how many of the best are."""
    rows = ("--target", str(given), "--pool", options.pool)
    costs, extra = [], ["--method", method]
    if method == "p2d":
        heads = options.out / f"{name}-heads"
        costs.append(p2d(options, "score-heads", *rows, out=heads))
        extra += ["--heads", str(heads)]
        extra += ["--index", str(options.out / "index")] if options.index else []
    out = options.out / name
    costs.append(p2d(options, "mine-data", *rows, "--count", str(len(relevant)), *extra, out=out))
    # By score: the first ranks are of the rows that are kept, which need not have the highest.
    order = [("score", "descending")] if method == "p2d" else "rank"
    best = pq.read_table(out / "pool_scores.parquet").sort_by(order)["id"].to_pylist()[: len(relevant)]
    kept = pq.read_table(out / "subset.parquet", columns=["id"])["id"].to_pylist()
    in_kept = sum(row in relevant for row in kept)
    return {
        "precision": sum(row in relevant for row in best) / len(relevant),
        "relevant": len(relevant),
        "kept": len(kept),
        "kept_precision": in_kept / len(kept),
        "kept_recall": in_kept / len(relevant),
        "tokens": [cost["tokens"] for cost in costs],
        "seconds": [cost["seconds"] for cost in costs],
        "peak_gib": [cost["peak_memory_gib"]["host"] for cost in costs],
        "summary": {key: value for key, value in costs[-1]["summary"].items() if key != "template"},
    }


def take_turns(options: argparse.Namespace, target: str, examples: int, relevant: set[str]) -> dict[str, Any]:
    """Let the first rows of a target take rows of the pool in turns, by what one run of rds read for all targets."""
    from p2d_cli.core.subset_selection import round_robin

    out, columns, start = options.out / "rds", [], 0
    if not (out / "manifest.json").exists():
        embed_for_rds(options, out)
    for name, query, _ in options.target:
        rows = Path(query).read_text(encoding="utf-8").count("\n")
        columns += range(start, start + min(examples, rows)) if name == target else []
        start += rows
    order = round_robin(np.ascontiguousarray(np.load(options.out / "likeness.npy")[:, columns]))
    ids = pq.read_table(out / "pool_scores.parquet", columns=["id"])["id"].to_pylist()
    assert len(order) == len(ids), "no row of the pool is a target row"
    best = order[: len(relevant)]
    precision = sum(ids[row] in relevant for row in best) / len(relevant)
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    return {
        "precision": precision,
        "relevant": len(relevant),
        "kept": len(relevant),
        "kept_precision": precision,
        "kept_recall": precision,
        "tokens": [manifest["tokens"]],
        "seconds": [manifest["seconds"]],
        "peak_gib": [manifest["peak_memory_gib"]["host"]],
    }


def embed_for_rds(options: argparse.Namespace, out: Path) -> None:
    """Run rds with the rows of all targets, and keep how like each of them every row of the pool is."""
    from p2d_cli.config import MineDataConfig, resolve
    from p2d_cli.methods.row_method import RowScores
    from p2d_cli.methods.rows.rds import Rds
    from p2d_cli.stages.mine_data import run

    def score(method: Rds) -> RowScores:
        np.save(options.out / "likeness.npy", method._likeness_MQ)
        return method_score(method)

    given = options.out / "all.jsonl"
    given.write_text("".join(Path(query).read_text(encoding="utf-8") for _, query, _ in options.target), "utf-8")
    method_score, Rds.score = Rds.score, score  # type: ignore[method-assign]
    flags = {"model": options.model, "pool": options.pool, "target": str(given), "method": "rds", "out": out}
    run(resolve(MineDataConfig, flags=flags, environ={}))


def p2d(options: argparse.Namespace, stage: str, *words: str, out: Path) -> dict[str, Any]:
    line = ["p2d", stage, "--model", options.model, *words, "--out", str(out)]
    print("$", " ".join(line), file=sys.stderr, flush=True)
    subprocess.run([*line, "--quiet"], check=True, stdout=subprocess.PIPE)
    manifest: dict[str, Any] = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    return manifest


def bare_pass(options: argparse.Namespace) -> dict[str, Any]:
    """Time a forward pass through all layers, without the output layer, over the rows as p2d shows them."""
    import torch

    from p2d_cli.config import MineDataConfig, resolve
    from p2d_cli.data.batching import token_batches
    from p2d_cli.engine.reader import ModelReader
    from p2d_cli.engine.stage_run import RunOptions, StageRun

    flags = {"model": options.model, "pool": options.pool, "method": "loss", "out": options.out / "none"}
    job = StageRun("mine-data", resolve(MineDataConfig, flags=flags, environ={}), RunOptions())
    reader = ModelReader(job, job.inputs.model(options.model))
    examples = reader.examples(job.inputs.read(job.inputs.rows("pool", options.pool)).records)
    lengths = [len(example.input_ids) for example in examples]
    timed, seconds = 0, 0.0
    batches = token_batches(lengths, token_budget=reader.token_budget)
    with torch.no_grad():
        for batch in batches[::EVERY]:
            ids = reader.pad([examples[row].input_ids for row in batch])
            reader.model.get_decoder()(input_ids=ids[:1], use_cache=False)
            started = time.perf_counter()
            reader.model.get_decoder()(input_ids=ids, use_cache=False)
            seconds += time.perf_counter() - started
            timed += ids.numel()
    padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    return {
        "target": "",
        "examples": 0,
        "method": "bare",
        "rows": len(examples),
        "tokens": sum(lengths),
        "timed_share": timed / padded,
        "seconds": seconds * padded / timed,
    }


def show(results: list[dict[str, Any]]) -> None:
    bare = next((row["seconds"] for row in results if row["method"] == "bare"), None)
    headings = ("P@R", "kept", "precision", "recall", "seconds", "of a pass")
    print(f"{'target':<16}{'rows':>5}  {'method':<10}" + "".join(f"{heading:>10}" for heading in headings))
    for row in results:
        if row["method"] == "bare":
            continue
        spent = sum(sum(phases.values()) - phases.get("load", 0.0) for phases in row["seconds"])
        shares = (f"{row[name]:.3f}" for name in ("precision", "kept_precision", "kept_recall"))
        first, *others = shares
        cells = (first, str(row["kept"]), *others, f"{spent:.1f}", f"{spent / bare:.3f}" if bare else "")
        print(
            f"{row['target']:<16}{row['examples']:>5}  {row['method']:<10}" + "".join(f"{cell:>10}" for cell in cells)
        )


if __name__ == "__main__":
    main()
