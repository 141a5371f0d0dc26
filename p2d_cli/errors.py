"""The errors that p2d tells its user about, each with the exit code it ends in.

A message says what was being done, what was expected and what was found; `hint` says what to do next.
Anything else that escapes a stage is a defect of p2d and exits with 70.
"""

from __future__ import annotations

from typing import ClassVar


class P2DError(Exception):
    """Base of all errors that are reported without a traceback."""

    exit_code: ClassVar[int] = 70

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(P2DError):
    """The command, a flag, a variable or a recipe asks for something that cannot be."""

    exit_code = 2


class DataError(P2DError):
    """Rows that cannot be read or used; names file and line where there is one."""

    exit_code = 65


class ArtifactError(P2DError):
    """An artifact that is damaged, of another kind, of a newer schema or of another model."""

    exit_code = 65


class UnavailableError(P2DError):
    """A model or data set that is neither on disk nor reachable, or an optional package not installed."""

    exit_code = 69


class NonFiniteError(P2DError):
    """A weight, score or loss that is not a finite number; nothing was written."""

    exit_code = 70


class CannotCreateError(P2DError):
    """The output cannot be created: it exists and holds something else, or its parent is not writable."""

    exit_code = 73


class StorageError(P2DError):
    """Reading or writing failed half-way: full disk, lost mount, failing device."""

    exit_code = 74


class StoppedEarlyError(P2DError):
    """Stopped before the end; running the same command again resumes."""

    exit_code = 75


class PeerLostError(StoppedEarlyError):
    """Another process of the same command is gone without saying why; what was finished is kept."""


INTERRUPTED_EXIT_CODE = 130

EXIT_CODES: dict[int, str] = {
    0: "done, or already up to date",
    2: "usage: a flag, variable or recipe key is wrong",
    65: "bad data or artifact",
    69: "model, data set or optional package not available",
    70: "internal error, or a value that is not finite",
    73: "cannot create the output",
    74: "input/output error",
    75: "stopped early: run the same command again to resume",
    INTERRUPTED_EXIT_CODE: "interrupted with Ctrl-C",
}


def first_line(problem: BaseException) -> str:
    """Return what another library's exception says first; its name where it says nothing."""
    lines = str(problem).strip().splitlines()
    return lines[0] if lines else type(problem).__name__
