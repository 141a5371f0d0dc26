"""How many of the chosen rows are of the target's task, where somebody knows: for measuring, never for choosing."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from p2d_cli.artifacts.digests import digest_file
from p2d_cli.artifacts.manifest import InputEntry
from p2d_cli.config import MineDataConfig
from p2d_cli.errors import DataError
from p2d_cli.stages.execution import StageRun


@dataclass
class RelevanceTally:
    """Counts relevant rows, in the pool and among the chosen."""

    relevant: frozenset[str]
    """Ids of the rows that are of the target's task."""
    in_pool: int = 0
    found: int = 0
    listed: int = 0

    def add(self, name: str, *, chosen: bool, listed: bool = True) -> None:
        """Take note of a row of the pool, by its id: whether it was chosen, and whether it could be."""
        if name in self.relevant:
            self.in_pool += 1
            self.listed += listed
            self.found += chosen

    def require_known(self, names: Iterable[str]) -> None:
        """Refuse ids that are none of a pool's, before it is scored.

        Raises:
            DataError: no relevant row is among `names`.
        """
        if not any(name in self.relevant for name in names):
            raise DataError(
                "none of the ids of --relevance is the id of a row of the pool",
                hint="give the ids as `mine-data --method full` writes them to pool_scores.parquet",
            )

    def summary(self, chosen: int, rows: int) -> dict[str, Any]:
        """Return precision and recall of `chosen` rows of a pool of `rows`, and the precision of chance."""
        return {
            "precision": self.found / chosen,
            "recall": self.found / self.in_pool,
            "listed_recall": self.listed / self.in_pool,
            "rows_relevant": self.in_pool,
            "chance_precision": self.in_pool / rows,
        }


def open_relevance(job: StageRun[MineDataConfig]) -> RelevanceTally | None:
    """Read the ids that `--relevance` names, and register the file as an input.

    Raises:
        DataError: it cannot be read, or is not `{"relevant": [id, ...]}`.
    """
    spec = job.config.relevance
    if spec is None:
        return None
    path = Path(spec).expanduser()
    try:
        relevant = json.loads(path.read_bytes())["relevant"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as problem:
        raise DataError(
            f'--relevance {spec}: expected a JSON object {{"relevant": [ids]}}; found {problem!r:.80}',
            hint="it names pool rows by their ids; it only measures, so leaving it out changes no choice",
        ) from None
    if not isinstance(relevant, list) or not all(isinstance(name, str) for name in relevant):
        raise DataError(
            f"--relevance {spec}: expected a list of ids, which are texts, under 'relevant'",
            hint="write numbers as texts too, as the subset's pool_scores.parquet does",
        )
    job.inputs.entries["relevance"] = InputEntry(kind="relevance", digest=digest_file(path), source=spec)
    return RelevanceTally(frozenset(relevant))
