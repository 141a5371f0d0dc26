"""Which heads to train, and which rows to keep where more than enough would do: judged by training on them.

    python tests/benchmarks/by_training.py --model MODEL --pool POOL --target NAME QUERY [--target ...]
        --single NAME ROWS [--single ...] --out OUT [--index DIR] [--seeds 3]

QUERY are 64 rows of a target, of which the first half is given and the other half held out. ROWS are rows of one task.
Everything is judged by the perplexity of held-out answers after 3 epochs with 4 rows an update and projections q,k,v,o;
OUT/by_training.json grows as results come, and what is there is not measured again. The parts:

- `heads`: 96 rows that p2d mines from POOL; heads of the upper half by score, or evenly spread there
- `above`: 48 of the rows above the floor: the top, a cover of them in words or in readings, or any
- `single`: 80 of 800 rows of one task: a cover in words, mean hidden states or readings, or any; 100 held out
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from readout_rules import head_outputs, open_reader
from sklearn.feature_extraction.text import TfidfVectorizer

from p2d_cli.config import EvalConfig, MineDataConfig, ScoreHeadsConfig, TrainConfig, resolve
from p2d_cli.core.head_selection import select_readers
from p2d_cli.engine.reader import ModelReader
from p2d_cli.modeling.generation import mean_hidden_states
from p2d_cli.stages import evaluate, mine_data, score_heads, train

MINED, KEPT = 96, 48
POOL_ROWS, OF_POOL, HELD_OUT = 800, 80, 100
Row = dict[str, Any]


def main() -> None:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(options)
    for name, query in options.target:
        bench.target(name, lines(query))
    for name, path in options.single:
        bench.single(name, lines(path))
    show(bench.results)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--pool", required=True)
    parser.add_argument("--target", nargs=2, action="append", default=[], metavar=("NAME", "QUERY"))
    parser.add_argument("--single", nargs=2, action="append", default=[], metavar=("NAME", "ROWS"))
    parser.add_argument("--index", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def lines(path: str | Path) -> list[Row]:
    with Path(path).open(encoding="utf-8") as rows:
        return [json.loads(line) for line in rows]


class Bench:
    """Runs the stages, each once, and keeps what came of it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out, self.embedded = options, options.out, 0
        self.path = self.out / "by_training.json"
        self.results: list[Row] = json.loads(self.path.read_text()) if self.path.exists() else []
        self.reader: ModelReader = open_reader(options)
        layers = self.reader.shape.num_layers
        half = {"model": options.model, "layers": f"{layers // 2}-{layers - 1}"}
        self.even = self.stage(score_heads, ScoreHeadsConfig, "even", half | {"method": "uniform"})

    def stage(self, module: Any, config: Any, name: str, flags: Row) -> Path:
        out: Path = self.out / name
        if not (out / "manifest.json").exists():
            words = {key: str(value) if isinstance(value, Path) else value for key, value in flags.items()}
            module.run(resolve(config, flags=words | {"model": self.options.model, "out": out}, environ={}))
        return out

    def target(self, name: str, query: list[Row]) -> None:
        """Measure parts `heads` and `above`."""
        half = len(query) // 2
        given, held_out = self.write(f"{name}-given", query[:half]), self.write(f"{name}-held-out", query[half:])
        rows = {"target": str(given), "pool": self.options.pool}
        scored = self.stage(score_heads, ScoreHeadsConfig, f"{name}-heads", rows)
        index = {"index": self.options.index} if self.options.index else {}
        mining = rows | index | {"heads": str(scored), "count": MINED, "pick": "top"}
        mined = self.stage(mine_data, MineDataConfig, f"{name}-rows", mining)
        for seed in range(self.options.seeds):
            for arm, heads in (("scored", scored), ("even", self.even)):
                self.judge({"part": "heads", "data": name, "arm": arm, "seed": seed}, mined, heads, held_out)
        above = self.above(mined)
        for seed in range(self.options.seeds):
            for arm, chosen in self.arms(above, KEPT, ("top", "words", "readings", "any"), seed):
                data = self.write(f"{name}-{arm}-{seed}", chosen)
                where = {"part": "above", "data": name, "arm": arm, "seed": seed, "of": len(above)}
                self.judge(where, data, scored, held_out)

    def above(self, mined: Path) -> list[Row]:
        """Return the rows of the pool that lie above the floor, the best first."""
        floor = json.loads((mined / "manifest.json").read_text())["summary"]["floor_score"]
        scores = pq.read_table(mined / "pool_scores.parquet").sort_by("rank").to_pylist()
        rows = {row["id"]: row for row in lines(self.options.pool)}
        return [rows[row["id"]] for row in scores if row["score"] is not None and row["score"] >= floor]

    def single(self, name: str, rows: list[Row]) -> None:
        """Measure part `single`, each seed with a pool of its own."""
        for seed in range(self.options.seeds):
            order = np.random.default_rng(seed).permutation(len(rows))
            pool = [rows[place] for place in order[:POOL_ROWS]]
            others = [rows[place] for place in order[POOL_ROWS : POOL_ROWS + HELD_OUT]]
            held_out = self.write(f"{name}-held-out-{seed}", others)
            for arm, chosen in self.arms(pool, OF_POOL, ("words", "states", "readings", "any"), seed):
                data = self.write(f"{name}-{arm}-{seed}", chosen)
                answers = len({row["completion"] for row in chosen})
                where = {"part": "single", "data": name, "arm": arm, "seed": seed, "answers": answers}
                self.judge(where, data, self.even, held_out)

    def arms(self, rows: list[Row], count: int, names: tuple[str, ...], seed: int) -> Iterator[tuple[str, list[Row]]]:
        """Give each way of choosing `count` of the rows with what it chooses."""
        for name in names:
            if name == "top":
                order = np.arange(count)
            elif name == "any":
                order = np.random.default_rng(100 + seed).permutation(len(rows))[:count]
            else:
                order = cover(likeness(getattr(self, name)(rows)), count)
            yield name, [rows[place] for place in order]

    def words(self, rows: list[Row]) -> Any:
        texts = [f"{row['prompt']}\n{row['completion']}" for row in rows]
        return TfidfVectorizer(sublinear_tf=True).fit_transform(texts).toarray()

    def readings(self, rows: list[Row]) -> NDArray[np.float64]:
        """Return what the heads of the first layers put out, the deviations from each one's mean at one scale."""
        shape = self.reader.shape
        heads = select_readers(np.zeros(shape.exists_LH.shape), "auto", shape.exists_LH, shape.layers).shallow_LH
        outputs = head_outputs(self.reader, self.records(rows), heads).astype(np.float64)
        outputs -= outputs.mean(axis=0)
        loudness = np.sqrt((outputs**2).mean(axis=(0, 3), keepdims=True))
        return (outputs / np.maximum(loudness, 1e-12)).reshape(len(rows), -1)

    def states(self, rows: list[Row]) -> NDArray[np.float64]:
        ids = [example.input_ids for example in self.reader.examples(self.records(rows))]
        found = [
            mean_hidden_states(self.reader.model, ids[at : at + 16], 0)[:, 0].numpy() for at in range(0, len(ids), 16)
        ]
        states = np.concatenate(found).astype(np.float64)
        return states - states.mean(axis=0)

    def records(self, rows: list[Row]) -> Any:
        self.embedded += 1
        inputs = self.reader.job.inputs
        return inputs.read(inputs.rows("target", str(self.write(f"embedded-{self.embedded}", rows)))).records

    def write(self, name: str, rows: list[Row]) -> Path:
        path: Path = self.out / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    def judge(self, where: Row, data: Path, heads: Path, held_out: Path) -> None:
        """Train on the rows, and keep the perplexity of the held-out answers."""
        if any(row | where == row for row in self.results):
            return
        name = "-".join(str(where[key]) for key in ("part", "data", "arm", "seed"))
        flags = {"data": data, "heads": heads, "projections": ("q", "k", "v", "o")}
        trained = self.stage(
            train, TrainConfig, f"{name}-trained", flags | {"batch_size": 4, "epochs": 3, "seed": where["seed"]}
        )
        flags = {"adapter": trained, "data": held_out, "metric": ("perplexity",)}
        judged = self.stage(evaluate, EvalConfig, f"{name}-judged", flags)
        metrics = json.loads((judged / "metrics.json").read_text())
        seconds = json.loads((trained / "manifest.json").read_text())["seconds"]["train"]
        self.results.append(where | {"perplexity": metrics["perplexity"]["value"], "seconds": seconds})
        self.path.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(self.results[-1]), flush=True)


