"""Being asked to stop by a batch queue: SIGTERM when the time is up, SIGUSR1 some minutes before.

The handler only takes note. Work that can go on later looks at `stop_requested` at its seams (after a batch, after an
update), saves what it has, and ends with exit code 75.
"""

from __future__ import annotations

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_requested: str | None = None


def listen() -> None:
    """Take note of `STOP_SIGNALS` from now on, instead of dying of them; for the main thread of a command."""
    for number in STOP_SIGNALS:
        signal.signal(number, _take_note)


def stop_requested() -> str | None:
    """Return the name of the signal that asked this process to stop, if one did."""
    return _requested


def _take_note(number: int, frame: FrameType | None) -> None:
    del frame
    global _requested
    _requested = signal.Signals(number).name
