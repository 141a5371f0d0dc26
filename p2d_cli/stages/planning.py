"""What a stage would take, told before anything heavy is loaded: passes, tokens, memory, disk, unfinished work.

Each `plan_` function follows its stage's own path up to the batches, with a tokenizer that needs no torch, and counts
instead of computing. `--time` then has a few of these batches timed on the model (`plan_timing`).

Legend: L layers, H query heads a layer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2d_cli.artifacts.checkpoints import newest_checkpoint
from p2d_cli.artifacts.head_scores import load_head_scores
from p2d_cli.config import EvalConfig, MineDataConfig, Resolved, RowOptions, ScoreHeadsConfig, StageConfig, TrainConfig
from p2d_cli.core.cost import (
    FLOAT32,
    BatchShape,
    ModelSize,
    StagePlan,
    Trained,
    Work,
    WorkKind,
    backward_flops,
    cache_bytes,
    forward_flops,
    heads_trained,
    learn_bytes,
    lora_trained,
    model_size,
    read_bytes,
)
from p2d_cli.core.geometry import share_count
from p2d_cli.core.subset_selection import resolve_count
from p2d_cli.data.batching import token_batches
from p2d_cli.data.episodes import duplicate_groups, plan_contrast, plan_mining, plan_self_mining
from p2d_cli.data.records import Record
from p2d_cli.modeling.model_files import ModelFiles, locate_model, tensor_shapes
from p2d_cli.runtime.hardware import likely_dtype
from p2d_cli.runtime.seeding import derive_seed, generator
from p2d_cli.stages.execution import RunOptions, StageRun
from p2d_cli.stages.planned_rows import RowCounter, Sample, read_sample, stretch

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
CHECKPOINTS_AT_ONCE = 3
"""Two are kept, and a third is there while it is being written."""
GENERATED_METRICS = frozenset({"exact_match", "token_f1", "rougeL", "number_match"})
METHODS_WITH_TARGET = frozenset({"p2d", "data-whisperer", "embedding", "lexical"})
MEGABATCHES = 50
"""Rows are sorted by length within so many batches, as in `p2d_cli.modeling.training`, which imports torch."""
JOURNAL_OVERHEAD = 4 / 3
"""Arrays stand in journals as base64."""
_FOUR_BITS = 0.56
"""Bytes a weight, with the scales of its block."""


class Planner:
    """What the plans of all stages are made with.

    Args:
        job: the stage that is planned.
        files: the model that it would run.
        unfinished: where an interrupted run of the same work would have left what it had finished.
    """

    def __init__(self, job: StageRun[Any], files: ModelFiles, unfinished: Path | None) -> None:
        self.job = job
        self.files = files
        self.config: Any = job.config
        self.size: ModelSize = model_size(files.config, tensor_shapes(files))
        self.precision = likely_dtype(self.config.dtype, self.config.device)
        self.itemsize = ITEMSIZE[self.precision]
        self.works: list[Work] = []
        self.rows: dict[str, int] = {}
        self.memory: dict[str, int] = {"weights": self.size.parameters * self.itemsize}
        self.disk: dict[str, int] = {}
        self.notes: list[str] = []
        self.other_seconds: dict[str, float] = {}
        self._unfinished = unfinished

    @cached_property
    def counter(self) -> RowCounter:
        """Tokenizes rows; loaded when it is first needed."""
        if not isinstance(self.config, RowOptions):
            raise TypeError(f"{type(self.config).__name__} has no settings for rows")
        return RowCounter(self.job, self.files, self.config)

    def read(self, name: str, sizes: Sequence[tuple[int, int]], *, layers: int | None = None) -> None:
        """Add one forward pass over sequences of these `(length, logits)`, up to a layer."""
        if not sizes:
            return
        shapes = self.counter.shapes(sizes)
        flops = [forward_flops(self.size, shape, layers=layers) for shape in shapes]
        self.add(name, "read", shapes, flops, rows=len(sizes))
        self.need(read_bytes(self.size, _largest(shapes), self.itemsize))

    def add(
        self,
        name: str,
        kind: WorkKind,
        shapes: Sequence[BatchShape],
        flops: Sequence[float],
        *,
        rows: int,
        times: float = 1.0,
        backward: bool = False,
    ) -> None:
        """Add passes over these batches, all of them `times` times."""
        middle = int(np.argsort(flops)[len(flops) // 2])
        passes = round(len(shapes) * times)
        self.works.append(
            Work(
                name=name,
                kind=kind,
                rows=rows,
                passes=passes,
                backward_passes=passes if backward else 0,
                tokens=round(sum(shape.tokens for shape in shapes) * times),
                flops=sum(flops) * times,
                typical=shapes[middle],
                largest=_largest(shapes),
                typical_flops=flops[middle],
            )
        )

    def need(self, memory: dict[str, int]) -> None:
        """Take parts of memory into account, each at its largest."""
        for part, size in memory.items():
            self.memory[part] = max(self.memory.get(part, 0), size)

    def plan(self, heads_LH: NDArray[np.bool_] | None = None) -> StagePlan:
        """Return what was gathered, timed if that was asked for, with these heads trained or read."""
        known = "counter" in vars(self)
        if self.job.options.timed:
            self._time(heads_LH)
        if self.config.dtype == "auto" and self.memory:
            self.notes.append(f"precision taken as {self.precision}, as --dtype auto would choose here")
        return StagePlan(
            rows=self.rows,
            exact=not known or self.counter.is_exact,
            works=tuple(self.works),
            memory={part: size for part, size in self.memory.items() if size},
            disk={part: size for part, size in self.disk.items() if size},
            other_seconds=self.other_seconds,
            resume=tuple(_unfinished_work(self._unfinished, self.works)),
            notes=tuple(self.notes),
        )

    def _time(self, heads_LH: NDArray[np.bool_] | None) -> None:
        from p2d_cli.stages.plan_timing import PlanTimer

        timer = PlanTimer(self.job, self.files, self.size, heads_LH)
        timed = []
        for work in self.works:
            timed.append(replace(work, seconds=timer.rate(work) * work.flops))
            if timer.start_seconds is not None:
                self.other_seconds["start"] = timer.start_seconds
        self.works = timed
        if "counter" in vars(self):
            self.other_seconds["tokenize"] = self.counter.seconds


def _largest(shapes: Iterable[BatchShape]) -> BatchShape:
    return max(shapes, key=lambda shape: (shape.tokens, shape.logits))


def _sizes(examples: Iterable[Any], *, logits: bool) -> list[tuple[int, int]]:
    return [
        (len(example.input_ids), len(example.input_ids) - example.prompt_length if logits else 0)
        for example in examples
    ]


def assumed_heads(size: ModelSize, ratio: float) -> NDArray[np.bool_]:
    """Return heads that stand for a selection that is still to be made: spread evenly, down from the very last."""
    total = size.layers * size.heads
    count = share_count(ratio, total)
    heads_LH = np.zeros(total, dtype=np.bool_)
    heads_LH[[(index + 1) * total // count - 1 for index in range(count)]] = True
    return heads_LH.reshape(size.layers, size.heads)


# --- unfinished work


def _unfinished_work(folder: Path | None, works: Sequence[Work]) -> list[str]:
    """Say what an interrupted run has finished of each work."""
    if folder is None or not folder.is_dir():
        return []
    found = [f"{name}: {done} of {work.passes} batches" for work in works for name, done in _journals(folder, work)]
    checkpoint, problems = newest_checkpoint(folder / "checkpoints")
    found += [f"not from {problem}" for problem in problems]
    if checkpoint is not None:
        found.append(f"train: from update {checkpoint.folder.name.rpartition('-')[2]}")
    return found


def _journals(folder: Path, work: Work) -> list[tuple[str, int]]:
    """Return the finished batches in a work's journals: a line each, below a head line; one journal a process."""
    stem = work.name.replace(" ", "-")
    journals = [path for path in folder.rglob("*.jsonl") if path.name.split(".")[0] == stem]
    finished = sum(max(path.read_bytes().count(b"\n") - 1, 0) for path in journals)
    return [(work.name, finished)] if journals else []


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
        _compare_layers(planner, 2 if method == "pad" else 0)
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
    sizes = _sizes(planner.counter.examples(rows, len(rows)), logits=True)
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
            size, _largest(shapes), planner.itemsize, layers=size.layers, weights_trained=False, recompute=False
        )
        | {"base weights aside": trained * planner.itemsize, "master weights": trained * FLOAT32}
        | {"gradients": trained * FLOAT32, "optimizer state": 2 * trained * FLOAT32}
    )


