"""Checkpoints of a training that is still running: sealed with digests when whole, verified before use.

A checkpoint is a folder `checkpoint-<updates>` that the training loop writes. The seal is written last, so that a
folder without one, or with a file that differs from it, is no checkpoint.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from p2d_cli.artifacts.digests import read_digest
from p2d_cli.artifacts.flushing import flush_directory, flush_file, flush_tree

SEAL_NAME = "p2d_seal.json"
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that verifies."""

    folder: Path
    progress: dict[str, Any]
    """What the stage knew when it was sealed."""

    @property
    def updates(self) -> int:
        """How many updates were made."""
        return updates_of(self.folder)


def updates_of(folder: Path) -> int:
    """Return how many updates were made before a checkpoint, as its name says."""
    return int(folder.name.rpartition("-")[2])


def seal_checkpoint(folder: Path, progress: Mapping[str, Any]) -> None:
    """Record the digest of each file of a finished checkpoint, and what the stage has to know to go on from it.

    Args:
        folder: the checkpoint; every process that writes into it has finished.
        progress: what the stage has to know; `work` in it says what the checkpoint is a part of.
    """
    flush_tree(folder)
    seal = {"name": folder.name, "files": _digests(folder), "progress": dict(progress)}
    aside = folder / f".{SEAL_NAME}"
    aside.write_text(json.dumps(seal), encoding="utf-8")
    flush_file(aside)
    aside.rename(folder / SEAL_NAME)
    flush_directory(folder)
    flush_directory(folder.parent)


def newest_checkpoint(root: Path, *, work: str | None = None) -> tuple[Checkpoint | None, tuple[str, ...]]:
    """Return the newest checkpoint below `root` that verifies, and what is wrong with each newer one.

    Args:
        root: the folder of the checkpoints.
        work: what they must be a part of, as their `progress` says.
    """
    problems: list[str] = []
    for folder in _newest_first(root):
        try:
            return Checkpoint(folder, _verified(folder, work)), tuple(problems)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
            problems.append(f"{folder.name}: {problem}")
    return None, tuple(problems)


def discard_newer(root: Path, kept: Checkpoint | None) -> None:
    """Remove the checkpoints below `root` that are newer than the one to go on from, as none of them verifies.

    Trainer keeps those with the highest numbers: for their sake it would remove what it writes next.
    """
    for folder in _newest_first(root):
        if kept is not None and folder == kept.folder:
            return
        shutil.rmtree(folder, ignore_errors=True)


def _newest_first(root: Path) -> list[Path]:
    found = {int(match[1]): path for path in root.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))}
    return [found[updates] for updates in sorted(found, reverse=True)]


def _verified(folder: Path, work: str | None) -> dict[str, Any]:
    if not (folder / SEAL_NAME).is_file():
        raise ValueError("it was not finished")
    seal = json.loads((folder / SEAL_NAME).read_bytes())
    if seal["name"] != folder.name:
        raise ValueError(f"it was written as {seal['name']}")
    files, found = seal["files"], _digests(folder)
    for name, digest in files.items():
        if name not in found:
            raise ValueError(f"{name} is missing")
        if found[name] != digest:
            raise ValueError(f"{name} has other bytes than were written")
    if added := sorted(found.keys() - files.keys()):
        raise ValueError(f"{added[0]} was added to it")
    progress: dict[str, Any] = seal["progress"]
    if progress.get("work") != work:
        raise ValueError("it is of another run")
    return progress


def _digests(folder: Path) -> dict[str, str]:
    """Return the digest of every file of a checkpoint but its seal, by the name relative to the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name.lstrip(".") != SEAL_NAME)
    return {path.relative_to(folder).as_posix(): read_digest(path) for path in files}
