"""What score-heads and mine-data would take (see `planning`).

Legend: L layers, H query heads a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from p2d_cli.config import MineDataConfig, ScoreHeadsConfig
from p2d_cli.core.cost import (
    FLOAT32,
    BatchShape,
    ModelSize,
    StagePlan,
    Work,
    backward_flops,
    forward_flops,
    learn_bytes,
)
from p2d_cli.core.geometry import share_count
from p2d_cli.core.subset_selection import resolve_count
from p2d_cli.data.episodes import duplicate_groups, plan_contrast, plan_mining, plan_self_mining
from p2d_cli.data.records import Record
from p2d_cli.modeling.model_files import ModelFiles
from p2d_cli.runtime.seeding import generator
from p2d_cli.stages.execution import StageRun
from p2d_cli.stages.planned_rows import Sample
from p2d_cli.stages.planning import JOURNAL_OVERHEAD, Planner, add_answers, assumed_heads, largest_of, sizes_of
from p2d_cli.stages.pool_task import METHODS_WITHOUT_MODEL

# --- score-heads


def plan_score_heads(
    job: StageRun[ScoreHeadsConfig],
    method: str,
    files: ModelFiles,
    target: Sample | None,
    pool: Sample | None,
    unfinished: Path | None = None,
) -> StagePlan:
    """Plan score-heads by a method, with the rows that it uses."""
    planner = Planner(job, files, unfinished)
    config, size = job.config, planner.size
    cells = size.layers * size.heads
    planner.disk["artifact"] = cells * (2 * FLOAT32 + 1 + FLOAT32 * config.repeats)
    if target is None:
        _compare_layers(planner, 2 if method == "pad" and config.scores is None else 0)
        return planner.plan()
    planner.rows["target"] = target.total
    if pool is not None:
        planner.rows["pool"] = pool.total
    for repeat in range(config.repeats):
        rng = generator(config.seed, "score-heads", method, repeat)
        {"pad": _plan_pad, "taylor": _plan_taylor, "contrast": _plan_contrast, "readout": _plan_readout}[method](
            planner, target.records, pool, rng
        )
    planner.works = _merged(planner.works)
    return planner.plan()


def _merged(works: Sequence[Work]) -> list[Work]:
    """Put repeats of the same work together."""
    merged: dict[str, Work] = {}
    for work in works:
        earlier = merged.get(work.name)
        merged[work.name] = (
            work
            if earlier is None
            else replace(
                earlier,
                rows=earlier.rows + work.rows,
                passes=earlier.passes + work.passes,
                backward_passes=earlier.backward_passes + work.backward_passes,
                tokens=earlier.tokens + work.tokens,
                flops=earlier.flops + work.flops,
            )
        )
    return list(merged.values())


def _compare_layers(planner: Planner, checkpoints: int) -> None:
    """Count comparing each head's weights before and after: no tokens, one layer of each checkpoint in memory."""
    size = planner.size
    layer = 2 * size.hidden * (size.queries + size.keys)
    planner.memory = {"weights": checkpoints * layer * FLOAT32}
    if checkpoints:
        planner.works.append(_comparison(size))


def _comparison(size: ModelSize) -> Work:
    # For each head two maps of D x D, each from factors of rank d, and passes over both in float64.
    flops = size.layers * size.heads * size.hidden**2 * (4.0 * size.head_dim + 40)
    return Work("compare layers", "compare", 0, size.layers, 0, 0, flops, typical_flops=flops / size.layers)


def _drawn(planner: Planner, target: Sequence[Record], rng: np.random.Generator) -> list[Record]:
    return [target[index] for index in rng.permutation(len(target))[: planner.config.proxy_samples]]


