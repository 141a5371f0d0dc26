"""The methods of score-heads behind one interface: a task goes in, scores of every repeat come out, higher is better.

Legend: R repeats, E episodes, L layers, H query heads a layer, K heads in (layer, head) order, S demos.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from p2d_cli.artifacts.head_scores import HeadScores
from p2d_cli.artifacts.journal import Entry, Journal
from p2d_cli.config import ScoreHeadsConfig
from p2d_cli.core.geometry import HeadGeometry
from p2d_cli.data.episodes import duplicate_groups
from p2d_cli.data.pool import Pool
from p2d_cli.data.raw_rows import RowSource
from p2d_cli.data.records import Record
from p2d_cli.errors import DataError, UsageError
from p2d_cli.modeling.model_files import ModelFiles
from p2d_cli.runtime import distributed, signals
from p2d_cli.runtime.seeding import derive_seed, generator, seed_everything
from p2d_cli.stages.execution import StageRun

if TYPE_CHECKING:
    from p2d_cli.core.head_importance import LayerWeights
    from p2d_cli.modeling.gradients import Batch
    from p2d_cli.stages.workbench import Workbench


REPEATS = "repeats"
PROXY_PHASES = ("prepare", "proxy", "score")
"""What a repeat of the proxy is charged to."""


@dataclass(frozen=True)
class ScoringInputs:
    """The inputs of score-heads, located; those that the method does not use are None."""

    method: str
    model: ModelFiles
    task_model: ModelFiles | None = None
    target: RowSource | None = None
    pool: RowSource | None = None
    scored: HeadScores | None = None
    """Scores that an earlier run found."""


@dataclass
class HeadsScored:
    """What a method found."""

    geometry: HeadGeometry
    repeats_RLH: NDArray[np.float64]
    device: str = "cpu"
    precision: str = ""
    """Empty where no model was run."""
    tokens: int = 0
    notes: dict[str, Any] = field(default_factory=dict)


def score_heads(job: StageRun[ScoreHeadsConfig], inputs: ScoringInputs) -> HeadsScored:
    """Score every head of the model with the method of `inputs`.

    Raises:
        UsageError: there are fewer heads in `--layers` than are to be selected.
    """
    if job.config.layers is not None:
        _require_candidates(job, inputs, job.config.layers)
    if inputs.scored is not None:
        return HeadsScored(inputs.scored.geometry, inputs.scored.repeats_RLH.astype(np.float64))
    if inputs.target is None:
        return _score_by_weights(job, inputs)
    return _score_by_rows(job, inputs, inputs.target)


def _require_candidates(job: StageRun[ScoreHeadsConfig], inputs: ScoringInputs, layers: str) -> None:
    """Refuse `--layers` that the model has not, or that hold too few heads, before anything is computed."""
    from p2d_cli.core.head_selection import candidate_layers
    from p2d_cli.modeling.checkpoints import skeleton
    from p2d_cli.modeling.layouts import geometry

    if inputs.scored is not None:
        shape = inputs.scored.geometry
    else:
        with job.timer.phase("load"):
            shape = geometry(skeleton(inputs.model.folder))
    budget = shape.head_budget(job.config.ratio)
    there = len(candidate_layers(layers, shape.num_layers)) * shape.num_heads
    if budget > there:
        raise UsageError(
            f"--ratio {job.config.ratio:g} asks for {budget} heads; layers {layers} have {there}",
            hint="name more layers, or give a smaller --ratio",
        )


# --- from weights alone, or from nothing: no rows, no tokenizer, no whole model


def _score_by_weights(job: StageRun[ScoreHeadsConfig], inputs: ScoringInputs) -> HeadsScored:
    from p2d_cli.core.head_selection import among_layers, candidate_layers, select_uniform
    from p2d_cli.modeling.checkpoints import skeleton
    from p2d_cli.modeling.layouts import geometry

    config = job.config
    with job.timer.phase("load"):
        shape = geometry(skeleton(inputs.model.folder))
    size = (shape.num_layers, shape.num_heads)
    with job.timer.phase("score"):
        if inputs.method == "pad":
            return HeadsScored(shape, _compare_checkpoints(job, inputs, shape)[None])
        if inputs.method == "uniform":
            layers = candidate_layers(config.layers, shape.num_layers)
            selected = select_uniform(len(layers), shape.num_heads, shape.head_budget(config.ratio))
            # Scores of 1 and 0, of which the highest are just this selection.
            return HeadsScored(shape, among_layers(selected, layers, shape.num_layers)[None].astype(np.float64))
        draws = (generator(config.seed, "score-heads", "random", repeat) for repeat in range(config.repeats))
        return HeadsScored(shape, np.stack([draw.random(size) for draw in draws]))


def _compare_checkpoints(
    job: StageRun[ScoreHeadsConfig], inputs: ScoringInputs, shape: HeadGeometry
) -> NDArray[np.float64]:
    """Score `pad` between two checkpoints on disk, one layer in memory at a time."""
    from p2d_cli.modeling.checkpoints import CheckpointReader, read_layer_weights, skeleton
    from p2d_cli.modeling.layouts import geometry, model_layout

    if inputs.task_model is None:
        raise UsageError("--method pad needs --target or --task-model")
    empty_task = skeleton(inputs.task_model.folder)
    if geometry(empty_task) != shape:
        raise DataError(
            f"--task-model has another shape than --model: {geometry(empty_task)} and {shape}",
            hint="give a model that was fine-tuned from --model",
        )
    base, task = CheckpointReader(inputs.model.folder), CheckpointReader(inputs.task_model.folder)
    pairs = ((read_layer_weights(base, layer), read_layer_weights(task, layer)) for layer in model_layout(empty_task))
    return _alignment_change(job, pairs, shape.num_layers)


def _alignment_change(
    job: StageRun[ScoreHeadsConfig], pairs: Iterator[tuple[LayerWeights, LayerWeights]], layers: int
) -> NDArray[np.float64]:
    """Return the distance between each head's weights before and after, `[L, H]` (ALPS, arXiv:2505.18799, eq. 5-7)."""
    from p2d_cli.core.head_importance import score_layer

    config = job.config
    scores = []
    with job.progress.task("compare layers", layers) as advance:
        for base, task in pairs:
            distances_H = score_layer(
                base, task, weights=config.weights, distance=config.distance, temperature=config.temperature
            )
            scores.append(distances_H.numpy())
            advance(1)
    return np.stack(scores)


