"""Being told to stop: Ctrl-C by a user, SIGTERM or SIGUSR1 by a batch queue.

Wherever nothing would be lost, a signal ends the work at once, by an `Interruption` raised in the main thread. Some
kinds of code want it otherwise:

- a batch or an update is worth finishing: inside `deferred`, the batch queue's signals wait for the end of the block;
- of work that is only kept once it is finished, a user wants to lose nothing either: inside `courteous`, the first
  Ctrl-C waits wherever the batch queue's signals do;
- an artifact that is being written is worth completing: inside `shielded`, all signals do;
- several processes that work together have to stop at the same batch: there, the batch queue's signals are only taken
  note of, and the work asks `stop_requested` and agrees.

What waits does not wait for ever. A signal that comes again, and one that has not taken effect when its patience is
over, ends the process; everything on disk is made to survive that. What was kept by then the message says: `promising`.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from types import FrameType
from typing import Any, NoReturn

from p2d_cli.errors import INTERRUPTED_EXIT_CODE, StoppedEarlyError
from p2d_cli.runtime import distributed

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_CHECK_SECONDS = 0.1
PATIENCE_SECONDS: dict[int, float] = {signal.SIGINT: 1.5, signal.SIGTERM: 20.0, signal.SIGUSR1: 300.0}
"""How long each signal waits. Slurm sends SIGKILL 30 s after SIGTERM; SIGUSR1 comes minutes before the time is up."""
COURTESY_SECONDS = 300.0
"""How long the first Ctrl-C waits inside `courteous`; whoever does not want to wait sends another one."""
CLEANUP_SECONDS = 2.0
"""How long what an `Interruption` ends may take to do so; longer means that it was caught where nothing should be."""
SAME_SIGNAL_SECONDS = 0.15
"""Launchers and terminals pass one signal on twice within milliseconds; a person cannot press Ctrl-C that fast."""


AGAIN = "run the same command again"
GO_ON = f"{AGAIN} to go on"
UNBEGUN = f"nothing was begun yet, {AGAIN}"
"""What to promise before it is known whether an earlier run has left something to go on from."""
BEGINS_ANEW = "the same command begins anew"
"""What to promise of work of which nothing is kept."""
COMPLETE = "the artifact is complete"


class Interruption(BaseException):
    """A signal ends the work. No `except Exception` below the command line stops it.

    Args:
        number: the signal.
        promise: what the same command does next time.
    """

    def __init__(self, number: int, promise: str = UNBEGUN) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number
        self.promise = promise

    @property
    def exit_code(self) -> int:
        """The code that the process ends with: 130 for Ctrl-C, 75 for a batch queue's signals."""
        return INTERRUPTED_EXIT_CODE if self.number == signal.SIGINT else StoppedEarlyError.exit_code

    @property
    def message(self) -> str:
        """One line for the user."""
        what = "interrupted" if self.number == signal.SIGINT else f"stopped by {self}"
        return f"{what}; {self.promise}"


@dataclass
class _State:
    """What this process was told, and what it is in the middle of."""

    requested: str | None = None
    waiting: int | None = None
    """A signal that has not been acted upon."""
    arrivals: dict[int, float] = field(default_factory=dict)
    """When each signal first came."""
    deferrals: int = 0
    shields: int = 0
    notices: list[Callable[[], None]] = field(default_factory=list)
    """What tells a user that the first Ctrl-C has come and waits, one for each `courteous` block that is open."""
    promises: list[Callable[[], str]] = field(default_factory=list)
    """What an interruption may promise, one for each `promising` block that is open."""
    took_effect: float | None = None
    """When an `Interruption` was raised."""
    over: bool = False
    """The command has ended; signals no longer matter."""
    previous: dict[int, Any] = field(default_factory=dict)
    """The handlers that were there before."""


_state = _State(over=True)


