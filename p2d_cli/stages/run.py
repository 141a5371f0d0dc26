"""run: a recipe from end to end, every point of its grid, one report.

The heads that mine are those of `[score-heads]`, the same at every point of the grid, so that the grid varies which
heads are trained and which rows they are trained on independently of each other. Where a smaller model
mines (`scorer-model`), they are its own.
"""

from __future__ import annotations

import importlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import TypeAdapter, ValidationError

from p2d_cli.config import (
    SCOPES,
    STAGE_CONFIGS,
    DataMethod,
    HeadMethod,
    Resolved,
    Scope,
    Seed,
    StageConfig,
    checked_path,
    resolve,
)
from p2d_cli.errors import UsageError
from p2d_cli.pipeline import stage_named
from p2d_cli.recipe import Grid, Recipe
from p2d_cli.stages.execution import RunOptions, StageResult
from p2d_cli.stages.pool_task import METHODS_WITHOUT_MODEL


@dataclass(frozen=True)
class Point:
    """One run of the grid."""

    heads: str | None
    """Method of the heads that are trained; None for a scope that trains no selected heads."""
    data: str
    scope: Scope
    seed: int
    head_ratio: float | None = None
    """Share of all heads that is trained; None is that of the recipe's own table."""
    data_ratio: float | None = None
    """Share of the pool that is kept, likewise."""

    @property
    def name(self) -> str:
        """The run's folder name."""
        heads = None if self.heads is None else self.heads_name
        return "-".join(part for part in (self.scope, heads, self.data_name, f"s{self.seed}") if part is not None)

    @property
    def heads_name(self) -> str:
        """What tells its heads from those of other runs of its seed."""
        return _sized(f"{self.heads}", "h", self.head_ratio)

    @property
    def data_name(self) -> str:
        """What tells its rows from those of other runs of its seed."""
        return _sized(self.data, "d", self.data_ratio)


@dataclass(frozen=True)
class RunResult:
    """What a recipe did."""

    out: Path
    stages: tuple[StageResult, ...]
    """In the order in which they were done; the last is the report."""


METHODS_WITHOUT_SCORES = {"random", "uniform", "all"}
"""Heads that take no time, so that each share is selected by itself."""

Word = TypeVar("Word", bound=str)
StageFunction = Callable[[Resolved[Any], RunOptions], StageResult]


