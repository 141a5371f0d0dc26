"""The adaptation efficiency ratio: what a run cost, selection included, over what a full fine-tuning costs.

`AER = (t_score_heads + t_mine_data + t_train) / t_reference`, lower is better (P2D, arXiv:2605.21558), speedup
`1 / AER`, and `STR = (t_score_heads + t_mine_data) / t_reference` (selection-to-tuning ratio, Data Whisperer,
arXiv:2505.12212). All times are device-synchronised wall seconds, read from manifests.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from statistics import fmean
from typing import Any

from p2d_cli.core.metrics import lower_is_better
from p2d_cli.errors import ArtifactError, UsageError

CHARGED_STAGES = ("score-heads", "mine-data", "train")
UNCHARGED_PHASES = frozenset({"load", "compile", "evaluate"})
"""Phases that every run has alike, or that are no part of adapting: timed, shown, and left out of AER."""
STEPS_PHASE = "train"
"""The phase of the train stage whose time grows with the optimizer's updates."""
DEFAULT_CONFIDENCE = 0.95
_RELATIVE_EPOCHS = 1e-6  # epochs that differ by less are the same number, written differently


@dataclass(frozen=True)
class StageCost:
    """What making one artifact cost; one entry of a manifest's ledger."""

    stage: str
    """`score-heads`, `mine-data`, `train` or `eval`."""
    artifact: str
    """Digest of the artifact; two entries with the same one are the same work, and are charged once."""
    seconds: dict[str, float]
    """Wall seconds by phase."""
    hardware: str
    precision: str
    epochs: float | None = None
    """Epochs planned (train)."""
    steps_done: int | None = None
    """Optimizer updates made (train)."""
    steps_planned: int | None = None
    """Optimizer updates that all epochs would have taken (train)."""
    model: str = ""
    """Identity of the model that did the work: the base model, or the smaller one that mined rows for it."""
    tokens: int | None = None
    """Tokens that were read, padding included."""
    tokens_planned: int | None = None
    """Those that all epochs would have read (a training that was cut short)."""
    peak_gib: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    """What a report says about the stage: the method, and for a training which heads and rows it trained."""

    @property
    def charged_seconds(self) -> float:
        """Seconds of all phases but those in `UNCHARGED_PHASES`."""
        return math.fsum(value for phase, value in self.seconds.items() if phase not in UNCHARGED_PHASES)

    @property
    def is_cut_short(self) -> bool:
        """Whether training stopped before the updates that were planned."""
        return self.steps_done is not None and self.steps_planned is not None and self.steps_done < self.steps_planned

    def to_dict(self) -> dict[str, Any]:
        """Return the entry in plain JSON types; `tokens_planned`, a later key, only where it says something."""
        entry = asdict(self)
        if self.tokens_planned is None:
            del entry["tokens_planned"]
        return entry

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> StageCost:
        """Read what `to_dict` wrote.

        Raises:
            ArtifactError: a required key is missing or one is not known, named; or the seconds are no numbers.
        """
        known = {item.name for item in fields(cls)}
        required = {item.name for item in fields(cls) if item.default is MISSING and item.default_factory is MISSING}
        if wrong := sorted((required - set(entry)) | (set(entry) - known)):
            raise ArtifactError(
                f"reading a cost entry: expected the keys {', '.join(sorted(known))}; missing or not known:"
                f" {', '.join(wrong)}",
                hint="redo the stage with --force, or read it with the version of p2d that wrote it",
            )
        try:
            seconds = {str(phase): float(value) for phase, value in entry["seconds"].items()}
        except (AttributeError, TypeError, ValueError):
            raise ArtifactError(
                f"reading a cost entry: expected seconds by phase, found {entry['seconds']!r}"
            ) from None
        return cls(**{**entry, "seconds": seconds, "settings": dict(entry.get("settings", {}))})


@dataclass(frozen=True)
class MetricValue:
    """A metric's mean over rows with its interval."""

    value: float
    low: float
    high: float
    count: int
    """Rows it was computed on."""


