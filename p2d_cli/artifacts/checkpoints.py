"""Checkpoints of a training that is still running: sealed with digests when whole, verified before use.

A checkpoint is a folder `checkpoint-<updates>` that the training loop writes. The seal is written last, so that a
folder without one, or with a file that differs from it, is no checkpoint.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from p2d_cli.artifacts.digests import read_digest

SEAL_NAME = "p2d_seal.json"
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that verifies."""

    folder: Path
    progress: dict[str, Any]
    """What the stage knew when it was sealed."""


def seal_checkpoint(folder: Path, progress: Mapping[str, Any]) -> None:
    """Record the digest of each file of a finished checkpoint, and what the stage has to know to go on from it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): read_digest(path) for path in paths}
    aside = folder / f".{SEAL_NAME}"
    aside.write_text(json.dumps({"files": files, "progress": dict(progress)}), encoding="utf-8")
    aside.rename(folder / SEAL_NAME)


def newest_checkpoint(root: Path) -> tuple[Checkpoint | None, tuple[str, ...]]:
    """Return the newest checkpoint below `root` that verifies, and what is wrong with each newer one."""
    problems: list[str] = []
    found = {int(match[1]): path for path in root.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))}
    for updates in sorted(found, reverse=True):
        try:
            return Checkpoint(found[updates], _verified(found[updates])), tuple(problems)
        except (OSError, ValueError, KeyError, TypeError) as problem:
            problems.append(f"{found[updates].name}: {problem}")
    return None, tuple(problems)


def _verified(folder: Path) -> dict[str, Any]:
    if not (folder / SEAL_NAME).is_file():
        raise ValueError("it was not finished")
    seal = json.loads((folder / SEAL_NAME).read_bytes())
    for name, digest in seal["files"].items():
        if not (folder / name).is_file():
            raise ValueError(f"{name} is missing")
        if read_digest(folder / name) != digest:
            raise ValueError(f"{name} has other bytes than were written")
    progress: dict[str, Any] = seal["progress"]
    return progress
