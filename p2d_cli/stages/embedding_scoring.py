"""Scoring a pool by what its rows' mean last hidden states have in common with the target's.

Legend: M rows to choose from, B rows of a batch or chunk, D hidden size.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from p2d_cli.data.pool import CHUNK_ROWS
from p2d_cli.data.records import Record
from p2d_cli.modeling.generation import mean_hidden_states
from p2d_cli.stages.pool_task import PoolScored, PoolTask, scored_by_model
from p2d_cli.stages.workbench import Workbench, finish_batches, open_workbench

Arrays = dict[str, NDArray[Any]]
LABEL = "embed rows"


def score_by_embedding(task: PoolTask) -> PoolScored:
    """Return the cosine of each row's mean last hidden state to the mean of the target rows'.

    Without a target that is the mean of the pool's. It is known only once all rows have been read, so that their
    states wait in a file: 4 D bytes a row, and about 5 D in the journal.
    """
    bench = open_workbench(task.job, task.inputs.model, task.job.config)
    return scored_by_model(bench, _like_the_target(task, bench) if task.target else _like_the_pool(task, bench))


def _like_the_target(task: PoolTask, bench: Workbench) -> NDArray[np.float64]:
    """Score chunk by chunk; the target rows are read with the first."""
    scores_M = np.empty(task.pool.size)
    centre_D: NDArray[np.float64] | None = None
    for chunk in task.chunks():
        label = chunk.label(LABEL)
        if centre_D is not None:
            scores_M[chunk.places] = _read(task, bench, chunk.records, label, partial(_cosine, centre_D))
            continue
        unit_BD = _unit(_read(task, bench, [*chunk.records, *task.target], label))
        centre_D = _unit(unit_BD[len(chunk.records) :].mean(axis=0))
        scores_M[chunk.places] = unit_BD[: len(chunk.records)] @ centre_D
    return scores_M


def _like_the_pool(task: PoolTask, bench: Workbench) -> NDArray[np.float64]:
    sum_D: NDArray[np.float64] | float = 0.0
    with tempfile.TemporaryFile(dir=task.job.scratch("states")) as stream:
        for chunk in task.chunks():
            states_BD = _read(task, bench, chunk.records, chunk.label(LABEL))
            stream.write(np.ascontiguousarray(states_BD, dtype=np.float32).data)
            sum_D = sum_D + _unit(states_BD).sum(axis=0)
        with task.job.timer.phase("score"):
            return _cosines(stream, _unit(np.asarray(sum_D) / task.pool.size), task.pool.size)


def _cosines(stream: IO[bytes], centre_D: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """Return the cosine to the centre of each row of states in a file."""
    scores_M = np.empty(count)
    stream.seek(0)
    for start in range(0, count, CHUNK_ROWS):
        stop = min(start + CHUNK_ROWS, count)
        block = stream.read((stop - start) * len(centre_D) * np.dtype(np.float32).itemsize)
        states_BD = np.frombuffer(block, dtype=np.float32).reshape(stop - start, len(centre_D))
        scores_M[start:stop] = _cosine(centre_D, states_BD)
    return scores_M


def _read(
    task: PoolTask,
    bench: Workbench,
    records: Sequence[Record],
    label: str,
    keep: Callable[[NDArray[np.float32]], NDArray[Any]] | None = None,
) -> NDArray[Any]:
    """Return the rows' mean last hidden states, float32 `[B, D]`, or what `keep` makes of them."""
    with task.job.timer.phase("prepare"):
        ids = [example.input_ids for example in bench.encode_examples(records)]

    def read(group: list[int]) -> Arrays:
        states_BD = mean_hidden_states(bench.model, [ids[index] for index in group], bench.tokenizer.pad_token_id)
        bench.tokens += len(group) * max(len(ids[index]) for index in group)
        return {"kept": states_BD.numpy() if keep is None else keep(states_BD.numpy())}

    kept: NDArray[Any] | None = None
    batches = bench.batches([len(row) for row in ids])
    for group, reading in finish_batches(task.job, bench, label, batches, read, name=lambda row: records[row].where):
        if kept is None:
            kept = np.empty((len(ids), *reading["kept"].shape[1:]), dtype=reading["kept"].dtype)
        kept[group] = reading["kept"]
    assert kept is not None, "a chunk has rows"
    return kept


def _cosine(centre_D: NDArray[np.float64], states_BD: NDArray[np.float32]) -> NDArray[np.float64]:
    cosine_B: NDArray[np.float64] = _unit(states_BD) @ centre_D
    return cosine_B


def _unit(vectors: NDArray[Any]) -> NDArray[np.float64]:
    """Return the vectors, along the last axis, at length 1 and in float64."""
    exact = np.asarray(vectors, dtype=np.float64)
    lengths = np.sqrt([vector.dot(vector) for vector in np.atleast_2d(exact)])
    unit: NDArray[np.float64] = exact / lengths.reshape(*exact.shape[:-1], 1)
    return unit