@dataclass(frozen=True)
class RunCost:
    """One evaluated run: its scores, and the costs of all stages that led to it."""

    name: str
    stages: tuple[StageCost, ...]
    metrics: dict[str, MetricValue]
    """The first one is the run's main metric."""
    path: str
    label: str = ""
    """What was trained on what, the same for runs that differ in their seed alone; the name if empty."""
    is_control: bool = False
    """Whether its heads or rows were chosen as others have to beat: at random, evenly or not at all."""

    def stages_of(self, stage: str) -> tuple[StageCost, ...]:
        """Return the entries of one stage, each artifact once, the first entry of it."""
        distinct: dict[str, StageCost] = {}
        for cost in self.stages:
            if cost.stage == stage:
                distinct.setdefault(cost.artifact, cost)
        return tuple(distinct.values())

    def seconds_of(self, stage: str) -> float:
        """Return the charged seconds of one stage over all distinct artifacts of it; 0 if it did not run."""
        return math.fsum(cost.charged_seconds for cost in self.stages_of(stage))

    @property
    def charged_stages(self) -> tuple[StageCost, ...]:
        """The entries of all stages that AER counts."""
        return tuple(cost for stage in CHARGED_STAGES for cost in self.stages_of(stage))

    @property
    def selection_seconds(self) -> float:
        """Seconds spent on scoring heads and mining data."""
        return self.seconds_of("score-heads") + self.seconds_of("mine-data")

    @property
    def total_seconds(self) -> float:
        """Selection and training together: the numerator of AER."""
        return self.selection_seconds + self.seconds_of("train")

    def trained(self, setting: str) -> Any:
        """Return a setting of the run's training, or None.

        What heads and rows were trained stands with the training itself: the heads that mined the rows may be others.
        """
        trainings = self.stages_of("train")
        return trainings[-1].settings.get(setting) if trainings else None


@dataclass(frozen=True)
class Reference:
    """The denominator of AER: the time of full fine-tuning on all the data."""

    seconds: float
    extrapolated: bool
    """Whether `seconds` was scaled up from a training that was cut short."""
    measured_steps: int | None
    planned_steps: int | None
    hardware: str = ""
    precision: str = ""


@dataclass(frozen=True)
class AerRow:
    """One run in the comparison; shares are None where the run's settings do not say."""

    name: str
    path: str
    score_heads_seconds: float
    mine_data_seconds: float
    train_seconds: float
    total_seconds: float
    aer: float
    speedup: float | None
    """`1 / AER`; None for a run that cost nothing, such as the untrained model."""
    str_ratio: float
    metrics: dict[str, MetricValue]
    head_share: float | None
    row_share: float | None
    trainable_share: float | None
    peak_gib: float | None
    is_control: bool
    is_reference: bool
    mixed: tuple[str, ...]
    """Fields in which the run differs from the reference: hardware, precision, epochs, model."""
    scorer_model: str | None = None
    """The smaller model that chose the rows (weak to strong); its seconds are among the run's."""
    precision: float | None = None
    """Share of the chosen rows that are of the target's task, where mine-data was told which are."""
    seed: int | None = None
    label: str = ""
    """See `RunCost.label`."""


@dataclass(frozen=True)
class SeedGroup:
    """Runs that differ in nothing but their seed, as one."""

    name: str
    members: tuple[int, ...]
    """Their places in the report's rows, from 0."""
    seeds: tuple[int, ...]
    aer: float
    """Mean of the runs' ratios."""
    speedup: float | None
    str_ratio: float
    metrics: dict[str, MetricValue]
    """Mean of the runs' values, and of the ends of their intervals: seeds share the test rows, so that their mean is
    about as uncertain as one of them."""
    ranges: dict[str, tuple[float, float]]
    """Lowest and highest value among the seeds, by metric."""
    is_control: bool
    is_reference: bool


@dataclass(frozen=True)
class HeadMap:
    """Which heads a score-heads artifact selected, which read rows, and how it ranked them."""

    method: str
    artifact: str
    num_layers: int
    num_heads: int
    selected: tuple[int, ...]
    """`layer * num_heads + head` of each head that was selected for training."""
    levels: str
    """A digit a head, layer by layer: the tenth of the ranking that it stands in, 9 the highest; a dot for none."""
    used_by: tuple[str, ...]
    """Names of the runs that it led to."""
    reads_all: tuple[int, ...] = ()
    """The heads that read all rows, in the same numbers; empty where the selected ones do."""
    reads_best: tuple[int, ...] = ()
    """Those that read the rows which the first found best."""