# --- from the model's reaction to rows


@dataclass(frozen=True)
class _Draw:
    """One repeat of a method: the model, the rows, and this repeat's source of chance."""

    job: StageRun[ScoreHeadsConfig]
    bench: Workbench
    target: tuple[Record, ...]
    pool: Pool | None
    rng: np.random.Generator
    repeat: int

    def finish(
        self,
        label: str,
        lengths: Sequence[int],
        compute: Callable[[list[int]], dict[str, NDArray[Any]]],
        name: Callable[[int], str],
    ) -> Iterator[tuple[list[int], Mapping[str, NDArray[Any]]]]:
        """Compute batches of sequences of these lengths, each once, whatever interrupts it; see `finish_batches`."""
        from p2d_cli.stages.workbench import finish_batches

        named = label if self.job.config.repeats == 1 else f"{label} of draw {self.repeat + 1}"
        return finish_batches(self.job, self.bench, named, self.bench.batches(lengths), compute, name=name)

    def recall(self) -> Entry | None:
        """Return what an interrupted run found in this repeat, if it finished it."""
        if not self.job.has_journal(REPEATS):
            return None
        with self._repeats() as journal:
            return journal.finished.get(self.repeat)

    def keep(self, arrays: dict[str, NDArray[Any]], tokens: int) -> None:
        """Record what this repeat found."""
        if self.job.is_main:
            with self._repeats() as journal:
                journal.add(self.repeat, arrays, seconds=float(arrays["spent"].sum()), tokens=tokens)

    def _repeats(self) -> Journal:
        return self.job.journal(REPEATS, [[repeat] for repeat in range(self.job.config.repeats)])

    @property
    def others(self) -> Pool:
        """The rows to tell the target's from."""
        if self.pool is None:
            raise UsageError("this method needs --pool")
        return self.pool

    def sample(self) -> list[Record]:
        """Return the target rows that this repeat looks at."""
        return [self.target[index] for index in self.rng.permutation(len(self.target))[: self.job.config.proxy_samples]]


RowMethod = Callable[[_Draw], tuple[NDArray[np.float64], dict[str, Any]]]


def _score_by_rows(job: StageRun[ScoreHeadsConfig], inputs: ScoringInputs, target: RowSource) -> HeadsScored:
    from p2d_cli.modeling.layouts import geometry
    from p2d_cli.stages.workbench import open_workbench

    config = job.config
    with job.timer.phase("prepare"):
        target_rows = job.inputs.read(target).records
        pool = job.inputs.pool(inputs.pool, target_rows) if inputs.pool is not None else None
    bench = open_workbench(job, inputs.model, config)
    repeats: list[NDArray[np.float64]] = []
    notes: dict[str, Any] = {}
    for repeat in range(config.repeats):
        seed_everything(derive_seed(config.seed, "score-heads", repeat))
        rng = generator(config.seed, "score-heads", inputs.method, repeat)
        scores_LH, notes = ROW_METHODS[inputs.method](_Draw(job, bench, target_rows, pool, rng, repeat))
        repeats.append(scores_LH)
    return HeadsScored(
        geometry(bench.model),
        np.stack(repeats),
        device=bench.device,
        precision=bench.precision,
        tokens=bench.tokens,
        notes=notes,
    )


