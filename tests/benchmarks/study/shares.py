"""Draw how the score grows with the share of heads and of rows, from what `collect.py` kept of a sweep.

    python tests/benchmarks/study/shares.py sweep

writes `results/sweep_shares.png`: on the left heads are swept at a tenth of the rows, in the middle rows are swept,
for a tenth of the heads and for full fine-tuning, and on the right these stand by what they cost; lines by how the
rows were chosen. Needs the extra `plot`.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
TENTH = 0.1
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#8b949e")  # of Okabe and Ito's palette
TICKS = (0.01, 0.05, 0.1, 0.2, 0.5, 1.0)


def main() -> None:
    name = sys.argv[1]
    report = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["report"]
    metric = next(iter(report["rows"][0]["metrics"]))
    by_heads = lines(report["rows"], "head_share", "row_share")
    by_rows = lines(report["rows"], "row_share", "head_share")
    figure = Figure(figsize=(12.0, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3, sharey=True)
    draw(left, metric, "head_share", by_heads, "share of heads, on 10% of the rows")
    draw(middle, metric, "row_share", by_rows, "share of rows")
    draw(right, metric, "aer", by_rows, "AER, the cost over that of full fine-tuning on all rows")
    left.set(ylim=(0, None), ylabel=metric.replace("_", " "))
    figure.savefig(RESULTS / f"{name}_shares.png", dpi=160)


def lines(rows: list[dict[str, Any]], swept: str, fixed: str) -> dict[str, list[dict[str, Any]]]:
    """Return the runs of each line in order of the share `swept`; the other is a tenth, or no share of theirs.

    A line's runs differ in their shares alone. The one that has all of what is swept ends every line of its scope.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row[swept] is not None and row[fixed] in {TENTH, None}:
            found.setdefault(family(row), []).append(row)
    whole = [row for row in rows if row[swept] == 1.0 and row[fixed] in {TENTH, None}]
    for name, members in found.items():
        ends = [row for row in whole if row not in members and scope(row) == scope(members[0])]
        found[name] = sorted(members + ends, key=lambda row: row[swept])
    return {name: members for name, members in found.items() if len({row[swept] for row in members}) > 2}


def family(row: dict[str, Any]) -> str:
    """Return a run's name without its shares and its seed."""
    return re.sub(r" [\d.]+%|, seed \d+", "", row["name"])


def scope(row: dict[str, Any]) -> str:
    return "full" if row["name"].startswith("full") else "heads"


def draw(axes: Axes, metric: str, key: str, members: dict[str, list[dict[str, Any]]], title: str) -> None:
    for (name, runs), colour in zip(sorted(members.items()), COLOURS, strict=False):
        places = [run[key] for run in runs]
        value, low, high = ([run["metrics"][metric][end] for run in runs] for end in ("value", "low", "high"))
        axes.plot(places, value, "o-", color=colour, label=name, markersize=4)
        axes.fill_between(places, low, high, color=colour, alpha=0.12, linewidth=0)
    axes.set_xscale("log")
    axes.set_xticks(TICKS, [f"{share:g}" if key == "aer" else f"{share:.0%}" for share in TICKS])
    axes.minorticks_off()
    axes.set_xlabel(title)
    axes.legend(frameon=False, fontsize=8.5, loc="upper left")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


if __name__ == "__main__":
    main()
