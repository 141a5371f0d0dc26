"""Scoring a pool by what the selected heads put out on each row, read alone: one forward pass, no episodes.

Legend: B rows of a batch, Q target rows, M rows to choose from, K selected heads, d head_dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from p2d_cli.config import MineDataConfig
from p2d_cli.core.readout import Readout, fit_readout, held_out_affinity
from p2d_cli.data.pool import Chunk
from p2d_cli.data.prompts import EncodedExample
from p2d_cli.data.records import Record
from p2d_cli.errors import UsageError
from p2d_cli.runtime.seeding import generator
from p2d_cli.stages.pool_task import PoolScored, PoolTask, scored_by_model
from p2d_cli.stages.workbench import Workbench, finish_batches, open_workbench


def score_by_readout(task: PoolTask) -> PoolScored:
    """Fit a readout of the selected heads on the target's rows and a sample of the pool, and apply it to every row.

    The sample is read once, with the target: its outputs are kept for its own scores.
    """
    job, heads_LH = task.job, task.inputs.heads_LH
    if heads_LH is None:
        raise UsageError("--method p2d needs --heads")
    bench = open_workbench(job, task.inputs.model, job.config)
    with job.timer.phase("prepare"):
        sample = _background(task)
        others = task.pool.take(task.pool.places(sample))
        background, target = bench.encode_examples(others), bench.encode_examples(task.target)
    known = _read(task, bench, heads_LH, [*target, *background], [*task.target, *others])
    with job.timer.phase("fit"):
        readout = fit_readout(known[: len(target)], known[len(target) :])
        floor = _floor(job.config, known[: len(target)], known[len(target) :])
    scores_M = np.full(task.pool.size, np.nan)
    scores_M[sample] = readout.affinity(known[len(target) :])
    truncated = _count_truncated(background)
    for chunk in task.chunks():
        truncated += _score_rest(task, bench, heads_LH, readout, chunk, scores_M[chunk.places])
    notes = {
        "affinity": "readout",
        "heads_read": int(heads_LH.sum()),
        "rows_background": len(sample),
        "target_affinity": float(readout.affinity(known[: len(target)]).mean()),
        "truncated_rows": truncated,
        **floor,
    }
    return scored_by_model(bench, scores_M, notes=notes)


def _floor(
    config: MineDataConfig, target_QKd: NDArray[np.float32], background_MKd: NDArray[np.float32]
) -> dict[str, float]:
    """Return the score below which no row is kept, where one is asked for, as notes."""
    if not config.has_floor:
        return {}
    held_out_Q = held_out_affinity(target_QKd, background_MKd)
    return {
        "floor_quantile": config.floor_quantile,
        "floor_score": float(np.quantile(held_out_Q, config.floor_quantile)),
    }


def _background(task: PoolTask) -> NDArray[np.int64]:
    """Return a random sample of the rows to choose from, in the pool's order."""
    config = task.job.config
    order = generator(config.seed, "mine-data", "background").permutation(task.pool.size)
    return np.sort(order[: config.background])


def _score_rest(
    task: PoolTask,
    bench: Workbench,
    heads_LH: NDArray[np.bool_],
    readout: Readout,
    chunk: Chunk,
    scores: NDArray[np.float64],
) -> int:
    """Score those rows of a chunk that have no score yet, in place; return how many of them had to be cut."""
    rest = np.flatnonzero(np.isnan(scores))
    with task.job.timer.phase("prepare"):
        examples = dict(
            zip(rest.tolist(), bench.encode_examples([chunk.records[index] for index in rest]), strict=True)
        )
    lengths = [len(example.input_ids) for example in examples.values()]
    for group, reading in finish_batches(
        task.job,
        bench,
        chunk.label("read rows"),
        [rest[group].tolist() for group in bench.batches(lengths)],
        lambda group: {"affinity": readout.affinity(bench.head_outputs([examples[i] for i in group], heads_LH))},
        name=chunk.name_of,
    ):
        scores[group] = reading["affinity"]
    return _count_truncated(examples.values())


def _count_truncated(examples: Iterable[EncodedExample]) -> int:
    return sum(example.truncated > 0 for example in examples)


def _read(
    task: PoolTask,
    bench: Workbench,
    heads_LH: NDArray[np.bool_],
    examples: Sequence[EncodedExample],
    records: Sequence[Record],
) -> NDArray[np.float32]:
    """Return the mean outputs of the heads on each row, `[rows, K, d]`."""
    outputs: list[NDArray[np.float32] | None] = [None] * len(examples)
    batches = bench.batches([len(example.input_ids) for example in examples])
    for group, reading in finish_batches(
        task.job,
        bench,
        "read target and background",
        batches,
        lambda group: {"outputs": bench.head_outputs([examples[index] for index in group], heads_LH)},
        name=lambda row: records[row].where,
    ):
        for index, output_Kd in zip(group, reading["outputs"], strict=True):
            outputs[index] = output_Kd
    return np.stack([output for output in outputs if output is not None])