@contextmanager
def listening() -> Iterator[None]:
    """Handle signals while a command runs in this block; when it ends they no longer matter to the command."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    borrowed = _state.over
    if borrowed:
        _install()
    try:
        yield
    finally:
        _state.over = True
        for number, handler in _state.previous.items() if borrowed else ():
            signal.signal(number, handler)


def own_process(say: Callable[[str], None]) -> None:
    """Handle signals from now until this process ends, even where Python cannot: inside of a long call into C.

    Args:
        say: tells the user a line in a process that is about to end; called from another thread.
    """
    _install()
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(read_end, say), daemon=True).start()
    os.register_at_fork(after_in_child=partial(signal.set_wakeup_fd, -1))  # a child does not report to this watch
    _silence_swallowed()


def finished() -> None:
    """Take no more notice of signals: the command has ended, and its process is about to."""
    _state.over = True
    for number in _state.previous:
        # On its way out Python would put the default back, and let a signal change the exit code of what is done.
        signal.signal(number, signal.SIG_IGN)


def took_effect() -> bool:
    """Say whether a signal ended the command."""
    return _state.took_effect is not None


def stop_requested() -> str | None:
    """Return the name of the signal that asked this process to stop and waits for that, if one did."""
    return _state.requested


@contextmanager
def promising(promise: Callable[[], str]) -> Iterator[None]:
    """Let a signal that ends the work in this block say what is kept; by default `UNBEGUN`.

    Args:
        promise: returns it, in words that follow a semicolon.
    """
    state = _state
    state.promises.append(promise)
    try:
        yield
    finally:
        state.promises.remove(promise)


@contextmanager
def courteous(notice: Callable[[], None]) -> Iterator[None]:
    """Let the first Ctrl-C of this block wait where a batch queue's signals do; a second one ends the work.

    Args:
        notice: tells the user that it has come; called from another thread.
    """
    state = _state
    state.notices.append(notice)
    try:
        yield
    finally:
        state.notices.remove(notice)
    _act(state)


@contextmanager
def deferred() -> Iterator[None]:
    """Let a batch queue's signals wait for the end of this block, where they raise an `Interruption`.

    Ctrl-C does not wait, but for the first one inside `courteous`. Among several processes they raise nothing, here or
    elsewhere.
    """
    state = _state
    state.deferrals += 1
    try:
        yield
    finally:
        state.deferrals -= 1
    _act(state)


@contextmanager
def shielded() -> Iterator[None]:
    """Let all signals wait for the end of this block, where they raise an `Interruption`."""
    state = _state
    state.shields += 1
    try:
        yield
    finally:
        state.shields -= 1
    _act(state)


def _install() -> None:
    global _state
    _state = _State()
    _mind_forks()
    for number in PATIENCE_SECONDS:
        # What the parent ignores, as a shell does Ctrl-C for what runs in the background, stays ignored.
        if (previous := signal.getsignal(number)) is not signal.SIG_IGN:
            _state.previous[number] = previous
            signal.signal(number, _receive)


def _receive(number: int, frame: FrameType | None) -> None:
    del frame
    state, now = _state, time.monotonic()
    if state.over:
        return
    if _may_wait(number):
        state.requested = signal.Signals(number).name
    arrived = state.arrivals.setdefault(number, now)
    if now - arrived > SAME_SIGNAL_SECONDS and (number == signal.SIGINT or not _together(number)):
        _interrupt(state, number)
    if arrived == now:
        # Ctrl-C is acted upon wherever another signal is, and in more places.
        state.waiting = state.waiting if state.waiting == signal.SIGINT else number
        _act(state)


def _act(state: _State) -> None:
    """Raise the signal that is waiting, if there is nothing left to wait for."""
    number = state.waiting
    if number is None or state.over or state.shields or _together(number):
        return
    if state.deferrals and _may_wait(number):
        return
    state.waiting = None
    _interrupt(state, number)


def _interrupt(state: _State, number: int) -> NoReturn:
    state.took_effect = time.monotonic()
    raise Interruption(number, _promise(state))


def _promise(state: _State) -> str:
    promises = [*state.promises]  # which the main thread may leave while another one asks
    return promises[-1]() if promises else UNBEGUN


def _may_wait(number: int) -> bool:
    """Whether a signal waits for the end of a batch, an update or the like."""
    return number in STOP_SIGNALS or bool(_state.notices)


def _together(number: int) -> bool:
    """Whether to leave a signal to what several processes agree upon."""
    return _may_wait(number) and distributed.world_size() > 1


def _watch(read_end: int, say: Callable[[str], None]) -> None:
    """End the process when a signal's patience is over; Python hands over its number as soon as it arrives."""
    came: dict[int, float] = {}
    deadlines: dict[int, float] = {}
    while True:
        ready, _, _ = select.select([read_end], [], [], _CHECK_SECONDS if deadlines else None)
        now = time.monotonic()
        if ready:
            number = os.read(read_end, 1)[0]
            if number in PATIENCE_SECONDS:
                _await(number, now, came, deadlines)
        number = min(deadlines, key=deadlines.__getitem__, default=0)
        raised = _state.took_effect
        if _state.over or number == 0:
            continue
        if now > deadlines[number] or (raised is not None and now > raised + CLEANUP_SECONDS):
            interruption = Interruption(number, _promise(_state))
            say(interruption.message)
            os._exit(interruption.exit_code)


def _await(number: int, now: float, came: dict[int, float], deadlines: dict[int, float]) -> None:
    """Set until when a signal that has come just now may wait, and tell the user of a Ctrl-C that does."""
    first = came.setdefault(number, now)
    latest = now + PATIENCE_SECONDS[number]
    notices = list(_state.notices) if number == signal.SIGINT else []
    if first == now:
        deadlines[number] = now + COURTESY_SECONDS if notices else latest
        for notice in notices[-1:]:
            with suppress(OSError, ValueError):
                notice()
    elif now - first > SAME_SIGNAL_SECONDS:
        deadlines[number] = min(deadlines[number], latest)


@cache
def _mind_forks() -> None:
    os.register_at_fork(after_in_child=_let_go)


def _let_go() -> None:
    """In a forked child: die of signals as any process does.

    A pool of processes ends its workers by SIGTERM, and would wait for ever for one that only takes note of it.
    """
    for number in PATIENCE_SECONDS:
        if signal.getsignal(number) is _receive:
            signal.signal(number, signal.SIG_DFL)


def _silence_swallowed() -> None:
    """Say nothing of an `Interruption` in a place where Python cannot raise it, such as a destructor.

    Python would write a traceback there and go on; the watch sees to it that the process ends all the same.
    """
    others = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if not isinstance(unraisable.exc_value, Interruption):
            others(unraisable)

    sys.unraisablehook = hook
