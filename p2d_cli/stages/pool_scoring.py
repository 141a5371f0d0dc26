"""The methods of mine-data behind one interface: a task goes in, one score a pool row comes out, higher is better.

Legend: M rows to choose from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from p2d_cli.data.pool import Chunk
from p2d_cli.data.records import Record
from p2d_cli.errors import UsageError
from p2d_cli.runtime.seeding import generator
from p2d_cli.stages.pool_task import PoolScored, PoolTask, measured, scored_by_model

if TYPE_CHECKING:
    from p2d_cli.data.episodes import Episode
    from p2d_cli.data.prompts import EncodedExample
    from p2d_cli.stages.workbench import Workbench


Method = Callable[[PoolTask], PoolScored]


# --- heads: p2d and its predecessor


def _score_by_heads(task: PoolTask) -> PoolScored:
    """Ask the selected heads how they respond to each row, in one of two ways."""
    if task.job.config.resolved_affinity == "attention":
        return _score_episodes(task)
    from p2d_cli.stages.readout_scoring import score_by_readout

    return score_by_readout(task)


def _score_episodes(task: PoolTask) -> PoolScored:
    """Weigh each demo by the chosen heads' attention and by how well its episode is answered.

    `score_i = mean over episodes of perf(e) * w_i` (Data Whisperer, arXiv:2505.12212, eq. 3-5), with the heads that
    score-heads selected for `p2d`, and all heads of one layer for `data-whisperer`. Rows meet others of their chunk.
    """
    from p2d_cli.core.sample_affinity import AffinityTally
    from p2d_cli.modeling.layouts import geometry
    from p2d_cli.stages.episode_scoring import score_chunk
    from p2d_cli.stages.workbench import open_workbench

    config = task.job.config
    dealt = _deal_chunks(task)
    first = next(dealt)  # what speaks against the episodes is said before the model is loaded
    bench = open_workbench(task.job, task.inputs.model, config)
    heads_LH = task.inputs.heads_LH if config.method == "p2d" else _one_layer(geometry(bench.model), config.layer)
    if heads_LH is None:
        raise UsageError("--method p2d needs --heads")
    tally = AffinityTally(task.pool.size)
    counts = Counter({"episodes": 0, "truncated_demos": 0, "unparsed_answers": 0})
    for chunk, plan in chain([first], dealt):
        counts.update(score_chunk(task, bench, heads_LH, chunk, plan, tally))
    notes = {"episodes": counts["episodes"], "heads_read": int(heads_LH.sum()), **counts}
    return scored_by_model(bench, tally.means(), tally.counts, notes)


def _deal_chunks(task: PoolTask) -> Iterator[tuple[Chunk, list[Episode]]]:
    rng = generator(task.job.config.seed, "mine-data", "episodes")
    for chunk in task.chunks():
        with task.job.timer.phase("prepare"):
            plan = _plan_episodes(task, chunk, rng)
        yield chunk, plan


def _plan_episodes(task: PoolTask, chunk: Chunk, rng: np.random.Generator) -> list[Episode]:
    from p2d_cli.data.episodes import duplicate_groups, plan_mining, plan_self_mining

    config, count = task.job.config, len(chunk.records)
    demos, queries, draws = config.demos, config.queries, config.draws
    pool_groups, target_groups = duplicate_groups(chunk.records, task.target)
    if not task.target:
        return plan_self_mining(count, demos=demos, queries=queries, draws=draws, rng=rng, pool_groups=pool_groups)
    return plan_mining(
        count,
        len(task.target),
        demos=demos,
        queries=queries,
        draws=draws,
        rng=rng,
        pool_groups=pool_groups,
        target_groups=target_groups,
    )


def _one_layer(shape: Any, layer: int | None) -> NDArray[np.bool_]:
    chosen = shape.num_layers // 2 if layer is None else layer
    if chosen >= shape.num_layers:
        raise UsageError(f"--layer {chosen}: the model has layers 0 to {shape.num_layers - 1}")
    heads_LH = np.zeros((shape.num_layers, shape.num_heads), dtype=np.bool_)
    heads_LH[chosen] = True
    return heads_LH


# --- one row at a time


def _score_loss(task: PoolTask) -> PoolScored:
    """Mean loss of the completion: the rows that the model finds hardest come first."""
    from p2d_cli.stages.workbench import open_workbench

    bench = open_workbench(task.job, task.inputs.model, task.job.config)
    losses_M = np.empty(task.pool.size)
    for chunk in task.chunks():
        examples = _encode(task, bench, chunk.records)
        losses_M[chunk.places] = _completion_losses(task, bench, _given(examples), chunk, "read rows")
    return scored_by_model(bench, losses_M)


def _score_ifd(task: PoolTask) -> PoolScored:
    """Instruction-following difficulty: the completion's perplexity with its prompt over that without (Li et al. 2023).

    Rows at 1 or above, whose prompt does not help at all, come last, as the authors leave them out
    (arXiv:2308.12032).
    """
    from p2d_cli.stages.workbench import open_workbench

    bench = open_workbench(task.job, task.inputs.model, task.job.config)
    first = bench.tokenizer.bos_token_id
    first = bench.tokenizer.eos_token_id if first is None else first
    scores_M = np.empty(task.pool.size)
    for chunk in task.chunks():
        examples = _encode(task, bench, chunk.records)
        given = _completion_losses(task, bench, _given(examples), chunk, "read rows")
        alone = [((first, *example.input_ids[example.answer_start :]), 1) for example in examples]
        ratio = np.exp(given - _completion_losses(task, bench, alone, chunk, "read completions"))
        scores_M[chunk.places] = np.where(ratio < 1, ratio, -ratio)
    return scored_by_model(bench, scores_M)


def _encode(task: PoolTask, bench: Workbench, records: Sequence[Record]) -> list[EncodedExample]:
    with task.job.timer.phase("prepare"):
        return bench.encode_examples(records)


def _given(examples: Sequence[EncodedExample]) -> list[tuple[Sequence[int], int]]:
    return [(example.input_ids, example.answer_start) for example in examples]


def _completion_losses(
    task: PoolTask, bench: Workbench, examples: Sequence[tuple[Sequence[int], int]], chunk: Chunk, work: str
) -> NDArray[np.float64]:
    """Return the mean negative log-likelihood, in nats a token, of each example's completion."""
    from p2d_cli.modeling.generation import score_completions
    from p2d_cli.stages.workbench import finish_batches

    def read(group: list[int]) -> dict[str, NDArray[Any]]:
        sums, counts = score_completions(
            bench.model, [examples[index] for index in group], bench.tokenizer.pad_token_id
        )
        bench.tokens += len(group) * max(len(examples[index][0]) for index in group)
        return {"loss": -np.asarray(sums) / np.maximum(counts, 1)}

    losses = np.full(len(examples), np.nan)
    batches = bench.batches([len(ids) for ids, _ in examples])
    for group, reading in finish_batches(task.job, bench, chunk.label(work), batches, read, name=chunk.name_of):
        losses[group] = reading["loss"]
    return losses


