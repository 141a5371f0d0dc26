"""score-heads: which heads does the task move?

Legend: R repeats, E episodes, L layers, H query heads a layer, K heads in (layer, head) order, S demos.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from p2d_cli.artifacts.head_scores import HeadScores, save_head_scores
from p2d_cli.config import Resolved, ScoreHeadsConfig
from p2d_cli.data.records import Record
from p2d_cli.data.sources import RowSource
from p2d_cli.errors import DataError, NonFiniteError, UnavailableError, UsageError
from p2d_cli.modeling.model_files import ModelFiles
from p2d_cli.runtime.seeding import generator, seed_everything
from p2d_cli.stages.execution import Outcome, RunOptions, StageResult, StageRun

if TYPE_CHECKING:
    import torch

    from p2d_cli.core.geometry import HeadGeometry
    from p2d_cli.stages.workbench import Workbench

PICTURE_NAME = "heads.png"


@dataclass(frozen=True)
class _Inputs:
    method: str
    model: ModelFiles
    task_model: ModelFiles | None
    target: RowSource | None
    pool: RowSource | None


def run(resolved: Resolved[ScoreHeadsConfig], options: RunOptions | None = None) -> StageResult:
    """Score and select heads, and write a heads artifact.

    Raises:
        P2DError: as its message says; see `p2d_cli.errors` for the exit codes.
    """
    job = StageRun("score-heads", resolved, options or RunOptions())
    inputs = _open_inputs(job)
    return job.complete(lambda folder: _compute(job, inputs, folder))


def _open_inputs(job: StageRun[ScoreHeadsConfig]) -> _Inputs:
    """Take the inputs that the method needs, and leave the others out of the artifact's identity."""
    config = job.config
    method = _resolve_method(config)
    needs_target = method in {"contrast", "taylor"} or (method == "pad" and config.task_model is None)
    if needs_target and config.target is None:
        raise UsageError(f"--method {method} needs --target: rows of the task", hint="give a file, folder or hub id")
    if method == "contrast" and config.pool is None:
        raise UsageError(
            "--method contrast needs --pool: rows to tell the target from",
            hint="give --pool, or use --method pad, which needs the target rows only",
        )
    task_model = config.task_model if method == "pad" else None
    return _Inputs(
        method=method,
        model=job.model(config.model, with_tokenizer=needs_target),
        task_model=job.model(task_model, name="task_model", with_tokenizer=False) if task_model else None,
        target=job.rows("target", config.target) if needs_target and config.target else None,
        pool=job.rows("pool", config.pool) if method == "contrast" and config.pool else None,
    )


def _resolve_method(config: ScoreHeadsConfig) -> str:
    if config.method != "auto":
        return config.method
    return "contrast" if config.pool is not None and config.task_model is None else "pad"


def _compute(job: StageRun[ScoreHeadsConfig], inputs: _Inputs, folder: Path) -> Outcome:
    from p2d_cli.core.head_selection import repeatability, select_top

    config = job.config
    scorer = _weights_scorer if inputs.target is None else _rows_scorer
    scored = scorer(job, inputs)
    scores_LH = scored.repeats_RLH.mean(axis=0)
    if not np.isfinite(scores_LH).all():
        layer, head = np.argwhere(~np.isfinite(scores_LH))[0]
        raise NonFiniteError(
            f"the {inputs.method} score of layer {layer}, head {head} is not a finite number; nothing was written",
            hint="look for NaN in the model's weights, or try --dtype float32",
        )
    budget = scored.geometry.head_budget(config.ratio)
    selected_LH = scored.selected_LH if scored.selected_LH is not None else select_top(scores_LH, budget)
    heads = HeadScores(
        scores_LH=scores_LH.astype(np.float32),
        selected_LH=selected_LH,
        repeats_RLH=scored.repeats_RLH.astype(np.float32),
        method=inputs.method,
        geometry=scored.geometry,
    )
    with job.timer.phase("save"):
        save_head_scores(folder, heads)
        _draw(job, heads, folder)
    repeat = repeatability(scored.repeats_RLH, budget)
    groups = int(scored.geometry.groups_of(selected_LH).sum())
    summary = {
        "method": inputs.method,
        "heads_selected": int(selected_LH.sum()),
        "heads_total": scored.geometry.total_heads,
        "groups_touched": groups,
        "groups_total": scored.geometry.num_layers * scored.geometry.num_groups,
        "layers_touched": int(selected_LH.any(axis=1).sum()),
        "repeatability": vars(repeat) if repeat else None,
        **scored.notes,
    }
    return Outcome(
        summary=summary,
        settings={"method": inputs.method, "ratio": config.ratio},
        precision=scored.precision,
        device=scored.device,
        tokens=scored.tokens,
        decoration=frozenset({PICTURE_NAME}),
    )


