"""What a report shows beside its table: runs of several seeds as one, and which heads were selected.

Axes: L layers, H query heads a layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2d_cli.core.aer import (
    AerReport,
    AerRow,
    HeadMap,
    MetricValue,
    RunCost,
    SeedGroup,
    StageCost,
    control_warnings,
)


def with_views(report: AerReport, runs: Sequence[RunCost]) -> AerReport:
    """Return the report with its groups and head maps; where there are groups, they are what a control is held against.

    Args:
        report: what `compare` returned.
        runs: the runs that it was given.
    """
    groups = seed_groups(report.rows, runs)
    warnings = report.warnings
    if groups:
        single = set(control_warnings(report.rows))
        warnings = (*(text for text in warnings if text not in single), *control_warnings(groups))
    return replace(report, groups=groups, head_maps=head_maps(runs), warnings=warnings)


def seed_groups(rows: Sequence[AerRow], runs: Sequence[RunCost]) -> tuple[SeedGroup, ...]:
    """Put the runs together that were trained alike but for their seed; nothing where each stands alone."""
    likeness = {run.path: _likeness(run) for run in runs}
    members: dict[Any, list[int]] = {}
    for place, row in enumerate(rows):
        members.setdefault(likeness[row.path], []).append(place)
    if all(len(places) == 1 for places in members.values()):
        return ()
    groups = [_seed_group(rows, places) for places in members.values()]
    return tuple(sorted(groups, key=lambda group: (group.aer, group.name)))


def _likeness(run: RunCost) -> tuple[Any, ...]:
    """Return what runs of one group have in common; a run that was not trained is like no other."""
    trainings = run.stages_of("train")
    if not trainings:
        return (run.path,)
    training = trainings[-1]
    # The share of parameters depends on which heads a seed drew.
    alike = {key: value for key, value in training.settings.items() if key not in {"seed", "trainable_share"}}
    mined = [cost.settings.get("method") for cost in run.stages_of("mine-data")]
    return (run.label or run.name, repr(sorted(alike.items(), key=str)), training.epochs, training.model, *mined)


def _seed_group(rows: Sequence[AerRow], places: Sequence[int]) -> SeedGroup:
    members = [rows[place] for place in places]
    aer = _mean([row.aer for row in members])
    names = [name for name in members[0].metrics if all(name in row.metrics for row in members)]
    values = {name: [row.metrics[name].value for row in members] for name in names}
    return SeedGroup(
        name=members[0].label or members[0].name,
        members=tuple(places),
        seeds=tuple(sorted(row.seed for row in members if row.seed is not None)),
        aer=aer,
        speedup=1 / aer if aer > 0 else None,
        str_ratio=_mean([row.str_ratio for row in members]),
        metrics={name: _mean_metric([row.metrics[name] for row in members]) for name in names},
        ranges={name: (min(found), max(found)) for name, found in values.items()},
        is_control=members[0].is_control,
        is_reference=any(row.is_reference for row in members),
    )


def _mean_metric(metrics: Sequence[MetricValue]) -> MetricValue:
    return MetricValue(
        value=_mean([metric.value for metric in metrics]),
        low=_mean([metric.low for metric in metrics]),
        high=_mean([metric.high for metric in metrics]),
        count=min(metric.count for metric in metrics),
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def head_maps(runs: Sequence[RunCost]) -> tuple[HeadMap, ...]:
    """Return the map of each score-heads artifact that recorded one, in the order of the runs."""
    found: dict[str, StageCost] = {}
    users: dict[str, list[str]] = {}
    for run in runs:
        for cost in run.stages_of("score-heads"):
            if "levels" in cost.settings:
                found.setdefault(cost.artifact, cost)
                users.setdefault(cost.artifact, []).append(run.name)
    return tuple(_head_map(cost, tuple(users[artifact])) for artifact, cost in found.items())


def _head_map(cost: StageCost, used_by: tuple[str, ...]) -> HeadMap:
    num_layers, num_heads = cost.settings["shape"]
    return HeadMap(
        method=cost.settings["method"],
        artifact=cost.artifact,
        num_layers=num_layers,
        num_heads=num_heads,
        selected=tuple(cost.settings["selected"]),
        levels=cost.settings["levels"],
        used_by=used_by,
    )


def head_levels(scores_LH: NDArray[np.floating[Any]]) -> str:
    """Return a digit a head, layer by layer: the tenth of the ranking that it stands in, 9 the highest.

    Equal scores share the lowest of their places.
    """
    scores = scores_LH.ravel()
    lower = np.searchsorted(np.sort(scores), scores, side="left")
    return "".join(str(level) for level in (10 * lower // scores.size).tolist())