@dataclass(frozen=True)
class AerReport:
    """All runs against one reference."""

    reference: Reference
    rows: tuple[AerRow, ...]
    """By AER, lowest first."""
    flags: tuple[str, ...]
    """What makes figures in it not strictly comparable: mixed runs, an extrapolated reference."""
    warnings: tuple[str, ...]
    """What a reader must know before believing a ranking, such as a control that does as well."""
    groups: tuple[SeedGroup, ...] = ()
    """Runs of several seeds as one, by AER; empty where no run was repeated with another seed."""
    head_maps: tuple[HeadMap, ...] = ()
    confidence: float | None = DEFAULT_CONFIDENCE
    """Level of the scores' intervals; None where they are of several."""

    def to_dict(self) -> dict[str, Any]:
        """Return the report in plain JSON types; a number that JSON cannot hold (nan, infinity) becomes None."""
        document: dict[str, Any] = _plain(asdict(self))
        return document


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def reference_seconds(run: RunCost) -> Reference:
    """Return the time of a full fine-tuning: that of its training alone, whatever prepared its rows.

    If the training was cut short (`steps_done < steps_planned`), the time of its updates is scaled to the planned
    ones and the result says so. Other charged phases do not grow with the updates and are taken as they are; if
    the stage was not timed with a phase `train`, all of it is scaled.

    Raises:
        UsageError: the run has no training, or none with a positive time.
    """
    trainings = run.stages_of("train")
    if len(trainings) != 1 or not trainings[0].charged_seconds > 0 or trainings[0].steps_done == 0:
        timed = (f"{cost.charged_seconds:g} s for {cost.steps_done} updates" for cost in trainings)
        found = ", ".join(timed) or "no training"
        raise UsageError(
            f"reference run '{run.name}' ({run.path}): expected one timed training, found {found}",
            hint="--reference is the evaluation of a full fine-tuning: train --scope full on all rows, then eval",
        )
    training = trainings[0]
    seconds = training.charged_seconds
    if training.is_cut_short and training.steps_done and training.steps_planned:
        measured = training.seconds.get(STEPS_PHASE, seconds)
        whole = training.steps_planned / training.steps_done
        if training.tokens and training.tokens_planned:
            # The rows of an update are of similar length, so that a few updates may be long ones or short ones.
            whole = training.tokens_planned / training.tokens
        seconds += measured * (whole - 1.0)
    return Reference(
        seconds=seconds,
        extrapolated=training.is_cut_short,
        measured_steps=training.steps_done,
        planned_steps=training.steps_planned,
        hardware=training.hardware,
        precision=training.precision,
    )


def compare(runs: Sequence[RunCost], reference: RunCost, *, allow_mixed: bool = False) -> AerReport:
    """Compare runs with a full fine-tuning, by cost and by score.

    Args:
        runs: The runs; the reference may be among them (known by its path) and is added if it is not.
        reference: The full fine-tuning.
        allow_mixed: Compare runs of other hardware, precision, epochs or model too, and flag them.

    Raises:
        UsageError: the reference has no usable training time, or runs are mixed and `allow_mixed` is not set;
            names each run, field and both values.
    """
    denominator = reference_seconds(reference)
    if all(run.path != reference.path for run in runs):
        runs = [*runs, reference]
    differences = [{} if run.path == reference.path else _differences(run, reference) for run in runs]
    flags = [text for found in differences for text in found.values()]
    if flags and not allow_mixed:
        raise UsageError(
            "these runs cannot be compared with the reference:\n" + "\n".join(f"  {text}" for text in flags),
            hint="repeat them under the same conditions, or pass --allow-mixed to have them flagged",
        )
    if denominator.extrapolated:
        flags.append(
            f"t_reference is extrapolated from {denominator.measured_steps} of {denominator.planned_steps} updates;"
            f" the scores of '{reference.name}' are those of an unfinished training"
        )
    levels = {
        cost.settings.get("confidence", DEFAULT_CONFIDENCE) for run in runs for cost in run.stages_of("eval")[-1:]
    }
    if len(levels) > 1:
        flags.append("the scores' intervals are of several levels: " + ", ".join(f"{x:g}" for x in sorted(levels)))
    rows = [
        _reference_row(run, denominator) if run.path == reference.path else _row(run, denominator.seconds, tuple(found))
        for run, found in zip(runs, differences, strict=True)
    ]
    rows.sort(key=lambda row: (row.aer, row.name, row.path))
    groups = _seed_groups(rows, runs)
    return AerReport(
        denominator,
        tuple(rows),
        tuple(flags),
        # Where there are groups, they are what a control is held against.
        (*_training_warnings(runs, reference), *(zero_warnings(rows) or control_warnings(groups or rows))),
        groups,
        _head_maps(runs),
        confidence=None if len(levels) > 1 else min(levels, default=DEFAULT_CONFIDENCE),
    )


