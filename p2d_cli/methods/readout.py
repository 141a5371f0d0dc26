"""Readouts of heads: how much what they put out on a row is like what they put out on the target's rows.

Where a heads artifact has heads of its own for reading, rows are read in two stages. Heads of the first layers read all
rows; the best of these are read on by deeper heads, and ranked. The others keep no score. How many are read on is
found on the way: in rounds, the best first, until hardly any row of a round scores like the upper half of the task's.

The deeper heads tell the target's rows from a random sample of the pool, and from near misses: rows that were read on
though most of the target's rows are more like the target. In a pool whose look-alikes are few a random sample has none.

No row is read twice: a heads artifact keeps what its heads made of the target's rows and of a sample of the pool
(`methods.known_rows`), an index what heads of the first layers made of a pool (`methods.indexed_rows`).

Legend: B rows of a batch, Q target rows, M rows to choose from, S rows of the sample, K heads, P places,
d head_dim.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2d_cli.core.readout import Background, Readout, fit_readout, floor_below, held_out_affinity, prompt_share
from p2d_cli.core.subset_selection import rank_rows
from p2d_cli.engine.passes import Arrays, Pass, scatter
from p2d_cli.engine.readings import distinct, head_outputs_pass
from p2d_cli.methods.indexed_rows import IndexedRows, kept_outputs
from p2d_cli.methods.known_rows import KnownRows
from p2d_cli.methods.row_method import PoolTask, RowMethod, RowScores

FEWEST_READ_ON, FIRST_ROUND, TIMES_KEPT = 0.02, 0.04, 3
"""At least so much of the pool is read on, so much in the first round, and at most so many times the rows that may be
kept, if that is more."""
FIRST_LEVEL = 0.002
"""Beyond the least, no row is read on that is less like the target, by the first heads, than all but so small a share
of the task's rows: a low bound, where few target rows tell."""
GROWTH, FEWEST_FOUND = 1.5, 0.05
"""Each further round of reading on brings what was read to so many times as many rows, as long as so large a share of
the last ones scores like the upper half of the task's rows: look-alikes above the floor go on and on."""
NEAR_ROWS = 2000
"""The most near misses: what the heads put out on them is held."""
NEAR_WEIGHT, NEAR_HALF = 0.3, 50
"""Their weight in the background, where they are many; with so many of them it is half of that. With more of it fewer
rows are found where a third of what is read on is of the task, with less where look-alikes are many."""
ONE_TASK = 0.7
"""Area under the ROC curve, of target rows among the pool's, below which the pool is of one task: where all of a share
`p` of it were of the task, the area would be `1 - p / 2`. Pools of one task had 0.07 to 0.63, mixed ones 0.79 to 1."""
SAMPLE, SAMPLE_OF_ALL = 250, 1000
"""Rows of the sample, and where all rows are read by the same heads, so that it costs nothing."""