def likeness(rows_MF: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the cosine of each row to each, 0 where it is negative."""
    unit = rows_MF / np.maximum(np.linalg.norm(rows_MF, axis=1, keepdims=True), 1e-12)
    return np.maximum(unit @ unit.T, 0.0)


def cover(likeness_MM: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Choose greedily by facility location, the plain way."""
    nearest_M, chosen = np.zeros(len(likeness_MM)), []
    for _ in range(count):
        added_M = np.maximum(likeness_MM - nearest_M[:, None], 0.0).sum(axis=0)
        added_M[chosen] = -1.0
        chosen.append(int(added_M.argmax()))
        nearest_M = np.maximum(nearest_M, likeness_MM[:, chosen[-1]])
    return np.array(chosen)


def show(results: list[Row]) -> None:
    """Print the geometric mean of the perplexity over seeds, and its spread."""
    groups: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for row in results:
        groups[row["part"], row["data"], row["arm"]].append(np.log(row["perplexity"]))
    for (part, data, arm), logs in groups.items():
        spread = np.std(logs, ddof=1) if len(logs) > 1 else float("nan")
        print(f"{part:<8}{data:<16}{arm:<10}{np.exp(np.mean(logs)):8.3f}  spread of its logarithm {spread:.3f}")


if __name__ == "__main__":
    main()
