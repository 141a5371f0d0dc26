"""random: heads by chance."""

from __future__ import annotations

from p2d_cli.methods.head_method import HeadMethod, RepeatScores


class Random(HeadMethod):
    """Draw scores by chance: what any other method has to beat."""

    name = "random"
    is_control = True

    def score(self) -> RepeatScores:
        """Return a random number for each head."""
        shape = self.task.shape
        return RepeatScores(shape.table(self.task.rng.random(shape.total_heads)))
