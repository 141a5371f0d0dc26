"""p2d: rows that the task's own heads respond to.

`readout`, p2d's own: the heads' outputs on a row are like those on the target's rows (`p2d_cli.core.readout`).
`attention`, the paper's: among few-shot demos, target queries look at the row (`p2d_cli.methods.episodes`).

Legend: B rows of a batch, Q target rows, M rows to choose from, K selected heads, d head_dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2d_cli.config import MineDataConfig
from p2d_cli.core.readout import Readout, fit_readout, held_out_affinity
from p2d_cli.engine.passes import Pass, Steps, scatter
from p2d_cli.engine.readings import head_outputs_pass
from p2d_cli.methods.episodes import EpisodeMethod
from p2d_cli.methods.method import Read
from p2d_cli.methods.row_method import PoolTask, RowMethod, RowScores
from p2d_cli.runtime.seeding import generator


class P2d(RowMethod):
    """Ask the selected heads how they respond to each row."""

    name = "p2d"
    takes_target = True
    takes_heads = True
    takes_shortlist = True
    sets_floor = True

    def __init__(self, task: PoolTask) -> None:
        super().__init__(task)
        by_attention = task.config.resolved_affinity == "attention"
        self._way: RowMethod = EpisodeMethod(task) if by_attention else _ReadoutMethod(task)

    @classmethod
    def check_settings(cls, config: MineDataConfig) -> None:
        """Refuse a readout without target rows, and a floor without a readout."""
        if config.scores is None and config.affinity == "readout" and config.target is None:
            raise ValueError("--affinity readout needs --target: rows of the task to tell from the pool")
        if config.floor_quantile and config.scores is None and config.resolved_affinity != "readout":
            raise ValueError("--floor-quantile needs --target and the readout: attention gives target rows no scores")

    @classmethod
    def reads(cls, config: MineDataConfig) -> frozenset[Read]:
        """Return what it reads of the model besides the outputs of heads."""
        return EpisodeMethod.reads(config) if config.resolved_affinity == "attention" else frozenset()

    def passes(self) -> Iterable[Pass | Steps]:
        """Yield what the model is to read."""
        return self._way.passes()

    def score(self) -> RowScores:
        """Return how the heads respond to each row."""
        return self._way.score()

    @classmethod
    def describe(cls, summary: dict[str, Any]) -> list[str]:
        """Say how many heads read what, and where the cut is."""
        lines = EpisodeMethod.describe(summary)
        if summary.get("affinity") == "readout":
            lines.append(
                f"{summary['heads_read']} heads read, told from {summary['rows_background']:,} background rows;"
                f" target rows at {summary['target_affinity']:.2f} deviations, the cut at {summary['cut_score']:.2f}"
            )
        if "floor_score" in summary:
            lines.append(
                f"none scores below {summary['floor_score']:.2f}, the {summary['floor_quantile']:g} quantile of target"
                " rows that were held out"
            )
        return lines


class _ReadoutMethod(RowMethod):
    """Fit a readout of the heads on the target's rows and a sample of the pool, and apply it to every row.

    The sample is read once, with the target: its outputs are kept for its own scores.
    """

    def __init__(self, task: PoolTask) -> None:
        super().__init__(task)
        assert task.heads_LH is not None, "mine-data refuses to run this method without heads"
        self._heads_LH = task.heads_LH
        self._truncated = 0
        order = generator(task.config.seed, "mine-data", "background").permutation(task.pool.size)
        self._sample = np.sort(order[: task.config.background])
        self._in_sample_M = np.zeros(task.pool.size, dtype=np.bool_)
        self._in_sample_M[self._sample] = True
        self._known: dict[int, NDArray[np.float32]] = {}
        """The outputs `[K, d]` of the target's rows and of the sample behind them."""

    def passes(self) -> Iterator[Pass]:
        """Read the target's rows with the sample, and then the rest of the pool."""
        task, reader = self.task, self.task.reader
        with task.job.timer.phase("prepare"):
            known = [*task.target, *task.pool.take(task.pool.places(self._sample))]
        examples = reader.examples(known)
        self._truncated += sum(example.truncated > 0 for example in examples[len(task.target) :])
        yield head_outputs_pass(
            reader,
            examples,
            self._heads_LH,
            work="read target and background",
            take=lambda batch, arrays: self._known.update(zip(batch, arrays["outputs"], strict=True)),
            name=lambda row: known[row].where,
        )
        for chunk in task.chunks():
            rest = np.flatnonzero(~self._in_sample_M[chunk.places])
            records = [chunk.records[row] for row in rest]
            examples = reader.examples(records)
            self._truncated += sum(example.truncated > 0 for example in examples)
            yield head_outputs_pass(
                reader,
                examples,
                self._heads_LH,
                work="read rows",
                part=chunk.part,
                keep=lambda arrays: {"affinity": self._readout.affinity(arrays["outputs"])},
                take=scatter(self.scores_M, "affinity", chunk.start + rest),
                name=lambda row, records=records: records[row].where,
            )

    @cached_property
    def _outputs(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The outputs of the target's rows `[Q, K, d]`, and of the sample's."""
        stacked = np.stack([self._known[row] for row in range(len(self._known))])
        return stacked[: len(self.task.target)], stacked[len(self.task.target) :]

    @property
    def _dims_K(self) -> NDArray[np.int64]:
        return self.task.reader.shape.dims(self._heads_LH)

    @cached_property
    def _readout(self) -> Readout:
        with self.task.job.timer.phase("fit"):
            return fit_readout(*self._outputs, dims_K=self._dims_K)

    def score(self) -> RowScores:
        """Return each row's affinity."""
        config = self.task.config
        target_QKd, background_MKd = self._outputs
        self.scores_M[self._sample] = self._readout.affinity(background_MKd)
        notes = {
            "affinity": "readout",
            "heads_read": int(self._heads_LH.sum()),
            "rows_background": len(self._sample),
            "target_affinity": float(self._readout.affinity(target_QKd).mean()),
            "truncated_rows": self._truncated,
        }
        if config.has_floor:
            with self.task.job.timer.phase("fit"):
                held_out_Q = held_out_affinity(target_QKd, background_MKd, dims_K=self._dims_K)
            notes["floor_quantile"] = config.floor_quantile
            notes["floor_score"] = float(np.quantile(held_out_Q, config.floor_quantile))
        return RowScores.measured(self.scores_M, notes)
