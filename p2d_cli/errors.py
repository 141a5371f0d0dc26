"""The errors that p2d tells its user about, each with the exit code it ends in.

A message says what was being done, what was expected and what was found; `hint` says what to do next.
Anything else that escapes a stage is a defect of p2d and exits with 70.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import ClassVar

INTERRUPTED_EXIT_CODE = 130


_FLOAT32_HELPS = re.compile(r"(, or |; |)try --dtype float32$")


class P2DError(Exception):
    """Base of all errors that are reported without a traceback."""

    exit_code: ClassVar[int] = 70

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        self.message = without_secrets(message)
        self.hint = None if hint is None else without_secrets(hint)
        super().__init__(self.message)


class UsageError(P2DError):
    """The command, a flag, a variable or a recipe asks for something that cannot be."""

    exit_code = 2


class DataError(P2DError):
    """Rows that cannot be read or used; names file and line where there is one."""

    exit_code = 65


class ArtifactError(P2DError):
    """An artifact that is damaged, of another kind, of a newer schema or of another model."""

    exit_code = 65


class ModelError(P2DError):
    """A model that cannot do what was asked of it: its architecture, its attention or its tokenizer rules it out."""

    exit_code = 65


class UnavailableError(P2DError):
    """A model or data set that is neither on disk nor reachable, or an optional package not installed."""

    exit_code = 69


class NonFiniteError(P2DError):
    """A weight, score or loss that is not a finite number; nothing was written."""

    exit_code = 70

    def forget_float32(self) -> None:
        """Leave out of the hint that float32 may help, for work that is done in it already."""
        self.hint = _FLOAT32_HELPS.sub("", self.hint or "") or None


class MemoryExhaustedError(P2DError):
    """The device's or the machine's memory is too small for the smallest piece of the work; nothing was written."""

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


class InterruptedEarlyError(StoppedEarlyError):
    """Stopped before the end by Ctrl-C, where that waits for the end of what is being done."""

    exit_code = INTERRUPTED_EXIT_CODE


class PeerLostError(StoppedEarlyError):
    """Another process of the same command is gone without saying why; what was finished is kept."""


EXIT_CODES: dict[int, str] = {
    0: "done, or already up to date",
    2: "usage: a flag, variable or recipe key is wrong",
    65: "bad data, model or artifact",
    69: "model, data set or optional package not available",
    70: "internal error, out of memory, or a value that is not finite",
    73: "cannot create the output",
    74: "input/output error",
    75: "stopped early: run the same command again to resume",
    INTERRUPTED_EXIT_CODE: "interrupted with Ctrl-C",
}


SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")
"""Secrets are taken from these variables alone, and by the libraries that use them."""
_SHORTEST_SECRET = 6
_CREDENTIALS = re.compile(r"(?<=://)[^\s/@'\"]+@")


def without_secrets(text: str) -> str:
    """Return a text without the values of variables that hold secrets, and without the credentials of URLs."""
    for variable in SECRET_VARIABLES:
        if len(secret := os.environ.get(variable, "")) >= _SHORTEST_SECRET:
            text = text.replace(secret, "***")
    return _CREDENTIALS.sub("***@", text)


NOT_FINITE_HINT = "look for NaN in the model's weights, or try --dtype float32"
LESS_MEMORY = "lower --token-budget or --max-length, or take a device with more memory"
_OUT_OF_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|out of memory|CUBLAS_STATUS_ALLOC_FAILED|std::bad_alloc", re.IGNORECASE
)


def is_out_of_memory(problem: BaseException) -> bool:
    """Say whether Python, NumPy or torch, on any device, could not get the memory it asked for.

    torch has a class of its own for accelerators, known here by its name; its CPU allocator has only a text.
    """
    if isinstance(problem, MemoryError) or type(problem).__name__ == "OutOfMemoryError":
        return True
    return isinstance(problem, RuntimeError) and _OUT_OF_MEMORY.search(str(problem)) is not None


def first_line(problem: BaseException) -> str:
    """Return what another library's exception says first; its name where it says nothing."""
    lines = str(problem).strip().splitlines()
    return lines[0] if lines else type(problem).__name__


def near_names(path: Path) -> str:
    """Return a hint for a path that leads nowhere: what its folder holds of a similar name."""
    folder = path.parent
    if not folder.is_dir():
        return f"the folder {folder} does not exist either"
    near = difflib.get_close_matches(path.name, sorted(entry.name for entry in folder.iterdir()), n=3)
    return f"did you mean {' or '.join(near)}?" if near else f"nothing of a similar name lies in {folder}"