def _draw(job: StageRun[ScoreHeadsConfig], heads: HeadScores, folder: Path) -> None:
    from p2d_cli.reporting.plots import head_heatmap

    try:
        title = f"{heads.method}: {int(heads.selected_LH.sum())} of {heads.scores_LH.size} heads"
        head_heatmap(heads.scores_LH, heads.selected_LH, folder / PICTURE_NAME, title=title)
    except UnavailableError as missing:
        job.progress.note(f"no {PICTURE_NAME}: {missing.message}")


@dataclass
class _Scored:
    geometry: HeadGeometry
    repeats_RLH: NDArray[np.float64]
    device: str
    precision: str
    tokens: int
    notes: dict[str, Any]
    selected_LH: NDArray[np.bool_] | None = None
    """Set by the methods that select without ranking."""


# --- scores from weights alone, or from nothing


def _weights_scorer(job: StageRun[ScoreHeadsConfig], inputs: _Inputs) -> _Scored:
    """Score with `random`, `uniform`, or `pad` between two checkpoints; no rows, no tokenizer, no whole model."""
    from p2d_cli.core.head_selection import select_uniform
    from p2d_cli.modeling.checkpoints import skeleton
    from p2d_cli.modeling.layouts import geometry, model_layout

    config = job.config
    with job.timer.phase("load"):
        empty = skeleton(inputs.model.folder)
        layout, shape = model_layout(empty), geometry(empty)
    scored = _Scored(shape, np.zeros((1, shape.num_layers, shape.num_heads)), "cpu", "", 0, {})
    with job.timer.phase("score"):
        if inputs.method == "pad":
            scored.repeats_RLH = _compare_checkpoints(job, inputs, layout)[None]
        elif inputs.method == "uniform":
            scored.selected_LH = select_uniform(shape.num_layers, shape.num_heads, shape.head_budget(config.ratio))
            scored.repeats_RLH = scored.selected_LH[None].astype(np.float64)
        else:
            scored.repeats_RLH = np.stack(
                [
                    generator(config.seed, "score-heads", "random", repeat).random((shape.num_layers, shape.num_heads))
                    for repeat in range(config.repeats)
                ]
            )
    return scored


def _compare_checkpoints(job: StageRun[ScoreHeadsConfig], inputs: _Inputs, layout: Any) -> NDArray[np.float64]:
    """Score `pad` between two checkpoints on disk, one layer in memory at a time."""
    from p2d_cli.core.head_importance import score_layer
    from p2d_cli.modeling.checkpoints import CheckpointReader, read_layer_weights, skeleton
    from p2d_cli.modeling.layouts import geometry

    config = job.config
    if inputs.task_model is None:
        raise UsageError("--method pad needs --target or --task-model")
    base_shape, task_shape = geometry(skeleton(inputs.model.folder)), geometry(skeleton(inputs.task_model.folder))
    if base_shape != task_shape:
        raise DataError(
            f"--task-model has another shape than --model: {task_shape} and {base_shape}",
            hint="give a model that was fine-tuned from --model",
        )
    base, task = CheckpointReader(inputs.model.folder), CheckpointReader(inputs.task_model.folder)
    scores = []
    with job.progress.task("compare layers", len(layout)) as advance:
        for layer in layout:
            scores.append(
                score_layer(
                    read_layer_weights(base, layer),
                    read_layer_weights(task, layer),
                    weights=config.weights,
                    distance=config.distance,
                    temperature=config.temperature,
                ).numpy()
            )
            advance(1)
    return np.stack(scores)