def pareto_front(points: Iterable[tuple[float, float]]) -> tuple[int, ...]:
    """Return the indices of the points that no other point beats, cheapest first.

    A point is `(cost, score)`; one is beaten by another that costs no more and scores no less, and is better in
    one of the two. Equal points stay together; a point with a nan is left out.
    """
    known = [(cost, -score, index) for index, (cost, score) in enumerate(points) if not math.isnan(cost + score)]
    front: list[int] = []
    best = (math.inf, math.inf)
    for cost, loss, index in sorted(known):
        if not front or loss < best[1] or (cost, loss) == best:
            front.append(index)
            best = (cost, loss)
    return tuple(front)


def _differences(run: RunCost, reference: RunCost) -> dict[str, str]:
    """Return, by field, how a run's charged stages differ from the reference's training."""
    expected = reference.stages_of("train")[0]
    # A smaller model that mined the rows, and was scored for its heads, is another one by intent.
    scorers = {cost.model for cost in run.stages_of("mine-data") if "scorer_model" in cost.settings}
    found: dict[str, str] = {}
    for cost in run.charged_stages:
        for name in ("hardware", "precision", "epochs", "model"):
            if name == "model" and cost.stage != "train" and cost.model in scorers:
                continue
            ours, theirs = getattr(cost, name), getattr(expected, name)
            if name not in found and not _is_same(ours, theirs):
                found[name] = f"run '{run.name}', {cost.stage}: {name} is {ours}, the reference's is {theirs}"
    return found


def _is_same(ours: str | float | None, theirs: str | float | None) -> bool:
    if ours in (None, "") or theirs in (None, ""):
        return True  # not recorded: nothing to compare
    if isinstance(ours, float | int) and isinstance(theirs, float | int):
        return math.isclose(ours, theirs, rel_tol=_RELATIVE_EPOCHS)
    return ours == theirs


def _row(run: RunCost, seconds: float, mixed: tuple[str, ...]) -> AerRow:
    charged, mined = run.charged_stages, run.stages_of("mine-data")
    return AerRow(
        name=run.name,
        path=run.path,
        score_heads_seconds=run.seconds_of("score-heads"),
        mine_data_seconds=run.seconds_of("mine-data"),
        train_seconds=run.seconds_of("train"),
        total_seconds=run.total_seconds,
        aer=run.total_seconds / seconds,
        speedup=seconds / run.total_seconds if run.total_seconds > 0 else None,
        str_ratio=run.selection_seconds / seconds,
        metrics=run.metrics,
        head_share=run.trained("head_share"),
        row_share=run.trained("row_share"),
        trainable_share=run.trained("trainable_share"),
        peak_gib=max((cost.peak_gib for cost in charged if cost.peak_gib is not None), default=None),
        is_control=run.is_control,
        is_reference=False,
        mixed=mixed,
        scorer_model=next((cost.settings["scorer_model"] for cost in charged if "scorer_model" in cost.settings), None),
        precision=mined[-1].settings.get("precision") if mined else None,
        seed=run.trained("seed"),
        label=run.label,
    )


def _reference_row(run: RunCost, denominator: Reference) -> AerRow:
    """Return the reference's own row: its training alone, at AER 1 by definition."""
    training_only = replace(run, stages=run.stages_of("train"))
    return replace(
        _row(training_only, denominator.seconds, ()),
        train_seconds=denominator.seconds,
        total_seconds=denominator.seconds,
        aer=1.0,
        speedup=1.0,
        is_control=False,
        is_reference=True,
    )


def _seed_groups(rows: Sequence[AerRow], runs: Sequence[RunCost]) -> tuple[SeedGroup, ...]:
    """Put the runs together that were trained alike but for their seed; nothing where each stands alone."""
    likeness = {run.path: _likeness(run) for run in runs}
    times = Counter((likeness[row.path], row.seed) for row in rows)
    # Two of one seed differ in more than that: it is how many rows they keep that tells them apart.
    several = {like for (like, _), count in times.items() if count > 1}
    members: dict[Any, list[int]] = {}
    for place, row in enumerate(rows):
        like = likeness[row.path]
        members.setdefault((like, row.row_share if like in several else None), []).append(place)
    if len(members) == len(rows):
        return ()
    groups = [_seed_group([rows[place] for place in places], tuple(places)) for places in members.values()]
    return tuple(sorted(groups, key=lambda group: (group.aer, group.name)))


def _likeness(run: RunCost) -> tuple[Any, ...]:
    """Return what runs of one group have in common; a run that was not trained is like no other."""
    trainings = run.stages_of("train")
    if not trainings:
        return (run.path,)
    training = trainings[-1]
    # The share of parameters depends on which heads a seed drew, and how many rows a floor keeps, on its target rows.
    left_out = {"seed", "trainable_share"} | ({"row_share", "rows"} if "rows_asked" in training.settings else set())
    alike = {key: value for key, value in training.settings.items() if key not in left_out}
    mined = [cost.settings.get("method") for cost in run.stages_of("mine-data")]
    return (run.label or run.name, repr(sorted(alike.items(), key=str)), training.epochs, training.model, *mined)


