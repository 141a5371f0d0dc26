"""How fast scoring and mining are, as ratios within one run: against scipy, a bare forward and the predecessors' way.

    python tests/benchmarks/speed.py --model MODEL --pool POOL --target QUERY --out OUT [--rows 512] [--only a b c d]

(a) `score-heads --task-model` on a pair of random 1B-shaped models, against one scipy call a head on the same vectors
(b) mining by readout and by attention, in tokens a second, against the bare model's forward over the same batches
(c) mining by readout, against full attention matrices and generated answers, over the same pool rows
(d) seconds and peak memory of `mine-data` against the size of the pool

`OUT/speed.json` holds all figures.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from p2d_cli.config import MineDataConfig, ScoreHeadsConfig, resolve
from p2d_cli.core.geometry import share_count
from p2d_cli.core.head_importance import score_layer
from p2d_cli.core.head_selection import select_uniform
from p2d_cli.data.batching import token_batches
from p2d_cli.data.episodes import duplicate_groups, plan_mining
from p2d_cli.engine.reader import ModelReader
from p2d_cli.engine.stage_run import RunOptions, StageRun
from p2d_cli.modeling.checkpoints import CheckpointReader, read_layer_weights, skeleton
from p2d_cli.modeling.layouts import layout_geometry, model_layout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    for name in ("model", "pool", "target"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--only", nargs="*", default=["a", "b", "c", "d"])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    parts: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
        "a": checkpoints_against_scipy,
        "b": mining_against_forward,
        "c": mining_against_predecessors,
        "d": cost_against_pool_size,
    }
    path = options.out / "speed.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for name in options.only:
        results[name] = parts[name](options)
        print(name, json.dumps(results[name], indent=2), flush=True)
        path.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# --- (a)


def checkpoints_against_scipy(options: argparse.Namespace) -> dict[str, Any]:
    from scipy.stats import wasserstein_distance

    base, task = (make_pair_member(options.out / name, seed) for name, seed in (("base-1b", 0), ("task-1b", 1)))
    manifests = {
        method: score_pair(options.out / f"pair-{method}", "--model", str(base), "--method", method, *extra)
        for method, extra in {"random": (), "pad": ("--task-model", str(task), "--weights", "qkv")}.items()
    }
    layout = model_layout(skeleton(base))
    shape = layout_geometry(layout)
    readers = CheckpointReader(base), CheckpointReader(task)
    layers = [[read_layer_weights(reader, layer) for reader in readers] for layer in layout]
    ours = timed(lambda: [score_layer(*pair, weights="qkv", distance="w1", temperature=1.0) for pair in layers])
    seconds, heads = 0.0, 0
    for pair in layers[:2]:  # scipy's time a head does not depend on the layer
        for head in range(shape.num_heads):
            group = shape.group_of(head)
            vectors = [torch.cat([w.q_HdD[head], w.k_GdD[group], w.v_GdD[group]]).flatten().double() for w in pair]
            chances = [vector.softmax(0).numpy() for vector in vectors]
            places = np.linspace(0, 1, len(chances[0]))
            start = time.perf_counter()
            wasserstein_distance(places, places, *chances)
            seconds, heads = seconds + time.perf_counter() - start, heads + 1
    scipy_seconds = seconds / heads * shape.total_heads
    command = manifests["pad"]["seconds"]
    peaks = {method: manifest["peak_memory_gib"]["host"] for method, manifest in manifests.items()}
    return {
        "heads": shape.total_heads,
        "scipy_seconds": scipy_seconds,
        "command_score_seconds": command["score"],
        "distances_seconds": ours,
        "command_faster": scipy_seconds / command["score"],
        "distances_faster": scipy_seconds / ours,
        # The random heads of the same model show what Python and torch take by themselves.
        "peak_gib_above_random": peaks["pad"] - peaks["random"],
        "attention_weights_gib": sum(
            weight.numel() * weight.element_size() for pair in layers for weight in vars(pair[0]).values()
        ) / 2**30,
    }  # fmt: skip


def score_pair(out: Path, *words: str) -> dict[str, Any]:
    """Run score-heads and return its manifest."""
    subprocess.run(
        ["p2d", "score-heads", *words, "--out", str(out), "--force", "-q"], check=True, stdout=subprocess.PIPE
    )
    manifest: dict[str, Any] = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    return manifest


def make_pair_member(folder: Path, seed: int) -> Path:
    """Write a random model with the attention of a 1B model, and little else."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if not (folder / "model.safetensors").exists():
        torch.manual_seed(seed)
        config = LlamaConfig(
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            hidden_size=2048,
            intermediate_size=16,
            vocab_size=64,
        )
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


# --- (b)


def mining_against_forward(options: argparse.Namespace) -> dict[str, Any]:
    bench, rows, targets = open_bench(options)
    heads_LH = uniform_heads(bench)
    examples = bench.examples(rows)
    groups = token_batches([len(example.input_ids) for example in examples], token_budget=bench.token_budget)
    episodes = encode_episodes(bench, rows, targets)
    episode_groups = token_batches([len(episode.input_ids) for episode in episodes], token_budget=bench.token_budget)

    def forward(sequences: list[Any], batches: list[list[int]]) -> None:
        with torch.no_grad():
            for group in batches:
                bench.model.get_decoder()(input_ids=bench.pad([sequences[i].input_ids for i in group]), use_cache=False)

    def readout() -> None:
        for group in groups:
            bench.head_outputs([examples[index] for index in group], heads_LH)

    def attention() -> None:
        for group in episode_groups:
            bench.attention([episodes[index] for index in group], heads_LH, 5)

    bare, read = alternate(lambda: forward(examples, groups), readout)
    bare_episodes, watched = alternate(lambda: forward(episodes, episode_groups), attention)
    tokens = sum(len(example.input_ids) for example in examples)
    return {
        "rows": len(rows),
        "tokens": tokens,
        "bare_tokens_a_second": tokens / bare,
        "readout_of_bare": bare / read,
        "attention_of_bare": bare_episodes / watched,
    }


