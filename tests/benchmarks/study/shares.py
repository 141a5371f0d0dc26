"""Draw how the score grows with the share of heads and of rows, from what `collect.py` kept of a sweep.

    python tests/benchmarks/study/shares.py sweep

writes `results/sweep_shares.png`: on the left heads are swept at a tenth of the rows, on the right rows are swept, for
a tenth of the heads and for full fine-tuning; lines by how the rows were chosen. Needs the extra `plot`.
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
    figure = Figure(figsize=(9.0, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    draw(left, metric, "head_share", lines(report["rows"], "head_share", "row_share"))
    draw(right, metric, "row_share", lines(report["rows"], "row_share", "head_share"))
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


def draw(axes: Axes, metric: str, swept: str, members: dict[str, list[dict[str, Any]]]) -> None:
    for (name, runs), colour in zip(sorted(members.items()), COLOURS, strict=False):
        shares = [run[swept] for run in runs]
        value, low, high = ([run["metrics"][metric][key] for run in runs] for key in ("value", "low", "high"))
        axes.plot(shares, value, "o-", color=colour, label=name, markersize=4)
        axes.fill_between(shares, low, high, color=colour, alpha=0.12, linewidth=0)
    axes.set_xscale("log")
    axes.set_xticks(TICKS, [f"{share:.0%}" for share in TICKS], minor=False)
    axes.minorticks_off()
    what = {"head_share": "share of heads, on 10% of the rows", "row_share": "share of rows"}[swept]
    axes.set(xlabel=what, ylabel=metric.replace("_", " ") if swept == "head_share" else "", ylim=(0, None))
    axes.legend(frameon=False, fontsize=8.5, loc="upper left")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


if __name__ == "__main__":
    main()
