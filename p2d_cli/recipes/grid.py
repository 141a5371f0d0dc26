"""The runs of a recipe: every combination of its grids, with their controls and their reference. Torch-free."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from p2d_cli.config import SCOPES, Scope, ScoreHeadsConfig, Seed, resolve
from p2d_cli.errors import UsageError
from p2d_cli.recipes.recipe import ALL_HEADS, Grid, Recipe
from p2d_cli.registry import HEAD_METHODS, ROW_METHODS

Word = TypeVar("Word", bound=str)
CONTROL = "random"
"""The method of heads and of rows that every grid is compared with."""


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
    count_of: str | None = None
    """The data method that says how many rows are kept."""
    epochs: float | None = None
    """Epochs of training; None is the number in the recipe's own table."""

    @property
    def name(self) -> str:
        """The run's folder name."""
        heads = None if self.heads is None else sized(self.heads, "h", self.head_ratio)
        epochs = None if self.epochs is None else f"e{self.epochs:g}"
        parts = (self.scope, heads, self.data_name, epochs, f"s{self.seed}")
        return "-".join(part for part in parts if part is not None)

    @property
    def data_name(self) -> str:
        """What tells its rows from those of other runs of its seed."""
        name = sized(self.data, "d", self.data_ratio)
        return name if self.count_of is None else f"{name}-as-{self.count_of}"


class Points:
    """The runs that a recipe asks for, with settings from flags that hold for every stage that has them."""

    def __init__(self, recipe: Recipe, overrides: dict[str, Any]) -> None:
        self._recipe = recipe
        self._overrides = overrides
        self.says_auto = False
        """Whether `[score-heads]` leaves the method to p2d."""
        self.head_method = self._find_head_method()
        """How `[score-heads]` scores heads; what `auto` stands for, not `auto`."""
        points = [point for grid in recipe.grid for point in self._of(grid)]
        self.all = tuple(dict.fromkeys([*points, *self._controls(points)]))
        """Every run; scopes without selected heads appear once, whatever the heads."""

    def _find_head_method(self) -> str:
        table = self._recipe.table("score-heads")
        _one_of("score-heads", table, "method", "auto", ("auto", *HEAD_METHODS))
        deciding = {"method", "pool", "task_model", "preset"}
        flags = {key: value for key, value in self._overrides.items() if key in deciding} | {"out": Path("heads")}
        table = {key: value for key, value in table.items() if key in deciding}
        # Which model it is does not matter here.
        config = resolve(ScoreHeadsConfig, flags=flags, recipe={"model": "any", **table}).config
        self.says_auto = config.method == "auto"
        return config.resolved_method

    def _of(self, grid: Grid) -> Iterator[Point]:
        recipe = self._recipe
        heads = [self.head_method if method == "auto" else method for method in grid.heads or (self.head_method,)]
        data = grid.data or (_one_of("mine-data", recipe.mine_data, "method", "p2d", tuple(ROW_METHODS)),)
        seeds = (self._overrides["seed"],) if "seed" in self._overrides else grid.seed or (self._seed(),)
        scopes = grid.scope or (_one_of("train", recipe.train, "scope", "heads", SCOPES),)
        sizes = itertools.product(grid.head_ratio or (None,), grid.data_ratio or (None,), grid.epochs or (None,))
        axes = itertools.product(seeds, scopes, heads, data, sizes)
        for seed, scope, head, rows, (head_ratio, data_ratio, epochs) in axes:
            yield Point(
                heads=head if scope == "heads" else None,
                data=rows,
                scope=scope,
                seed=seed,
                head_ratio=head_ratio if scope == "heads" and head != ALL_HEADS else None,
                data_ratio=data_ratio if ROW_METHODS[rows].has_size else None,
                count_of=grid.count_of if ROW_METHODS[rows].has_size and rows != grid.count_of else None,
                epochs=epochs,
            )

    def _controls(self, points: Sequence[Point]) -> Iterator[Point]:
        """Yield random heads on random rows for every seed, at every size that another run of it has."""
        if not self._recipe.controls:
            return
        sized_points = [point for point in points if point.heads != ALL_HEADS and ROW_METHODS[point.data].has_size]
        bare = [replace(point, head_ratio=None, data_ratio=None) for point in points]
        seeds = {point.seed for point in sized_points}
        measures = {grid.count_of for grid in self._recipe.grid}
        for point in [*sized_points, *(point for point in bare if point.seed not in seeds)]:
            count_of = point.data if point.data in measures and point.data_ratio is None else point.count_of
            yield replace(point, heads=CONTROL, data=CONTROL, scope="heads", count_of=count_of)

    def reference(self) -> Point:
        """Return the run that all others are measured against: full fine-tuning on the whole pool."""
        scope = _one_of("reference", self._recipe.reference, "scope", "full", SCOPES)
        return Point(heads=None, data="full", scope=scope, seed=self.all[0].seed)

    def _seed(self) -> int:
        given = self._recipe.defaults.get("seed", 0)
        try:
            return TypeAdapter(Seed).validate_python(given)
        except ValidationError as problems:
            raise UsageError(f"the recipe's [defaults] seed: {problems.errors()[0]['msg']}") from None

    def scored_share_of_heads(self, method: str, seed: int) -> float | None:
        """Return the share that is selected from fresh scores: that of the heads that mine, else the greatest."""
        points = [point for point in self.all if point.seed == seed]
        mines = method == self.head_method and self._recipe.table("mine-data").get("scorer_model") is None
        if mines and any(ROW_METHODS[point.data].takes_heads for point in points):
            return None
        return _greatest([point.head_ratio for point in points if point.heads == method])

    def scored_with(self, point: Point) -> Point:
        """Return the point whose scores choose its rows: of several shares the recipe's own, or the greatest."""
        if not ROW_METHODS[point.data].reads_model:
            return point
        kin = [each for each in self.all if (each.data, each.seed) == (point.data, point.seed)]
        shares = [each.data_ratio for each in kin if each.count_of is None]
        # Where every number is that of another method's rows, each is chosen from scores of its own.
        return replace(point, data_ratio=_greatest(shares), count_of=None) if shares else point


def sized(method: str, mark: str, share: float | None) -> str:
    """Return a method's name with the share that it selects, if that is not the recipe's own."""
    return method if share is None else f"{method}-{mark}{share:g}"


def _one_of(table: str, settings: dict[str, Any], key: str, default: Word, known: tuple[Word, ...]) -> Word:
    """Return a setting that folders are named after; it has to be a word that the stage knows."""
    value = settings.get(key, default)
    if value not in known:
        raise UsageError(f"the recipe's [{table}] {key} must be one of {', '.join(known)}; found {value!r:.80}")
    found: Word = value
    return found


def _greatest(shares: Sequence[float | None]) -> float | None:
    """Return the greatest share, or None, the recipe's own, if that is among them."""
    return None if None in shares else max(share for share in shares if share is not None)
