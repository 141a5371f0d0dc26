"""The finished batches of a stage that is still running, so that a stage that was killed goes on where it stopped.

A journal is a file of lines, one a batch: a checksum, and a JSON object with the batch's arrays and what they cost.
Lines are only ever appended. A line that was cut by a crash fails its checksum, and it and what follows is dropped.
The arrays come back bit by bit, and the plan of the batches is part of the journal, so that a stage that was
interrupted ends with the same numbers as one that was not.
"""

from __future__ import annotations

import base64
import json
import os
import time
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from p2d_cli.artifacts.digests import digest_json

SECONDS_BETWEEN_FLUSHES = 5.0
Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Entry:
    """One finished batch."""

    arrays: dict[str, NDArray[Any]]
    seconds: float
    """What the batch took when it was computed."""
    tokens: int


class Journal:
    """The finished batches of one piece of work.

    Args:
        path: the file; its folder is made.
        plan: the row indices of each batch. A journal of another plan is started anew.
        work: what the batches are for. A journal of other work is started anew as well.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, plan: Sequence[Sequence[int]], *, work: str = "") -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        header = {"plan": digest_json([list(batch) for batch in plan]), "work": work}
        self._stream = path.open("r+b" if path.exists() else "w+b")
        lines, length = _read(self._stream)
        if lines[:1] != [header]:
            lines, length = [], 0
        self.finished = {line["batch"]: line["entry"] for line in lines[1:]}
        """By the position of the batch in the plan."""
        self._stream.truncate(length)
        self._stream.seek(length)
        self._flushed = time.monotonic()
        if not lines:
            self._begin(header)

    def add(self, batch: int, arrays: Arrays, *, seconds: float, tokens: int) -> None:
        """Record a finished batch; it outlives the process at once, and the machine within seconds."""
        packed = {name: _pack(array) for name, array in arrays.items()}
        self._append({"batch": batch, "seconds": seconds, "tokens": tokens, "arrays": packed})

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def _begin(self, header: Mapping[str, Any]) -> None:
        """Write the head line; where that fails nobody enters the journal, who would close it."""
        try:
            self._append(header)
        except BaseException:
            with suppress(OSError):
                self._stream.close()
            raise

    def _append(self, line: Mapping[str, Any]) -> None:
        text = json.dumps(line, separators=(",", ":"))
        self._stream.write(f"{zlib.crc32(text.encode()):08x} {text}\n".encode())
        self._stream.flush()
        if time.monotonic() - self._flushed > SECONDS_BETWEEN_FLUSHES:
            os.fsync(self._stream.fileno())
            self._flushed = time.monotonic()


def pack_texts(texts: Sequence[str]) -> NDArray[np.uint8]:
    """Return texts as an array that a journal can hold."""
    return np.frombuffer(json.dumps(list(texts)).encode("ascii"), dtype=np.uint8)


def unpack_texts(packed: NDArray[np.uint8]) -> list[str]:
    """Return the texts that `pack_texts` took."""
    texts: list[str] = json.loads(packed.tobytes())
    return texts


def _read(stream: BinaryIO) -> tuple[list[dict[str, Any]], int]:
    """Return the sound lines at the start of a journal, and how many bytes they take."""
    lines: list[dict[str, Any]] = []
    length = 0
    for raw in stream:
        if (line := _line(raw, is_header=not lines)) is None:
            break
        lines.append(line)
        length += len(raw)
    return lines, length


def _line(raw: bytes, *, is_header: bool) -> dict[str, Any] | None:
    """Return what a line says, with its arrays unpacked; None if it was cut, damaged or written by something else."""
    checksum, _, text = raw.partition(b" ")
    if not text.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text[:-1]):
        return None
    try:
        line: dict[str, Any] = json.loads(text)
        return line if is_header else {"batch": int(line["batch"]), "entry": _entry(line)}
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _pack(array: NDArray[Any]) -> dict[str, Any]:
    data = base64.b64encode(array.tobytes()).decode("ascii")
    return {"dtype": array.dtype.str, "shape": list(array.shape), "data": data}


def _entry(line: Mapping[str, Any]) -> Entry:
    arrays = {
        name: np.frombuffer(base64.b64decode(packed["data"]), dtype=packed["dtype"]).reshape(packed["shape"])
        for name, packed in line["arrays"].items()
    }
    return Entry(arrays, line["seconds"], line["tokens"])