# --- scores from the model's reaction to rows


def _rows_scorer(job: StageRun[ScoreHeadsConfig], inputs: _Inputs) -> _Scored:
    """Score with `pad` by a proxy, `taylor` or `contrast`, once for each repeat."""
    from p2d_cli.modeling.layouts import geometry
    from p2d_cli.stages.workbench import open_workbench

    config = job.config
    if inputs.target is None:
        raise UsageError(f"--method {inputs.method} needs --target")
    with job.timer.phase("prepare"):
        target = job.read(inputs.target).records
        pool = job.read(inputs.pool).records if inputs.pool is not None else ()
    bench = open_workbench(job, inputs.model, config)
    shape = geometry(bench.model)
    score = {"pad": _score_pad, "taylor": _score_taylor, "contrast": _score_contrast}[inputs.method]
    repeats: list[NDArray[np.float64]] = []
    notes: dict[str, Any] = {}
    for repeat in range(config.repeats):
        seed_everything(int(generator(config.seed, "score-heads", repeat).integers(2**31)))
        rng = generator(config.seed, "score-heads", inputs.method, repeat)
        scores_LH, notes = score(job, bench, target, pool, rng)
        repeats.append(scores_LH)
    return _Scored(shape, np.stack(repeats), bench.device, bench.precision, bench.tokens, notes)


def _draw_rows(records: tuple[Record, ...], count: int, rng: np.random.Generator) -> list[Record]:
    return [records[index] for index in rng.permutation(len(records))[:count]]


def _score_pad(
    job: StageRun[ScoreHeadsConfig],
    bench: Workbench,
    target: tuple[Record, ...],
    pool: tuple[Record, ...],
    rng: np.random.Generator,
) -> tuple[NDArray[np.float64], dict[str, Any]]:
    """Tune the attention on some target rows, and measure how far each head's weights moved."""
    from p2d_cli.core.head_importance import score_layer
    from p2d_cli.modeling.layouts import model_layout
    from p2d_cli.modeling.proxy import AttentionProxy

    del pool
    config = job.config
    layout = model_layout(bench.model)
    rows = _draw_rows(target, config.proxy_samples, rng)
    with job.timer.phase("prepare"):
        examples = bench.encode_examples(rows)
    losses: list[float] = []
    with job.timer.phase("proxy"):
        batches = list(_proxy_batches(bench, examples, config, rng))
        proxy = AttentionProxy(bench.model, layout, lr=config.proxy_lr)
        with job.progress.task("tune the proxy", len(batches)) as advance:
            for loss in proxy.steps(batches):
                losses.append(loss)
                advance(1)
    with job.timer.phase("score"):
        scores_LH = np.stack(
            [
                score_layer(
                    proxy.base_weights(index),
                    proxy.task_weights(index),
                    weights=config.weights,
                    distance=config.distance,
                    temperature=config.temperature,
                )
                .cpu()
                .numpy()
                for index in range(len(layout))
            ]
        )
        proxy.restore()
    return scores_LH, {
        "proxy_rows": len(rows),
        "proxy_steps": len(losses),
        "proxy_first_loss": losses[0],
        "proxy_last_loss": losses[-1],
    }


def _proxy_batches(
    bench: Workbench, examples: list[Any], config: ScoreHeadsConfig, rng: np.random.Generator
) -> Iterator[dict[str, torch.Tensor]]:
    for _ in range(config.proxy_epochs):
        order = rng.permutation(len(examples))
        for start in range(0, len(order), config.proxy_batch_size):
            yield bench.training_batch([examples[index] for index in order[start : start + config.proxy_batch_size]])


