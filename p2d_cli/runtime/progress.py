"""How a stage tells how far it is, without knowing who listens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[[int], None]


class Progress(Protocol):
    """What a stage reports to: the command line draws bars or writes lines, tests use `SilentProgress`."""

    def task(self, label: str, total: int | None) -> AbstractContextManager[Advance]:
        """Open a piece of work of `total` units, None if not known; the body calls `advance(n)` as units are done."""
        ...

    def note(self, message: str) -> None:
        """Say something that the user should know, but that is not a result."""
        ...


class SilentProgress:
    """Report nothing."""

    @contextmanager
    def task(self, label: str, total: int | None) -> Iterator[Advance]:
        """Yield an `advance` that does nothing."""
        del label, total
        yield lambda _: None

    def note(self, message: str) -> None:
        """Drop the message."""
        del message
