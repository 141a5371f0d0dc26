"""What a method of mine-data is: it turns the rows of a pool into scores, higher is better.

Legend: N pool rows, M rows to choose from (those that are listed, and no target rows), L layers, H query heads a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from p2d_cli.artifacts.readings import Readings
from p2d_cli.config import MineDataConfig
from p2d_cli.core.geometry import SelectedHeads
from p2d_cli.core.subset_selection import resolve_count
from p2d_cli.data.pool import Chunk, Pool
from p2d_cli.data.records import Record
from p2d_cli.engine.reader import Reader
from p2d_cli.engine.stage_run import StageRun
from p2d_cli.methods.method import Method, Read
from p2d_cli.modeling.model_files import ModelFiles
from p2d_cli.modeling.suitability import Needs, require


@dataclass(frozen=True)
class PoolTask:
    """A pool to be scored."""

    job: StageRun[MineDataConfig]
    reader: Reader
    """Of the model that reads the rows; it loads the model once it is to read."""
    pool: Pool
    target: Sequence[Record]
    """Empty where the method has no use for target rows, or none were given."""
    heads: SelectedHeads | None = None
    """The heads of a heads artifact, where the method takes any."""
    readings: Readings | None = None
    """What that artifact keeps of the rows that its heads have read."""
    readings_planned: int | None = None
    """How many pool rows that artifact will keep readings of, beside the target's, where it is still to be made, as in
    the dry run of a recipe, and the heads only stand for others; 0 if it will keep none at all."""

    @property
    def heads_LH(self) -> NDArray[np.bool_] | None:
        """The heads that read the best rows, or all where no others do; bool [L, H]."""
        if self.heads is None or self.heads.reading is None:
            return None if self.heads is None else self.heads.selected_LH
        return self.heads.reading.deep_LH

    @property
    def config(self) -> MineDataConfig:
        """The stage's settings."""
        return self.job.config

    def chunks(self) -> Iterator[Chunk]:
        """Yield the rows to choose from, a chunk at a time; reading them is charged to `prepare`."""
        chunks = self.pool.chunks()
        while True:
            with self.job.timer.phase("prepare"):
                chunk = next(chunks, None)
            if chunk is None:
                return
            yield chunk


@dataclass(frozen=True)
class RowScores:
    """What a method found of the M rows to choose from."""

    scores: NDArray[np.float64]
    draws: NDArray[np.int64]
    """Number of measurements behind each score."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Figures for the summary, which `describe` puts into words."""
    first: NDArray[np.float64] | None = None
    """What orders rows without a score, where a first look at them found none worth reading on."""

    @classmethod
    def measured(
        cls, scores_M: NDArray[np.float64], notes: dict[str, Any] | None = None, *, times: int = 1
    ) -> RowScores:
        """Return scores that all rest on so many measurements; 0 for those that rest on nothing that was read."""
        return cls(scores_M, np.broadcast_to(np.int64(times), scores_M.shape), notes or {})


class RowMethod(Method[PoolTask]):
    """One way of scoring rows; an instance scores one pool."""

    takes_target: ClassVar[bool] = False
    """Whether it looks at target rows, where they are given."""
    takes_heads: ClassVar[bool] = False
    """Whether it needs a heads artifact."""
    takes_shortlist: ClassVar[bool] = False
    """Whether words may choose beforehand which rows the model reads."""
    sets_floor: ClassVar[bool] = False
    """Whether target rows can set a score below which no row is kept (`--floor-quantile`)."""
    takes_index: ClassVar[bool] = False
    """Whether an index can keep what it reads of the pool (`--index`)."""
    reads_model: ClassVar[bool] = True
    has_size: ClassVar[bool] = True
    """Whether `--ratio` or `--count` says how many rows are kept."""

    @classmethod
    def check_settings(cls, config: MineDataConfig) -> None:
        """Refuse settings that do not go together with this method.

        Raises:
            ValueError: saying which.
        """
        del config

    @classmethod
    def count(cls, config: MineDataConfig, num_rows: int) -> int:
        """Return how many rows of a pool are kept."""
        return resolve_count(num_rows, config.ratio, config.count)

    @classmethod
    def reads(cls, config: MineDataConfig) -> frozenset[Read]:
        """Return what it reads of the model besides the outputs of heads."""
        del config
        return frozenset({"logits"})

    @classmethod
    def needs(cls, config: MineDataConfig) -> Needs:
        """Return what it asks of a model."""
        reads = cls.reads(config)
        is_of_heads = cls.takes_heads or "attention" in reads
        return Needs(tokenizer=True, heads=is_of_heads, attention="attention" in reads, logits="logits" in reads)

    @classmethod
    def check_model(cls, config: MineDataConfig, model: ModelFiles) -> int:
        """Refuse a model that cannot read as the method wants it; return how many tokens it has embeddings for.

        Raises:
            P2DError: see `p2d_cli.modeling.suitability.require`.
        """
        return require(model, cls.needs(config))

    @cached_property
    def scores_M(self) -> NDArray[np.float64]:
        """Room for the score of each row to choose from, to be filled by the passes."""
        return np.full(self.task.pool.size, np.nan)

    def caveats(self) -> tuple[str, ...]:
        """Return what a plan cannot know beforehand, once its passes were counted."""
        return ()

    def disk(self) -> dict[str, int]:
        """Return the bytes by part that the method writes beside the artifact, once its passes were counted."""
        return {}

    def score(self) -> RowScores:
        """Return the scores, once all passes are done."""
        return RowScores.measured(self.scores_M)
