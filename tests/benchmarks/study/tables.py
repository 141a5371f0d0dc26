"""Make `RESULTS.md`, every table of the study, from what `collect.py` kept.

    python tests/benchmarks/study/tables.py > tests/benchmarks/study/RESULTS.md

Of the two pools there is a table each, a line a run, a column a target; of each other recipe one, by AER. Scores are
means over seeds, differences are paired.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results"
INTRODUCTION = """\
# What the study found

On SmolLM2-135M-Instruct and two CPU cores, in 3 epochs; where nothing else is said, a tenth of the heads. Scores have
95% bootstrap intervals over test rows, differences are of the same rows, paired. AER is the cost, selection included,
over that of full fine-tuning on all rows, STR the selection's part of it. Made by `tables.py` from `results`.
"""
TARGETS = {
    "banking77": ("banking77", "exact_match"),
    "snips_parse": ("snips-nlu", "exact_match"),
    "commonsense_qa": ("CommonsenseQA", "accuracy"),
    "disfl_qa": ("Disfl-QA", "exact_match"),
}
"""What each target of the pools is called, and what its score is."""
P2D = "heads-readout-p2d"
SELECTORS = ("lexical", "rds", "embedding", "random")
RUNS = {
    "untrained": "untrained",
    P2D: "heads, **p2d rows**",
    **{f"heads-readout-{name}-as-p2d": f"heads, {name} rows" for name in SELECTORS},
    **{f"heads-readout-{name}-d0.1": f"heads, {name} rows, a tenth" for name in SELECTORS},
    "heads-random-p2d": "random heads, p2d rows",
    "attention-p2d": "attention, p2d rows",
    "lora-p2d": "LoRA, p2d rows",
    "full-p2d": "full, p2d rows",
    "full-full-e1": "full, all rows, one epoch",
}
"""The lines of a pool's table, by the folders of their evaluations without the seed."""


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
    rows: float


class Study(NamedTuple):
    """What one recipe's table is called, what it shows, and the run that others are compared with."""

    recipe: str
    title: str
    text: str
    baseline: str = "full, all rows"


STUDIES = (
    Study("banking77", "banking77, a pool of one task", "1,000 rows, 100 are chosen, 100 test rows, three seeds."),
    Study("coverage", "banking77, rows that cover the pool", "The same, two seeds.", "random heads, random rows"),
    Study("snips_parse", "snips-nlu, a pool of one task", "1,000 rows, 100 are chosen, 100 test rows, two seeds."),
    Study("sweep", "banking77, shares of heads and of rows", "1,000 rows, 200 test rows, one seed."),
)


def main() -> None:
    print(INTRODUCTION)
    pools = (pool_section(pool) for pool in POOLS if found(pool.name))
    print("\n\n".join([*pools, *(section(study) for study in STUDIES)]))


def section(study: Study) -> str:
    sources = f"`{study.recipe}.toml`, raw result `results/{study.recipe}.json`."
    return "\n\n".join([f"## {study.title}", f"{study.text} {sources}", table(read(study.recipe), study.baseline)])


def found(pool: str) -> dict[str, dict[str, Any]]:
    """Return the raw results of a pool's targets, as far as they are there."""
    paths = {target: RESULTS / f"{pool}_{target}.json" for target in TARGETS}
    return {target: json.loads(path.read_text(encoding="utf-8")) for target, path in paths.items() if path.is_file()}


def pool_section(pool: Pool) -> str:
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
        lines[folder_of(rows[0])] = Run(
            score=group["metrics"][metric]["value"],
            seeds=len(rows),
            aer=fmean((row["total_seconds"] + document["uncharged"].get(row["path"], 0.0)) / seconds for row in rows),
            precision=fmean(precisions) if precisions else None,
            rows=fmean(row["row_share"] or 0.0 for row in rows) * document["pool_rows"],
        )
    return lines


def folder_of(row: dict[str, Any]) -> str:
    """Return the folder of a run's evaluation, without its seed."""
    return re.sub(r"-s\d+$", "", Path(row["path"]).name)


def scores(documents: dict[str, dict[str, Any]]) -> str:
    """Return the scores, a line a run, a column a target, with means and costs where all targets are there."""
    lines = {target: runs_of(document, TARGETS[target][1]) for target, document in documents.items()}
    heading = ["trained", *(TARGETS[target][0] for target in documents), "mean", "right rows", "AER", "speed-up"]
    kept = [runs[P2D].rows for runs in lines.values()]
    table = [heading, ["---"] * len(heading), ["*rows kept*", *(f"{rows:.0f}" for rows in kept), "", "", "", ""]]
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


def read(recipe: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((RESULTS / f"{recipe}.json").read_text(encoding="utf-8"))
    return document


def table(document: dict[str, Any], baseline: str) -> str:
    """Return the table of one recipe; its score is the report's first metric.

    A reference that was cut short has a cost, but no score.
    """
    report, away = document["report"], document["differences"][baseline]
    is_cut_short = report["reference"]["extrapolated"]
    metric = next(iter(report["rows"][0]["metrics"]))
    groups = report["groups"] or [row | {"members": [place]} for place, row in enumerate(report["rows"])]
    knows_truth = any(row["precision"] is not None for row in report["rows"])
    headings = ["run", metric.replace("_", " "), f"less {baseline}", "AER", "STR", "parameters", "peak (GiB)", "seeds"]
    lines = [headings, ["---"] * len(headings)]
    for group in groups:
        members = [report["rows"][place] for place in group["members"]]
        line = cells(group, members, metric, away.get(group["name"], {}).get(metric))
        if group["is_reference"] and is_cut_short:
            line[:3] = [f"{group['name']} (cut short)", "", ""]
        lines.append(line)
    if knows_truth:
        right = ["right rows", "---", *(share(report["rows"][group["members"][0]]["precision"]) for group in groups)]
        lines = [[*line[:5], cell, *line[5:]] for line, cell in zip(lines, right, strict=True)]
    return markdown(lines)


def cells(
    group: dict[str, Any], members: list[dict[str, Any]], metric: str, away: dict[str, float] | None
) -> list[str]:
    score = group["metrics"][metric]
    is_control = group["is_control"] and not group["is_reference"]
    return [
        group["name"] + (" (control)" if is_control else ""),
        interval(score["value"], score["low"], score["high"]),
        interval(away["difference"], away["low"], away["high"], sign="+") if away else "",
        f"{group['aer']:.3f}",
        f"{group['str_ratio']:.3f}",
        share(members[0]["trainable_share"]),
        f"{max(row['peak_gib'] for row in members):.1f}",
        str(len(members)),
    ]


def markdown(lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.{1 if value < 0.1 else 0}f}%"


def interval(value: float, low: float, high: float, sign: str = "") -> str:
    return f"{value:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


if __name__ == "__main__":
    main()
