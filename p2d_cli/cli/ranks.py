"""Who speaks when several processes run one command: rank 0, and a rank whose failure nobody else can tell."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator

from p2d_cli.errors import EXIT_CODES, P2DError
from p2d_cli.runtime.distributed import adopt_launch, end_together, is_main_process, rank, world_size

SECONDS_TO_SPEAK = 1.0
"""A launcher kills the other processes when the first one fails; rank 0 may not have said yet why."""


@contextlib.contextmanager
def silent_follower() -> Iterator[None]:
    """Let nothing that runs in the body print, libraries included, unless this process is rank 0."""
    adopt_launch()
    if is_main_process() or "P2D_DEBUG" in os.environ:
        yield
        return
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,  # noqa: PTH123 - a device, not a path
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        try:
            yield
        except SystemExit as end:
            if end.code:
                time.sleep(SECONDS_TO_SPEAK)
            raise


@contextlib.contextmanager
def speaking(problem: P2DError) -> Iterator[bool]:
    """End all ranks with the error of this one; yields whether to say it here, and lets the body print if so."""
    speaks = end_together(problem)
    if not speaks or is_main_process():
        yield speaks
        return
    with contextlib.redirect_stderr(sys.__stderr__ or sys.stderr):
        sys.stderr.write(f"rank {rank()}: ")
        yield True


def exit_note(code: int) -> str | None:
    """Return what to say of the exit code where a launcher will hide it behind its own."""
    return f"exit code {code}: {EXIT_CODES[code]}" if world_size() > 1 else None
