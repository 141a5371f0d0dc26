"""What the readout's constants come from: shrinkage, prompts, near misses, the floor, and how many rows are read on.

    python tests/benchmarks/readout_rules.py --model MODEL --pool POOL --target NAME QUERY RELEVANCE [--target ...]
        --out OUT [--every 1] [--examples 2 4 8 64] [--draws 3]

QUERY are rows of the target, RELEVANCE a JSON file whose `relevant` lists the ids of the pool rows of the same task; R
is their number. All rows (or every `--every`-th) are read by the heads of the first tenth of the layers, and what any
setting would read on by those of the first two thirds; both stay in OUT, and what is there is not read again. Each
number of examples is drawn `--draws` times, one behind the other. OUT/rules.json holds precision at R for

- `first`: heads of the first layers, by shrinkage: fixed, OAS, Ledoit and Wolf's, p2d's rule; 250 or 1,000 other rows
- `prompt`: heads of the first layers, and two stages, by how much what they put out over the prompt counts
- `deep`: two stages, by the weight of the rows that are read on in the background: of all of them, or of near misses
- `floor`: precision and recall above the floor, by a quantile of held-out target rows and by Student's bound
- `read_on`: share of the pool and of the relevant rows that pass a floor by the first heads, by level; and the area
  under the ROC curve of held-out target rows among the pool's
"""

from __future__ import annotations

import argparse
import functools
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.covariance import OAS, LedoitWolf

from p2d_cli.artifacts.readings import PLACES
from p2d_cli.config import MineDataConfig, resolve
from p2d_cli.core.geometry import HeadGeometry
from p2d_cli.core.head_selection import select_readers
from p2d_cli.core.readout import (
    Background,
    fit_readout,
    floor_below,
    held_out_affinity,
    prompt_share,
    separation,
    shrinkage_for,
)
from p2d_cli.data.batching import token_batches
from p2d_cli.data.records import Record
from p2d_cli.engine.reader import ModelReader
from p2d_cli.engine.stage_run import RunOptions, StageRun

FIXED = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.5)
PROMPTS = (0.0, 0.15, 0.3, 0.5, 1.0)
LEVELS = (0.05, 0.02, 0.01, 0.005, 0.002, 0.001)
SAMPLES = (250, 1000)
Results = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Bench:
    """A pool with its targets, as heads have read them."""

    geometry: HeadGeometry
    names: list[str]
    relevant: dict[str, NDArray[np.bool_]]
    first: NDArray[Any]
    """What the heads of the first layers put out on all rows, over answer and prompt, `[N, K, 2, d]`."""
    first_LH: NDArray[np.bool_]
    targets: dict[str, NDArray[np.float32]]
    """What all heads of the first two thirds of the layers put out."""
    sample: NDArray[np.int64]
    known: NDArray[np.float32]
    """The same on the sample of the pool."""
    deep_LH: NDArray[np.bool_]


def main() -> None:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    reader = open_reader(options)
    bench, read_deep = read(options, reader)
    results: Results = defaultdict(list)
    for name, _, _ in options.target:
        for examples in options.examples:
            for draw in range(options.draws if examples * options.draws <= len(bench.targets[name]) else 1):
                rows = bench.targets[name][examples * draw : examples * (draw + 1)]
                where = {"target": name, "examples": examples, "draw": draw}
                judge_first(bench, rows, where, results)
                judge_deep(bench, rows, where, results, read_deep)
                (options.out / "rules.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    show(results)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--pool", required=True)
    parser.add_argument("--target", nargs=3, action="append", required=True, metavar=("NAME", "QUERY", "RELEVANCE"))
    parser.add_argument("--examples", nargs="*", type=int, default=[2, 4, 8, 64])
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


# --- readings


def open_reader(options: argparse.Namespace) -> ModelReader:
    flags = {"model": options.model, "pool": options.pool, "method": "loss", "out": options.out / "none"}
    job = StageRun("mine-data", resolve(MineDataConfig, flags=flags, environ={}), RunOptions())
    return ModelReader(job, job.inputs.model(options.model))


