"""Getting by with less memory than was hoped for."""

from __future__ import annotations

import gc

import torch


def release_memory(*, cycles: bool) -> None:
    """Give back the memory of work that failed; with `cycles`, of reference cycles too, which takes a while.

    Call it outside of the `except` block; inside, the traceback still holds the tensors of every frame.
    """
    if cycles:
        gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
