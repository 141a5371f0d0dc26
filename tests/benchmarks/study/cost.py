"""How AER grows with the pool, the model and the length of rows, from the plans that `p2d run --dry-run --time` makes.

    python tests/benchmarks/study/cost.py --tokenizer MODEL --out OUT [--shapes 135M 1B] [--pools 1000 10000] ...

Models are of random weights, in the shapes of `SHAPES`; rows are random words of the tokenizer's. A plan loads the
model, times a few batches of each work on this machine, and counts the rest exactly: nothing is trained to the end.
Varied are the pool's size, the length of its rows and the model's shape, each from the middle of the others.
`OUT/cost.json` holds the seconds of each stage and the ratios that follow from them.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, int]] = {
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "heads": 9, "groups": 3},
    "360M": {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "heads": 15, "groups": 5},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "heads": 32, "groups": 8},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "heads": 32, "groups": 8},
}
"""Those of SmolLM2-135M and 360M, Llama-3.2-1B and Llama-3.1-8B, all with the given tokenizer's vocabulary."""
TARGET_ROWS, TEST_ROWS = 64, 16
RECIPE = """\
name = "cost"
[defaults]
model = "{model}"
template = "plain"
dtype = "{dtype}"
[score-heads]
method = "readout"
target = "target.jsonl"
pool = "pool.jsonl"
background = 250
[mine-data]
target = "target.jsonl"
pool = "pool.jsonl"
shortlist = {shortlist}
background = 250
[train]
epochs = 3
[eval]
data = "test.jsonl"
metric = "perplexity"
[grid]
heads = ["readout"]
data = ["p2d"]
"""


def main() -> None:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    results = []
    for shape, pool, length in combinations(options):
        for shortlist in (1.0, 0.2):
            results.append(plan(options, shape, pool, length, shortlist))
            print(results[-1], flush=True)
            text = json.dumps({"dtype": options.dtype, "plans": results}, indent=1)
            (options.out / "cost.json").write_text(text + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a model, for its tokenizer")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["135M", "360M", "1B"])
    parser.add_argument("--pools", nargs="+", type=int, default=[1000, 10_000, 100_000])
    parser.add_argument("--lengths", nargs="+", type=int, default=[32, 128, 512], help="tokens a row")
    return parser.parse_args()


def combinations(options: argparse.Namespace) -> Iterator[tuple[str, int, int]]:
    """Yield what to plan for: one of the three varied, the others in the middle of theirs, each combination once."""
    shape, pool, length = options.shapes[0], options.pools[len(options.pools) // 2], options.lengths[0]
    varied = [
        *((shape, each, length) for each in options.pools),
        *((shape, pool, each) for each in options.lengths),
        *((each, pool, length) for each in options.shapes),
    ]
    yield from dict.fromkeys(varied)


def plan(options: argparse.Namespace, shape: str, pool: int, length: int, shortlist: float) -> dict[str, Any]:
    """Plan p2d and full fine-tuning, and return their seconds by stage and the ratios."""
    folder = options.out / f"pool-{pool}-length-{length}"
    rows = {"pool": pool, "target": TARGET_ROWS, "test": TEST_ROWS}
    for seed, (name, count) in enumerate(rows.items()):
        write_rows(options.tokenizer, folder / f"{name}.jsonl", count, length, seed)
    recipe = folder / "recipe.toml"
    model = random_model(options, shape)
    recipe.write_text(RECIPE.format(model=model, dtype=options.dtype, shortlist=shortlist), encoding="utf-8")
    words = ["p2d", "run", str(recipe), "--out", str(folder / "out"), "--dry-run", "--time", "--json", "-q"]
    document = json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout)
    found = {Path(stage["out"]).parent.name + "/" + Path(stage["out"]).name: stage for stage in document["stages"]}
    p2d = {
        "score_heads": found["heads/readout-s0"],
        "mine_data": found["subset/p2d-s0"],
        "train": found["adapter/heads-readout-p2d-s0"],
    }
    seconds = {name: stage["plan"]["seconds"] for name, stage in p2d.items()}
    full = found["adapter/full-full-s0"]["plan"]
    return {
        "shape": shape,
        "pool_rows": pool,
        "tokens_a_row": length,
        "shortlist": shortlist,
        "seconds": seconds | {"full": full["seconds"]},
        "flops": {name: stage["plan"]["flops"] for name, stage in p2d.items()} | {"full": full["flops"]},
        "memory_gib": {"p2d": p2d["train"]["plan"]["memory_bytes"] / 2**30, "full": full["memory_bytes"] / 2**30},
        "str": (seconds["score_heads"] + seconds["mine_data"]) / full["seconds"],
        "aer": sum(seconds.values()) / full["seconds"],
    }


def write_rows(tokenizer: Path, path: Path, count: int, length: int, seed: int) -> None:
    """Write rows of about so many tokens, an eighth of them in the completion."""
    from transformers import AutoTokenizer

    path.parent.mkdir(parents=True, exist_ok=True)
    draw, vocabulary = random.Random(seed), AutoTokenizer.from_pretrained(tokenizer).get_vocab()
    words = sorted(word[1:] for word in vocabulary if word.startswith("Ġ") and word[1:].isalpha())
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            text = [draw.choice(words) for _ in range(length - 2)]
            prompt, completion = " ".join(text[length // 8 :]), " ".join(text[: length // 8])
            file.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")


def random_model(options: argparse.Namespace, shape: str) -> Path:
    """Save a Llama of some shape with random weights, and the tokenizer beside it, unless it is there."""
    folder: Path = options.out.resolve() / shape
    if folder.exists():
        return folder
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    sizes = dict(SHAPES[shape])
    config = LlamaConfig(
        num_attention_heads=sizes.pop("heads"),
        num_key_value_heads=sizes.pop("groups"),
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        dtype=options.dtype,
        **sizes,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(getattr(torch, options.dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
