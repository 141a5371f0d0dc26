"""The processes that share a training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from p2d_cli.errors import P2DError


def _raise(problem: P2DError | None) -> None:
    if problem is not None:
        raise problem


@dataclass(frozen=True)
class Ranks:
    """The processes that share a training, and how they agree; by default there is one, which agrees with itself."""

    rank: int = 0
    size: int = 1
    exchange: Callable[[Any], list[Any]] = lambda value: [value]
    """Tells all ranks a value, and returns what all told, by rank."""
    raise_together: Callable[[P2DError | None], None] = _raise
    """Raises on all ranks the error that one of them has."""
