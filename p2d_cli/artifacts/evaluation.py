"""The payload of an evaluation artifact: the metrics and every prediction."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from p2d_cli.artifacts.cards import save_data_card
from p2d_cli.core.aer import MetricValue
from p2d_cli.core.metrics import ANSWER_METRICS
from p2d_cli.errors import ArtifactError, first_line

METRICS_NAME = "metrics.json"
PREDICTIONS_NAME = "predictions.parquet"
_TEXTS = ("id", "prompt", "reference")
_TEXTS_OR_NULL = ("prediction", "choice")
_METRIC = TypeAdapter(MetricValue)
GENERATED_METRICS = frozenset(figure for figures in ANSWER_METRICS.values() for figure in figures)
"""Figures that are of generated answers."""


def save_evaluation(
    folder: Path,
    metrics: Mapping[str, MetricValue],
    predictions: Sequence[Mapping[str, Any]],
    *,
    answers_cut: int | None = None,
) -> None:
    """Write `metrics.json` (`{metric: {value, low, high, count}}`) and `predictions.parquet` (a row an example).

    A card is added, by which `datasets.load_dataset` opens the folder: the predictions, as split `test`.

    Args:
        folder: of the artifact.
        metrics: by name.
        predictions: rows of one shape.
        answers_cut: how many generated answers ended at the limit of new tokens; stands with each metric of such
            answers, where versions that do not know it pass over it.
    """
    entries = metric_entries(metrics)
    for name in GENERATED_METRICS & entries.keys() if answers_cut is not None else ():
        entries[name]["answers_cut"] = answers_cut
    (folder / METRICS_NAME).write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    pq.write_table(pa.Table.from_pylist([dict(row) for row in predictions]), folder / PREDICTIONS_NAME)
    # A table without rows has no columns either, and opens as no data set.
    tables = {"default": (PREDICTIONS_NAME, "test")} if predictions else {}
    lines = [
        f"| {name} | {metric.value:.4f} | {metric.low:.4f} to {metric.high:.4f} | {metric.count} |"
        for name, metric in metrics.items()
    ]
    text = (
        f"`{PREDICTIONS_NAME}` holds what was asked and answered in {len(predictions)} examples, `{METRICS_NAME}` "
        "these:\n\n| metric | value | interval | examples |\n|---|---|---|---|\n" + "\n".join(lines)
    )
    save_data_card(folder, tables, title="Evaluated with p2d", text=text)


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
        return metric_values(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as problem:
        raise ArtifactError(f"{path} cannot be read: {first_line(problem)}", hint="rerun p2d eval") from None


def metric_values(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, MetricValue]:
    """Return metrics from what `metric_entries` made of them.

    Raises:
        ValueError: a figure is missing, or is no number.
        AttributeError: it is no table of metrics.
    """
    return {
        name: _METRIC.validate_python({key: math.nan if value is None else value for key, value in metric.items()})
        for name, metric in entries.items()
    }


def load_predictions(folder: Path) -> list[dict[str, Any]]:
    """Read `predictions.parquet`, a dictionary an example.

    Raises:
        ArtifactError: the file is missing or not a Parquet table.
    """
    path = folder / PREDICTIONS_NAME
    try:
        table = pq.read_table(path)
        rows: list[dict[str, Any]] = table.to_pylist()
    except (OSError, pa.ArrowException, ValueError, OverflowError) as problem:
        raise ArtifactError(f"{path} cannot be read: {problem}", hint="rerun p2d eval") from None
    for name in (*_TEXTS, *(name for name in _TEXTS_OR_NULL if name in table.column_names)):
        optional = name in _TEXTS_OR_NULL
        if not all(isinstance(row.get(name), str) or (optional and row[name] is None) for row in rows):
            raise ArtifactError(f"{path}: column '{name}' does not hold texts alone", hint="rerun p2d eval")
    return rows