def _plan_taylor(planner: Planner, target: Sequence[Record], pool: Sample | None, rng: np.random.Generator) -> None:
    del pool
    size = planner.size
    rows = _drawn(planner, target, rng)
    sizes = _sizes(planner.counter.examples(rows, len(rows)), logits=True)
    shapes = planner.counter.shapes(sizes)
    flops = [forward_flops(size, shape) + backward_flops(size, shape) for shape in shapes]
    planner.add("read rows", "learn", shapes, flops, rows=len(rows), backward=True)
    planner.need(
        learn_bytes(
            size, _largest(shapes), planner.itemsize, layers=size.layers, weights_trained=False, recompute=False
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
    planner.read("read rows", _sizes(encoded, logits=False))
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
    if config.method in {"random", "full", "lexical"}:
        planner.memory = {}
        return planner.plan()
    shown = target.records if target is not None else ()
    pool_groups, target_groups = duplicate_groups(pool.records, shown)
    others = [pool.records[index] for index in np.flatnonzero(~np.isin(pool_groups, target_groups))]
    total = round(len(others) * pool.total / len(pool.records))
    planner.counter.is_exact = pool.is_whole
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
    rows = _sizes(planner.counter.examples(others, total), logits=False)
    shown = _sizes(planner.counter.examples(target, len(target)), logits=False)
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
        _answer(planner, "answer episodes", prompts)
    planner.disk["journal"] = round(len(episodes) * int(heads_LH.sum()) * config.demos * 8 * JOURNAL_OVERHEAD)


def _mine_by_rows(planner: Planner, others: Sequence[Record], total: int, target: Sequence[Record]) -> None:
    method = planner.config.method
    rows = planner.counter.examples(others, total)
    if method == "embedding":
        rows = [*rows, *planner.counter.examples(target, len(target))]
        planner.read("embed rows", _sizes(rows, logits=False))
        return
    planner.read("read rows", _sizes(rows, logits=True))
    if method == "ifd":
        alone = [len(row.input_ids) - row.prompt_length for row in rows]
        planner.read("read completions", [(length + 1, length) for length in alone])


# --- train


def plan_train(
    job: StageRun[TrainConfig],
    files: ModelFiles,
    data: Sample,
    held_out: Sample | None,
    heads_LH: NDArray[np.bool_] | None,
    unfinished: Path | None = None,
) -> StagePlan:
    """Plan train; `heads_LH` are the selected heads (scope heads only)."""
    planner = Planner(job, files, unfinished)
    config, size = job.config, planner.size
    scope = config.resolved_scope
    trained = _trained(config, size, heads_LH)
    planner.rows["data"] = data.total
    planner.counter.is_exact = data.is_whole
    sizes = _learnt(planner, data)
    shapes = _micro_batches(planner, sizes)
    each_epoch = -(-len(sizes) // config.batch_size)
    done = min(float(np.ceil(each_epoch * config.epochs)), config.max_steps or np.inf)
    times = done / max(each_epoch, 1)
    whole = scope in {"attention", "full"}
    flops = [
        forward_flops(size, shape) * (2 if config.checkpointing else 1)
        + backward_flops(size, shape, layers=trained.layers, trained=trained.parameters)
        for shape in shapes
    ]
    planner.add("train", "learn", shapes, flops, rows=round(len(sizes) * times), times=times, backward=True)
    planner.notes.append(f"{round(done):,} updates of {trained.parameters:,} parameters")
    if held_out is not None:
        _look_at(planner, held_out, done)
    planner.need(
        learn_bytes(
            size,
            _largest(shapes),
            planner.itemsize,
            layers=trained.layers,
            weights_trained=whole,
            recompute=config.checkpointing,
        )
    )
    planner.need({"gradients": trained.gradient_bytes, "optimizer state": trained.optimizer_bytes})
    planner.memory["weights"], adapter = _weight_bytes(planner, config, trained)
    planner.need({"adapter": adapter})
    _training_disk(planner, config, trained, adapter)
    return planner.plan(heads_LH)


def _trained(config: TrainConfig, size: ModelSize, heads_LH: NDArray[np.bool_] | None) -> Trained:
    scope = config.resolved_scope
    if scope == "heads":
        return heads_trained(size, assumed_heads(size, 0.1) if heads_LH is None else heads_LH, config.projections)
    if scope == "lora":
        return lora_trained(size, config.lora_rank, config.projections)
    return Trained(size.parameters if scope == "full" else size.attention_weights, 0, size.layers)


def _learnt(planner: Planner, data: Sample) -> list[tuple[int, int]]:
    examples = planner.counter.examples(data.records, data.total, planner.config.loss_on)
    return [
        (len(example.input_ids), sum(example.label_mask))
        for example in examples
        if len(example.input_ids) > example.prompt_length
    ]


def _micro_batches(planner: Planner, sizes: Sequence[tuple[int, int]]) -> list[BatchShape]:
    """Return the micro-batches of an epoch: rows in random order, sorted by length within so many batches."""
    config = planner.config
    micro = config.batch_size // config.accumulation
    rng = np.random.default_rng(derive_seed(config.seed, "plan", "order"))
    order = rng.permutation(len(sizes))
    part = MEGABATCHES * config.batch_size
    shapes = []
    for start in range(0, len(order), part):
        by_length = sorted((sizes[index] for index in order[start : start + part]), key=lambda size: -size[0])
        for first in range(0, len(by_length), micro):
            rows = by_length[first : first + micro]
            logits = sum(labels for _, labels in rows)
            if config.packing:
                shapes.append(BatchShape(1, sum(length for length, _ in rows), logits))
            else:
                shapes.append(BatchShape(len(rows), rows[0][0], logits))
    return shapes


def _look_at(planner: Planner, held_out: Sample, updates: float) -> None:
    """Count the looks at held-out rows, each of which reads all of them."""
    config = planner.config
    planner.rows["eval_data"] = held_out.total
    sizes = _learnt(planner, held_out)
    every = config.eval_steps or -(-planner.rows["data"] // config.batch_size)
    looks = max(int(updates // every), 1)
    micro = config.batch_size // config.accumulation
    groups = [sizes[start : start + micro] for start in range(0, len(sizes), micro)]
    shapes = [
        BatchShape(len(group), max(length for length, _ in group), sum(labels for _, labels in group))
        for group in groups
    ]
    flops = [forward_flops(planner.size, shape) for shape in shapes]
    planner.add("look at held-out rows", "read", shapes, flops, rows=len(sizes) * looks, times=looks)
    planner.works[-1] = replace(planner.works[-1], counted=False)


def _weight_bytes(planner: Planner, config: TrainConfig, trained: Trained) -> tuple[int, int]:
    """Return the bytes of the model's own weights, and of the adapter beside them."""
    size, scope = planner.size, config.resolved_scope
    if scope == "full":
        return size.parameters * FLOAT32, 0
    if scope == "attention":
        return size.parameters * planner.itemsize + size.attention_weights * (FLOAT32 - planner.itemsize), 0
    quantised = size.layers * size.layer_weights if config.base_quantization == "4bit" else 0
    base = (size.parameters - quantised) * planner.itemsize + round(quantised * _FOUR_BITS)
    return base, (trained.parameters + trained.placing) * FLOAT32


def _training_disk(planner: Planner, config: TrainConfig, trained: Trained, adapter: int) -> None:
    whole = config.resolved_scope in {"attention", "full"}
    planner.disk["artifact"] = planner.size.parameters * planner.itemsize if whole else adapter
    weights = planner.memory["weights"] if whole else adapter
    planner.disk["checkpoints"] = CHECKPOINTS_AT_ONCE * (weights + trained.optimizer_bytes)
    if config.eval_data is None:
        planner.notes.append(f"checkpoints only if it takes more than {config.checkpoint_minutes:g} minutes")


# --- eval


def plan_eval(
    job: StageRun[EvalConfig],
    files: ModelFiles,
    data: Sample | None,
    choices: Sequence[str] | None,
    adapter: Path | None,
    unfinished: Path | None = None,
) -> StagePlan:
    """Plan eval; `choices` are the answers that rows without their own choose from."""
    planner = Planner(job, files, unfinished)
    config = job.config
    if adapter is not None and (weights := adapter / "adapter_model.safetensors").is_file():
        planner.memory["adapter"] = weights.stat().st_size
    if data is None:
        planner.notes.append("the tasks of lm-eval bring their own rows, which are not counted here")
        return planner.plan()
    planner.rows["data"] = data.total
    planner.counter.is_exact = data.is_whole
    if GENERATED_METRICS & set(config.metric):
        room = max(1, planner.counter.max_length - config.max_new_tokens)
        _answer(planner, "answer rows", planner.counter.prompts(data.records, data.total, room))
    if "accuracy" in config.metric:
        _choose(planner, data, choices or ())
    if "perplexity" in config.metric:
        rows = planner.counter.examples(data.records, data.total)
        planner.read("weigh references", _sizes(rows, logits=True))
    mean = sum(len(record.text) for record in data.records) / max(len(data.records), 1)
    planner.disk["artifact"] = round(2 * mean * data.total)
    return planner.plan()


def _answer(planner: Planner, name: str, prompts: Sequence[tuple[int, int]]) -> None:
    """Count generation, of answers as long as the references; a batch goes on until its longest answer ends."""
    size, most = planner.size, planner.config.max_new_tokens
    shapes = planner.counter.shapes([(length + most, min(answer, most)) for length, answer in prompts])
    steps_of = _longest_answers(planner, prompts)
    asked = [BatchShape(shape.rows, shape.length - most, steps) for shape, steps in zip(shapes, steps_of, strict=True)]
    planner.add(name, "answer", asked, [_answer_flops(size, shape) for shape in asked], rows=len(prompts))
    steps = sum(steps_of)
    tokens = sum(length + min(answer, most) for length, answer in prompts)
    planner.works[-1] = replace(planner.works[-1], passes=steps, tokens=tokens)
    largest = _largest(shapes)
    planner.need(read_bytes(size, replace(largest, logits=largest.rows), planner.itemsize))
    planner.need({"key/value cache": cache_bytes(size, largest.rows, largest.length, planner.itemsize)})
    planner.notes.append(
        f"{name}: answers as long as the references, {steps:,} steps; at most {len(shapes) * most:,} steps of"
        f" {most} new tokens"
    )


def _answer_flops(size: ModelSize, asked: BatchShape) -> float:
    """Return the operations of reading prompts and generating so many steps behind them, the first from the prompts."""
    prompt = forward_flops(size, replace(asked, logits=asked.rows))
    step = forward_flops(size, BatchShape(asked.rows, 1, asked.rows))
    cached = 4.0 * size.queries * size.layers * asked.rows * (asked.length + asked.logits / 2)
    return prompt + (asked.logits - 1) * (step + cached)


def _longest_answers(planner: Planner, prompts: Sequence[tuple[int, int]]) -> list[int]:
    """Return the number of steps that each batch generates."""
    most = planner.config.max_new_tokens
    batches = token_batches([length + most for length, _ in prompts], token_budget=planner.counter.token_budget)
    return [max(min(prompts[index][1], most) for index in batch) for batch in batches]


def _choose(planner: Planner, data: Sample, choices: Sequence[str]) -> None:
    """Count weighing each row's choices, its prompt read once for those that fit into the budget with it."""
    variants = [
        (number, replace(record, completion=text))
        for number, record in enumerate(data.records)
        for text in record.choices or choices
    ]
    if not variants:
        planner.notes.append("accuracy needs choices: the rows have none, and --choices was not given")
        return
    total = round(len(variants) * data.total / len(data.records))
    examples = planner.counter.examples([record for _, record in variants], total)
    owners = stretch([number for number, _ in variants], total)
    sizes: list[tuple[int, int]] = []
    previous: tuple[int, tuple[int, ...]] | None = None
    for owner, example in zip(owners, examples, strict=True):
        answer = len(example.input_ids) - example.prompt_length
        read = max(answer - 1, 0)
        prompt = (owner, example.input_ids[: example.prompt_length])
        if previous == prompt and sizes[-1][0] + read <= planner.counter.token_budget:
            sizes[-1] = (sizes[-1][0] + read, sizes[-1][1] + answer)
        else:
            sizes.append((example.prompt_length + read, answer))
        previous = prompt
    planner.read("weigh choices", sizes)


# --- stages whose inputs are still to be made


def plan_ahead(
    stage: str, resolved: Resolved[Any], options: RunOptions, planned: Mapping[str, StageConfig]
) -> StagePlan:
    """Plan a stage some of whose inputs are artifacts that are planned themselves.

    Heads stand for themselves by their number, spread over all layers; rows to be mined by others of their pool; a
    model or an adapter to be trained by the base model.

    Args:
        stage: its name: mine-data, train or eval.
        resolved: its settings.
        options: how to run.
        planned: the settings of the stages that are planned, by their output folder.
    """
    job: StageRun[Any] = StageRun(stage, resolved, options)
    config = job.config
    if stage == "mine-data":
        reader = config.scorer_model or config.model
        files = locate_model(reader)
        uses_target = config.method in METHODS_WITH_TARGET and config.target is not None
        target = _sample(job, "target", config.target, planned) if uses_target else None
        pool = _sample(job, "pool", config.pool, planned)
        return _marked(plan_mine_data(job, files, pool, target, _heads_ahead(config.heads, files, planned)))
    if stage == "train":
        files = locate_model(config.model)
        held_out = _sample(job, "eval_data", config.eval_data, planned) if config.eval_data is not None else None
        data = _sample(job, "data", config.data, planned)
        heads_LH = _heads_ahead(config.heads, files, planned) if config.resolved_scope == "heads" else None
        return _marked(plan_train(job, files, data, held_out, heads_LH))
    trained = planned.get(config.model)
    files = locate_model(trained.model if isinstance(trained, TrainConfig) else config.model)
    asked = _sample(job, "data", config.data, planned, limit=config.limit) if config.data is not None else None
    return _marked(plan_eval(job, files, asked, choices_in(config.choices), None))


def _marked(plan: StagePlan) -> StagePlan:
    return replace(plan, notes=(*plan.notes, "inputs that are still to be made are stood for by others like them"))


def _sample(
    job: StageRun[Any], name: str, spec: str, planned: Mapping[str, StageConfig], *, limit: int | None = None
) -> Sample:
    """Read rows; those that are still to be mined are stood for by as many of their pool."""
    mined = planned.get(spec)
    if not isinstance(mined, MineDataConfig):
        return read_sample(job, job.rows(name, spec), limit=limit)
    pool = read_sample(job, job.rows(name, mined.pool))
    count = pool.total if mined.method == "full" else resolve_count(pool.total, mined.ratio, mined.count)
    return pool.reduced_to(count)


def _heads_ahead(spec: str | None, files: ModelFiles, planned: Mapping[str, StageConfig]) -> NDArray[np.bool_] | None:
    if spec is None:
        return None
    scored = planned.get(spec)
    if not isinstance(scored, ScoreHeadsConfig):
        return load_head_scores(Path(spec).expanduser()).selected_LH
    return assumed_heads(model_size(files.config, tensor_shapes(files)), scored.ratio)


def choices_in(spec: str | None) -> Sequence[str]:
    """Return the choices in a file, for rows that bring none; none if it cannot be read."""
    if spec is None:
        return ()
    try:
        found = json.loads(Path(spec).expanduser().read_bytes())
    except (OSError, ValueError):
        return ()
    return [choice for choice in found if isinstance(choice, str)] if isinstance(found, list) else ()
