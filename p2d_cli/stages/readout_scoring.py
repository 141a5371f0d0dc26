"""Scoring a pool by what the selected heads put out on each row, read alone: one forward pass, no episodes.

Legend: B rows of a batch, Q target rows, M background rows, K selected heads, d head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from p2d_cli.core.readout import fit_readout
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
        pool, target = bench.encode_examples(task.pool), bench.encode_examples(task.target)
    order = generator(job.config.seed, "mine-data", "background").permutation(len(pool))
    sample, rest = np.sort(order[: job.config.background]), np.sort(order[job.config.background :])
    known_rows = [*task.target, *(task.pool[index] for index in sample)]
    known = _read(task, bench, heads_LH, [*target, *(pool[index] for index in sample)], known_rows)
    with job.timer.phase("fit"):
        readout = fit_readout(known[: len(target)], known[len(target) :])
    scores_N = np.empty(len(pool))
    scores_N[sample] = readout.affinity(known[len(target) :])
    batches = [rest[group].tolist() for group in bench.batches([len(pool[index].input_ids) for index in rest])]
    for group, reading in finish_batches(
        job,
        bench,
        "read rows",
        batches,
        lambda group: {"affinity": readout.affinity(bench.head_outputs([pool[index] for index in group], heads_LH))},
        name=task.name_of,
    ):
        scores_N[group] = reading["affinity"]
    notes = {
        "affinity": "readout",
        "heads_read": int(heads_LH.sum()),
        "rows_background": len(sample),
        "target_affinity": float(readout.affinity(known[: len(target)]).mean()),
        "truncated_rows": sum(example.truncated > 0 for example in pool),
    }
    return scored_by_model(bench, scores_N, notes=notes)


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
