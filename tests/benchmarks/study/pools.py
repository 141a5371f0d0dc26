"""The tables of the two pools, one a pool, from what `collect.py` kept of its four targets.

A line a run, a column a target: means over seeds, with 95% bootstrap intervals over test rows where runs are compared.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results"
TARGETS = {
    "banking77": ("banking77", "exact_match"),
    "snips_parse": ("snips-nlu", "exact_match"),
    "commonsense_qa": ("CommonsenseQA", "accuracy"),
    "disfl_qa": ("Disfl-QA", "exact_match"),
}
P2D = "readout heads, p2d rows"
SELECTORS = ("lexical", "rds", "embedding")
"""Whose rows p2d's have to beat."""
RUNS = {
    "base model": "untrained",
    P2D: "heads, **p2d rows**",
    **{f"readout heads, {name} rows as p2d": f"heads, {name} rows" for name in (*SELECTORS, "random")},
    **{f"readout heads, {name} rows 10%": f"heads, {name} rows, a tenth" for name in (*SELECTORS, "random")},
    "random heads, p2d rows": "random heads, p2d rows",
    "attention, p2d rows": "attention, p2d rows",
    "lora, p2d rows": "LoRA, p2d rows",
    "full, p2d rows": "full, p2d rows",
}
REFERENCE = "full, all rows"


class Pool(NamedTuple):
    """One of the pools."""

    name: str
    title: str
    text: str


POOLS = (
    Pool(
        "big",
        "Rare rows in a large pool",
        "42,381 rows, 200 of each target's task (0.47%) beside thousands of look-alikes.",
    ),
    Pool("mixed", "A mixed pool", "10,496 rows of 21 tasks, some 500 of each target's (4.8%)."),
)


class Run(NamedTuple):
    """One line of a table for one target."""

    score: float
    seeds: int
    aer: float
    precision: float | None
    rows: float | None


def main() -> None:
    print("\n\n".join(section(pool) for pool in POOLS if found(pool.name)))


def found(pool: str) -> dict[str, dict[str, Any]]:
    """Return the raw results of a pool's targets, as far as they are there."""
    paths = {target: RESULTS / f"{pool}_{target}.json" for target in TARGETS}
    return {target: json.loads(path.read_text(encoding="utf-8")) for target, path in paths.items() if path.is_file()}


def section(pool: Pool) -> str:
    documents = found(pool.name)
    recipes = ", ".join(f"`{pool.name}_{target}.toml`" for target in documents)
    return "\n\n".join(
        [f"## {pool.title}", f"{pool.text} {recipes}.", scores(documents), DIFFERENCES, differences(documents)]
    )


DIFFERENCES = "Heads on p2d's rows less heads on as many rows of others, and less other trainings, in points, paired:"


def runs_of(document: dict[str, Any], metric: str) -> dict[str, Run]:
    """Return the lines of one target, by name of the run; each charged with the whole of an index that it shared."""
    report = document["report"]
    groups = report["groups"] or [row | {"members": [place]} for place, row in enumerate(report["rows"])]
    seconds, lines = report["reference"]["seconds"], {}
    for group in groups:
        rows = [report["rows"][place] for place in group["members"]]
        precisions = [row["precision"] for row in rows if row["precision"] is not None]
        shares = [row["row_share"] for row in rows if row["row_share"] is not None]
        lines[group["name"]] = Run(
            score=group["metrics"][metric]["value"],
            seeds=len(rows),
            aer=fmean((row["total_seconds"] + document["uncharged"].get(row["path"], 0.0)) / seconds for row in rows),
            precision=fmean(precisions) if precisions else None,
            rows=fmean(shares) if shares else None,
        )
    return lines


def scores(documents: dict[str, dict[str, Any]]) -> str:
    """Return the scores, a line a run, a column a target, with means and costs where all targets are there."""
    lines = {target: runs_of(document, TARGETS[target][1]) for target, document in documents.items()}
    heading = ["trained", *(TARGETS[target][0] for target in documents), "mean", "right rows", "AER", "speed-up"]
    table = [heading, ["---"] * len(heading)]
    for name, words in RUNS.items():
        here = [runs[name] for runs in lines.values() if name in runs]
        if not here:
            continue
        right = [run.precision for run in here if run.precision is not None]
        aer = fmean(run.aer for run in here)
        table.append(
            [
                words,
                *(score_text(runs.get(name)) for runs in lines.values()),
                f"{fmean(run.score for run in here):.3f}" if len(here) == len(documents) else "",
                f"{fmean(right):.2f}" if right else "",
                f"{aer:.3f}" if aer else "",
                f"{1 / aer:.0f}x" if aer else "",
            ]
        )
    return markdown(table)


def score_text(run: Run | None) -> str:
    """Return a score, with the number of seeds where it is one."""
    if run is None:
        return ""
    return f"{run.score:.3f}" + (" (1)" if run.seeds == 1 else "")


def differences(documents: dict[str, dict[str, Any]]) -> str:
    """Return by how much p2d's heads and rows are ahead of each other run, with intervals."""
    heading = ["less", *(TARGETS[target][0] for target in documents)]
    table = [heading, ["---"] * len(heading)]
    for name, words in RUNS.items():
        cells = [
            points(document["p2d_less"].get(name, {}).get(TARGETS[target][1])) for target, document in documents.items()
        ]
        if any(cells):
            table.append([words, *cells])
    return markdown(table)


def points(away: dict[str, float] | None) -> str:
    """Return a difference in points of a hundred, with its interval."""
    if away is None:
        return ""
    value, low, high = (100 * away[key] for key in ("difference", "low", "high"))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def markdown(table: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in table)


if __name__ == "__main__":
    main()
