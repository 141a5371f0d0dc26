"""uniform: heads spread evenly over the model, whatever the task."""

from __future__ import annotations

import numpy as np

from p2d_cli.config import ScoreHeadsConfig
from p2d_cli.core.head_selection import among_layers, candidate_layers, select_uniform
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
        layers = candidate_layers(config.layers, shape.num_layers)
        selected = select_uniform(len(layers), shape.num_heads, shape.head_budget(config.ratio))
        return RepeatScores(among_layers(selected, layers, shape.num_layers).astype(np.float64))