def read(
    options: argparse.Namespace, reader: ModelReader
) -> tuple[Bench, Callable[[NDArray[np.int64]], NDArray[np.float32]]]:
    """Read all rows by the first heads, and target and sample by all; return what reads more rows of the pool."""

    def rows_of(path: str) -> tuple[Record, ...]:
        return reader.job.inputs.read(reader.job.inputs.rows("target", path)).records

    pool = rows_of(options.pool)[:: options.every]
    shape = reader.shape
    readers = select_readers(np.zeros(shape.exists_LH.shape), "auto", shape.exists_LH, shape.layers)
    depth = readers.depths[1]
    deep_LH = shape.exists_LH & (np.arange(shape.num_layers) < depth)[:, None]
    sample = np.sort(np.random.default_rng(0).permutation(len(pool))[: max(SAMPLES)])
    path, found = options.out / "deep.npz", {}
    if path.exists():
        kept = np.load(path)
        found = dict(zip(kept["rows"].tolist(), kept["outputs"], strict=True))

    def read_deep(rows: NDArray[np.int64]) -> NDArray[np.float32]:
        missing = [row for row in rows.tolist() if row not in found]
        if missing:
            outputs = head_outputs(reader, [pool[row] for row in missing], deep_LH)
            found.update(zip(missing, outputs, strict=True))
            np.savez(path, rows=np.array(list(found)), outputs=np.stack(list(found.values())))
        return np.stack([found[row] for row in rows.tolist()]).astype(np.float32)

    first_path = options.out / "first.npy"
    if not first_path.exists():
        np.save(first_path, head_outputs(reader, pool, readers.shallow_LH))
    targets = {name: head_outputs(reader, rows_of(query), deep_LH) for name, query, _ in options.target}
    names = [record.id for record in pool]
    relevant = {
        name: np.isin(names, json.loads(Path(relevance).read_text(encoding="utf-8"))["relevant"])
        for name, _, relevance in options.target
    }
    bench = Bench(
        geometry=shape,
        names=names,
        relevant=relevant,
        first=np.load(first_path).astype(np.float32),
        first_LH=readers.shallow_LH,
        targets={name: rows.astype(np.float32) for name, rows in targets.items()},
        sample=sample,
        known=read_deep(sample),
        deep_LH=deep_LH,
    )
    return bench, read_deep


def head_outputs(reader: ModelReader, rows: Any, heads_LH: NDArray[np.bool_]) -> NDArray[np.float16]:
    examples = reader.examples(rows)
    batches = token_batches([len(example.input_ids) for example in examples], token_budget=reader.token_budget)
    outputs = np.empty((len(rows), int(heads_LH.sum()), PLACES, reader.shape.head_dim), dtype=np.float16)
    for number, batch in enumerate(batches):
        outputs[batch] = reader.head_outputs([examples[row] for row in batch], heads_LH)
        if number % 20 == 0:
            print(f"{number} of {len(batches)} batches", flush=True)
    return outputs


# --- rules


def precision_at_r(scores: NDArray[np.float64], relevant: NDArray[np.bool_]) -> float:
    return float(relevant[np.argsort(-scores, kind="stable")[: relevant.sum()]].mean())


def judge_first(bench: Bench, rows: NDArray[np.float32], where: dict[str, Any], results: Results) -> None:
    """Score all rows by the first heads, by each shrinkage."""
    target, relevant = rows[:, bench.first_LH[bench.deep_LH]], bench.relevant[where["target"]]
    for count in SAMPLES:
        seen = bench.first[bench.sample[:count]].astype(np.float64)
        background = Background.of(seen, prompt=prompt_share(target, seen))
        by_reading = seen.reshape(len(seen), -1, seen.shape[-1])
        rules = {f"{share}": np.full(by_reading.shape[1], share) for share in FIXED}
        for name, estimator in (("OAS", OAS), ("Ledoit-Wolf", LedoitWolf)):
            rules[name] = np.array(
                [max(estimator().fit(by_reading[:, at]).shrinkage_, 1e-6) for at in range(by_reading.shape[1])]
            )
        rules["rule"] = shrinkage_for(background.dims_J, background.rows, len(target))
        for name, shrinkage in rules.items():
            scores = fit_readout(target, background, shrinkage=shrinkage).affinity(bench.first)
            figures = {"sample": count, "shrinkage": name, "precision": precision_at_r(scores, relevant)}
            results["first"].append(where | figures)
    seen = bench.first[bench.sample[: min(SAMPLES)]]
    for share, scores in by_prompt(target, Background.of, seen, bench.first):
        figures = {"stage": "first", "prompt": share, "precision": precision_at_r(scores, relevant)}
        results["prompt"].append(where | figures)


def by_prompt(
    target: NDArray[np.float32],
    background: Callable[[NDArray[np.float32]], Background],
    seen: NDArray[np.float32],
    rows: NDArray[np.float32],
) -> Iterator[tuple[float, NDArray[np.float64]]]:
    """Give the affinities of rows for each share of the prompt."""
    answer, prompt = (
        fit_readout(target[:, :, place], background(seen[:, :, place])).affinity(rows[:, :, place]) for place in (0, 1)
    )
    for share in PROMPTS:
        yield share, (1 - share) * answer + share * prompt