class ReadoutMethod(RowMethod):
    """Fit a readout of the heads on the target's rows and a sample of the pool, and apply it to every row."""

    def __init__(self, task: PoolTask) -> None:
        task = replace(task, target=distinct(task.target))
        super().__init__(task)
        assert task.heads is not None, "mine-data refuses to run this method without heads"
        reading = task.heads.reading
        self._deep_LH = task.heads.selected_LH if reading is None else reading.deep_LH
        self._first_LH = None if reading is None or not self._pays(*reading.depths) else reading.shallow_LH
        """The heads that read all rows, where others read the best of them."""
        heads_LH = self._deep_LH if reading is None else reading.all_LH
        size = SAMPLE_OF_ALL if self._first_LH is None else SAMPLE
        self._known = KnownRows(task, heads_LH, task.config.background or size)
        self._indexed = None
        if self._first_LH is not None and task.config.index is not None:
            self._indexed = IndexedRows(task, kept_outputs(task, self._first_LH, self._known))
        for flag, value in (("--index", task.config.index), ("--refine", task.config.refine)):
            if self._first_LH is None and value is not None:
                task.job.progress.note(f"{flag} is of no use here: all rows are read as deep as the best")
        self._first_M = np.full(task.pool.size, np.nan)
        """Affinities to the first heads, where there are two stages."""
        self._read_on_M = np.zeros(task.pool.size, dtype=np.bool_)
        """Which rows are read on, so far."""
        self._near: dict[int, NDArray[np.float32]] = {}
        """What the deeper heads put out on near misses, by their positions."""
        self._truncated_M = np.zeros(task.pool.size, dtype=np.bool_)
        self._backgrounds: dict[bytes, Background] = {}
        """What the sample is to heads, by their mask."""

    # --- what is read

    def passes(self) -> Iterator[Pass]:
        """Read the target's rows and the sample, then the rest of the pool, and then its best rows further."""
        yield from self._known.passes()
        everything_M = np.ones(self.task.pool.size, dtype=np.bool_)
        if self._first_LH is None:
            yield from self._score(everything_M, self._deep_LH, lambda: self._deep, self.scores_M, work="read rows")
            return
        if self._indexed is None:
            yield from self._score(everything_M, self._first_LH, lambda: self._first, self._first_M, work="read rows")
        else:
            yield from self._indexed.passes()
        if self._is_one_task:
            return
        self._read_on_M = self._best_M(self._first_read_on)
        near_M = self._near_M
        yield from self._keep(near_M, self._deep_LH, self._near, work="read on", part="near misses ")
        yield from self._read_on(self._read_on_M & ~near_M)
        self._score_near()
        last_M = self._read_on_M & ~self._best_M(int(self._first_read_on / GROWTH))
        for number in itertools.count(2):
            if not self._goes_on(last_M):
                return
            count = min(math.ceil(GROWTH * self._read_on_M.sum()), self._may_read_on)
            last_M = self._best_M(count) & ~self._read_on_M
            self._read_on_M |= last_M
            yield from self._read_on(last_M, part=f"round {number} ")

    def _read_on(self, wanted_M: NDArray[np.bool_], part: str = "") -> Iterator[Pass]:
        """Yield passes that give wanted rows their affinity to the deeper heads."""
        yield from self._score(wanted_M, self._deep_LH, lambda: self._deep, self.scores_M, work="read on", part=part)

    def _score(
        self,
        wanted_M: NDArray[np.bool_],
        heads_LH: NDArray[np.bool_],
        readout: Callable[[], Readout],
        affinities_M: NDArray[np.float64],
        *,
        work: str,
        part: str = "",
    ) -> Iterator[Pass]:
        """Yield passes that give wanted rows their affinity, but those of the sample."""

        def options(rows_M: NDArray[np.int64]) -> dict[str, Any]:
            return {
                "keep": lambda arrays: {"affinity": readout().affinity(arrays["outputs"])},
                "take": scatter(affinities_M, "affinity", rows_M),
            }

        yield from self._passes(wanted_M, heads_LH, options, work, part)

    def _keep(
        self,
        wanted_M: NDArray[np.bool_],
        heads_LH: NDArray[np.bool_],
        kept: dict[int, NDArray[np.float32]],
        *,
        work: str,
        part: str,
    ) -> Iterator[Pass]:
        """Yield passes that keep what the heads put out on wanted rows, but those of the sample."""

        def options(rows_M: NDArray[np.int64]) -> dict[str, Any]:
            def take(batch: list[int], arrays: Arrays) -> None:
                kept.update(zip(rows_M[batch].tolist(), arrays["outputs"], strict=True))

            return {"take": take}

        yield from self._passes(wanted_M, heads_LH, options, work, part)

    def _passes(
        self,
        wanted_M: NDArray[np.bool_],
        heads_LH: NDArray[np.bool_],
        options: Callable[[NDArray[np.int64]], dict[str, Any]],
        work: str,
        part: str = "",
    ) -> Iterator[Pass]:
        reader = self.task.reader
        for chunk in self.task.chunks():
            rows = np.flatnonzero(wanted_M[chunk.places] & ~self._known.is_known_M[chunk.places])
            if not rows.size:
                continue
            records = [chunk.records[row] for row in rows]
            examples = reader.examples(records)
            self._truncated_M[chunk.start + rows] = [example.truncated > 0 for example in examples]
            yield head_outputs_pass(
                reader,
                examples,
                heads_LH,
                work=work,
                part=f"{part}{chunk.part}".strip(),
                name=lambda row, records=records: records[row].where,
                **options(chunk.start + rows),
            )

    # --- how many are read on, and which

    def _pays(self, first: int, deep: int) -> bool:
        """Say whether two stages, of so many layers, compute less than reading all rows as deep as the best."""
        size = self.task.pool.size
        return first * size + deep * self._most_read_on < deep * size

    @cached_property
    def _most_read_on(self) -> int:
        """How many rows are read on at most: as many as asked for."""
        config, size = self.task.config, self.task.pool.size
        kept = min(self.count(config, self.task.pool.num_rows), size)
        if config.refine is not None:
            return min(max(math.ceil(config.refine * size), kept), size)
        return min(max(math.ceil(FIRST_ROUND * size), TIMES_KEPT * kept), size)

    @cached_property
    def _affinities_M(self) -> NDArray[np.float64]:
        """The affinities of all rows to the heads that read all; nan in a dry run, in which nothing was read."""
        if not self._known.is_read:
            return self._first_M
        if self._first_LH is None:
            self.scores_M[self._known.sample] = self._deep.affinity(self._known.background(self._deep_LH))
            return self.scores_M
        if self._indexed is not None:
            self._indexed.score(lambda outputs_nKPd: self._first.affinity(outputs_nKPd), self._first_M)
        else:
            self._first_M[self._known.sample] = self._first.affinity(self._known.background(self._first_LH))
        return self._first_M

    @cached_property
    def _area(self) -> float:
        """How well target rows that the readout has not seen can be told from the pool's rows, in [0, 1]."""
        return float(np.mean([(self._affinities_M < value).mean() for value in self._held_out_Q]))

    @property
    def _is_one_task(self) -> bool:
        """Whether target and pool can hardly be told apart, and nobody asked for those most like the target."""
        if self.task.config.pick == "top" or not len(self._held_out_Q):
            return False
        if np.isnan(self._affinities_M).any() or not np.ptp(self._affinities_M):  # rows that are all alike tell nothing
            return False
        return self._area < ONE_TASK

    @cached_property
    def _may_read_on(self) -> int:
        """How many rows are read on if all rounds find some: those that may be of the task, as the first heads tell."""
        most = self._most_read_on
        if not self._goes_by_rounds:
            return most
        floor = floor_below(self._held_out_Q, FIRST_LEVEL)
        likely = int((self._affinities_M >= floor).sum())
        return min(most, max(likely, math.ceil(FEWEST_READ_ON * self.task.pool.size)))

    @property
    def _first_read_on(self) -> int:
        """How many rows are read on in the first round."""
        most = self._may_read_on
        return min(most, math.ceil(FIRST_ROUND * self.task.pool.size)) if self._goes_by_rounds else most

    @property
    def _goes_by_rounds(self) -> bool:
        """Whether what is found says how many rows are read on: not with a share asked for, without a floor, or dry."""
        return self.task.config.refine is None and self._sets_floor and self._is_read

    @property
    def _is_read(self) -> bool:
        """Whether all rows were read by the first heads; in a dry run they are not."""
        return not np.isnan(self._affinities_M).any()

    @cached_property
    def _first_ranks_M(self) -> NDArray[np.int64]:
        return rank_rows(self._affinities_M)

    def _best_M(self, count: int) -> NDArray[np.bool_]:
        """Return the best rows by the first heads; in a dry run, in which nothing was read, evenly spread ones."""
        return self._first_ranks_M < count if self._is_read else evenly_M(count, self.task.pool.size)

    def _goes_on(self, last_M: NDArray[np.bool_]) -> bool:
        """Say whether there is more to read on, and enough of the last rows that were are like the task's."""
        if self._read_on_M.sum() >= self._may_read_on:
            return False
        last = self.scores_M[last_M & np.isfinite(self.scores_M)]  # those of the sample are not scored yet
        return bool(last.size) and float((last >= self._middle).mean()) >= FEWEST_FOUND

    @cached_property
    def _near_M(self) -> NDArray[np.bool_]:
        """Which of them are near misses: less like the target than half of its own rows, by the first heads."""
        best = np.flatnonzero(self._read_on_M)
        if self._first_LH is not None and len(self._held_out_Q) and self._is_read:
            best = best[self._affinities_M[best] < np.median(self._held_out_Q)]
        near_M = np.zeros(self.task.pool.size, dtype=np.bool_)
        near_M[best[evenly_M(min(NEAR_ROWS, len(best)), len(best))]] = True
        return near_M

    @cached_property
    def _held_out_Q(self) -> NDArray[np.float64]:
        """The affinities of target rows to the heads that read all, by readouts that were fitted without them."""
        if len(self.task.target) < 2 or not self._known.is_read:
            return np.empty(0)
        heads_LH = self._deep_LH if self._first_LH is None else self._first_LH
        with self.task.job.timer.phase("fit"):
            return held_out_affinity(self._known.target(heads_LH), self._sample_background(heads_LH))

    # --- readouts

    @cached_property
    def _first(self) -> Readout:
        assert self._first_LH is not None, "there are two stages"
        with self.task.job.timer.phase("fit"):
            return fit_readout(self._known.target(self._first_LH), self._sample_background(self._first_LH))

    @cached_property
    def _deep(self) -> Readout:
        with self.task.job.timer.phase("fit"):
            return fit_readout(self._known.target(self._deep_LH), self._deep_background)

    def _sample_background(self, heads_LH: NDArray[np.bool_]) -> Background:
        known, key = self._known, heads_LH.tobytes()
        if key not in self._backgrounds:
            outputs_SKPd, dims_K = known.background(heads_LH), known.dims(heads_LH)
            prompt = prompt_share(known.target(heads_LH), outputs_SKPd, dims_K=dims_K)
            self._backgrounds[key] = Background.of(outputs_SKPd, dims_K=dims_K, prompt=prompt)
        return self._backgrounds[key]

    @property
    def _prompt_share(self) -> float:
        """How much the prompt counts where the deeper heads read."""
        return float(self._sample_background(self._deep_LH).shares_P[1])

    @cached_property
    def _deep_background(self) -> Background:
        """The sample, and near misses if there are any."""
        near = sorted(self._near)
        if self._first_LH is None or not near:
            return self._sample_background(self._deep_LH)
        sample_SKPd = self._known.background(self._deep_LH)
        outputs_SKPd = np.concatenate([sample_SKPd, np.stack([self._near[row] for row in near])])
        share = NEAR_WEIGHT * len(near) / (len(near) + NEAR_HALF)
        weights_S = np.repeat([(1 - share) / len(sample_SKPd), share / len(near)], [len(sample_SKPd), len(near)])
        dims_K = self._known.dims(self._deep_LH)
        return Background.of(outputs_SKPd, weights_S, dims_K=dims_K, prompt=self._prompt_share)

    @property
    def _sets_floor(self) -> bool:
        """Whether rows that score too low are left out: a single target row does not tell what is too low."""
        return self.task.config.has_floor and len(self.task.target) > 1

    @cached_property
    def _deep_held_out_Q(self) -> NDArray[np.float64]:
        """The affinities of target rows to the deeper heads, by readouts that were fitted without them."""
        with self.task.job.timer.phase("fit"):
            return held_out_affinity(self._known.target(self._deep_LH), self._deep_background)

    @property
    def _floor(self) -> float:
        return floor_below(self._deep_held_out_Q, self.task.config.resolved_floor)

    @property
    def _middle(self) -> float:
        """The score that half of the task's rows reach."""
        return float(np.median(self._deep_held_out_Q))

    # --- what a plan and a summary say

    def caveats(self) -> tuple[str, ...]:
        """Say where fewer rows may be read on than is planned."""
        if self._first_LH is None or self.task.config.refine is not None:
            return ()
        return ("read on: at most; fewer where fewer rows can be of the task",)

    def disk(self) -> dict[str, int]:
        """Return the bytes by which the index will grow."""
        return {} if self._indexed is None else {"index": self._indexed.disk_bytes}

    def score(self) -> RowScores:
        """Return the affinity of each row that was read to the end; of a pool of one task, to the first heads."""
        known, size = self._known, self.task.pool.size
        notes: dict[str, Any] = {
            "affinity": "readout",
            "heads_read": int(self._deep_LH.sum()),
            "rows_background": len(known.sample),
            "rows_found_read": known.found,
        }
        if len(self.task.target) > 1:
            notes["pool_area"] = self._area
        if self._first_LH is not None:
            notes["heads_read_first"] = int(self._first_LH.sum())
        if self._indexed is not None:
            notes["index"] = self._indexed.notes
        is_cut_M = self._truncated_M | known.is_cut_M
        if self._indexed is not None:
            is_cut_M |= self._indexed.is_cut_M
        notes["truncated_rows"] = int(is_cut_M.sum())
        if self._is_one_task:
            return RowScores.measured(self._affinities_M, notes | {"pool_of_one_task": True})
        self._score_read(notes)
        if self._first_LH is not None:
            self.scores_M[~self._read_on_M] = np.nan
            read_on = int(self._read_on_M.sum())
            notes |= {"rows_read_on": read_on, "rows_not_read_on": size - read_on, "near_misses": len(self._near)}
        if self._sets_floor:
            notes["floor_quantile"] = self.task.config.resolved_floor
            notes["floor_score"] = self._floor
            notes["middle_score"] = self._middle
        first_M = None if self._first_LH is None else self._first_M
        return RowScores(self.scores_M, np.isfinite(self.scores_M).astype(np.int64), notes, first_M)

    def _score_near(self) -> None:
        """Give near misses their affinity to the deeper heads."""
        if self._near:
            rows = sorted(self._near)
            self.scores_M[rows] = self._deep.affinity(np.stack([self._near[row] for row in rows]))

    def _score_read(self, notes: dict[str, Any]) -> None:
        """Give the rows that are held their affinity to the deeper heads, and tell the target's."""
        known = self._known
        self.scores_M[known.sample] = self._deep.affinity(known.background(self._deep_LH))
        notes["prompt_share"] = self._prompt_share
        notes["target_affinity"] = float(self._deep.affinity(known.target(self._deep_LH)).mean())


def evenly_M(count: int, size: int) -> NDArray[np.bool_]:
    """Return a mask of `count` of `size` places, evenly spread."""
    mask = np.zeros(size, dtype=np.bool_)
    mask[np.arange(count) * size // max(count, 1)] = True
    return mask
