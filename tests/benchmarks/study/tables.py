"""Make `RESULTS.md`, every table of the study, from what `collect.py` kept.

    python tests/benchmarks/study/tables.py > tests/benchmarks/study/RESULTS.md

Methods stand by AER, means over seeds, with the paired difference from one run, a control or the reference.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results"
INTRODUCTION = """\
# What the study found

Each table is what one recipe of this folder gave, on SmolLM2-135M-Instruct in float32 on two CPU cores, in 3 epochs;
where nothing else is said, a tenth of the rows and a tenth of the heads. Scores have 95% bootstrap intervals over
test rows, differences are of the same rows, paired. AER is the cost, selection included, over that of full
fine-tuning on all rows, STR the selection's part of it. Made by `tables.py` from `results`; how the settings were
chosen is `choices.md`.
"""


class Study(NamedTuple):
    """What one recipe's table is called, what it shows, and the run that others are compared with."""

    recipe: str
    title: str
    text: str
    baseline: str = "full, all rows"
    one_epoch: str = ""
    """The raw result of one epoch on all rows, where three were cut short."""
    crossed_with: tuple[str, ...] = ()
    """The recipes of the same grid's other cells."""


_WHOLE = (
    "10,496 rows of 21 tasks, 500 of them of the target's, 64 target rows; 1,050 rows are chosen, 200 test rows, one"
    " seed. Full fine-tuning was ended after 12 updates, and its cost extrapolated."
)
_MIXED = "1,312 rows of 21 tasks, 64 target rows; 132 rows are chosen, 200 test rows, one seed."
STUDIES = (
    Study(
        "whole_pool_banking77", "banking77 out of a large mixed pool", _WHOLE, "full, random rows", "whole_pool_epoch"
    ),
    Study(
        "whole_pool_snips_parse",
        "snips-nlu out of a large mixed pool",
        f"{_WHOLE} 4.53% of the rows, on which full fine-tuning was run as well, are those above the floor that the"
        " target's own rows set (`whole_pool_floor.sh`).",
        "full, random rows",
    ),
    Study("mixed_banking77", "banking77 out of a mixed pool", _MIXED, "full, random rows"),
    Study("mixed_snips_parse", "snips-nlu out of a mixed pool", _MIXED, "full, random rows"),
    Study(
        "mixed_gsm8k",
        "gsm8k out of a mixed pool",
        "1,312 rows of 21 tasks, 64 target rows; 132 rows are chosen, 100 test rows, one seed. A lower perplexity is"
        " better; full fine-tuning was ended after 12 updates, and its cost extrapolated.",
    ),
    *(
        Study(
            f"rows_{target}",
            f"{name} out of a mixed pool, other ways to choose rows",
            "The same on another day, on which full fine-tuning was ended after 12 updates, and its cost extrapolated."
            f" p2d keeps the {kept} rows above the floor that the target's own rows set (`floor-quantile = 0.05`), the"
            " others 132.",
            baseline,
        )
        for target, name, kept, baseline in (
            ("banking77", "banking77", 79, "random heads, random rows"),
            ("snips_parse", "snips-nlu", 53, "random heads, random rows"),
        )
    ),
    Study("cross", "Which heads are trained, on which rows", f"banking77. {_MIXED}"),
    Study(
        "cross_rows",
        "Which heads are trained, on which rows: the other rows",
        "The same, on another day, on which full fine-tuning was ended after 12 updates, and its cost extrapolated.",
        "random heads, all rows",
    ),
    Study(
        "cross_all_rows",
        "Which heads are trained, on which rows: all rows",
        "The same, on a third day, for the sets of heads that are left.",
        "uniform heads, all rows",
        crossed_with=("cross", "cross_rows"),
    ),
    Study("banking77", "banking77, a pool of one task", "1,000 rows, 100 are chosen, 100 test rows, three seeds."),
    Study("coverage", "banking77, rows that cover the pool", "The same, two seeds.", "random heads, random rows"),
    Study("snips_parse", "snips-nlu, a pool of one task", "1,000 rows, 100 are chosen, 100 test rows, two seeds."),
    Study("sweep", "banking77, shares of heads and of rows", "1,000 rows, 200 test rows, one seed."),
)


def main() -> None:
    print(INTRODUCTION)
    print("\n\n".join(section(study) for study in STUDIES))


def section(study: Study) -> str:
    sources = f"`{study.recipe}.toml`, raw result `results/{study.recipe}.json`."
    parts = [f"## {study.title}", f"{study.text} {sources}", table(read(study.recipe), study.baseline)]
    if study.one_epoch:
        parts.append(one_epoch(study.one_epoch))
    if study.crossed_with:
        parts += ["Exact match of all three together:", crossing(*study.crossed_with, study.recipe)]
    return "\n\n".join(parts)


def one_epoch(name: str) -> str:
    """Return what one epoch of full fine-tuning on all rows reached, in words."""
    report = read(name)["report"]
    row = next(row for row in report["rows"] if not row["is_reference"])
    score = row["metrics"]["exact_match"]
    return (
        f"One epoch of full fine-tuning on all rows, on another day, answers"
        f" {interval(score['value'], score['low'], score['high'])} after {row['train_seconds']:,.0f} s,"
        f" {row['aer']:.3f} of the three epochs that were extrapolated on that day"
        f" ({report['reference']['seconds']:,.0f} s)."
        f" `{name}.sh`, raw result `results/{name}.json`."
    )


def crossing(*recipes: str) -> str:
    """Return the scores of some recipes' runs, a line for each set of heads, a column for each set of rows."""
    scores = {}
    for row in (row for recipe in recipes for row in read(recipe)["report"]["rows"] if not row["is_reference"]):
        heads, rows = row["name"].split(" heads, ")
        score = row["metrics"]["exact_match"]
        scores[heads, rows] = interval(score["value"], score["low"], score["high"])
    methods, columns = dict.fromkeys(heads for heads, _ in scores), dict.fromkeys(rows for _, rows in scores)
    lines = [["heads", *columns], ["---"] * (len(columns) + 1)]
    lines += [[heads, *(scores.get((heads, rows), "") for rows in columns)] for heads in methods]
    return markdown(lines)


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
