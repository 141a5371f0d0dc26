"""Sequences of different lengths into padded batches.

Legend: B rows of a batch, T tokens of its longest row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from p2d_cli.errors import UsageError

if TYPE_CHECKING:
    import torch


def token_batches(lengths: Sequence[int], *, token_budget: int, max_rows: int | None = None) -> list[list[int]]:
    """Group rows of similar length, so that little padding is computed.

    The longest rows come first: memory that does not suffice shows in the first batch, not in the last.

    Args:
        lengths: tokens of each row.
        token_budget: largest padded size of a batch, its rows times its longest row. A row that is longer than
            that by itself gets a batch of its own.
        max_rows: largest number of rows of a batch.

    Returns:
        Lists of positions in `lengths`; every position stands in exactly one of them.

    Raises:
        UsageError: a budget or row limit below 1.
    """
    if token_budget < 1 or (max_rows is not None and max_rows < 1):
        raise UsageError(f"a batch needs room for a token and a row; got {token_budget} tokens, {max_rows} rows")
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    batches: list[list[int]] = []
    start = 0
    while start < len(order):
        longest = max(lengths[order[start]], 1)
        rows = max(token_budget // longest, 1)
        stop = start + (rows if max_rows is None else min(rows, max_rows))
        batches.append(order[start:stop])
        start = stop
    return batches


def pad_mask(rows: Sequence[Sequence[int]] | Sequence[Sequence[bool]], fill: int | bool) -> torch.Tensor:
    """Return rows of masks, labels or segment ids as `[B, T]`, padded on the right with `fill`.

    The tensor is bool where `fill` is, otherwise int64.
    """
    import torch

    width = max((len(row) for row in rows), default=0)
    padded = [[*row, *[fill] * (width - len(row))] for row in rows]
    dtype = torch.bool if isinstance(fill, bool) else torch.long
    return torch.tensor(padded, dtype=dtype).reshape(len(rows), width)
