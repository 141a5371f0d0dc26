"""Getting by with less memory than was hoped for."""

from __future__ import annotations

import gc

import torch


def release_memory() -> None:
    """Give back what a piece of work that failed has left: cycles of objects, and what torch keeps for reuse.

    Call it outside of the `except` block; inside, the traceback still holds the tensors of every frame.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