# --- (c)


def mining_against_predecessors(options: argparse.Namespace) -> dict[str, Any]:
    """Data Whisperer as published: an episode's answers are generated, and the attention taken from whole matrices.

    Five demos and three queries an episode are the settings in its authors' README (gszfwsb/Data-Whisperer).
    """
    bench, rows, targets = open_bench(options, rows=min(options.rows, 60))
    heads_LH = uniform_heads(bench)
    examples = bench.examples(rows)

    def readout() -> None:
        for group in token_batches([len(example.input_ids) for example in examples], token_budget=bench.token_budget):
            bench.head_outputs([examples[index] for index in group], heads_LH)

    episodes = encode_episodes(bench, rows, targets, queries=3)

    def predecessor() -> None:
        bench.model.set_attn_implementation("eager")
        for episode in episodes:
            shown = [token for token, answer in zip(episode.input_ids, episode.answer_mask, strict=True) if not answer]
            prompt = torch.tensor([shown])
            with torch.no_grad():
                bench.model.generate(
                    prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=3 * 64, do_sample=False,
                    output_attentions=True, return_dict_in_generate=True, pad_token_id=bench.tokenizer.pad_token_id,
                )  # fmt: skip
        bench.model.set_attn_implementation("sdpa")

    readout()
    ours, theirs = timed(readout), timed(predecessor)
    return {"rows": len(rows), "readout_seconds": ours, "predecessor_seconds": theirs, "faster": theirs / ours}


# --- (d)


def cost_against_pool_size(options: argparse.Namespace) -> dict[str, Any]:
    lines = [line for line in Path(options.pool).read_text(encoding="utf-8").split("\n") if line]
    heads = options.out / "uniform-heads"
    base = ("--model", options.model, "--template", "plain", "--json", "--force")
    subprocess.run(
        ["p2d", "score-heads", *base, "--method", "uniform", "--out", str(heads)],
        check=True, stdout=subprocess.PIPE,
    )  # fmt: skip
    figures = []
    for size in (options.rows, 2 * options.rows, 4 * options.rows):
        pool = options.out / f"pool-{size}.jsonl"
        pool.write_text("\n".join(lines[:size]) + "\n", encoding="utf-8")
        out = options.out / f"subset-{size}"
        subprocess.run(
            [
                *("p2d", "mine-data", *base, "--heads", str(heads), "--target", options.target, "--pool", str(pool)),
                *("--background", "256", "--out", str(out)),
            ],
            check=True,
            stdout=subprocess.PIPE,
        )
        manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
        figures.append(
            {
                "rows": size,
                "tokens": manifest["tokens"],
                "score_seconds": manifest["seconds"]["score"],
                "peak_gib": manifest["peak_memory_gib"],
            }
        )
    tokens, seconds = (np.array([row[key] for row in figures]) for key in ("tokens", "score_seconds"))
    return {"sizes": figures, "correlation_of_seconds_with_tokens": float(np.corrcoef(tokens, seconds)[0, 1])}


# --- helpers


def open_bench(options: argparse.Namespace, rows: int | None = None) -> tuple[ModelReader, list[Any], list[Any]]:
    flags = {"model": options.model, "pool": options.pool, "target": options.target, "out": "unused", "heads": "unused"}
    job = StageRun("mine-data", resolve(MineDataConfig, flags=flags | {"template": "plain"}), RunOptions())
    bench = ModelReader(job, job.inputs.model(options.model))
    pool = job.inputs.read(job.inputs.rows("pool", options.pool), limit=rows or options.rows).records
    return bench, list(pool), list(job.inputs.read(job.inputs.rows("target", options.target)).records)


def uniform_heads(bench: ModelReader) -> Any:
    shape = layout_geometry(bench.layout)
    ratio = ScoreHeadsConfig.model_fields["ratio"].default
    return select_uniform(share_count(ratio, shape.total_heads), shape.exists_LH)


def encode_episodes(bench: ModelReader, rows: list[Any], targets: list[Any], queries: int = 1) -> list[Any]:
    pool_groups, target_groups = duplicate_groups(rows, targets)
    plan = plan_mining(
        len(rows), len(targets), demos=5, queries=queries, draws=1, rng=np.random.default_rng(0),
        pool_groups=pool_groups, target_groups=target_groups,
    )  # fmt: skip
    return bench.episodes([([rows[i] for i in e.demos], [targets[i] for i in e.queries]) for e in plan])


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def alternate(first: Callable[[], object], second: Callable[[], object], repeats: int = 2) -> tuple[float, float]:
    """Return the best seconds of both, run in turn so that neither has the quieter machine."""
    first()
    seconds = [(timed(first), timed(second)) for _ in range(repeats)]
    return min(a for a, _ in seconds), min(b for _, b in seconds)


if __name__ == "__main__":
    main()
