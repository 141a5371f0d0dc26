"""The terminal: consoles that texts cannot steer, progress on stderr, documents on stdout, and errors."""

from __future__ import annotations

import datetime
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.text import Text

from p2d_cli.cli.streams import visible
from p2d_cli.errors import InterruptedEarlyError, P2DError
from p2d_cli.runtime.distributed import is_main_process
from p2d_cli.runtime.progress import Advance, SilentProgress
from p2d_cli.runtime.progress import Progress as ProgressProtocol

SECONDS_BETWEEN_LINES = 10.0
_JSON_CONTROLS = {code: f"\\u{code:04x}" for code in range(0x7F, 0xA0)}
"""The control characters that JSON allows in a text, which a terminal might obey."""


class PlainConsole(Console):
    """A console whose texts cannot steer the terminal."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render as rich does, with the control characters of the texts written out."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)

    def on_broken_pipe(self) -> None:
        """Leave it to the command's boundary, where rich would exit with a code of its own."""
        raise BrokenPipeError


out = PlainConsole(highlight=False)
err = PlainConsole(stderr=True, highlight=False)


class _Bars(Progress):
    """Bars, with what is told of the work in a line below, since a terminal of 80 columns has no room beside them."""

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yield the bars, and then a line for each of them that there is something to say of."""
        yield from super().get_renderables()
        for task in self.tasks:
            if told := task.fields.get("told"):
                yield Text(f"  {told}", style="dim", no_wrap=True, overflow="ellipsis")


class BarProgress:
    """Bars on a terminal."""

    @contextmanager
    def task(self, label: str, total: int | None, *, found: int = 0) -> Iterator[Advance]:
        """Show a bar of `total` units while the body runs; the time left is by the speed of the last 30 seconds."""
        del found
        times = TimeElapsedColumn(), TimeRemainingColumn()
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *times
        with _Bars(*columns, console=err, transient=True) as bars:
            bar = bars.add_task(label, total=total)

            def advance(units: int, told: str | None = None, /, *, at_once: bool = False) -> None:
                del at_once  # a bar always shows it
                if told is not None:
                    bars.update(bar, told=told)
                bars.advance(bar, units)

            yield advance

    def note(self, message: str) -> None:
        """Write one line."""
        err.print(f"[dim]note:[/] {escape(message)}", soft_wrap=True)


class LineProgress:
    """A line now and then, for logs, each with the time of day.

    Args:
        clock: monotonic clock in seconds, which decides when a line is due.
        now: the time of day.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime.datetime] = datetime.datetime.now,
    ) -> None:
        self._clock = clock
        self._now = now

    @contextmanager
    def task(self, label: str, total: int | None, *, found: int = 0) -> Iterator[Advance]:
        """Write a line every ten seconds while the body runs, and where there is something to say at once."""
        started = last = self._clock()
        done, told_last = 0, ""

        def advance(units: int, told: str | None = None, /, *, at_once: bool = False) -> None:
            nonlocal done, last, told_last
            done += units
            told_last = told_last if told is None else f"; {told}"
            now = self._clock()
            if at_once or now - last >= SECONDS_BETWEEN_LINES:
                last = now
                self.note(f"{label}: {_how_far(done, total, now - started, found)}{told_last}")

        yield advance

    def note(self, message: str) -> None:
        """Write one line."""
        sys.stderr.write(f"{self._now():%H:%M:%S} {visible(message)}\n")
        sys.stderr.flush()


def _how_far(done: int, total: int | None, seconds: float, found: int) -> str:
    so_far = f"{done}, {seconds:.0f} s" if total is None else f"{done}/{total}, {seconds:.0f} s"
    if total is None or done <= found:
        return so_far
    left = seconds / (done - found) * (total - done)
    return f"{so_far}, about {f'{left:.0f} s' if left < 100 else seconds_text(left)} left"


def seconds_text(seconds: float | None) -> str:
    """Return a duration in the unit that suits it."""
    if seconds is None:
        return ""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def progress_for(*, quiet: bool) -> ProgressProtocol:
    """Return bars on a terminal, lines elsewhere, nothing when quiet or on a rank that is not the first."""
    if quiet or not is_main_process():
        return SilentProgress()
    return BarProgress() if err.is_terminal else LineProgress()


def print_json(document: dict[str, Any]) -> None:
    """Write one JSON document to stdout, in ASCII where the locale is not of Unicode."""
    is_unicode = (sys.stdout.encoding or "utf").lower().startswith("utf")
    text = json.dumps(document, indent=2, ensure_ascii=not is_unicode, default=str)
    # Halves of surrogate pairs, which no encoding takes, end as the escapes that JSON has for them.
    sys.stdout.write(text.translate(_JSON_CONTROLS) + "\n")


def print_error(problem: P2DError, note: str | None = None) -> None:
    """Write what went wrong and what to do next, and a note if there is one."""
    start = Text() if isinstance(problem, InterruptedEarlyError) else Text("error: ", style="bold red")
    err.print(start + Text(problem.message), soft_wrap=True)
    if problem.hint:
        err.print(Text("  try: ", style="bold") + Text(problem.hint), soft_wrap=True)
    if note:
        err.print(Text(f"  {note}"), soft_wrap=True)