def _score_pad(draw: _Draw) -> tuple[NDArray[np.float64], dict[str, Any]]:
    """Tune the attention on some target rows, and measure how far each head's weights moved.

    A repeat that an interrupted run had finished is not done again.
    """
    job, bench = draw.job, draw.bench
    rows = draw.sample()
    notes = {"proxy_rows": len(rows)}
    if (earlier := distributed.from_main(draw.recall)) is None:
        before, tokens = dict(job.timer.seconds), bench.tokens
        with job.timer.phase("prepare"):
            batches = list(_proxy_batches(draw, bench.encode_examples(rows)))
        scores_LH, losses = _tune_proxy(draw, batches)
        bench.tokens = tokens + sum(distributed.exchange(bench.tokens - tokens))
        spent = [job.timer.seconds[phase] - before.get(phase, 0.0) for phase in PROXY_PHASES]
        draw.keep({"scores": scores_LH, "losses": np.array(losses), "spent": np.array(spent)}, bench.tokens - tokens)
    else:
        scores_LH, losses = earlier.arrays["scores"], earlier.arrays["losses"].tolist()
        for phase, seconds in zip(PROXY_PHASES, earlier.arrays["spent"].tolist(), strict=True):
            job.timer.charge(phase, seconds)
        bench.tokens += earlier.tokens
        job.progress.note(f"draw {draw.repeat + 1} of the proxy was finished before")
    notes["proxy_steps"] = len(losses)
    return scores_LH, notes | {"proxy_first_loss": losses[0], "proxy_last_loss": losses[-1]}


def _tune_proxy(draw: _Draw, batches: Sequence[Batch | None]) -> tuple[NDArray[np.float64], list[float]]:
    """Return the scores `[L, H]`, and the loss of each step; all ranks take the same steps, and share their rows."""
    from p2d_cli.modeling.proxy import AttentionProxy

    job, bench = draw.job, draw.bench
    with job.timer.phase("proxy"), job.progress.task("tune the proxy", len(batches)) as advance:
        proxy = AttentionProxy(
            bench.model, bench.layout, lr=job.config.proxy_lr, sum_over_ranks=distributed.sum_tensors
        )
        losses = []
        for loss in proxy.steps(batches):
            losses.append(loss)
            advance(1)
            if distributed.world_size() > 1:
                distributed.stop_together(signals.stop_requested())
    with job.timer.phase("score"):
        pairs = ((proxy.base_weights(layer), proxy.task_weights(layer)) for layer in range(len(bench.layout)))
        scores_LH = _alignment_change(job, pairs, len(bench.layout))
        proxy.restore()
    return scores_LH, losses


def _proxy_batches(draw: _Draw, examples: Sequence[Any]) -> Iterator[Batch | None]:
    """Yield this rank's rows of each step, None where it has none."""
    config = draw.job.config
    for _ in range(config.proxy_epochs):
        order = draw.rng.permutation(len(examples))
        for start in range(0, len(order), config.proxy_batch_size):
            chosen = order[start : start + config.proxy_batch_size]
            mine = chosen[distributed.rank() :: distributed.world_size()]
            yield draw.bench.training_batch([examples[index] for index in mine]) if len(mine) else None


def _score_taylor(draw: _Draw) -> tuple[NDArray[np.float64], dict[str, Any]]:
    """First-order effect on the loss of removing each head, averaged over rows."""
    from p2d_cli.modeling.importance import taylor_scores
    from p2d_cli.modeling.layouts import layout_geometry

    job, bench = draw.job, draw.bench
    rows = draw.sample()
    with job.timer.phase("prepare"):
        examples = bench.encode_examples(rows)

    def read(group: list[int]) -> dict[str, NDArray[Any]]:
        batch = bench.training_batch([examples[index] for index in group])
        [effect_BLH] = taylor_scores(bench.model, bench.layout, [batch])
        return {"effect": effect_BLH.numpy()}

    shape = layout_geometry(bench.layout)
    total_LH = np.zeros((shape.num_layers, shape.num_heads))
    lengths = [len(example.input_ids) for example in examples]
    for _, reading in draw.finish("read rows", lengths, read, lambda row: rows[row].where):
        total_LH += reading["effect"].sum(axis=0)
    return total_LH / len(rows), {"rows": len(rows)}


