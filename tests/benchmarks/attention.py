"""Torch's attention on a CPU, forward and backward: bfloat16 against float32, by the length of the rows.

    python tests/benchmarks/attention.py [--heads 9] [--head-size 64] [--tokens 480] [--lengths 32 64 ...] [--out FILE]

A batch holds `--tokens` tokens, or one row. The float32 column has the conversions from and to bfloat16, as in
`p2d_cli.modeling.attention_kernels.short_rows_in_float32`, whose limit stands on this. The quickest of some calls, in
milliseconds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

CALLS = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=480)
    parser.add_argument("--lengths", type=int, nargs="*", default=[16, 32, 64, 96, 128, 192, 256, 512, 1024])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = [measure(options, length) for length in options.lengths]
    print(f"{'length':>6}{'rows':>6}{'bfloat16':>10}{'float32':>9}{'ratio':>7}")
    for row in found:
        print("{length:>6}{rows:>6}{bfloat16:>10.2f}{float32:>9.2f}{ratio:>7.2f}".format_map(row))
    if options.out:
        told = {"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": found}
        options.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def measure(options: argparse.Namespace, length: int) -> dict[str, float]:
    rows = max(1, options.tokens // length)
    shape = (rows, options.heads, length, options.head_size)
    inputs = [torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]

    def narrow() -> Tensor:
        return scaled_dot_product_attention(*inputs, is_causal=True)

    def wide() -> Tensor:
        return scaled_dot_product_attention(*(tensor.float() for tensor in inputs), is_causal=True).to(torch.bfloat16)

    took = {"bfloat16": milliseconds(narrow), "float32": milliseconds(wide)}
    return {"length": length, "rows": rows, **took, "ratio": took["bfloat16"] / took["float32"]}


def milliseconds(attend: Callable[[], Tensor]) -> float:
    """Return what a forward and backward pass takes."""
    taken = []
    for _ in range(CALLS):
        started = time.perf_counter()
        attend().sum().backward()
        taken.append(time.perf_counter() - started)
    return min(taken) * 1000


if __name__ == "__main__":
    main()
