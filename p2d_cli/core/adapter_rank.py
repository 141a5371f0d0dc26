"""The one rank that all modules of a saved head adapter have.

The modules of a head adapter have as many trained rows as their layer has selected heads, but engines read ranks in
different ways: llama.cpp scales each module by the global alpha over the rows of its own tensors, SGLang wants one rank
for q, k and v of a layer, TGI stacks the layers, and vLLM takes some ranks only. Where every module has the same rank
and alpha is that rank, all of them compute the same. Rows of zeros make up for what a module lacks.
"""

from __future__ import annotations

from collections.abc import Collection

SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values of vLLM's `--max-lora-rank`."""


def common_rank(row_counts: Collection[int]) -> int:
    """Return the smallest rank that holds the rows of every module and that vLLM serves.

    Args:
        row_counts: trained rows of each module; not empty.

    Returns:
        The largest count itself where it is above all ranks that vLLM serves.
    """
    needed = max(row_counts)
    return next((rank for rank in SERVED_RANKS if rank >= needed), needed)