def _score_embedding(task: PoolTask) -> PoolScored:
    """Cosine of a row's mean last hidden state to the mean of the target rows' (of the pool's without a target)."""
    from p2d_cli.stages.embedding_scoring import score_by_embedding

    return score_by_embedding(task)


# --- without a model


def _score_lexical(task: PoolTask) -> PoolScored:
    """Cosine of a row's TF-IDF vector to the mean of the target rows' (of the pool's without a target)."""
    from p2d_cli.stages.lexical_scoring import score_by_words

    return score_by_words(task)


def _score_coverage(task: PoolTask) -> PoolScored:
    """Order rows so that the first are like all others in their TF-IDF vectors: diverse, and for no target."""
    from p2d_cli.stages.lexical_scoring import score_by_coverage

    return score_by_coverage(task)


def _score_random(task: PoolTask) -> PoolScored:
    """Draw scores by chance: the baseline that many published selectors fail to beat."""
    scores_M = generator(task.job.config.seed, "mine-data", "random").random(task.pool.size)
    return PoolScored(scores_M, measured(0, task.pool.size))


def _score_full(task: PoolTask) -> PoolScored:
    """Keep every row, in the pool's order."""
    return PoolScored(np.zeros(task.pool.size), measured(0, task.pool.size))


METHODS: dict[str, Method] = {
    "p2d": _score_by_heads,
    "data-whisperer": _score_episodes,
    "random": _score_random,
    "loss": _score_loss,
    "ifd": _score_ifd,
    "embedding": _score_embedding,
    "lexical": _score_lexical,
    "coverage": _score_coverage,
    "full": _score_full,
}
