"""How AER and memory grow with the pool, the model and the length of rows, from the plans of `p2d run --dry-run`.

    python tests/benchmarks/study/cost.py --tokenizer MODEL --work FOLDER --out tests/benchmarks/study/results/cost.json

Plans count passes and tokens, and what follows from them, floating-point operations and bytes; no model is loaded, so
that the model folders hold weight files of the right shapes with nothing in them. AER and STR are ratios of operations
here, not of seconds. Rows are random words of the tokenizer's. Varied are the pool's size, the length of its rows and
the model's shape, each from the middle of the others, and for each how many of the rows are of the task: 0.5%, for
which 0.04 of the pool is read on, or 5%, for which it is 0.06: the most that was in the two pools that were measured.
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
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "heads": 64, "groups": 8},
}
"""Those of SmolLM2-135M and 360M, Llama-3.2-1B and Llama-3.1-8B and 70B, all with the given tokenizer's vocabulary."""
POOLS, MIDDLE_POOL = (1000, 10_000, 100_000, 1_000_000), 10_000
LENGTHS, MIDDLE_LENGTH = (32, 128, 512), 128
TASKS = {"0.5%": (0.005, 0.04), "5%": (0.05, 0.06)}
"""How much of the pool is of the task, and kept; and how much of it is read on."""
TARGET_ROWS, TEST_ROWS = 8, 16
RECIPE = """\
name = "cost"
[defaults]
model = "{model}"
template = "plain"
dtype = "bfloat16"
[score-heads]
target = "target.jsonl"
pool = "pool.jsonl"
[mine-data]
target = "target.jsonl"
pool = "pool.jsonl"
ratio = {kept}
refine = {refine}
[eval]
data = "test.jsonl"
metric = "perplexity"
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a model, for its tokenizer")
    parser.add_argument("--work", type=Path, required=True, help="folder for rows and empty models")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the figures")
    options = parser.parse_args()
    plans: list[dict[str, Any]] = []
    for shape, pool, length in combinations():
        for task in TASKS:
            plans.append(plan(options.work.resolve(), options.tokenizer, shape, pool, length, task))
            print(plans[-1], flush=True)
            options.out.write_text(json.dumps({"plans": plans}, indent=1) + "\n", encoding="utf-8")


def combinations() -> Iterator[tuple[str, int, int]]:
    """Yield what to plan for: one of the three varied, the others in the middle of theirs, each combination once."""
    varied = [
        *(("135M", pool, MIDDLE_LENGTH) for pool in POOLS),
        *(("135M", MIDDLE_POOL, length) for length in LENGTHS),
        *((shape, MIDDLE_POOL, MIDDLE_LENGTH) for shape in SHAPES),
    ]
    yield from dict.fromkeys(varied)


def plan(work: Path, tokenizer: Path, shape: str, pool: int, length: int, task: str) -> dict[str, Any]:
    """Plan p2d by its defaults and full fine-tuning; return operations by stage and the ratios."""
    folder = work / f"pool-{pool}-length-{length}"
    rows = {"pool": pool, "target": TARGET_ROWS, "test": TEST_ROWS}
    for seed, (name, count) in enumerate(rows.items()):
        write_rows(tokenizer, folder / f"{name}.jsonl", count, length, seed)
    recipe, (kept, refine) = folder / "recipe.toml", TASKS[task]
    text = RECIPE.format(model=empty_model(work, tokenizer, shape), kept=kept, refine=refine)
    recipe.write_text(text, encoding="utf-8")
    words = ["p2d", "run", str(recipe), "--out", str(folder / "out"), "--dry-run", "--json", "-q"]
    document = json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout)
    found = {Path(stage["out"]).parent.name + "/" + Path(stage["out"]).name: stage for stage in document["stages"]}
    p2d = {
        "score_heads": found["heads/readout-s0"]["plan"],
        "mine_data": found["subset/p2d-s0"]["plan"],
        "train": found["adapter/heads-readout-p2d-s0"]["plan"],
    }
    full = found["adapter/full-full-s0"]["plan"]
    flops = {name: stage["flops"] for name, stage in p2d.items()}
    return {
        "shape": shape,
        "pool_rows": pool,
        "tokens_a_row": length,
        "of_the_task": task,
        "flops": flops | {"full": full["flops"]},
        "memory_gib": {name: stage["memory_bytes"] / 2**30 for name, stage in (p2d | {"full": full}).items()},
        "str": (flops["score_heads"] + flops["mine_data"]) / full["flops"],
        "aer": sum(flops.values()) / full["flops"],
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


def empty_model(work: Path, tokenizer: Path, shape: str) -> Path:
    """Write a Llama of some shape whose weights are a hole of the right size, and the tokenizer beside it."""
    folder = work / shape
    if folder.exists():
        return folder
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    vocabulary = AutoTokenizer.from_pretrained(tokenizer)
    sizes = dict(SHAPES[shape])
    config = LlamaConfig(
        num_attention_heads=sizes.pop("heads"),
        num_key_value_heads=sizes.pop("groups"),
        vocab_size=len(vocabulary),
        tie_word_embeddings=True,
        dtype="bfloat16",
        **sizes,
    )
    with torch.device("meta"):
        weights = LlamaForCausalLM(config).state_dict()
    header, end = {}, 0
    for name, tensor in weights.items():
        if name != "lm_head.weight":  # tied
            start, end = end, end + 2 * tensor.numel()
            header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    written = json.dumps(header).encode()
    written += b" " * (-len(written) % 8)
    config.save_pretrained(folder)
    vocabulary.save_pretrained(folder)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(written).to_bytes(8, "little") + written)
        file.truncate(8 + len(written) + end)
    return folder


if __name__ == "__main__":
    main()
