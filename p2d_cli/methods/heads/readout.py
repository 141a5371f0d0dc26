"""readout: heads whose output on a row, read alone, tells target rows from pool rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from p2d_cli.artifacts.readings import PLACES, Readings
from p2d_cli.core.readout import require_halves, separation
from p2d_cli.data.episodes import duplicate_groups
from p2d_cli.data.records import Record
from p2d_cli.engine.passes import Pass, scatter
from p2d_cli.engine.readings import context_of, digests_of, distinct, head_outputs_pass
from p2d_cli.methods.head_method import HeadMethod, HeadTask, RepeatScores

FEW_ROWS = 8


class Readout(HeadMethod):
    """How well each head's output tells target rows from pool rows that its readout was not fitted on."""

    name = "readout"
    takes_pool = True
    spreads = True
    reads = frozenset()

    def __init__(self, task: HeadTask) -> None:
        super().__init__(task)
        self._target = distinct(task.sample())
        with task.job.timer.phase("prepare"):
            self._background = self._draw_background()
            require_halves(len(self._target), len(self._background))
        self._outputs = np.empty((0, 0, 0, 0), dtype=np.float32)

    def passes(self) -> Iterator[Pass]:
        """Read each row once."""
        reader, rows = self.task.reader, [*self._target, *self._background]
        examples = reader.examples(rows)
        shape = reader.shape
        self._outputs = np.empty((len(rows), shape.total_heads, PLACES, shape.head_dim), dtype=np.float32)
        yield head_outputs_pass(
            reader,
            examples,
            shape.exists_LH,
            work="read rows",
            part=self.task.part,
            take=scatter(self._outputs, "outputs"),
            name=lambda row: rows[row].where,
        )

    def score(self) -> RepeatScores:
        """Return the area under each head's ROC curve."""
        target, shape = len(self._target), self.task.reader.shape
        with self.task.job.timer.phase("score"):
            scores_K = separation(self._outputs[:target], self._outputs[target:], dims_K=shape.dims(shape.exists_LH))
        notes = {"rows": target, "rows_background": len(self._background), "best_separation": float(scores_K.max())}
        rows = [*self._target, *self._background]
        readings = Readings(
            context=context_of(self.task.reader),
            digests_n2=digests_of(rows),
            outputs_nKPd=self._outputs,
            heads_LH=shape.exists_LH,
            targets=target,
            pool=self.task.job.inputs.entries["pool"].digest,
        )
        return RepeatScores(shape.table(scores_K), notes, readings)

    def _draw_background(self) -> Sequence[Record]:
        """Return a random sample of the pool rows that are none of these target rows."""
        task, pool = self.task, self.task.others
        texts = {record.plain_text for record in self._target}
        groups, _ = duplicate_groups(task.target)
        shown = [group for group, record in zip(groups, task.target, strict=True) if record.plain_text in texts]
        is_other_N = np.ones(pool.num_rows, dtype=np.bool_)
        is_other_N[pool.twins[np.isin(pool.twin_groups, shown)]] = False
        return pool.take(task.rng.permutation(np.flatnonzero(is_other_N))[: task.config.background])

    @classmethod
    def describe(cls, summary: dict[str, Any]) -> list[str]:
        """Say how well heads tell the target's rows, how sure that is, and what more rows would bring."""
        if "best_separation" not in summary:
            return []
        lines = [
            f"best head tells target rows from pool rows with ROC area {summary['best_separation']:.3f}, chance 0.5"
        ]
        if summary.get("area") is not None:
            low, high = summary["area_low"], summary["area_high"]
            lines.append(
                f"the heads that read, together, place target rows that were held out of their fit above"
                f" {summary['area']:.3f} [{low:.3f}, {high:.3f}] of the pool, over {summary['rows']} target rows"
            )
        if summary["rows"] < FEW_ROWS:
            lines.append(
                f"{summary['rows']} target rows are few: {FEW_ROWS} would find more of the task's rows, and tell surely"
                " where they end"
            )
        return lines
