"""run: a recipe from end to end, every point of its grid, one report.

The heads that mine are those of `[score-heads]`, the same at every point of the grid, so that the grid varies which
heads are trained and which rows they are trained on independently of each other. Where a smaller model
mines (`scorer-model`), they are its own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from p2d_cli.config import STAGE_CONFIGS, Resolved, StageConfig, checked_path, resolve
from p2d_cli.engine.stage_run import RunOptions, StageResult
from p2d_cli.errors import UsageError
from p2d_cli.pipeline import stage_named
from p2d_cli.recipes.grid import Point, Points, sized
from p2d_cli.recipes.recipe import ALL_HEADS, Recipe
from p2d_cli.registry import HEAD_METHODS, ROW_METHODS
from p2d_cli.runtime import signals


@dataclass(frozen=True)
class RunResult:
    """What a recipe did."""

    out: Path
    stages: tuple[StageResult, ...]
    """In the order in which they were done; the last is the report."""


class RecipeRun:
    """One execution of a recipe; artifacts that grid points share are made once.

    Settings from flags, `overrides`, hold for every stage that has them. `on_stage` is told of each stage, and of its
    folder, before it is done. The report shows the recipe's file, `source`.
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
        self.points = Points(recipe, self._overrides)
        self._planned: dict[str, StageConfig] = {}
        """Settings of the stages that this dry run has only planned, by their folder."""
        self._options = replace(
            options,
            replace_stale=True,
            planned=self._planned,
            nothing_kept=lambda: self._promise(signals.BEGINS_ANEW),
        )
        self._on_stage = on_stage
        self._source = source
        self._done: dict[Path, StageResult] = {}

    def run(self) -> RunResult:
        """Do every stage of every point that is not up to date, then the report.

        Whatever was finished when an error ends it stays, and is skipped the next time.

        Raises:
            P2DError: from the stage that failed.
        """
        with signals.promising(lambda: self._promise(signals.UNBEGUN)):
            return self._run()

    def _promise(self, otherwise: str) -> str:
        """Return what to say of an interruption where the stage that is being done has nothing to go on from."""
        is_begun = any(result.status in {"done", "up-to-date"} for result in [*self._done.values()])
        return f"finished stages are kept, {self._options.go_on}" if is_begun else otherwise

    def _run(self) -> RunResult:
        reference = self.points.reference()
        points = [point for point in self.points.all if point != reference]
        # A grid with sizes that its own settings rule out is refused before anything is computed.
        for name, inputs in {point.data_name: self._subset_settings(point) for point in points}.items():
            self._resolve("mine-data", self._out / "subset" / name, self._recipe.table("mine-data"), inputs)
        evaluations = [self._untrained()] if self._recipe.untrained else []
        evaluations += [self._evaluation(point) for point in points]
        full = self._evaluation(reference, self._recipe.reference)
        # A dry run leaves no artifacts for the report to read.
        if not self._options.dry_run:
            # A recipe that varies the epochs asks for runs of several.
            mixed: dict[str, Any] = {"allow_mixed": True} if any(point.epochs is not None for point in points) else {}
            self._stage(
                "report-aer",
                self._out / "report",
                evaluations=tuple(str(folder) for folder in evaluations),
                reference=str(full),
                **mixed,
                recipe=None if self._source is None else str(self._source),
            )
        return RunResult(self._out, tuple(self._done.values()))

    def _evaluation(self, point: Point, extra: dict[str, Any] | None = None) -> Path:
        """Do all stages of one point and return the folder of its evaluation."""
        inputs: dict[str, Any] = {"data": str(self._subset(point)), "scope": point.scope, "seed": point.seed}
        if point.heads is not None:
            inputs["heads"] = str(self._heads(point.heads, point.seed, point.head_ratio))
        if point.epochs is not None:
            inputs["epochs"] = point.epochs
        table = self._recipe.table("train", point.scope) | {
            key.replace("-", "_"): value for key, value in (extra or {}).items()
        }
        adapter = self._stage("train", self._out / "adapter" / point.name, table=table, **inputs)
        trained: dict[str, Any] = {"adapter" if point.scope in {"heads", "lora"} else "model": str(adapter)}
        return self._stage("eval", self._out / "evaluation" / point.name, seed=point.seed, **trained)

    def _untrained(self) -> Path:
        """Evaluate the model as it is, and return the folder."""
        return self._stage("eval", self._out / "evaluation" / "untrained", seed=self.points.reference().seed)

    def _heads(self, method: str, seed: int, ratio: float | None = None) -> Path:
        chosen: dict[str, Any] = (
            {"method": "uniform", "ratio": 1.0, "layers": None} if method == ALL_HEADS else {"method": method}
        )
        if ratio is not None:
            chosen["ratio"] = ratio
        is_scored = method != ALL_HEADS and not HEAD_METHODS[method].is_control
        if is_scored and (scored := self.points.scored_share_of_heads(method, seed)) != ratio:
            chosen["scores"] = str(self._heads(method, seed, scored))
        return self._stage(
            "score-heads", self._out / "heads" / f"{sized(method, 'h', ratio)}-s{seed}", seed=seed, **chosen
        )

    def _mining_heads(self, seed: int) -> Path:
        """Return the heads that mine: those of the model that reads the rows."""
        method = self.points.head_method
        reader = self._recipe.table("mine-data").get("scorer_model")
        if reader is None:
            return self._heads(method, seed)
        # A task model of [score-heads] is one of the trained model's size, and its layers are those of that model.
        settings = {"model": reader, "method": method, "task_model": None, "layers": None, "seed": seed}
        return self._stage("score-heads", self._out / "heads" / f"{method}-scorer-s{seed}", **settings)

    def _subset(self, point: Point) -> Path:
        inputs = self._subset_settings(point)
        if point.count_of is not None:
            measure = replace(point, data=point.count_of, count_of=None)
            inputs |= {"ratio": None, "count": None, "count_of": str(self._subset(measure))}
        if (scored := self.points.scored_with(point)) != point:
            inputs["scores"] = str(self._subset(scored))
        elif ROW_METHODS[point.data].takes_heads:
            inputs["heads"] = str(self._mining_heads(point.seed))
        return self._stage("mine-data", self._out / "subset" / f"{point.data_name}-s{point.seed}", **inputs)

    def _subset_settings(self, point: Point) -> dict[str, Any]:
        """Return the settings that a point gives to its rows, heads aside."""
        ratio = {} if point.data_ratio is None else {"ratio": point.data_ratio}
        return {"method": point.data, "seed": point.seed, **ratio}

    def _stage(self, name: str, out: Path, *, table: dict[str, Any] | None = None, **settings: Any) -> Path:
        """Do one stage unless it was done in this run already, and return its folder."""
        if self.points.says_auto:
            # Once, folders were named after `auto`, not after what it stands for; what is in them stays where it is.
            former = out.with_name(f"-{out.name}".replace(f"-{self.points.head_method}-", "-auto-", 1)[1:])
            out = former if former.exists() and not out.exists() else out
        if out in self._done:
            return out
        self._on_stage(name, out)
        resolved = self._resolve(name, out, self._recipe.table(name) if table is None else table, settings)
        self._done[out] = importlib.import_module(stage_named(name).module).run(resolved, self._options)
        if self._done[out].manifest is None:
            self._planned[str(out)] = resolved.config
        return out

    def _resolve(self, name: str, out: Path, table: dict[str, Any], settings: dict[str, Any]) -> Resolved[StageConfig]:
        """Return a stage's settings: the recipe's, under those of flags, under those of the grid.

        What the grid sets is recorded as the recipe's.
        """
        fields = STAGE_CONFIGS[name].model_fields
        flags = {key: value for key, value in self._overrides.items() if key in fields} | settings | {"out": out}
        resolved = resolve(STAGE_CONFIGS[name], flags=flags, recipe=table)
        origins = resolved.origins | dict.fromkeys([*settings, "out"], "recipe")
        # What a recipe gives to several scopes at once need not matter to each.
        aimed = self._recipe.own_of(settings["scope"]) if name == "train" else {}
        return replace(resolved, origins=origins, aimed=frozenset(aimed))
