"""Keep what a recipe of the study gave: its report, and how each method differs from others, row by row.

    python tests/benchmarks/study/collect.py study/banking77 banking77

writes `results/banking77.json` and `results/banking77.png` beside this file. Methods are compared with the reference
and with each control, and p2d's heads on p2d's rows with every other run: the scores of a test row are averaged over a
method's seeds, and rows are resampled jointly. Perplexities are not compared. Where runs share the index of a pool, the
seconds of it that a run is not charged with stand beside the report, so that it can be charged with the whole.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tables import P2D, RESULTS, folder_of

from p2d_cli.artifacts.evaluation import load_predictions
from p2d_cli.core.metrics import compare_means
from p2d_cli.runtime.seeding import generator


def main() -> None:
    folder, name = Path(sys.argv[1]), sys.argv[2]
    report = json.loads((folder / "report" / "aer.json").read_text(encoding="utf-8"))
    groups = report["groups"] or [
        {key: row[key] for key in ("name", "metrics", "is_reference", "is_control")} | {"members": [place]}
        for place, row in enumerate(report["rows"])
    ]
    folders = {group["name"]: folder_of(report["rows"][group["members"][0]]) for group in groups}
    of_p2d = next((group for group, its_folder in folders.items() if its_folder == P2D), None)
    scores = {
        group["name"]: row_scores([report["rows"][place]["path"] for place in group["members"]]) for group in groups
    }
    document = {
        "recipe": name,
        "report": report,
        "pool_rows": pool_rows(folder),
        "stages": {
            row["path"]: stages(row["path"]) for row in report["rows"] if row["is_reference"] or P2D in row["path"]
        },
        "uncharged": uncharged(folder, [row["path"] for row in report["rows"]]),
        "p2d_less": {
            folders[group["name"]]: {
                metric: difference(scores[group["name"]][metric], found)
                for metric, found in scores.get(of_p2d, {}).items()
            }
            for group in groups
            if of_p2d not in (None, group["name"])
        },
        "differences": {
            base: {
                method: {metric: difference(scores[base][metric], found[metric]) for metric in found}
                for method, found in scores.items()
                if method != base
            }
            for base in baselines(groups)
        },
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    shutil.copyfile(folder / "report" / "aer.png", RESULTS / f"{name}.png")


def stages(evaluation: str) -> list[dict[str, Any]]:
    """Return the tokens and the seconds, by phase, of the stages that led to an evaluation."""
    ledger = json.loads((Path(evaluation) / "manifest.json").read_text(encoding="utf-8"))["ledger"]
    return [{name: entry[name] for name in ("stage", "tokens", "seconds")} for entry in ledger]


def pool_rows(folder: Path) -> int:
    """Return how many rows the pool has."""
    path = next((folder / "subset").glob("*/manifest.json"))
    return int(json.loads(path.read_text(encoding="utf-8"))["summary"]["rows_total"])


def uncharged(folder: Path, evaluations: list[str]) -> dict[str, float]:
    """Return, for each evaluation, the seconds of an index that its rows came from and that it is not charged with."""
    spared = {}
    for path in (folder / "subset").glob("*/manifest.json"):
        manifest = json.loads(path.read_text(encoding="utf-8"))
        told = manifest["summary"].get("index", {})
        if told.get("rows_found"):
            spared[manifest["key"]] = told["seconds_shared"] * (told["targets"] - 1)
    found = {}
    for spec in evaluations:
        ledger = json.loads((Path(spec) / "manifest.json").read_text(encoding="utf-8"))["ledger"]
        found[spec] = sum(spared.get(entry["artifact"], 0.0) for entry in ledger)
    return found


def baselines(groups: list[dict[str, Any]]) -> list[str]:
    """Return the names of the reference and of the controls, in this order."""
    reference = [group["name"] for group in groups if group["is_reference"]]
    return reference + [group["name"] for group in groups if group["is_control"] and not group["is_reference"]]


def row_scores(evaluations: list[str]) -> dict[str, NDArray[np.float64]]:
    """Return the mean over some evaluations of each test row's score, by metric; rows in the order of their ids.

    Metrics of all rows together, such as perplexity, are not among them.
    """
    tables = [sorted(load_predictions(Path(path)), key=lambda row: row["id"]) for path in evaluations]
    metrics = [name for name, value in tables[0][0].items() if isinstance(value, float) and name != "log_likelihood"]
    return {name: np.mean([[row[name] for row in table] for table in tables], axis=0) for name in metrics}


def difference(baseline: NDArray[np.float64], method: NDArray[np.float64]) -> dict[str, Any]:
    """Return the method's score less the baseline's, with its 95% interval."""
    paired = compare_means(baseline, method, rng=generator(0, "study", "paired"))
    return {"difference": paired.difference, "low": paired.low, "high": paired.high, "rows": paired.count}


if __name__ == "__main__":
    main()
