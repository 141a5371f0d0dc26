"""`python -m p2d_cli` and the `p2d` command."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import NoReturn

from p2d_cli.runtime import signals
from p2d_cli.runtime.distributed import is_main_process

SHOW_CURSOR = "\x1b[?25h"


def main() -> None:
    """Run the command line; ends the process with a documented exit code."""
    signals.own_process(_say)
    try:
        # Importing takes a second or more, in which a user may think better of it.
        from p2d_cli.cli.ranks import silent_follower

        with silent_follower():
            from p2d_cli.cli.app import app

            app()
    except signals.Interruption as interruption:
        signals.finished()
        _say(interruption.message)
        _leave(interruption.exit_code)
    except SystemExit as end:
        signals.finished()
        if signals.took_effect() and isinstance(end.code, int):
            _leave(end.code)
        raise


def _leave(code: int) -> NoReturn:
    """End at once: what a signal interrupted is not fit to be taken down in good order, nor is it quick."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _say(line: str) -> None:
    """Write a line past all that may be in the middle of writing, on rank 0; a bar may have hidden the cursor."""
    if not is_main_process():
        return
    start = f"{SHOW_CURSOR}\n" if sys.stderr.isatty() else ""
    os.write(2, f"{start}{line}\n".encode())


if __name__ == "__main__":
    main()
