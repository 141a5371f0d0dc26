"""Make the README's tables from the reports that `collect.py` kept.

    python tests/benchmarks/study/tables.py banking77 snips_parse

prints one Markdown table a recipe: methods by AER, mean over seeds.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
HEADINGS = ("run", "score", "less full fine-tuning", "AER", "speed-up", "STR", "parameters", "peak GiB", "seeds")


def main() -> None:
    for name in sys.argv[1:]:
        print(f"\n{name}\n")
        print(table(json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))))


def table(document: dict[str, Any]) -> str:
    """Return the table of one recipe; its score is the report's first metric."""
    report = document["report"]
    metric = next(iter(report["rows"][0]["metrics"]))
    lines = [HEADINGS, ("---",) * len(HEADINGS)]
    groups = report["groups"] or [row | {"members": [place]} for place, row in enumerate(report["rows"])]
    for group in groups:
        lines.append(cells(group, [report["rows"][place] for place in group["members"]], metric, document))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cells(
    group: dict[str, Any], members: list[dict[str, Any]], metric: str, document: dict[str, Any]
) -> tuple[str, ...]:
    score, away = group["metrics"][metric], document["differences"].get(group["name"], {}).get(metric)
    mark = " (reference)" if group["is_reference"] else " (control)" if group["is_control"] else ""
    return (
        group["name"] + mark,
        interval(score["value"], score["low"], score["high"]),
        "" if away is None else interval(away["difference"], away["low"], away["high"], sign="+"),
        f"{group['aer']:.3f}",
        f"{1 / group['aer']:.1f}",
        f"{group['str_ratio']:.3f}",
        f"{100 * members[0]['trainable_share']:.1f}%",
        f"{max(row['peak_gib'] for row in members):.1f}",
        str(len(members)),
    )


def interval(value: float, low: float, high: float, sign: str = "") -> str:
    return f"{value:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


if __name__ == "__main__":
    main()