def _score_contrast(draw: _Draw) -> tuple[NDArray[np.float64], dict[str, Any]]:
    """How far each head's attention, from a target query, favours the one target demo among pool demos."""
    from p2d_cli.core.head_selection import contrast_scores
    from p2d_cli.core.sample_affinity import demo_shares
    from p2d_cli.modeling.layouts import layout_geometry

    job, bench, demos = draw.job, draw.bench, draw.job.config.demos
    with job.timer.phase("prepare"):
        plan, episodes = _contrast_episodes(draw)
    shape = layout_geometry(bench.layout)
    everyone_LH = np.ones((shape.num_layers, shape.num_heads), dtype=np.bool_)

    def watch(group: list[int]) -> dict[str, NDArray[Any]]:
        attention_BKS = bench.watch([episodes[index] for index in group], everyone_LH, num_segments=demos)
        # Each head is weighed alone, so to demo_shares each is an episode of its own.
        shares = [
            demo_shares(attention_KS[:, None, :])[:, plan[index].target_demo]
            for index, attention_KS in zip(group, attention_BKS, strict=True)
        ]
        return {"target_share": np.stack(shares)}

    target_share_EK = np.zeros((len(plan), shape.total_heads))
    lengths = [len(episode.input_ids) for episode in episodes]
    for group, reading in draw.finish("watch episodes", lengths, watch, "episode {}".format):
        target_share_EK[group] = reading["target_share"]
    scores_K = contrast_scores(target_share_EK, demos)
    notes = {
        "episodes": len(plan),
        "truncated_demos": sum(episode.truncated_demos for episode in episodes),
        "best_target_share": float(target_share_EK.mean(axis=0).max()),
        "chance_target_share": 1 / demos,
    }
    return scores_K.reshape(shape.num_layers, shape.num_heads), notes


def _score_readout(draw: _Draw) -> tuple[NDArray[np.float64], dict[str, Any]]:
    """How well each head's output, read alone, tells target rows from pool rows that it was not fitted on."""
    from p2d_cli.core.readout import require_halves, separation
    from p2d_cli.modeling.layouts import layout_geometry

    job, bench = draw.job, draw.bench
    target = draw.sample()
    with job.timer.phase("prepare"):
        background = _background(draw, target)
        require_halves(len(target), len(background))
        examples = bench.encode_examples([*target, *background])
    shape = layout_geometry(bench.layout)
    everyone_LH = np.ones((shape.num_layers, shape.num_heads), dtype=np.bool_)

    def read(group: list[int]) -> dict[str, NDArray[Any]]:
        return {"outputs": bench.head_outputs([examples[index] for index in group], everyone_LH)}

    outputs = np.empty((len(examples), shape.total_heads, shape.head_dim), dtype=np.float32)
    lengths = [len(example.input_ids) for example in examples]
    for group, reading in draw.finish("read rows", lengths, read, lambda row: [*target, *background][row].where):
        outputs[group] = reading["outputs"]
    with job.timer.phase("score"):
        scores_K = separation(outputs[: len(target)], outputs[len(target) :])
    notes = {"rows": len(target), "rows_background": len(background), "best_separation": float(scores_K.max())}
    return scores_K.reshape(everyone_LH.shape), notes


def _background(draw: _Draw, target: Sequence[Record]) -> list[Record]:
    """Return a random sample of the pool rows that are none of these target rows."""
    pool = draw.others
    texts = {record.plain_text for record in target}
    groups, _ = duplicate_groups(draw.target)
    shown = [group for group, record in zip(groups, draw.target, strict=True) if record.plain_text in texts]
    is_other_N = np.ones(pool.num_rows, dtype=np.bool_)
    is_other_N[pool.twins[np.isin(pool.twin_groups, shown)]] = False
    return pool.take(draw.rng.permutation(np.flatnonzero(is_other_N))[: draw.job.config.background])


def _contrast_episodes(draw: _Draw) -> tuple[list[Any], list[Any]]:
    """Plan and tokenize episodes with one target demo among pool demos, asked by another target row."""
    from p2d_cli.data.episodes import plan_contrast

    config, target, pool = draw.job.config, draw.target, draw.others
    target_groups, _ = duplicate_groups(target)
    pool_groups = np.full(pool.num_rows, -1, dtype=np.int64)  # only likeness to the target matters
    pool_groups[pool.twins] = pool.twin_groups
    plan = plan_contrast(
        len(target),
        pool.num_rows,
        demos=config.demos,
        episodes=config.episodes,
        rng=draw.rng,
        pool_groups=pool_groups,
        target_groups=target_groups,
    )
    shown = [[row for slot, row in enumerate(each.demos) if slot != each.target_demo] for each in plan]
    others = iter(pool.take([row for rows in shown for row in rows]))
    episodes = []
    for episode in plan:
        demos = [target[row] if slot == episode.target_demo else next(others) for slot, row in enumerate(episode.demos)]
        episodes.append(draw.bench.encode_episode(demos, [target[index] for index in episode.queries]))
    return plan, episodes


ROW_METHODS: dict[str, RowMethod] = {
    "pad": _score_pad,
    "taylor": _score_taylor,
    "contrast": _score_contrast,
    "readout": _score_readout,
}
