"""The payload of an evaluation artifact: the metrics and every prediction."""

from __future__ import annotations

import json
import math
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
    text = json.dumps(metric_entries(metrics), indent=2)
    (folder / METRICS_NAME).write_text(text + "\n", encoding="utf-8")
    pq.write_table(pa.Table.from_pylist([dict(row) for row in predictions]), folder / PREDICTIONS_NAME)


def metric_entries(metrics: Mapping[str, MetricValue]) -> dict[str, dict[str, Any]]:
    """Return metrics in plain JSON types; what is not known, such as a bound of an interval, is None."""
    return {
        name: {key: None if math.isnan(value) else value for key, value in vars(metric).items()}
        for name, metric in metrics.items()
    }


def load_metrics(folder: Path) -> dict[str, MetricValue]:
    """Read `metrics.json`.

    Raises:
        ArtifactError: the file is missing or not of that form.
    """
    path = folder / METRICS_NAME
    try:
        values = json.loads(path.read_bytes())
        return {name: MetricValue(**_with_nan(metric)) for name, metric in values.items()}
    except (OSError, ValueError, TypeError, AttributeError) as problem:
        raise ArtifactError(f"{path} cannot be read: {problem}", hint="rerun p2d eval") from None


def _with_nan(metric: Mapping[str, Any]) -> dict[str, Any]:
    return {key: math.nan if value is None else value for key, value in metric.items()}


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
