"""doctor: what p2d can do with a model, told by its config and the headers of its files, without its weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

from p2d_cli.config import MineDataConfig, Scope
from p2d_cli.core.geometry import HeadGeometry
from p2d_cli.core.head_layout import ModelLayout
from p2d_cli.errors import P2DError
from p2d_cli.modeling.model_files import ModelFiles, locate_model
from p2d_cli.modeling.quantised import quantisation_of
from p2d_cli.modeling.suitability import Needs, read_layout, require
from p2d_cli.registry import HEAD_METHODS, ROW_METHODS
from p2d_cli.stages import evaluate, export
from p2d_cli.stages.train import needs_of


@dataclass(frozen=True)
class Ability:
    """Something that p2d does, and whether it can do it with the model."""

    stage: str
    what: str
    """A method, a scope, or the stage itself."""
    reason: str = ""
    """Why not; empty if it can."""


@dataclass(frozen=True)
class Examination:
    """What was found of a model."""

    model: str
    model_type: str
    has_weights: bool
    """Whether the weights themselves are there; nothing here needs them."""
    quantised: str
    """How the weights are stored, empty if they are plain."""
    abilities: tuple[Ability, ...]
    geometry: HeadGeometry | None = None
    """None where the heads cannot be told apart."""
    gated: tuple[int, ...] = field(default=())
    """Layers in which a head owns a gate beside its query."""
    sharing: dict[int, int] = field(default_factory=dict)
    """Layer -> the layer that it takes keys and values from."""

    def can(self, stage: str) -> tuple[str, ...]:
        """Return what a stage can do with the model."""
        return tuple(one.what for one in self.abilities if one.stage == stage and not one.reason)

    @property
    def stages(self) -> tuple[str, ...]:
        """Return the stages that were asked about, in their order."""
        return tuple(dict.fromkeys(one.stage for one in self.abilities))

    def reasons(self) -> dict[str, dict[str, list[str]]]:
        """Return reason -> stage -> what it keeps the stage from doing."""
        found: dict[str, dict[str, list[str]]] = {}
        for one in self.abilities:
            if one.reason:
                found.setdefault(one.reason, {}).setdefault(one.stage, []).append(one.what)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return it in plain JSON types."""
        geometry = None if self.geometry is None else self.geometry.to_dict() | {"heads": self.geometry.total_heads}
        return asdict(self) | {"geometry": geometry}


def examine(spec: str) -> Examination:
    """Say what p2d can do with a model, given by folder or hub id, of which the weights may be missing.

    Raises:
        UnavailableError, DataError: it is not a model, or its config cannot be read.
    """
    files = locate_model(spec, with_weights=False)
    abilities = tuple(_abilities(files))
    layout = _read_layout(files)
    quantised = quantisation_of(files)
    return Examination(
        model=spec,
        model_type=files.model_type,
        has_weights=bool(files.weights),
        quantised="" if quantised is None else quantised.name,
        abilities=abilities,
        geometry=None if layout is None else layout.geometry,
        gated=tuple(one.layer for one in layout or () if one.q.rows[0][1] - one.q.rows[0][0] > one.query_dim),
        sharing={one.layer: one.kv_layer for one in layout or () if one.kv_layer != one.layer},
    )


def _abilities(files: ModelFiles) -> Iterator[Ability]:
    """Ask for everything that p2d does with models."""
    for name in HEAD_METHODS:
        yield Ability("score-heads", name, _why_not(files, HEAD_METHODS[name].needs()))
    for name in ROW_METHODS:
        method = ROW_METHODS[name]
        for affinity in ("readout", "attention") if method.takes_heads else ("auto",):
            config = MineDataConfig(
                model="model", pool="pool", target="target", heads="heads", out="out", method=name, affinity=affinity
            )
            what = f"{name} ({affinity})" if method.takes_heads else name
            yield Ability("mine-data", what, _why_not(files, method.needs(config)) if method.reads_model else "")
    for scope in get_args(Scope):
        yield Ability("train", scope, _why_not(files, needs_of(scope)))
    yield Ability("eval", "eval", _why_not(files, evaluate.NEEDS))
    yield Ability("export", "export", _why_not(files, export.NEEDS))


def _why_not(files: ModelFiles, needs: Needs) -> str:
    try:
        require(files, needs)
    except P2DError as problem:
        return problem.message
    return ""


def _read_layout(files: ModelFiles) -> ModelLayout | None:
    try:
        return read_layout(files)
    except P2DError:
        return None
