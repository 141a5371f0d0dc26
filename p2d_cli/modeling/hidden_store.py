"""Hidden states of rows, kept in memory or in a file that several processes share.

Axes: N tokens of all rows, T tokens of a row, D hidden size.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from p2d_cli.core.wording import bytes_text

Tokens = tuple[int, ...]
Place = Literal["memory", "disk", "nowhere"]

_DISK_SHARE = 0.5
"""How much of the room that is left on the disk is taken at most."""


@dataclass(frozen=True)
class KeptWhere:
    """Where hidden states are kept, and how many bytes they take."""

    place: Place
    bytes: int

    def __str__(self) -> str:
        size = bytes_text(self.bytes)
        if self.place == "nowhere":
            return (
                f"computed anew in each epoch: there is no room for {size} in a quarter of memory or half of the disk"
            )
        return f"kept after the first epoch: {size} {'in memory' if self.place == 'memory' else 'on disk'}"


def place_for(
    rows: Iterable[Sequence[int]], width: int, itemsize: int, *, memory: int, folder: Path, shared: bool
) -> KeptWhere:
    """Decide where the hidden states of these rows go: into memory if they fit, else onto the disk of `folder`.

    Args:
        rows: their tokens; equal rows are kept once.
        width: D.
        itemsize: bytes a value.
        memory: bytes of it that may be taken.
        folder: where a file would be written.
        shared: whether other processes need them too, which takes a file.
    """
    needed = sum(map(len, {tuple(row) for row in rows})) * width * itemsize
    if not shared and needed <= memory:
        return KeptWhere("memory", needed)
    is_roomy = needed <= _DISK_SHARE * shutil.disk_usage(folder).free
    return KeptWhere("disk" if is_roomy else "nowhere", needed)


class HiddenStates:
    """A place for the hidden states of each of some rows, `[T, D]`, empty at first.

    A file is mapped into memory, so that its pages are the system's to keep or to write; processes of one machine see
    each other's rows in it. It has no name any more once all have opened it, and is gone with the last of them.
    """

    def __init__(self, rows: Iterable[Tokens], width: int, dtype: torch.dtype, file: Path | None = None) -> None:
        """Make room.

        Args:
            rows: the tokens of those that will be put there.
            width: D.
            dtype: of the hidden states.
            file: None for memory. Each process that shares it gives the same path, and calls `hide` when all have.

        Raises:
            OSError: there is no room for the file.
        """
        self._spans: dict[Tokens, tuple[int, int, int]] = {}
        tokens = 0
        for row in rows:
            if row not in self._spans:
                self._spans[row] = len(self._spans), tokens, tokens + len(row)
                tokens += len(row)
        self._files: list[Path] = []
        if file is None:
            # Pages that nothing was written to take no memory.
            self._states_ND = torch.empty(tokens, width, dtype=dtype)
            self._is_there = torch.zeros(len(self._spans), dtype=torch.uint8)
            return
        self._files = [_on_this_machine(file), _on_this_machine(file.with_name(f"{file.name}.rows"))]
        try:
            self._states_ND = _mapped(self._files[0], tokens * width, dtype).view(tokens, width)
            self._is_there = _mapped(self._files[1], len(self._spans), torch.uint8)
        except OSError:
            self.hide()
            raise

    def hide(self) -> None:
        """Take the name off the file, so that nothing is left behind whatever becomes of the process."""
        for file in self._files:
            with suppress(OSError):
                file.unlink(missing_ok=True)

    def get(self, row: Tokens) -> Tensor | None:
        """Return the hidden states of a row, or None where they are not there."""
        if row not in self._spans:
            return None
        place, start, end = self._spans[row]
        return self._states_ND[start:end] if self._is_there[place] else None

    def put(self, row: Tokens, states_TD: Tensor) -> None:
        """Keep the hidden states of a row, if it is one of those that there is room for."""
        if row in self._spans:
            place, start, end = self._spans[row]
            self._states_ND[start:end].copy_(states_TD)
            self._is_there[place] = 1


def _on_this_machine(file: Path) -> Path:
    """Return a name of its own for each machine that works in one folder: their maps of one file would not agree."""
    return file.with_name(f"{file.name}.{platform.node()}")


def _mapped(file: Path, count: int, dtype: torch.dtype) -> Tensor:
    """Map a file of so many values, zeros at first, into memory."""
    size = max(count, 1) * dtype.itemsize
    with file.open("ab") as opened:
        # A map that the disk has no room for would end the process with a bus error.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(opened.fileno(), 0, size)
        else:
            opened.truncate(size)
    return torch.from_file(str(file), shared=True, size=max(count, 1), dtype=dtype)[:count]
