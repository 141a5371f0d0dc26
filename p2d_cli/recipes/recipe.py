"""A recipe: a whole pipeline and the grid of runs that it is for, in one TOML file. Torch-free."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from glob import has_magic, iglob
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from p2d_cli.config import (
    INPUT_FIELDS,
    SCOPES,
    SEED_MARK,
    STAGE_CONFIGS,
    Choice,
    Epochs,
    Ratio,
    RowMethodName,
    Scope,
    Seed,
    TrainConfig,
    field_name,
    known_keys,
    shown,
    suggestion,
)
from p2d_cli.errors import DataError, UsageError, near_names
from p2d_cli.registry import HEAD_METHODS

ALL_HEADS = "all"
"""In a grid: every head, which no method selects."""


def _underscored(table: Mapping[str, Any]) -> dict[str, Any]:
    return {field_name(key): value for key, value in table.items()}


class Grid(BaseModel):
    """The axes of a cross-ablation; every combination is one run. A recipe may unite several."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    heads: tuple[Annotated[str, Choice(HEAD_METHODS, ("auto", ALL_HEADS))], ...] = Field(
        (), description="Head methods, or `all` for every head; by default the method of [score-heads]."
    )
    data: tuple[RowMethodName, ...] = Field((), description="Data methods; by default the one of [mine-data].")
    seed: tuple[Seed, ...] = Field((), description="Seeds; by default the recipe's own.")
    scope: tuple[Scope, ...] = Field((), description="Scopes; by default that of [train], else heads.")
    head_ratio: tuple[Ratio, ...] = Field(
        (), description="Shares of all heads to train; by default [score-heads] ratio."
    )
    data_ratio: tuple[Ratio, ...] = Field((), description="Shares of the pool to keep; by default [mine-data] ratio.")
    count_of: RowMethodName | None = Field(
        None, description="Data method: the others keep as many rows as it keeps of the same pool, with the same seed."
    )
    epochs: tuple[Epochs, ...] = Field((), description="Epochs of training; by default [train] epochs.")

    @model_validator(mode="before")
    @classmethod
    def _dashes(cls, given: Any) -> Any:
        return _underscored(given) if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _one_size(self) -> Grid:
        if self.count_of is not None and self.data_ratio:
            raise ValueError("count-of and data-ratio exclude each other: give them in two [[grid]] tables")
        return self


AsSeveral = BeforeValidator(lambda grids: (grids,) if isinstance(grids, (Mapping, Grid)) else grids)
"""Takes a single `[grid]` for a list of one."""