def _plan_pad(planner: Planner, target: Sequence[Record], pool: Sample | None, rng: np.random.Generator) -> None:
    del pool
    config, size = planner.config, planner.size
    rows = _drawn(planner, target, rng)
    sizes = sizes_of(planner.counter.examples(rows, len(rows)), logits=True)
    shapes = []
    for _ in range(config.proxy_epochs):
        order = rng.permutation(len(sizes))
        for start in range(0, len(order), config.proxy_batch_size):
            chosen = [sizes[index] for index in order[start : start + config.proxy_batch_size]]
            shapes.append(BatchShape(len(chosen), max(length for length, _ in chosen), sum(n for _, n in chosen)))
    trained = size.layers * size.hidden * (size.queries + 2 * size.keys)
    flops = [forward_flops(size, shape) + backward_flops(size, shape, trained=trained) for shape in shapes]
    planner.add("tune the proxy", "learn", shapes, flops, rows=len(rows) * config.proxy_epochs, backward=True)
    planner.works.append(_comparison(size))
    planner.need(
        learn_bytes(
            size, largest_of(shapes), planner.itemsize, layers=size.layers, weights_trained=False, recompute=False
        )
        | {"base weights aside": trained * planner.itemsize, "master weights": trained * FLOAT32}
        | {"gradients": trained * FLOAT32, "optimizer state": 2 * trained * FLOAT32}
    )


def _plan_taylor(planner: Planner, target: Sequence[Record], pool: Sample | None, rng: np.random.Generator) -> None:
    del pool
    size = planner.size
    rows = _drawn(planner, target, rng)
    sizes = sizes_of(planner.counter.examples(rows, len(rows)), logits=True)
    shapes = planner.counter.shapes(sizes)
    flops = [forward_flops(size, shape) + backward_flops(size, shape) for shape in shapes]
    planner.add("read rows", "learn", shapes, flops, rows=len(rows), backward=True)
    planner.need(
        learn_bytes(
            size, largest_of(shapes), planner.itemsize, layers=size.layers, weights_trained=False, recompute=False
        )
    )


def _plan_contrast(planner: Planner, target: Sequence[Record], pool: Sample | None, rng: np.random.Generator) -> None:
    config, others = planner.config, pool.records if pool is not None else ()
    pool_groups, target_groups = duplicate_groups(others, target)
    plan = plan_contrast(
        len(target),
        len(others),
        demos=config.demos,
        episodes=config.episodes,
        rng=rng,
        pool_groups=pool_groups,
        target_groups=target_groups,
    )
    episodes = [
        (
            [(target if slot == episode.target_demo else others)[index] for slot, index in enumerate(episode.demos)],
            [target[index] for index in episode.queries],
        )
        for episode in plan
    ]
    encoded = planner.counter.episodes(episodes, len(episodes))
    planner.read("watch episodes", [(len(episode.input_ids), 0) for episode in encoded])


def _plan_readout(planner: Planner, target: Sequence[Record], pool: Sample | None, rng: np.random.Generator) -> None:
    size, records = planner.size, pool.records if pool is not None else ()
    shown = _drawn(planner, target, rng)
    pool_groups, target_groups = duplicate_groups(records, shown)
    others = rng.permutation(np.flatnonzero(~np.isin(pool_groups, target_groups)))
    rows = [*shown, *(records[index] for index in others[: planner.config.background])]
    encoded = planner.counter.examples(rows, len(rows))
    planner.read("read rows", sizes_of(encoded, logits=False))
    planner.need({"captured head outputs": len(rows) * size.layers * size.queries * FLOAT32})


# --- mine-data


def plan_mine_data(
    job: StageRun[MineDataConfig],
    files: ModelFiles,
    pool: Sample,
    target: Sample | None,
    heads_LH: NDArray[np.bool_] | None,
    unfinished: Path | None = None,
) -> StagePlan:
    """Plan mine-data; `heads_LH` are the selected heads (p2d only)."""
    planner = Planner(job, files, unfinished)
    config = job.config
    planner.rows = {"pool": pool.total} | ({"target": target.total} if target is not None else {})
    chosen = pool.total if config.method == "full" else resolve_count(pool.total, config.ratio, config.count)
    planner.rows["chosen"] = chosen
    planner.disk["artifact"] = round(pool.stored_bytes * chosen / pool.total) + 3 * 8 * pool.total
    if config.method in METHODS_WITHOUT_MODEL or config.scores is not None:
        planner.memory = {}
        return planner.plan()
    shown = target.records if target is not None else ()
    pool_groups, target_groups = duplicate_groups(pool.records, shown)
    others = [pool.records[index] for index in np.flatnonzero(~np.isin(pool_groups, target_groups))]
    total = round(len(others) * pool.total / len(pool.records))
    if config.has_shortlist:  # which rows it holds, and how long they are, only the words tell
        total = min(total, share_count(config.shortlist, pool.total))
        others = others[: share_count(config.shortlist, len(others))]
    planner.counter.is_exact = pool.is_whole and not config.has_shortlist
    if config.method in {"p2d", "data-whisperer"}:
        heads_LH = _middle_layer(planner.size, config.layer) if config.method != "p2d" else heads_LH
        heads_LH = assumed_heads(planner.size, 0.1) if heads_LH is None else heads_LH
        by_readout = config.method == "p2d" and config.resolved_affinity == "readout"
        (_mine_by_readout if by_readout else _mine_by_episodes)(planner, others, total, shown, heads_LH)
    else:
        _mine_by_rows(planner, others, total, shown)
    return planner.plan()


