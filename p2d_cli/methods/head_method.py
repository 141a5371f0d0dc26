"""What a method of score-heads is: it turns a model into scores of its heads, higher is better.

Legend: L layers, H query heads a layer.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from p2d_cli.artifacts.readings import Readings
from p2d_cli.config import ScoreHeadsConfig
from p2d_cli.core.geometry import HeadGeometry
from p2d_cli.data.pool import Pool
from p2d_cli.data.records import Record
from p2d_cli.engine.reader import Reader
from p2d_cli.engine.stage_run import StageRun
from p2d_cli.errors import UsageError
from p2d_cli.methods.method import Method, Read
from p2d_cli.modeling.model_files import ModelFiles
from p2d_cli.modeling.suitability import Needs, require


@dataclass(frozen=True)
class HeadTask:
    """One repeat of a method: the model, the rows, and this repeat's source of chance."""

    job: StageRun[ScoreHeadsConfig]
    reader: Reader
    """Of the model whose heads are scored; it loads the model once it is to read."""
    rng: np.random.Generator
    repeat: int = 0
    target: tuple[Record, ...] = ()
    pool: Pool | None = None
    task_model: ModelFiles | None = None

    @property
    def config(self) -> ScoreHeadsConfig:
        """The stage's settings."""
        return self.job.config

    @property
    def part(self) -> str:
        """What tells this repeat's passes from those of the others."""
        return "" if self.config.repeats == 1 else f"of draw {self.repeat + 1}"

    @property
    def others(self) -> Pool:
        """The rows to tell the target's from."""
        if self.pool is None:
            raise UsageError("this method needs --pool")
        return self.pool

    @cached_property
    def shape(self) -> HeadGeometry:
        """How many heads the model has, found without its weights."""
        return self.reader.shape_without_weights()

    def sample(self) -> list[Record]:
        """Return the target rows that this repeat looks at."""
        return [self.target[index] for index in self.rng.permutation(len(self.target))[: self.config.proxy_samples]]


@dataclass(frozen=True)
class RepeatScores:
    """What one repeat found."""

    scores_LH: NDArray[np.float64]
    """Nan where a layer has no such head."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Figures for the summary, which `describe` puts into words."""
    readings: Readings | None = None
    """Of all heads on the rows that were read, the target's first, where rows are read by heads."""


class HeadMethod(Method[HeadTask]):
    """One way of scoring heads; an instance is one repeat of it.

    As a control it takes no time, and each share is selected by itself.
    """

    takes_pool: ClassVar[bool] = False
    """Whether it needs rows to tell the target's from."""
    takes_task_model: ClassVar[bool] = False
    """Whether it can compare the model with a fine-tuned one instead of reading rows."""
    spreads: ClassVar[bool] = False
    """Whether its best heads are chosen with an even share of each layer, unless `--selection` says otherwise."""
    reads_apart: ClassVar[bool] = True
    """Whether heads of their own read rows, chosen by the same scores as those that are trained (`--depth`)."""
    reads: ClassVar[frozenset[Read]] = frozenset({"logits"})
    """What it reads of the model besides the outputs of heads."""

    @classmethod
    def takes_target(cls, config: ScoreHeadsConfig) -> bool:
        """Say whether it needs target rows."""
        del config
        return not cls.is_control

    @classmethod
    def repeats(cls, config: ScoreHeadsConfig) -> int:
        """Return how often it is done: as often as asked for, unless each time gives the same."""
        return config.repeats

    @classmethod
    def needs(cls) -> Needs:
        """Return what it asks of a model."""
        if cls.is_control:  # its weights are not read
            return Needs(heads=True, weights=False)
        return Needs(tokenizer=True, heads=True, attention="attention" in cls.reads, logits="logits" in cls.reads)

    @classmethod
    def check_model(cls, model: ModelFiles, task_model: ModelFiles | None) -> int:
        """Refuse a model that cannot be scored by this method; return how many tokens it has embeddings for.

        Raises:
            P2DError: see `p2d_cli.modeling.suitability.require`.
        """
        del task_model
        return require(model, cls.needs())

    @abstractmethod
    def score(self) -> RepeatScores:
        """Return the scores, once all passes are done."""
