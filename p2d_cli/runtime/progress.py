"""How a stage tells how far it is, without knowing who listens."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol


class Advance(Protocol):
    """What the body of a piece of work calls as units are done."""

    def __call__(self, units: int, told: str | None = None, /, *, at_once: bool = False) -> None:
        """Count units.

        Args:
            units: how many were done since the last call.
            told: what there is to say of the work by now, such as a loss; shown until something else is told.
            at_once: say it in a log now, and not only when its next line is due.
        """
        ...


class Progress(Protocol):
    """What a stage reports to: the command line draws bars or writes lines, tests use `SilentProgress`."""

    def task(self, label: str, total: int | None, *, found: int = 0) -> AbstractContextManager[Advance]:
        """Open a piece of work; the body calls `advance(n)` as units are done.

        Args:
            label: what it is called.
            total: its units, None if not known.
            found: units that an interrupted run has finished: the body counts them too, but they take no time.
        """
        ...

    def note(self, message: str) -> None:
        """Say something that the user should know, but that is not a result."""
        ...


class SilentProgress:
    """Report nothing."""

    @contextmanager
    def task(self, label: str, total: int | None, *, found: int = 0) -> Iterator[Advance]:
        """Yield an `advance` that does nothing."""
        del label, total, found

        def advance(units: int, told: str | None = None, /, *, at_once: bool = False) -> None:
            del units, told, at_once

        yield advance

    def note(self, message: str) -> None:
        """Drop the message."""
        del message


class LogProgress:
    """Append to a file what was begun, when it ended, and every note: for a process that has no terminal to itself."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextmanager
    def task(self, label: str, total: int | None, *, found: int = 0) -> Iterator[Advance]:
        """Write a line when the body begins, and one with its seconds when it ends, however it does."""
        started, done, last = time.monotonic(), 0, ""

        def advance(units: int, told: str | None = None, /, *, at_once: bool = False) -> None:
            del at_once
            nonlocal done, last
            done += units
            last = last if told is None else f"; {told}"

        self.note(label if total is None else f"{label}: {total - found} to do")
        try:
            yield advance
        finally:
            of_total = "" if total is None else f"/{total}"
            self.note(f"{label}: {done}{of_total} in {time.monotonic() - started:.1f} s{last}")

    def note(self, message: str) -> None:
        """Write one line, with the time of day."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(f"{datetime.datetime.now().isoformat(timespec='seconds')} {message}\n")
