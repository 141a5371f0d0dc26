"""contrast: heads whose attention, from a target query, favours the one target demo among pool demos.

Legend: E episodes, B batch, K heads in (layer, head) order, S demos.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2d_cli.core.head_selection import contrast_scores
from p2d_cli.core.sample_affinity import demo_shares
from p2d_cli.data.episodes import EncodedEpisode, Episode, duplicate_groups, plan_contrast
from p2d_cli.engine.cost import FLOAT64
from p2d_cli.engine.passes import Arrays, Pass, scatter
from p2d_cli.engine.reader import ModelReader
from p2d_cli.methods.head_method import HeadMethod, RepeatScores


class Contrast(HeadMethod):
    """Show a target query one target demo among pool demos, and see which heads look at it."""

    name = "contrast"
    takes_pool = True
    spreads = True
    reads = frozenset({"attention"})

    _share_EK: NDArray[np.float64]
    """Each head's share of attention to the target demo, once the passes are made."""
    _truncated: int

    def passes(self) -> Iterator[Pass]:
        """Read each episode once."""
        task, demos = self.task, self.task.config.demos
        with task.job.timer.phase("prepare"):
            plan, episodes = self._plan_episodes()
        self._truncated = sum(episode.truncated_demos for episode in episodes)
        shape = task.reader.shape
        self._share_EK = np.zeros((len(plan), shape.total_heads))

        def watch(reader: ModelReader, batch: list[int]) -> Arrays:
            attention_BKS = reader.attention([episodes[index] for index in batch], shape.exists_LH, demos)
            # Each head is weighed alone, so to demo_shares each is an episode of its own.
            shares = [
                demo_shares(attention_KS[:, None, :])[:, plan[index].target_demo]
                for index, attention_KS in zip(batch, attention_BKS, strict=True)
            ]
            return {"target_share": np.stack(shares)}

        yield Pass(
            work="watch episodes",
            part=task.part,
            lengths=[len(episode.input_ids) for episode in episodes],
            read=watch,
            take=scatter(self._share_EK, "target_share"),
            name="episode {}".format,
            kept_bytes=shape.total_heads * FLOAT64,
        )

    def _plan_episodes(self) -> tuple[Sequence[Episode], list[EncodedEpisode]]:
        """Plan and tokenize episodes with one target demo among pool demos, asked by another target row."""
        config, target, pool = self.task.config, self.task.target, self.task.others
        target_groups, _ = duplicate_groups(target)
        pool_groups = np.full(pool.num_rows, -1, dtype=np.int64)  # only likeness to the target matters
        pool_groups[pool.twins] = pool.twin_groups
        plan = plan_contrast(
            len(target),
            pool.num_rows,
            demos=config.demos,
            episodes=config.episodes,
            rng=self.task.rng,
            pool_groups=pool_groups,
            target_groups=target_groups,
        )
        places = [row for each in plan for slot, row in enumerate(each.demos) if slot != each.target_demo]
        others = iter(pool.take(places))
        shown = [
            (
                [target[row] if slot == each.target_demo else next(others) for slot, row in enumerate(each.demos)],
                [target[row] for row in each.queries],
            )
            for each in plan
        ]
        return plan, self.task.reader.episodes(shown)

    def score(self) -> RepeatScores:
        """Return by how much each head's share of attention to the target demo exceeds chance."""
        demos = self.task.config.demos
        notes = {
            "episodes": len(self._share_EK),
            "truncated_demos": self._truncated,
            "best_target_share": float(self._share_EK.mean(axis=0).max()),
            "chance_target_share": 1 / demos,
        }
        return RepeatScores(self.task.reader.shape.table(contrast_scores(self._share_EK, demos)), notes)

    @classmethod
    def describe(cls, summary: dict[str, Any]) -> list[str]:
        """Say where the best head looks."""
        if "best_target_share" not in summary:
            return []
        share, chance = summary["best_target_share"], summary["chance_target_share"]
        return [f"best head looks at the target demo {share:.0%} of the time, chance {chance:.0%}"]
