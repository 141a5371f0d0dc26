"""Trying a few learning rates before a training: what was tried, kept where an interrupted run finds it again."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from p2d_cli.artifacts.unfinished import RATES_NAME
from p2d_cli.runtime.seeding import derive_seed

if TYPE_CHECKING:
    from p2d_cli.modeling.training import TrainingPlan

PROBED_FACTORS = (1 / 3, 1.0, 3.0)
"""Rates that are tried, as multiples of the default."""
PROBED_UPDATES = 12
"""Updates of each rate at most: a shorter training is tried as a whole."""
PROBED_ROWS = 64
"""Held-out rows at most."""
TOO_FEW_ROWS = "--lr probe: too few rows to hold any out; the default rate is taken"
Row = TypeVar("Row")


@dataclass(frozen=True)
class RateProbe:
    """Rates that were tried, and what that took."""

    losses: Mapping[float, float] = field(default_factory=dict)
    """Mean loss of held-out answer tokens in nats behind the last update, by peak rate; inf where it diverged."""
    tokens: int = 0
    seconds: float = 0.0

    @classmethod
    def load(cls, folder: Path) -> RateProbe:
        """Return what an interrupted run has tried."""
        try:
            found = json.loads((folder / RATES_NAME).read_text(encoding="utf-8"))
            return cls(losses_of(found["losses"]), int(found["tokens"]), float(found["seconds"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return cls()

    def save(self, folder: Path) -> None:
        """Keep it for a later run."""
        aside = folder / f"{RATES_NAME}.new"
        aside.write_text(json.dumps(self.to_dict()), encoding="utf-8")
        aside.replace(folder / RATES_NAME)

    def to_dict(self) -> dict[str, Any]:
        """Return it in plain JSON types; the loss of a rate that diverged is null."""
        losses = {f"{rate:g}": loss if math.isfinite(loss) else None for rate, loss in self.losses.items()}
        return {"losses": losses, "tokens": self.tokens, "seconds": self.seconds}

    def adding(self, rate: float, loss: float, tokens: int, seconds: float) -> RateProbe:
        """Return it with a further rate."""
        return replace(
            self, losses={**self.losses, rate: loss}, tokens=self.tokens + tokens, seconds=self.seconds + seconds
        )

    @property
    def best(self) -> float:
        """The rate of the lowest loss; the lower one of equals, and the lowest where all diverged."""
        return min(sorted(self.losses), key=self.losses.__getitem__)

    def described(self) -> str:
        """Return each rate with its loss, in words."""
        said = {rate: "diverged" if math.isinf(loss) else f"{loss:.3f}" for rate, loss in sorted(self.losses.items())}
        return ", ".join(f"{words} at {rate:g}" for rate, words in said.items())


def losses_of(written: Mapping[str, float | None]) -> dict[float, float]:
    """Return the losses of a summary or a file, by rate, inf where it is null."""
    return {float(rate): math.inf if loss is None else float(loss) for rate, loss in written.items()}


def lent(rows: Sequence[Row], eval_rows: Sequence[Row], seed: int) -> tuple[Sequence[Row], Sequence[Row]]:
    """Return the rows that each rate is tried with, and those to look at behind it.

    A training without held-out rows lends a quarter of its own at most; of fewer than four there are none to look at.
    """
    source = eval_rows or rows
    most = min(PROBED_ROWS, len(eval_rows) or len(rows) // 4)
    order = np.random.default_rng(derive_seed(seed, "train", "probe")).permutation(len(source)).tolist()
    looked_at, others = ([source[place] for place in part] for part in (order[:most], order[most:]))
    return (rows if eval_rows else others), looked_at


def probed(plan: TrainingPlan, rate: float, rows: int, updates: int) -> TrainingPlan:
    """Return the plan of a short training, with a whole schedule of its own and one look at held-out rows behind it.

    Args:
        plan: the training.
        rate: the peak rate to try.
        rows: that it is tried with.
        updates: of the training.
    """
    updates = min(PROBED_UPDATES, updates)
    an_epoch = math.ceil(rows / plan.batch_size)
    return replace(
        plan,
        learning_rate=rate,
        epochs=updates / an_epoch,
        max_steps=None,
        eval_steps=updates,
        patience=None,
        trackers=(),
        checkpoint_minutes=math.inf,
        cache_frozen=False,
        keeps_best=False,
        looks_first=False,
    )
