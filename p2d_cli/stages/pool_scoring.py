"""The methods of mine-data behind one interface: a task goes in, one score a pool row comes out, higher is better.

Legend: N pool rows, B batch, K selected heads, S demos.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from p2d_cli.errors import UsageError
from p2d_cli.runtime.seeding import generator
from p2d_cli.stages.pool_task import PoolScored, PoolTask, scored_by_model

if TYPE_CHECKING:
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
    score-heads selected for `p2d`, and all heads of one layer for `data-whisperer`.
    """
    from p2d_cli.core.sample_affinity import AffinityTally, demo_shares
    from p2d_cli.modeling.layouts import geometry
    from p2d_cli.stages.episode_scoring import EpisodeReader
    from p2d_cli.stages.workbench import finish_batches, open_workbench

    job, config = task.job, task.job.config
    with job.timer.phase("prepare"):
        plan = _plan_episodes(task)
    bench = open_workbench(job, task.inputs.model, config)
    heads_LH = task.inputs.heads_LH if config.method == "p2d" else _one_layer(geometry(bench.model), config.layer)
    if heads_LH is None:
        raise UsageError("--method p2d needs --heads")
    reader = EpisodeReader(bench, heads_LH, config, queries_from=task.target or task.pool)
    with job.timer.phase("prepare"):
        episodes = reader.encode(plan, task.pool)
    tally = AffinityTally(len(task.pool))
    demos_ES = np.array([episode.demos for episode in plan], dtype=np.int64)
    unparsed = 0
    batches = reader.batches(episodes)
    for group, reading in finish_batches(
        job,
        bench,
        "read episodes",
        batches,
        lambda group: reader.read(plan, episodes, group),
        unchecked=("perf",),
        name="episode {}".format,
    ):
        weights_BS = demo_shares(reading["attention"], normalise=config.normalise)
        perf_B = reading["perf"]
        answered = np.isfinite(perf_B)
        tally.add(demos_ES[group][answered], (weights_BS * perf_B[:, None])[answered])
        unparsed += int(reading["unparsed"].sum())
    notes = {
        "episodes": len(plan),
        "heads_read": int(heads_LH.sum()),
        "truncated_demos": sum(episode.truncated_demos for episode in episodes),
        "unparsed_answers": unparsed,
    }
    return scored_by_model(bench, tally.means(), tally.counts, notes)


def _plan_episodes(task: PoolTask) -> list[Any]:
    from p2d_cli.data.episodes import duplicate_groups, plan_mining, plan_self_mining

    config = task.job.config
    demos, queries, draws = config.demos, config.queries, config.draws
    rng = generator(config.seed, "mine-data", "episodes")
    pool_groups, target_groups = duplicate_groups(task.pool, task.target)
    if not task.target:
        return plan_self_mining(
            len(task.pool), demos=demos, queries=queries, draws=draws, rng=rng, pool_groups=pool_groups
        )
    return plan_mining(
        len(task.pool),
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
    bench, examples = _open_with_examples(task)
    losses_N = _completion_losses(task, bench, [(example.input_ids, example.prompt_length) for example in examples])
    return scored_by_model(bench, losses_N)


def _score_ifd(task: PoolTask) -> PoolScored:
    """Instruction-following difficulty: the completion's perplexity with its prompt over that without (Li et al. 2023).

    Rows at 1 or above, whose prompt does not help at all, come last, as the authors leave them out
    (arXiv:2308.12032).
    """
    bench, examples = _open_with_examples(task)
    given_N = _completion_losses(task, bench, [(example.input_ids, example.prompt_length) for example in examples])
    first = bench.tokenizer.bos_token_id
    first = bench.tokenizer.eos_token_id if first is None else first
    alone = [((first, *example.input_ids[example.prompt_length :]), 1) for example in examples]
    ratio_N = np.exp(given_N - _completion_losses(task, bench, alone, "read completions"))
    return scored_by_model(bench, np.where(ratio_N < 1, ratio_N, -ratio_N))


def _open_with_examples(task: PoolTask) -> tuple[Workbench, list[Any]]:
    from p2d_cli.stages.workbench import open_workbench

    bench = open_workbench(task.job, task.inputs.model, task.job.config)
    with task.job.timer.phase("prepare"):
        return bench, bench.encode_examples([*task.pool, *task.target])


def _completion_losses(
    task: PoolTask, bench: Workbench, examples: Sequence[tuple[Sequence[int], int]], label: str = "read rows"
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

    losses_N = np.full(len(examples), np.nan)
    batches = bench.batches([len(ids) for ids, _ in examples])
    for group, reading in finish_batches(task.job, bench, label, batches, read, name=task.name_of):
        losses_N[group] = reading["loss"]
    return losses_N


def _score_embedding(task: PoolTask) -> PoolScored:
    """Cosine of a row's mean last hidden state to the mean of the target rows' (of the pool's without a target)."""
    from p2d_cli.modeling.generation import mean_hidden_states
    from p2d_cli.stages.workbench import finish_batches

    bench, examples = _open_with_examples(task)
    ids = [example.input_ids for example in examples]

    def read(group: list[int]) -> dict[str, NDArray[Any]]:
        states_BD = mean_hidden_states(bench.model, [ids[index] for index in group], bench.tokenizer.pad_token_id)
        bench.tokens += len(group) * max(len(ids[index]) for index in group)
        return {"states": states_BD.numpy()}

    vectors: list[Any] = [None] * len(ids)
    batches = bench.batches([len(row) for row in ids])
    for group, reading in finish_batches(task.job, bench, "embed rows", batches, read, name=task.name_of):
        for index, vector in zip(group, reading["states"].astype(np.float64), strict=True):
            vectors[index] = vector / np.linalg.norm(vector)
    unit_ND = np.stack(vectors)
    count = len(task.pool)
    centre_D = (unit_ND[count:] if task.target else unit_ND).mean(axis=0)
    return scored_by_model(bench, unit_ND[:count] @ (centre_D / np.linalg.norm(centre_D)))


# --- without a model


def _score_lexical(task: PoolTask) -> PoolScored:
    """Cosine of a row's TF-IDF vector to the mean of the target rows' (of the pool's without a target)."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    with task.job.timer.phase("score"):
        vectorizer = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\w+|[^\w\s]")
        rows = vectorizer.fit_transform([record.text for record in [*task.pool, *task.target]])
        count = len(task.pool)
        centre = np.asarray((rows[count:] if task.target else rows).mean(axis=0)).ravel()
        scores_N = np.asarray(rows[:count] @ (centre / np.linalg.norm(centre))).ravel()
    return PoolScored(scores_N, np.ones(count, np.int64))


def _score_random(task: PoolTask) -> PoolScored:
    """Draw scores by chance: the baseline that many published selectors fail to beat."""
    scores_N = generator(task.job.config.seed, "mine-data", "random").random(len(task.pool))
    return PoolScored(scores_N, np.zeros(len(task.pool), np.int64))


def _score_full(task: PoolTask) -> PoolScored:
    """Keep every row, in the pool's order."""
    return PoolScored(np.zeros(len(task.pool)), np.zeros(len(task.pool), np.int64))


METHODS: dict[str, Method] = {
    "p2d": _score_by_heads,
    "data-whisperer": _score_episodes,
    "random": _score_random,
    "loss": _score_loss,
    "ifd": _score_ifd,
    "embedding": _score_embedding,
    "lexical": _score_lexical,
    "full": _score_full,
}