def _seed_group(rows: Sequence[AerRow], places: tuple[int, ...]) -> SeedGroup:
    first, aer = rows[0], fmean(row.aer for row in rows)
    scores = {
        name: [row.metrics[name] for row in rows] for name in first.metrics if all(name in row.metrics for row in rows)
    }
    return SeedGroup(
        name=first.label or first.name,
        members=places,
        seeds=tuple(sorted(row.seed for row in rows if row.seed is not None)),
        aer=aer,
        speedup=1 / aer if aer > 0 else None,
        str_ratio=fmean(row.str_ratio for row in rows),
        metrics={
            name: MetricValue(
                value=fmean(score.value for score in found),
                low=fmean(score.low for score in found),
                high=fmean(score.high for score in found),
                count=min(score.count for score in found),
            )
            for name, found in scores.items()
        },
        ranges={name: (min(s.value for s in found), max(s.value for s in found)) for name, found in scores.items()},
        is_control=first.is_control,
        is_reference=any(row.is_reference for row in rows),
    )


def _head_maps(runs: Sequence[RunCost]) -> tuple[HeadMap, ...]:
    """Return the map of each score-heads artifact that recorded one, in the order of the runs."""
    found: dict[str, tuple[StageCost, list[str]]] = {}
    for run in runs:
        for cost in run.stages_of("score-heads"):
            if "levels" in cost.settings:
                found.setdefault(cost.artifact, (cost, []))[1].append(run.name)
    return tuple(
        HeadMap(
            method=cost.settings["method"],
            artifact=artifact,
            num_layers=cost.settings["shape"][0],
            num_heads=cost.settings["shape"][1],
            selected=tuple(cost.settings["selected"]),
            levels=cost.settings["levels"],
            used_by=tuple(users),
            reads_all=tuple(cost.settings.get("reads_all", ())),
            reads_best=tuple(cost.settings.get("reads_best", ())),
        )
        for artifact, (cost, users) in found.items()
    )


def _training_warnings(runs: Sequence[RunCost], reference: RunCost) -> Iterator[str]:
    """Say of the reference that it is no full fine-tuning, and of other runs that they were stopped."""
    scope, row_share = reference.trained("scope"), reference.trained("row_share")
    if scope not in (None, "full"):
        yield f"the reference '{reference.name}' is no full fine-tuning: it was trained with scope '{scope}'"
    if row_share is not None and row_share < 1.0:
        yield f"the reference '{reference.name}' was trained on {row_share:.1%} of the rows, not on all"
    for run in runs:
        for cost in run.stages_of("train"):
            if cost.is_cut_short and run.path != reference.path:
                yield (
                    f"'{run.name}' stopped after {cost.steps_done} of {cost.steps_planned} updates: its cost and score"
                    " are those of an unfinished training"
                )


def zero_warnings(rows: Sequence[AerRow]) -> list[str]:
    """Say so if no run scores anything on the main metric of all of them: then a table ranks costs alone."""
    mains = {next(iter(row.metrics), None) for row in rows}
    if len(mains) != 1 or (metric := mains.pop()) is None or lower_is_better(metric):
        return []
    if any(row.metrics[metric].value != 0 for row in rows):
        return []
    others = [name for name in rows[0].metrics if any(row.metrics[name].value for row in rows if name in row.metrics)]
    more = f"; {', '.join(others)} may tell them apart" if others else "; look at the answers in predictions.parquet"
    return [f"every run scores 0 on {metric}, so that it tells none from another{more}"]


def control_warnings(rows: Sequence[AerRow] | Sequence[SeedGroup]) -> list[str]:
    """Say of each method which controls cost no more than it and score no worse on its main metric."""
    controls = [row for row in rows if row.is_control and not row.is_reference]
    found = []
    for row in rows:
        if row.is_control or row.is_reference or not row.metrics:
            continue
        metric = next(iter(row.metrics))
        sign = 1 if lower_is_better(metric) else -1
        rivals = [
            f"'{control.name}'"
            for control in controls
            if control.aer <= row.aer
            and metric in control.metrics
            and sign * control.metrics[metric].value <= sign * row.metrics[metric].value
        ]
        if rivals:
            found.append(
                f"'{row.name}' is not better than a control: {', '.join(rivals)} cost no more, with {metric} no worse"
            )
    return found
