"""A pool to be scored, and what a method of mine-data makes of it.

Legend: N pool rows, M rows to choose from (those that are listed, and no target rows), L layers, H query heads a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from p2d_cli.artifacts.subset import NamedPoolScores
from p2d_cli.config import MineDataConfig
from p2d_cli.data.pool import Chunk, Pool
from p2d_cli.data.raw_rows import RowSource
from p2d_cli.data.records import Record
from p2d_cli.modeling.model_files import ModelFiles
from p2d_cli.stages.execution import StageRun
from p2d_cli.stages.relevance import RelevanceTally

if TYPE_CHECKING:
    from p2d_cli.stages.workbench import Workbench


METHODS_WITH_TARGET = frozenset({"p2d", "data-whisperer", "embedding", "lexical"})
METHODS_WITHOUT_MODEL = frozenset({"random", "lexical", "coverage", "full"})


@dataclass(frozen=True)
class MiningInputs:
    """The inputs of mine-data, located."""

    model: ModelFiles
    """The model that reads the rows."""
    pool: RowSource
    target: RowSource | None
    heads_LH: NDArray[np.bool_] | None
    """The selected heads (p2d only)."""
    relevance: RelevanceTally | None = None
    """Counts rows that are known to be of the target's task, once the choice is made."""
    scored: NamedPoolScores | None = None
    """Scores that an earlier run found."""


@dataclass(frozen=True)
class PoolTask:
    """A pool to be scored."""

    job: StageRun[MineDataConfig]
    inputs: MiningInputs
    pool: Pool
    target: Sequence[Record]
    """Empty where the method has no use for target rows, or none were given."""

    def chunks(self) -> Iterator[Chunk]:
        """Yield the rows to choose from, a chunk at a time; reading them is charged to `prepare`."""
        chunks = self.pool.chunks()
        while True:
            with self.job.timer.phase("prepare"):
                chunk = next(chunks, None)
            if chunk is None:
                return
            yield chunk


@dataclass
class PoolScored:
    """What a method found of the M rows to choose from."""

    scores: NDArray[np.float64]
    draws: NDArray[np.int64]
    """Number of measurements behind each score."""
    device: str = "cpu"
    precision: str = ""
    """Empty where no model was read."""
    tokens: int = 0
    notes: dict[str, Any] = field(default_factory=dict)

    def spread(self, pool: Pool) -> PoolScored:
        """Return the same for all N rows of the pool; those that are not to be chosen have no score."""
        if pool.size == pool.num_rows:
            return self
        others_N = ~pool.is_excluded_N
        scores_N = np.full(pool.num_rows, np.nan)
        draws_N = np.zeros(pool.num_rows, dtype=np.int64)
        scores_N[others_N], draws_N[others_N] = self.scores, self.draws
        return replace(self, scores=scores_N, draws=draws_N)


def measured(times: int, count: int) -> NDArray[np.int64]:
    """Return the number of measurements of `count` rows that were all measured equally often, in a few bytes."""
    return np.broadcast_to(np.int64(times), (count,))


def scored_by_model(
    bench: Workbench,
    scores: NDArray[np.float64],
    draws: NDArray[np.int64] | None = None,
    notes: dict[str, Any] | None = None,
) -> PoolScored:
    """Return what a method found by reading rows with `bench`; without `draws`, each row was measured once."""
    return PoolScored(
        scores=scores,
        draws=measured(1, len(scores)) if draws is None else draws,
        device=bench.device,
        precision=bench.precision,
        tokens=bench.tokens,
        notes=notes or {},
    )