class RecipeRun:
    """One execution of a recipe; artifacts that grid points share are made once.

    Args:
        recipe: what to run.
        overrides: settings from flags, which hold for every stage that has them.
        options: how to run.
        on_stage: told the stage and its folder before each one.
        source: the recipe's file, which the report shows.
    """

    def __init__(
        self,
        recipe: Recipe,
        overrides: dict[str, Any],
        options: RunOptions,
        on_stage: Callable[[str, Path], None],
        source: Path | None = None,
    ) -> None:
        self._recipe = recipe
        self._overrides = {key: value for key, value in overrides.items() if key != "out"}
        out = overrides.get("out", recipe.out)
        if out is None:
            raise UsageError("the recipe names no output folder", hint='add out = "..." to it, or give --out')
        try:
            self._out = Path(checked_path(str(out)))
        except ValueError as problem:
            raise UsageError(f"--out: {problem}") from None
        self._options = replace(options, replace_stale=True)
        self._on_stage = on_stage
        self._source = source
        self._done: dict[Path, StageResult] = {}
        self._planned: dict[str, StageConfig] = {}
        """Settings of the stages that this dry run has only planned, by their folder."""

    def run(self) -> RunResult:
        """Do every stage of every point that is not up to date, then the report."""
        reference = self._reference_point()
        points = [point for point in self.points() if point != reference]
        self._check_sizes(points)
        evaluations = [self._evaluation(point) for point in points]
        full = self._evaluation(reference, self._recipe.reference)
        # A dry run leaves no artifacts for the report to read.
        if not self._options.dry_run:
            self._stage(
                "report-aer",
                self._out / "report",
                evaluations=tuple(str(folder) for folder in evaluations),
                reference=str(full),
                recipe=None if self._source is None else str(self._source),
            )
        return RunResult(self._out, tuple(self._done.values()))

    def points(self) -> list[Point]:
        """Return the runs of all grids; scopes without selected heads appear once, whatever the heads."""
        points = [point for grid in self._recipe.grid for point in self._points_of(grid)]
        return list(dict.fromkeys([*points, *self._controls(points)]))

    def _points_of(self, grid: Grid) -> Iterator[Point]:
        recipe = self._recipe
        heads = grid.heads or (self._head_method(),)
        data = grid.data or (_one_of("mine-data", recipe.mine_data, "method", "p2d", get_args(DataMethod)),)
        seeds = (self._overrides["seed"],) if "seed" in self._overrides else grid.seed or (self._seed(),)
        scopes = grid.scope or (_one_of("train", recipe.train, "scope", "heads", SCOPES),)
        sizes = itertools.product(grid.head_ratio or (None,), grid.data_ratio or (None,))
        for seed, scope, head, rows, (head_ratio, data_ratio) in itertools.product(seeds, scopes, heads, data, sizes):
            yield Point(
                heads=head if scope == "heads" else None,
                data=rows,
                scope=scope,
                seed=seed,
                head_ratio=head_ratio if scope == "heads" and head != "all" else None,
                data_ratio=data_ratio if rows != "full" else None,
            )

    def _controls(self, points: Sequence[Point]) -> Iterator[Point]:
        """Yield random heads on random rows for every seed, at every size that another run of it has."""
        if not self._recipe.controls:
            return
        sized = [point for point in points if point.heads != "all" and point.data != "full"]
        bare = [replace(point, head_ratio=None, data_ratio=None) for point in points]
        seeds = {point.seed for point in sized}
        for point in [*sized, *(point for point in bare if point.seed not in seeds)]:
            yield replace(point, heads="random", data="random", scope="heads")

    def _reference_point(self) -> Point:
        seed = self.points()[0].seed
        scope = _one_of("reference", self._recipe.reference, "scope", "full", SCOPES)
        return Point(heads=None, data="full", scope=scope, seed=seed)

    def _check_sizes(self, points: Sequence[Point]) -> None:
        """Refuse a grid with sizes that its own settings rule out, before anything is computed."""
        for name, inputs in {point.data_name: self._subset_settings(point) for point in points}.items():
            self._resolve("mine-data", self._out / "subset" / name, self._recipe.table("mine-data"), inputs)

    def _seed(self) -> int:
        given = self._recipe.defaults.get("seed", 0)
        try:
            return TypeAdapter(Seed).validate_python(given)
        except ValidationError as problems:
            raise UsageError(f"the recipe's [defaults] seed: {problems.errors()[0]['msg']}") from None

    def _head_method(self) -> HeadMethod:
        return _one_of("score-heads", self._recipe.score_heads, "method", "auto", get_args(HeadMethod))

    def _evaluation(self, point: Point, extra: dict[str, Any] | None = None) -> Path:
        """Do all stages of one point and return the folder of its evaluation."""
        data = self._subset(point)
        inputs: dict[str, Any] = {"data": str(data), "scope": point.scope, "seed": point.seed}
        if point.heads is not None:
            inputs["heads"] = str(self._heads(point.heads, point.seed, point.head_ratio))
        table = self._recipe.table("train", point.scope) | {
            key.replace("-", "_"): value for key, value in (extra or {}).items()
        }
        adapter = self._stage("train", self._out / "adapter" / point.name, table=table, **inputs)
        out = self._out / "evaluation" / point.name
        if point.scope in {"heads", "lora"}:
            return self._stage("eval", out, adapter=str(adapter), seed=point.seed)
        return self._stage("eval", out, model=str(adapter), seed=point.seed)

    def _heads(self, method: str, seed: int, ratio: float | None = None) -> Path:
        chosen: dict[str, Any] = (
            {"method": "uniform", "ratio": 1.0, "layers": None} if method == "all" else {"method": method}
        )
        if ratio is not None:
            chosen["ratio"] = ratio
        if method not in METHODS_WITHOUT_SCORES and (scored := self._scored_share_of_heads(method, seed)) != ratio:
            chosen["scores"] = str(self._heads(method, seed, scored))
        out = self._out / "heads" / f"{_sized(method, 'h', ratio)}-s{seed}"
        return self._stage("score-heads", out, seed=seed, **chosen)

    def _scored_share_of_heads(self, method: str, seed: int) -> float | None:
        """Return the share that is selected from fresh scores: that of the heads that mine, else the greatest."""
        points = [point for point in self.points() if point.seed == seed]
        mines = method == self._head_method() and self._recipe.table("mine-data").get("scorer_model") is None
        if mines and any(point.data == "p2d" for point in points):
            return None
        return _greatest([point.head_ratio for point in points if point.heads == method])

    def _mining_heads(self, seed: int) -> Path:
        """Return the heads that mine: those of the model that reads the rows."""
        method = self._head_method()
        reader = self._recipe.table("mine-data").get("scorer_model")
        if reader is None:
            return self._heads(method, seed)
        # A task model of [score-heads] is one of the trained model's size, and its layers are those of that model.
        settings = {"model": reader, "method": method, "task_model": None, "layers": None, "seed": seed}
        return self._stage("score-heads", self._out / "heads" / f"{method}-scorer-s{seed}", **settings)

    def _subset(self, point: Point) -> Path:
        inputs = self._subset_settings(point)
        if (scored := self._scored_with(point)) != point:
            inputs["scores"] = str(self._subset(scored))
        elif point.data == "p2d":
            inputs["heads"] = str(self._mining_heads(point.seed))
        return self._stage("mine-data", self._out / "subset" / f"{point.data_name}-s{point.seed}", **inputs)

    def _scored_with(self, point: Point) -> Point:
        """Return the point whose scores choose its rows: of several shares the recipe's own, or the greatest."""
        if point.data in METHODS_WITHOUT_MODEL:
            return point
        kin = [each for each in self.points() if (each.data, each.seed) == (point.data, point.seed)]
        return replace(point, data_ratio=_greatest([each.data_ratio for each in kin]))

    def _subset_settings(self, point: Point) -> dict[str, Any]:
        """Return the settings that a point gives to its rows, heads aside."""
        settings: dict[str, Any] = {"method": point.data, "seed": point.seed}
        if point.data_ratio is not None:
            settings["ratio"] = point.data_ratio
        return settings

    def _stage(self, name: str, out: Path, *, table: dict[str, Any] | None = None, **settings: Any) -> Path:
        """Do one stage unless it was done in this run already, and return its folder."""
        if out in self._done:
            return out
        self._on_stage(name, out)
        resolved = self._resolve(name, out, self._recipe.table(name) if table is None else table, settings)
        if self._is_waiting(settings):
            self._done[out] = self._plan(name, out, resolved)
        else:
            self._done[out] = _function(name)(resolved, self._options)
        if self._done[out].manifest is None:
            self._planned[str(out)] = resolved.config
        return out

    def _resolve(self, name: str, out: Path, table: dict[str, Any], settings: dict[str, Any]) -> Resolved[StageConfig]:
        """Return a stage's settings: the recipe's, under those of flags, under those of the grid."""
        fields = STAGE_CONFIGS[name].model_fields
        flags = {key: value for key, value in self._overrides.items() if key in fields} | settings | {"out": out}
        return _owned_by_recipe(resolve(STAGE_CONFIGS[name], flags=flags, recipe=table), settings)

    def _is_waiting(self, settings: dict[str, Any]) -> bool:
        """Say whether an input is an artifact that this dry run has only planned."""
        return not self._planned.keys().isdisjoint(value for value in settings.values() if isinstance(value, str))

    def _plan(self, name: str, out: Path, resolved: Resolved[Any]) -> StageResult:
        from p2d_cli.stages.plan_ahead import plan_ahead

        started = time.perf_counter()
        plan, bad_rows = plan_ahead(name, resolved, self._options, self._planned)
        return StageResult(
            stage=name,
            out=out,
            status="would-run",
            key="",
            inputs={},
            manifest=None,
            wall_seconds=time.perf_counter() - started,
            plan=plan,
            bad_rows=bad_rows,
        )


