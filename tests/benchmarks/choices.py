"""How much faster choices are weighed when each prompt is read once for all of them, and how far the results differ.

    python tests/benchmarks/choices.py --model MODEL --data ROWS --choices LABELS --out FILE

Both ways run in turns in one process, in float32; only the ratio of a turn means something on a machine
that does other work.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from p2d_cli.core.batches import split_into_packs
from p2d_cli.data.batching import token_batches
from p2d_cli.data.chat_templates import resolve_template
from p2d_cli.data.records import read_records
from p2d_cli.data.sources import locate
from p2d_cli.modeling.choices import score_pack_batch
from p2d_cli.modeling.generation import score_completions
from p2d_cli.modeling.loading import ensure_pad_token, load_model, load_tokenizer

Scored = tuple[list[float], int]
"""The log-likelihood of each example, and the tokens that were read, padding included."""


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    tokenizer = load_tokenizer(options.model)
    ensure_pad_token(tokenizer)
    model = load_model(options.model, dtype=torch.float32, device="cpu")
    template = resolve_template(tokenizer, options.template)
    choices = json.loads(options.choices.read_text(encoding="utf-8"))
    records = read_records(locate(options.data), limit=options.rows).records
    variants = [replace(record, completion=choice) for record in records for choice in choices]
    encoded = [template.encode_example(tokenizer, variant, 2048) for variant in variants]
    examples = [(example.input_ids, example.prompt_length) for example in encoded]
    ways: dict[str, Callable[[], Scored]] = {
        "packed": lambda: packed(model, examples, options.token_budget),
        "plain": lambda: plain(model, examples, options.token_budget),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.repeats):
        scored = {}
        for name, way in ways.items():
            started = time.perf_counter()
            scored[name] = way()
            seconds[name].append(time.perf_counter() - started)
    pairs = zip(scored["packed"][0], scored["plain"][0], strict=True)
    report = {
        "rows": len(records),
        "choices": len(choices),
        "prompt_tokens": sorted({length for _, length in examples}),
        "seconds": {name: [round(value, 2) for value in values] for name, values in seconds.items()},
        "tokens": {name: tokens for name, (_, tokens) in scored.items()},
        "speedup": [round(a / b, 2) for a, b in zip(seconds["plain"], seconds["packed"], strict=True)],
        "largest_difference": max(abs(a - b) for a, b in pairs),
        "lowest_log_likelihood": min(scored["plain"][0]),
    }
    print(text := json.dumps(report, indent=2))
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--choices", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--template", default="auto")
    parser.add_argument("--token-budget", type=int, default=8192)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def packed(model: object, examples: list[tuple[tuple[int, ...], int]], budget: int) -> Scored:
    packs = split_into_packs(examples, token_budget=budget)
    values, tokens = [0.0] * len(examples), 0
    for batch in token_batches([pack.length for pack, _ in packs], token_budget=budget):
        chosen = [packs[index] for index in batch]
        tokens += len(batch) * max(pack.length for pack, _ in chosen)
        found = score_pack_batch(model, [pack for pack, _ in chosen], pad_id=0)
        for place, value in zip((place for _, places in chosen for place in places), found, strict=True):
            values[place] = value
    return values, tokens


def plain(model: object, examples: list[tuple[tuple[int, ...], int]], budget: int) -> Scored:
    values, tokens = [0.0] * len(examples), 0
    batches = token_batches([len(ids) for ids, _ in examples], token_budget=budget)
    for batch in batches:
        chosen = [examples[index] for index in batch]
        sums, _ = score_completions(model, chosen, pad_id=0)
        tokens += len(batch) * max(len(ids) for ids, _ in chosen)
        for index, value in zip(batch, sums, strict=True):
            values[index] = value
    return values, tokens


if __name__ == "__main__":
    main()
