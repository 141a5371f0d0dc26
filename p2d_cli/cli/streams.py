"""stdout and stderr as p2d finds them: closed, cut off by `| head`, on a full disk, or of a locale without Unicode."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def prepare_streams() -> None:
    """Make stdout and stderr take every text, whatever the locale, and lead nowhere where they were closed."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # The lowest free number is taken: else the next file that is opened would be stdout to a library.
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115 - for the whole process
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def abandon_unwritable_streams() -> None:
    """Drop what a stream still holds that nobody reads or nothing can hold, so that the process can end in order."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                sink = os.open(os.devnull, os.O_WRONLY)
                os.dup2(sink, stream.fileno())
                os.close(sink)


def visible(text: str) -> str:
    """Return a text with its control characters written out, line feeds and tabs apart.

    Rows and artifacts may come from anywhere: what they hold must not steer the terminal.
    """
    return text.translate(_CONTROLS)
