"""A pool to be scored, and what a method of mine-data makes of it.

Legend: N pool rows, L layers, H query heads a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from p2d_cli.config import MineDataConfig
from p2d_cli.data.records import Record
from p2d_cli.data.sources import RowSource
from p2d_cli.modeling.model_files import ModelFiles
from p2d_cli.stages.execution import StageRun

if TYPE_CHECKING:
    from p2d_cli.stages.workbench import Workbench


@dataclass(frozen=True)
class MiningInputs:
    """The inputs of mine-data, located."""

    model: ModelFiles
    pool: RowSource
    target: RowSource | None
    heads_LH: NDArray[np.bool_] | None
    """The selected heads (p2d only)."""


@dataclass(frozen=True)
class PoolTask:
    """A pool to be scored."""

    job: StageRun[MineDataConfig]
    inputs: MiningInputs
    pool: Sequence[Record]
    target: Sequence[Record]
    """Empty where the method has no use for target rows, or none were given."""

    def name_of(self, row: int) -> str:
        """Return what messages call a row; the target's are counted on from the pool's."""
        return (self.pool[row] if row < len(self.pool) else self.target[row - len(self.pool)]).where


@dataclass
class PoolScored:
    """What a method found."""

    scores_N: NDArray[np.float64]
    draws_N: NDArray[np.int64]
    """Number of measurements behind each score."""
    device: str = "cpu"
    precision: str = ""
    """Empty where no model was read."""
    tokens: int = 0
    notes: dict[str, Any] = field(default_factory=dict)

    def spread(self, places: Sequence[int], size: int) -> PoolScored:
        """Return the same for a larger pool, in which these rows stand at `places` and the others have no score."""
        scores_N = np.full(size, np.nan)
        draws_N = np.zeros(size, dtype=np.int64)
        scores_N[places], draws_N[places] = self.scores_N, self.draws_N
        return replace(self, scores_N=scores_N, draws_N=draws_N)


def scored_by_model(
    bench: Workbench,
    scores_N: NDArray[np.float64],
    draws_N: NDArray[np.int64] | None = None,
    notes: dict[str, Any] | None = None,
) -> PoolScored:
    """Return what a method found by reading rows with `bench`; without `draws_N`, each row was measured once."""
    return PoolScored(
        scores_N=scores_N,
        draws_N=np.ones(len(scores_N), np.int64) if draws_N is None else draws_N,
        device=bench.device,
        precision=bench.precision,
        tokens=bench.tokens,
        notes=notes or {},
    )
