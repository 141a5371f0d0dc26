"""compare: two evaluations of the same rows, metric by metric and row by row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np

from p2d_cli.artifacts.evaluation import load_metrics, load_predictions
from p2d_cli.artifacts.store import open_artifact
from p2d_cli.core.metrics import PairedComparison, compare_means, compare_perplexities, lower_is_better
from p2d_cli.engine.identity import identity_differences, recorded_identity
from p2d_cli.errors import ArtifactError
from p2d_cli.runtime.seeding import generator

PERPLEXITY = "perplexity"
PERPLEXITY_COLUMNS = ("log_likelihood", "completion_tokens")
"""What a perplexity is made of, in the table of predictions."""
SHOWN = 60
"""Characters of a prompt in a message."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class ChangedRow:
    """A row that the two runs were scored differently on."""

    id: str
    prompt: str
    reference: str
    answers: tuple[str | None, str | None]
    """What each run answered: the text or the choice; None where only likelihoods were measured."""
    changes: dict[str, tuple[float, float]]
    """Both scores of each metric that changed."""


@dataclass(frozen=True)
class Comparison:
    """How the second evaluation differs from the first."""

    first: Path
    second: Path
    rows: int
    confidence: float
    differences: tuple[str, ...]
    """In what the two evaluations were made differently, such as `input adapter`."""
    metrics: dict[str, PairedComparison]
    left_out: tuple[str, ...]
    """Metrics that only one of the two has, or that are not known row by row."""
    changed: tuple[ChangedRow, ...]
    warnings: tuple[str, ...] = ()
    """What a reader should know before relying on a difference."""


def compare(first: Path, second: Path, *, confidence: float = 0.95, seed: int = 0) -> Comparison:
    """Compare two evaluations on each metric that both have.

    Args:
        first: an evaluation artifact.
        second: another one, of the same rows; differences are its value minus the first one's.
        confidence: level of the intervals.
        seed: of the bootstrap's resamples, where scores are not 0 or 1.

    Raises:
        ArtifactError: one is not an evaluation or is damaged, or they are of other rows.
    """
    manifests = [open_artifact(folder.expanduser(), "evaluation") for folder in (first, second)]
    tables = [load_predictions(folder.expanduser()) for folder in (first, second)]
    named = [load_metrics(folder.expanduser()) for folder in (first, second)]
    _ensure_same_rows((first, second), tables)
    common = [name for name in named[0] if name in named[1] and _is_known_by_row(name, tables)]
    for folder, table in zip((first, second), tables, strict=True):
        _ensure_numbers(folder, table, common)
    metrics = {
        name: _compare_metric(name, tables, confidence, generator(seed, "compare", "bootstrap", name))
        for name in common
    }
    return Comparison(
        first=first,
        second=second,
        rows=len(tables[0]),
        confidence=confidence,
        differences=tuple(identity_differences(*map(recorded_identity, manifests))),
        metrics=metrics,
        left_out=tuple(name for name in {**named[0], **named[1]} if name not in common),
        changed=_changed_rows(common, tables),
        warnings=tuple(_zero_warnings(metrics)),
    )


def _zero_warnings(metrics: Mapping[str, PairedComparison]) -> Iterator[str]:
    """Say on which metrics neither run scores anything."""
    scored = {name: found for name, found in metrics.items() if found.count and not lower_is_better(name)}
    if zero := [name for name, found in scored.items() if found.first == found.second == 0]:
        yield f"both score 0 on {', '.join(zero)}: no difference can show there"


def _ensure_same_rows(folders: tuple[Path, Path], tables: Sequence[Sequence[Row]]) -> None:
    what = f"{folders[0]} and {folders[1]} are evaluations of other rows"
    hint = "evaluate both on the same --data, with the same --limit"
    first, second = map(len, tables)
    if first != second:
        raise ArtifactError(f"{what}: the first has {first} rows, the second {second}", hint=hint)
    for column in ("prompt", "reference"):
        pairs = [(a.get(column), b.get(column)) for a, b in zip(*tables, strict=True)]
        differing = [number for number, (a, b) in enumerate(pairs, start=1) if a != b]
        if differing:
            texts = map(str, pairs[differing[0] - 1])
            found = " and ".join(repr(text if len(text) <= SHOWN else text[: SHOWN - 3] + "...") for text in texts)
            raise ArtifactError(
                f"{what}: {len(differing)} of {first} differ in the {column}; the first is row {differing[0]}: {found}",
                hint=hint,
            )


def _columns_of(metric: str) -> tuple[str, ...]:
    return PERPLEXITY_COLUMNS if metric == PERPLEXITY else (metric,)


def _is_known_by_row(metric: str, tables: Sequence[Sequence[Row]]) -> bool:
    return all(column in row for table in tables for row in table[:1] for column in _columns_of(metric))


def _ensure_numbers(folder: Path, table: Sequence[Row], metrics: Sequence[str]) -> None:
    for name in metrics:
        kinds = (int, float) if name == PERPLEXITY else (int, float, NoneType)
        for column in _columns_of(name):
            if not all(isinstance(row[column], kinds) for row in table):
                raise ArtifactError(f"{folder}: column '{column}' of the predictions does not hold numbers alone")


def _compare_metric(
    name: str, tables: Sequence[Sequence[Row]], confidence: float, rng: np.random.Generator
) -> PairedComparison:
    if name == PERPLEXITY:
        logprobs, tokens = ([[row[column] for row in table] for table in tables] for column in PERPLEXITY_COLUMNS)
        return compare_perplexities(
            *logprobs, first_tokens=tokens[0], second_tokens=tokens[1], confidence=confidence, rng=rng
        )
    pairs = [pair for first, second in zip(*tables, strict=True) if None not in (pair := (first[name], second[name]))]
    scores_2n = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    return compare_means(*scores_2n, lower_is_better=lower_is_better(name), confidence=confidence, rng=rng)


def _changed_rows(metrics: Sequence[str], tables: Sequence[Sequence[Row]]) -> tuple[ChangedRow, ...]:
    """Return the rows whose score changed; likelihoods always do, and count only where nothing else was measured."""
    columns = [name for name in metrics if name != PERPLEXITY]
    if not columns and PERPLEXITY in metrics:
        columns = [PERPLEXITY_COLUMNS[0]]
    changed = []
    for first, second in zip(*tables, strict=True):
        pairs = {name: (first[name], second[name]) for name in columns}
        changes = {name: pair for name, pair in pairs.items() if None not in pair and pair[0] != pair[1]}
        if changes:
            answer = "choice" if set(changes) <= {"accuracy"} and "choice" in first else "prediction"
            changed.append(
                ChangedRow(
                    id=str(first["id"]),
                    prompt=first["prompt"],
                    reference=first["reference"],
                    answers=(first.get(answer), second.get(answer)),
                    changes=changes,
                )
            )
    if columns == [PERPLEXITY_COLUMNS[0]]:
        changed.sort(key=lambda row: -abs(np.subtract(*row.changes[columns[0]])))
    return tuple(changed)
