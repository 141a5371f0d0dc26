"""inspect: verify an artifact, and read from it what a person would want to see."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from p2d_cli.artifacts.head_scores import HeadScores, load_head_scores
from p2d_cli.artifacts.manifest import Manifest, is_artifact
from p2d_cli.artifacts.pool_index import IndexFound, inspect_index
from p2d_cli.artifacts.store import open_artifact, recover
from p2d_cli.artifacts.subset import load_extreme_rows
from p2d_cli.errors import ArtifactError
from p2d_cli.registry import HEAD_METHODS

EXTREMES = 5


@dataclass(frozen=True)
class Inspection:
    """What was found in an artifact that verified."""

    folder: Path
    manifest: Manifest
    heads: HeadScores | None = None
    best_rows: tuple[tuple[str, float, str], ...] = ()
    """Id, score and text of the best rows of a subset."""
    last_rows: tuple[tuple[str, float, str], ...] = ()
    """The same of the last rows that were still chosen."""
    warnings: tuple[str, ...] = ()


def inspect(folder: Path) -> Inspection | IndexFound:
    """Verify every file of an artifact, or of the index of a pool, and read what it says.

    Raises:
        ArtifactError: it is neither, or a file is missing or damaged.
    """
    recover(folder)
    if not folder.exists():
        raise ArtifactError(f"there is nothing at {folder}", hint="give a folder that p2d wrote")
    if not is_artifact(folder):
        if (index := inspect_index(folder)) is not None:
            return index
        raise ArtifactError(
            f"{folder} is not an artifact: it has no manifest.json", hint="give a folder that p2d wrote"
        )
    manifest = open_artifact(folder)
    if manifest.kind == "heads":
        return Inspection(folder, manifest, heads=load_head_scores(folder), warnings=_ranking_warnings(manifest))
    if manifest.kind == "subset":
        best, last = (tuple(map(_described, rows)) for rows in load_extreme_rows(folder, EXTREMES))
        differ = best[:1] and best[0][1] != last[-1][1]  # scores fall from the first row to the last
        return Inspection(folder, manifest, best_rows=best, last_rows=last if differ else ())
    return Inspection(folder, manifest)


def _is_control(method: str) -> bool:
    return method in HEAD_METHODS and bool(HEAD_METHODS[method].is_control)


def _ranking_warnings(manifest: Manifest) -> tuple[str, ...]:
    """Say so if two draws agree no better than chance: in the heads they choose, or in the ranking of all.

    The rank correlation of two independent rankings of n heads has a standard deviation of `1 / sqrt(n - 1)`.
    """
    repeat = manifest.summary.get("repeatability")
    if repeat is None or _is_control(manifest.summary["method"]):
        return ()
    chance_spearman = 2 / math.sqrt(max(manifest.summary["heads_total"] - 1, 1))
    if repeat["mean_jaccard"] > 2 * repeat["chance_jaccard"] and repeat["mean_spearman"] > chance_spearman:
        return ()
    return (
        f"this ranking is hardly better than chance: draws share {repeat['mean_jaccard']:.2f} of their heads"
        f" (random choices {repeat['chance_jaccard']:.2f}), with a rank correlation of {repeat['mean_spearman']:.2f}"
        f" (chance stays below {chance_spearman:.2f}); more rows or episodes would tell",
    )


def _described(row: dict[str, Any]) -> tuple[str, float, str]:
    text = " | ".join(str(value) for name, value in row.items() if name not in {"id", "score", "rank"})
    return str(row["id"]), float(row["score"]), text
