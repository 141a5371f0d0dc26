"""p2d: rows that the task's own heads respond to.

`readout`, p2d's own: the heads' outputs on a row are like those on the target's rows (`p2d_cli.methods.readout`).
`attention`, the paper's: among few-shot demos, target queries look at the row (`p2d_cli.methods.episodes`).

"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from p2d_cli.config import MineDataConfig
from p2d_cli.engine.passes import Pass, Steps
from p2d_cli.methods.episodes import EpisodeMethod
from p2d_cli.methods.indexed_rows import describe_index
from p2d_cli.methods.method import Read
from p2d_cli.methods.readout import ReadoutMethod
from p2d_cli.methods.row_method import PoolTask, RowMethod, RowScores


class P2d(RowMethod):
    """Ask the selected heads how they respond to each row."""

    name = "p2d"
    takes_target = True
    takes_heads = True
    takes_shortlist = True
    sets_floor = True
    takes_index = True

    def __init__(self, task: PoolTask) -> None:
        super().__init__(task)
        by_attention = task.config.resolved_affinity == "attention"
        self._way: RowMethod = EpisodeMethod(task) if by_attention else ReadoutMethod(task)

    @classmethod
    def check_settings(cls, config: MineDataConfig) -> None:
        """Refuse a readout without target rows, and a floor without a readout."""
        if config.scores is None and config.affinity == "readout" and config.target is None:
            raise ValueError("--affinity readout needs --target: rows of the task to tell from the pool")
        if config.scores is None and config.resolved_affinity != "readout":
            if config.floor_quantile:
                raise ValueError("--floor-quantile needs --target and the readout: attention scores no target rows")
            if config.index is not None:
                raise ValueError("--index needs --target and the readout: attention reads rows in few-shot episodes")

    @classmethod
    def reads(cls, config: MineDataConfig) -> frozenset[Read]:
        """Return what it reads of the model besides the outputs of heads."""
        return EpisodeMethod.reads(config) if config.resolved_affinity == "attention" else frozenset()

    def passes(self) -> Iterable[Pass | Steps]:
        """Yield what the model is to read."""
        return self._way.passes()

    def caveats(self) -> tuple[str, ...]:
        """Return what a plan cannot know beforehand."""
        return self._way.caveats()

    def disk(self) -> dict[str, int]:
        """Return the bytes by part that are written beside the artifact."""
        return self._way.disk()

    def score(self) -> RowScores:
        """Return how the heads respond to each row."""
        return self._way.score()

    @classmethod
    def describe(cls, summary: dict[str, Any]) -> list[str]:
        """Say how many heads read what, and where the cut is."""
        lines = EpisodeMethod.describe(summary)
        if summary.get("affinity") == "readout":
            lines.append(_describe_reading(summary))
        if summary.get("pool_of_one_task"):
            lines.append(
                f"target and pool can hardly be told apart (ROC area {summary['pool_area']:.2f}, chance 0.5): the pool"
                " seems to be of one task" + ("; rows that cover it are kept" if "picked" in summary else "")
            )
        if "index" in summary:
            lines.append(describe_index(summary["index"]))
        if "floor_score" in summary:
            lines.append(
                f"none scores below {summary['floor_score']:.2f}, as {summary['floor_quantile']:g} of the task's rows"
                " would, by target rows that were held out"
            )
        return lines


def _describe_reading(summary: dict[str, Any]) -> str:
    """Say how many heads read what, and where the cut is."""
    readers = f"{summary['heads_read']} heads"
    if "rows_read_on" in summary:
        readers = f"{summary['heads_read_first']} heads read all rows, {readers} the best {summary['rows_read_on']:,}"
    elif "heads_read_first" in summary:
        readers = f"{summary['heads_read_first']} heads read all rows"
    else:
        readers += " read"
    line = f"{readers}, told from {summary['rows_background']:,} background rows"
    if "target_affinity" in summary:
        line += f"; target rows at {summary['target_affinity']:.2f} deviations, the cut at {summary['cut_score']:.2f}"
    return line
