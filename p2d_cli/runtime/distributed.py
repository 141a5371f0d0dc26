"""Which process this is among those that `torchrun`, `accelerate launch` or `srun` started."""

from __future__ import annotations

import os


def rank() -> int:
    """Return this process's global rank; 0 when it runs alone."""
    return int(os.environ.get("RANK", "0"))


def is_main_process() -> bool:
    """Say whether this process is the one that prints."""
    return rank() == 0