def _score_taylor(
    job: StageRun[ScoreHeadsConfig],
    bench: Workbench,
    target: tuple[Record, ...],
    pool: tuple[Record, ...],
    rng: np.random.Generator,
) -> tuple[NDArray[np.float64], dict[str, Any]]:
    """First-order effect on the loss of removing each head, averaged over rows."""
    from p2d_cli.modeling.importance import taylor_scores
    from p2d_cli.modeling.layouts import model_layout

    del pool
    config = job.config
    rows = _draw_rows(target, config.proxy_samples, rng)
    with job.timer.phase("prepare"):
        examples = bench.encode_examples(rows)
    total_LH: NDArray[np.float64] | None = None
    with job.timer.phase("score"), job.progress.task("read rows", len(rows)) as advance:
        groups = bench.batches([len(example.input_ids) for example in examples])
        batches = (bench.training_batch([examples[index] for index in group]) for group in groups)
        for effect_BLH in taylor_scores(bench.model, model_layout(bench.model), batches):
            summed = effect_BLH.double().sum(dim=0).cpu().numpy()
            total_LH = summed if total_LH is None else total_LH + summed
            advance(len(effect_BLH))
    if total_LH is None:
        raise DataError("no rows to read", hint="give --target with at least one row")
    return total_LH / len(rows), {"rows": len(rows)}


def _score_contrast(
    job: StageRun[ScoreHeadsConfig],
    bench: Workbench,
    target: tuple[Record, ...],
    pool: tuple[Record, ...],
    rng: np.random.Generator,
) -> tuple[NDArray[np.float64], dict[str, Any]]:
    """How far each head's attention, from a target query, favours the one target demo among pool demos."""
    from p2d_cli.core.head_selection import contrast_scores
    from p2d_cli.data.episodes import duplicate_groups, plan_contrast
    from p2d_cli.modeling.layouts import geometry

    config = job.config
    with job.timer.phase("prepare"):
        pool_groups, target_groups = duplicate_groups(pool, target)
        plan = plan_contrast(
            len(target),
            len(pool),
            demos=config.demos,
            episodes=config.episodes,
            rng=rng,
            pool_groups=pool_groups,
            target_groups=target_groups,
        )
        episodes = []
        for episode in plan:
            demos = [
                target[index] if slot == episode.target_demo else pool[index]
                for slot, index in enumerate(episode.demos)
            ]
            episodes.append(bench.encode_episode(demos, [target[index] for index in episode.queries]))
    shape = geometry(bench.model)
    everyone_LH = np.ones((shape.num_layers, shape.num_heads), dtype=np.bool_)
    target_share_EK = np.zeros((len(plan), shape.total_heads))
    with job.timer.phase("score"), job.progress.task("watch episodes", len(plan)) as advance:
        for group, attention_BKS in bench.watch(episodes, everyone_LH, num_segments=config.demos):
            slots = np.array([plan[index].target_demo for index in group])
            for index, slot, attention_KS in zip(group, slots, attention_BKS, strict=True):
                target_share_EK[index] = _shares_of(attention_KS)[:, slot]
            advance(len(group))
    scores_K = contrast_scores(target_share_EK, config.demos)
    notes = {
        "episodes": len(plan),
        "truncated_demos": sum(episode.truncated_demos for episode in episodes),
        "best_target_share": float(target_share_EK.mean(axis=0).max()),
        "chance_target_share": 1 / config.demos,
    }
    return scores_K.reshape(shape.num_layers, shape.num_heads), notes


def _shares_of(attention_KS: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return each head's share of attention on each demo, `[K, S]`; every head is an episode of its own."""
    from p2d_cli.core.sample_affinity import demo_shares

    return demo_shares(attention_KS[:, None, :])