def _one_of(table: str, settings: dict[str, Any], key: str, default: Word, known: tuple[Word, ...]) -> Word:
    """Return a setting that folders are named after; it has to be a word that the stage knows."""
    value = settings.get(key, default)
    if value not in known:
        raise UsageError(f"the recipe's [{table}] {key} must be one of {', '.join(known)}; found {value!r:.80}")
    found: Word = value
    return found


def _sized(method: str, mark: str, share: float | None) -> str:
    """Return a method's name with the share that it selects, if that is not the recipe's own."""
    return method if share is None else f"{method}-{mark}{share:g}"


def _greatest(shares: Sequence[float | None]) -> float | None:
    """Return the greatest share, or None, the recipe's own, if that is among them."""
    return None if None in shares else max(share for share in shares if share is not None)


def _owned_by_recipe(resolved: Resolved[StageConfig], settings: dict[str, Any]) -> Resolved[StageConfig]:
    """Record that what the grid set came from the recipe, not from flags."""
    return replace(resolved, origins=resolved.origins | dict.fromkeys([*settings, "out"], "recipe"))


def _function(stage: str) -> StageFunction:
    function: StageFunction = importlib.import_module(stage_named(stage).module).run
    return function


def run(
    recipe: Recipe,
    overrides: dict[str, Any],
    options: RunOptions,
    on_stage: Callable[[str, Path], None] = lambda *_: None,
    *,
    source: Path | None = None,
) -> RunResult:
    """Execute a recipe; whatever was finished when an error ends it stays, and is skipped the next time.

    Raises:
        P2DError: from the stage that failed.
    """
    return RecipeRun(recipe, overrides, options, on_stage, source).run()
