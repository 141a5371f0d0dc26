"""What an interrupted run leaves beside its output, for the same command to go on from.

The folder `.OUT.unfinished-<key>` holds journals of finished batches (`*.jsonl`), sealed checkpoints of a training
(`checkpoints/micro-batch-*/checkpoint-*`), the learning rates that were tried (`rate-probe/rates.json`), and
`origin.json`, which says what work it is of.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from p2d_cli.artifacts.checkpoints import SEAL_NAME, updates_of
from p2d_cli.core.wording import count_text

ORIGIN_NAME = "origin.json"
DIVERGED_NAME = "diverged"
"""Marks work that ended in a value that is not finite: other settings are what it asks for."""
RATES_FOLDER, RATES_NAME = "rate-probe", "rates.json"


@dataclass(frozen=True)
class Origin:
    """Whose work is unfinished."""

    identity: dict[str, Any]
    """Settings and inputs, as in a manifest; empty where an older p2d left none."""
    forced: bool
    """Whether `--force` began it, so that the same command with `--force` goes on from it."""

    @classmethod
    def load(cls, folder: Path) -> Origin:
        """Return what a folder of unfinished work says of itself."""
        try:
            found = json.loads((folder / ORIGIN_NAME).read_text(encoding="utf-8"))
            return cls(dict(found["identity"]), bool(found["forced"]))
        except (OSError, ValueError, KeyError, TypeError):
            return cls({}, forced=False)

    def save(self, folder: Path) -> None:
        """Record it in a folder, which is made, unless one that began the work did; what diverged may do better."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / DIVERGED_NAME).unlink(missing_ok=True)
        if not (folder / ORIGIN_NAME).exists():
            aside = folder / f"{ORIGIN_NAME}.new"
            aside.write_text(json.dumps(asdict(self)), encoding="utf-8")
            aside.replace(folder / ORIGIN_NAME)


def progress_in(folder: Path) -> str:
    """Return what a run would go on from, such as `12 updates`; empty if there is nothing."""
    sealed = folder.glob(f"checkpoints/micro-batch-*/checkpoint-*/{SEAL_NAME}")
    if updates := max((updates_of(path.parent) for path in sealed), default=0):
        return count_text(updates, "update")
    if any(map(_holds_batches, folder.glob("*.jsonl"))):
        return "finished batches"
    return "tried rates" if (folder / RATES_FOLDER / RATES_NAME).exists() else ""


def is_worth_keeping(folder: Path) -> bool:
    """Say whether a command with other settings is not to discard it."""
    return bool(progress_in(folder)) and not (folder / DIVERGED_NAME).exists()


def _holds_batches(journal: Path) -> bool:
    """Say whether a journal has a line below the one that says what it is of."""
    with suppress(OSError), journal.open("rb") as lines:
        return sum(line.endswith(b"\n") for line in islice(lines, 2)) == 2
    return False
