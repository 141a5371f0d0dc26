"""Make the README's tables from what `collect.py` kept.

    python tests/benchmarks/study/tables.py mixed_banking77 coverage

prints one Markdown table a recipe: methods by AER, mean over seeds, with paired differences.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    for name in sys.argv[1:]:
        print(f"\n{name}\n")
        print(table(json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))))


def table(document: dict[str, Any]) -> str:
    """Return the table of one recipe; its score is the report's first metric."""
    report, differences = document["report"], document["differences"]
    metric = next(iter(report["rows"][0]["metrics"]))
    groups = report["groups"] or [row | {"members": [place]} for place, row in enumerate(report["rows"])]
    less = [f"less {base}" for base in differences]
    headings = ["run", metric, *less, "AER", "speed-up", "STR", "right rows", "parameters", "peak (GiB)", "seeds"]
    lines = [headings, ["---"] * len(headings)]
    for group in groups:
        away = [found.get(group["name"], {}).get(metric) for found in differences.values()]
        lines.append(cells(group, [report["rows"][place] for place in group["members"]], metric, away))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cells(
    group: dict[str, Any], members: list[dict[str, Any]], metric: str, away: list[dict[str, float] | None]
) -> list[str]:
    score = group["metrics"][metric]
    mark = " (reference)" if group["is_reference"] else " (control)" if group["is_control"] else ""
    return [
        group["name"] + mark,
        interval(score["value"], score["low"], score["high"]),
        *("" if each is None else interval(each["difference"], each["low"], each["high"], sign="+") for each in away),
        f"{group['aer']:.3f}",
        f"{1 / group['aer']:.1f}",
        f"{group['str_ratio']:.3f}",
        "" if members[0]["precision"] is None else f"{members[0]['precision']:.2f}",
        f"{100 * members[0]['trainable_share']:.1f}%",
        f"{max(row['peak_gib'] for row in members):.1f}",
        str(len(members)),
    ]


def interval(value: float, low: float, high: float, sign: str = "") -> str:
    return f"{value:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


if __name__ == "__main__":
    main()
