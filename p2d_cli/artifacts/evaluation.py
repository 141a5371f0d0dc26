"""The payload of an evaluation artifact: the metrics and every prediction."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from p2d_cli.core.aer import MetricValue
from p2d_cli.errors import ArtifactError

METRICS_NAME = "metrics.json"
PREDICTIONS_NAME = "predictions.parquet"


def save_evaluation(folder: Path, metrics: Mapping[str, MetricValue], predictions: Sequence[Mapping[str, Any]]) -> None:
    """Write `metrics.json` (`{metric: {value, low, high, count}}`) and `predictions.parquet` (a row an example)."""
    values = {name: vars(metric) for name, metric in metrics.items()}
    (folder / METRICS_NAME).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    pq.write_table(pa.Table.from_pylist([dict(row) for row in predictions]), folder / PREDICTIONS_NAME)


def load_metrics(folder: Path) -> dict[str, MetricValue]:
    """Read `metrics.json`.

    Raises:
        ArtifactError: the file is missing or not of that form.
    """
    path = folder / METRICS_NAME
    try:
        values = json.loads(path.read_bytes())
        return {name: MetricValue(**metric) for name, metric in values.items()}
    except (OSError, ValueError, TypeError, AttributeError) as problem:
        raise ArtifactError(f"{path} cannot be read: {problem}", hint="rerun p2d eval") from None


def load_predictions(folder: Path) -> list[dict[str, Any]]:
    """Read `predictions.parquet`, a dictionary an example.

    Raises:
        ArtifactError: the file is missing or not a Parquet table.
    """
    path = folder / PREDICTIONS_NAME
    try:
        rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    except (OSError, pa.ArrowException) as problem:
        raise ArtifactError(f"{path} cannot be read: {problem}", hint="rerun p2d eval") from None
    return rows
