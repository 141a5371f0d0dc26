"""Seconds by phase, on a monotonic clock, with the device's queue emptied at both ends of a phase."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Throughput:
    """Units a second of work that is done in pieces, over the last `window` seconds of it."""

    def __init__(self, window: float = 10.0) -> None:
        self._window = window
        self._pieces: deque[tuple[int, float]] = deque()

    def add(self, units: int, seconds: float) -> float:
        """Count a piece, and return the units a second of it and of those before; 0 where no time has passed."""
        self._pieces.append((units, seconds))
        while len(self._pieces) > 1 and sum(spent for _, spent in self._pieces) - self._pieces[0][1] >= self._window:
            self._pieces.popleft()
        done, spent = (sum(values) for values in zip(*self._pieces, strict=True))
        return done / spent if spent > 0 else 0.0


class PhaseTimer:
    """Add up the seconds spent in each named phase.

    A phase opened inside another pauses the outer one, so that no second is counted twice.

    Args:
        clock: monotonic clock in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._synchronize: Callable[[], None] = lambda: None
        self._open: list[str] = []
        self._since = 0.0
        self.seconds: dict[str, float] = {}

    def synchronize_with(self, synchronize: Callable[[], None]) -> None:
        """Wait for `synchronize` at the ends of phases; a device's kernels run behind the host's back."""
        self._synchronize = synchronize

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge the body of the `with` block to `name`."""
        self._switch()
        self._open.append(name)
        try:
            yield
        finally:
            self._switch()
            self._open.pop()

    def charge(self, name: str, seconds: float) -> None:
        """Add seconds that an earlier process, since interrupted, spent on a phase."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def _switch(self) -> None:
        self._synchronize()
        now = self._clock()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now