def _middle_layer(size: ModelSize, layer: int | None) -> NDArray[np.bool_]:
    heads_LH = np.zeros((size.layers, size.heads), dtype=np.bool_)
    heads_LH[min(size.layers // 2 if layer is None else layer, size.layers - 1)] = True
    return heads_LH


def _depth(heads_LH: NDArray[np.bool_]) -> int:
    """Return how many layers are computed to read these heads."""
    return int(np.flatnonzero(heads_LH.any(axis=1)).max()) + 1


def _mine_by_readout(
    planner: Planner, others: Sequence[Record], total: int, target: Sequence[Record], heads_LH: NDArray[np.bool_]
) -> None:
    config, size, depth = planner.config, planner.size, _depth(heads_LH)
    rows = sizes_of(planner.counter.examples(others, total), logits=False)
    shown = sizes_of(planner.counter.examples(target, len(target)), logits=False)
    order = generator(config.seed, "mine-data", "background").permutation(total)
    sample, rest = np.sort(order[: config.background]), np.sort(order[config.background :])
    known = [*shown, *(rows[index] for index in sample)]
    planner.read("read target and background", known, layers=depth)
    planner.read("read rows", [rows[index] for index in rest], layers=depth)
    outputs = len(known) * int(heads_LH.sum()) * size.head_dim * FLOAT32
    planner.need({"captured head outputs": outputs})
    planner.disk["journal"] = round(outputs * JOURNAL_OVERHEAD) + 16 * len(rest)


def _mine_by_episodes(
    planner: Planner, others: Sequence[Record], total: int, target: Sequence[Record], heads_LH: NDArray[np.bool_]
) -> None:
    config = planner.config
    pool_groups, target_groups = duplicate_groups(others, target)
    rng = generator(config.seed, "mine-data", "episodes")
    counts = {"demos": config.demos, "queries": config.queries, "draws": config.draws, "rng": rng}
    if target:
        plan = plan_mining(len(others), len(target), pool_groups=pool_groups, target_groups=target_groups, **counts)
    else:
        plan = plan_self_mining(len(others), pool_groups=pool_groups, **counts)
    asked = target or others
    episodes = planner.counter.episodes(
        [([others[i] for i in episode.demos], [asked[i] for i in episode.queries]) for episode in plan],
        round(len(plan) * total / len(others)),
    )
    likely = config.perf == "likelihood"
    sizes = [(len(episode.input_ids), sum(episode.answer_mask) if likely else 0) for episode in episodes]
    planner.read("read episodes", sizes, layers=None if likely else _depth(heads_LH))
    if config.perf == "generate":
        prompts = [
            (len(episode.input_ids), max(sum(episode.answer_mask) // config.queries, 1))
            for episode in episodes
            for _ in range(config.queries)
        ]
        add_answers(planner, "answer episodes", prompts)
    planner.disk["journal"] = round(len(episodes) * int(heads_LH.sum()) * config.demos * 8 * JOURNAL_OVERHEAD)


def _mine_by_rows(planner: Planner, others: Sequence[Record], total: int, target: Sequence[Record]) -> None:
    method = planner.config.method
    rows = planner.counter.examples(others, total)
    if method == "embedding":
        rows = [*rows, *planner.counter.examples(target, len(target))]
        planner.read("embed rows", sizes_of(rows, logits=False))
        return
    planner.read("read rows", sizes_of(rows, logits=True))
    if method == "ifd":
        alone = [len(row.input_ids) - row.answer_start for row in rows]
        planner.read("read completions", [(length + 1, length) for length in alone])