class Recipe(BaseModel):
    """A whole pipeline in one TOML file; each stage's table holds that stage's settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    name: str = Field("run", description="Shown in the report.")
    out: Path | None = Field(None, description="Folder for all artifacts, relative to the working directory.")
    defaults: dict[str, Any] = Field(default_factory=dict, description="Settings of every stage that has them.")
    score_heads: dict[str, Any] = Field(default_factory=dict, alias="score-heads")
    mine_data: dict[str, Any] = Field(default_factory=dict, alias="mine-data")
    train: dict[str, Any] = Field(default_factory=dict)
    eval: dict[str, Any] = Field(default_factory=dict)
    report_aer: dict[str, Any] = Field(default_factory=dict, alias="report-aer")
    grid: Annotated[tuple[Grid, ...], AsSeveral] = Field(
        (Grid(),), min_length=1, description="What to combine; several tables, [[grid]], are done one after the other."
    )
    reference: dict[str, Any] = Field(
        default_factory=dict, description="[train] settings of the full fine-tuning that is the reference."
    )
    controls: bool = Field(
        True, description="Add random heads on random rows at the same sizes if the grid lacks them."
    )
    untrained: bool = Field(False, description="Evaluate the model as it is, too.")

    def table(self, stage: str, scope: Scope | None = None) -> dict[str, Any]:
        """Return the settings that this recipe gives to `stage`: its own table over the defaults.

        Args:
            stage: the stage's name.
            scope: for train, the scope whose own table, as `[train.full]`, goes over `[train]`.
        """
        fields = STAGE_CONFIGS[stage].model_fields
        own = _underscored(getattr(self, stage.replace("-", "_"), {}))
        settings = {key: value for key, value in _underscored(self.defaults).items() if key in fields}
        settings |= {key: value for key, value in own.items() if not (stage == "train" and key in SCOPES)}
        if stage == "train" and (chosen := scope or settings.get("scope")) in SCOPES:
            settings |= self.own_of(chosen)
        return settings

    def own_of(self, scope: Scope) -> dict[str, Any]:
        """Return the settings that this recipe gives to the trainings of one scope alone, as in `[train.full]`."""
        return _underscored(self.train.get(scope, {}))


def find_recipe(name: str) -> Path:
    """Return the path of a recipe; `quickstart`, unless a file has that name, is the recipe that comes with p2d."""
    if name != "quickstart" or Path(name).exists():
        return Path(name)
    package = Path(__file__).parents[1]
    places = [folder / "fixtures" / "quickstart.toml" for folder in (package, package.parent)]
    return next((place for place in places if place.is_file()), Path(name))


def read_recipe_text(path: Path) -> str:
    """Return the text of a recipe, without the mark (BOM) that editors on Windows put before it.

    Raises:
        UnicodeDecodeError: it is not UTF-8.
        OSError: it cannot be read.
    """
    return path.read_text(encoding="utf-8-sig")


def read_recipe(path: Path) -> Recipe:
    """Read a recipe and make its relative input paths relative to the recipe's own folder.

    Raises:
        DataError: the file is missing or is not TOML.
        UsageError: it has keys that p2d does not know.
    """
    try:
        path = path.expanduser()
        table = tomllib.loads(read_recipe_text(path))
    except FileNotFoundError:
        hint = f"quickstart is the one that comes with p2d; {near_names(path)}"
        raise DataError(f"no recipe at {path}", hint=hint) from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder, not a recipe", hint="give the path of a .toml file") from None
    except UnicodeDecodeError as problem:
        found = f"byte 0x{problem.object[problem.start]:02x} at byte {problem.start + 1}"
        raise DataError(f"{path} is not valid UTF-8: {found}", hint="save it as UTF-8") from None
    except (ValueError, RecursionError) as problem:
        raise DataError(f"{path} is not valid TOML: {problem}") from None
    except RuntimeError:
        raise DataError(f"no recipe at {path}: that home folder is not known") from None
    _check_recipe_keys(table)
    _anchor_paths(table, path.parent)
    try:
        return Recipe.model_validate(table)
    except ValidationError as problems:
        raise UsageError(f"the recipe {path} is wrong:\n{_explain(problems)}") from None


def _explain(problems: ValidationError) -> str:
    """Return one line for each wrong value, with the keys that lead to it."""
    # "At least one" of what has some is said when one of these is wrong, and that is said already.
    found = [problem for problem in problems.errors() if problem["type"] != "too_short" or not problem["input"]]
    places = [".".join(str(part).replace("_", "-") for part in problem["loc"]) for problem in found]
    return "\n".join(
        f"  [{place}] {problem['msg']}; got {shown(problem['input'])}"
        for place, problem in zip(places, found, strict=True)
    )


def _check_recipe_keys(table: Mapping[str, Any]) -> None:
    known = {field.alias or name: name for name, field in Recipe.model_fields.items()}
    for key, value in table.items():
        if key not in known:
            raise UsageError(f"unknown key '{key}' in the recipe", hint=suggestion(key, known))
        if key not in STAGE_CONFIGS or not isinstance(value, dict):
            continue
        by_scope = {name: own for name, own in value.items() if key == "train" and name in SCOPES}
        own = {name: setting for name, setting in value.items() if name not in by_scope}
        known_keys(own, STAGE_CONFIGS[key].model_fields, where=f"recipe's [{key}]")
        for name, of_scope in by_scope.items():
            if not isinstance(of_scope, dict):
                raise UsageError(f"the recipe's [train.{name}] must be a table; found {shown(of_scope)}")
            known_keys(of_scope, TrainConfig.model_fields, where=f"recipe's [train.{name}]")
    if isinstance(reference := table.get("reference"), dict):
        known_keys(reference, TrainConfig.model_fields, where="recipe's [reference]")
    grids = table.get("grid")
    for grid in grids if isinstance(grids, list) else [grids]:
        if isinstance(grid, dict):
            known_keys(grid, Grid.model_fields, where="recipe's [grid]")
    if isinstance(defaults := table.get("defaults"), dict):
        every_field = {name: None for config in STAGE_CONFIGS.values() for name in config.model_fields}
        known_keys(defaults, every_field, where="recipe's [defaults]")


def _anchor_paths(table: Mapping[str, Any], folder: Path) -> None:
    """Take input paths from the recipe's folder, in place; those of `[train.full]` and its like too."""
    for settings in table.values():
        if not isinstance(settings, dict):
            continue
        for key, value in settings.items():
            if key.replace("-", "_") in INPUT_FIELDS and isinstance(value, str):
                settings[key] = _anchored(value, folder)
        _anchor_paths({key: value for key, value in settings.items() if key in SCOPES}, folder)


def _anchored(spec: str, folder: Path) -> str:
    """Return a file or folder, one of several configurations of a folder, or a glob with matches, seen from the recipe.

    What is not there may be on the hub, and what cannot be a path is refused with the other settings.
    """
    try:
        name = str(folder / Path(spec).expanduser())
        parent, colon, _ = name.rpartition(":")
        # Path.glob takes no pattern from the root, nor one that leads upwards.
        pattern = name.replace(SEED_MARK, "*")
        matched = has_magic(pattern) and next(iglob(pattern, recursive=True), None) is not None  # noqa: PTH207
        is_there = Path(name).exists() or matched or (colon and Path(parent).is_dir())
    except (OSError, RuntimeError, ValueError):
        return spec
    return name if spec and is_there else spec
