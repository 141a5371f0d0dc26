"""uniform: heads spread evenly over the model, whatever the task."""

from __future__ import annotations

import numpy as np

from p2d_cli.config import ScoreHeadsConfig
from p2d_cli.core.head_selection import candidate_heads, select_uniform
from p2d_cli.methods.head_method import HeadMethod, RepeatScores


class Uniform(HeadMethod):
    """Take the same number of heads from each layer, whatever the task."""

    name = "uniform"
    ranks = False
    is_control = True

    @classmethod
    def repeats(cls, config: ScoreHeadsConfig) -> int:
        """Return 1: nothing is drawn."""
        del config
        return 1

    def score(self) -> RepeatScores:
        """Return scores of 1 and 0, of which the highest are just this selection."""
        config, shape = self.task.config, self.task.shape
        budget = shape.head_budget(config.ratio)
        selected_LH = select_uniform(budget, candidate_heads(config.resolved_layers, shape.exists_LH, budget))
        return RepeatScores(np.where(shape.exists_LH, selected_LH, np.nan))