def judge_deep(
    bench: Bench,
    rows: NDArray[np.float32],
    where: dict[str, Any],
    results: Results,
    read_deep: Callable[[NDArray[np.int64]], NDArray[np.float32]],
) -> None:
    """Read on what the first heads find best, and score it by each background."""
    relevant = bench.relevant[where["target"]]
    known, sample = bench.known[: min(SAMPLES)], bench.sample[: min(SAMPLES)]
    columns = bench.first_LH[bench.deep_LH]
    background = Background.of(known[:, columns], prompt=prompt_share(rows[:, columns], known[:, columns]))
    first = fit_readout(rows[:, columns], background).affinity(bench.first)
    held_out = held_out_affinity(rows[:, columns], background)
    for level in LEVELS:
        passed = first >= floor_below(held_out, level)
        area = float(np.mean([(first < value).mean() for value in held_out]))
        recall = float(relevant[passed].sum() / relevant.sum())
        figures = {"share": float(passed.mean()), "recall": recall, "area": area}
        results["read_on"].append(where | {"level": level} | figures)
    best = np.argsort(-first, kind="stable")[: max(3 * int(relevant.sum()), round(0.04 * len(first)))]
    table_LH = np.full(bench.deep_LH.shape, -np.inf)
    table_LH[bench.deep_LH] = separation(rows, known)
    readers = select_readers(
        np.where(bench.deep_LH, table_LH, 0.0),
        "auto",
        bench.geometry.exists_LH,
        bench.geometry.layers,
        target_rows=len(rows),
    )
    chosen = readers.deep_LH[bench.deep_LH]
    outputs, target = read_deep(best)[:, chosen], rows[:, chosen]
    is_near = (first[best] < np.median(held_out)) & ~np.isin(best, sample)
    for name, local in (("all read on", np.ones(len(best), dtype=bool)), ("near misses", is_near)):
        for weight in WEIGHTS:
            share = weight * local.sum() / (local.sum() + 50)
            weights = np.repeat([(1 - share) / len(known), share / max(local.sum(), 1)], [len(known), local.sum()])
            told = Background.of(
                np.concatenate([known[:, chosen], outputs[local]]),
                np.maximum(weights, 1e-12),
                prompt=prompt_share(target, known[:, chosen]),
            )
            scores = np.full(len(first), -np.inf)
            scores[best] = fit_readout(target, told).affinity(outputs)
            figures = {"background": name, "weight": weight, "precision": precision_at_r(scores, relevant)}
            results["deep"].append(where | figures | {"recall": float(relevant[best].sum() / relevant.sum())})
            if (name, weight) == ("near misses", 0.3):
                seen = np.concatenate([known[:, chosen], outputs[local]])
                told_by = functools.partial(Background.of, weights_M=np.maximum(weights, 1e-12))
                for prompt, found in by_prompt(target, told_by, seen, outputs):
                    scores[best] = found
                    figures = {"stage": "deep", "prompt": prompt, "precision": precision_at_r(scores, relevant)}
                    results["prompt"].append(where | figures)
                scores[best] = fit_readout(target, told).affinity(outputs)
                judge_floor(scores, held_out_affinity(target, told), relevant, where, results)


def judge_floor(
    scores: NDArray[np.float64],
    held_out: NDArray[np.float64],
    relevant: NDArray[np.bool_],
    where: dict[str, Any],
    results: Results,
) -> None:
    for name, floor in (("quantile", float(np.quantile(held_out, 0.05))), ("Student", floor_below(held_out, 0.05))):
        kept = scores >= floor
        precision = float(relevant[kept].mean()) if kept.any() else 0.0
        figures = {"floor": name, "precision": precision, "recall": float(relevant[kept].sum() / relevant.sum())}
        results["floor"].append(where | figures)


def show(results: Results) -> None:
    """Print means over targets and draws."""
    named = {
        "first": ("sample", "shrinkage"),
        "prompt": ("stage", "prompt"),
        "deep": ("background", "weight"),
        "floor": ("floor",),
        "read_on": ("level",),
    }
    for part, keys in named.items():
        examples = sorted({row["examples"] for row in results[part]})
        values = [key for key in ("share", "precision", "recall", "area") if key in results[part][0]]
        print(f"\n{part}: {' / '.join(values)}, with {', '.join(map(str, examples))} examples")
        groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
        for row in results[part]:
            groups[tuple(row[key] for key in keys)].append(row)
        for group, rows in groups.items():
            cells = []
            for count in examples:
                means = [np.mean([row[value] for row in rows if row["examples"] == count]) for value in values]
                cells.append(" / ".join(f"{mean:.3f}" for mean in means))
            print(f"  {' '.join(map(str, group)):<24}" + "   ".join(cells))


if __name__ == "__main__":
    main()
