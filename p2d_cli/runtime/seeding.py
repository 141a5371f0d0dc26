"""One seed, from which each use derives its own."""

from __future__ import annotations

import hashlib
import random

import numpy as np


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Return a seed in [0, 2**32) for one purpose, independent of the seeds of all other purposes.

    The same `(seed, *purpose)` gives the same number on every machine and Python version.
    """
    text = "\x1f".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """Return a fresh NumPy generator for one purpose."""
    return np.random.default_rng(derive_seed(seed, *purpose))


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch, which libraries below p2d draw from."""
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
