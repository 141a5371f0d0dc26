"""What train and eval would take (see `planning`).

Legend: L layers, H query heads a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from p2d_cli.config import EvalConfig, TrainConfig
from p2d_cli.core.cost import (
    FLOAT32,
    MEGABATCHES,
    BatchShape,
    ModelSize,
    StagePlan,
    Trained,
    backward_flops,
    forward_flops,
    heads_trained,
    learn_bytes,
    lora_trained,
)
from p2d_cli.core.metrics import ANSWER_METRICS
from p2d_cli.data.prompts import encoding_notes
from p2d_cli.errors import DataError
from p2d_cli.modeling.model_files import ModelFiles
from p2d_cli.runtime.seeding import derive_seed
from p2d_cli.stages.execution import StageRun
from p2d_cli.stages.planned_rows import Sample, stretch
from p2d_cli.stages.planning import (
    CHECKPOINTS_AT_ONCE,
    FOUR_BITS,
    Planner,
    add_answers,
    assumed_heads,
    largest_of,
    sizes_of,
)

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
            largest_of(shapes),
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
    sizes = [
        (len(example.input_ids), sum(example.label_mask))
        for example in examples
        if len(example.input_ids) > example.answer_start
    ]
    if not sizes:
        raise DataError(
            f"--max-length {planner.counter.max_length} cuts off the completions of all rows: nothing to learn from",
            hint="raise --max-length",
        )
    if planner.counter.is_exact:
        told = encoding_notes(examples, planner.counter.max_length)
        planner.notes += [note for note in told if note not in planner.notes]
    return sizes


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
    base = (size.parameters - quantised) * planner.itemsize + round(quantised * FOUR_BITS)
    return base, (trained.parameters + trained.placing) * FLOAT32


def _training_disk(planner: Planner, config: TrainConfig, trained: Trained, adapter: int) -> None:
    whole = config.resolved_scope in {"attention", "full"}
    planner.disk["artifact"] = planner.size.parameters * planner.itemsize if whole else trained.saved * FLOAT32
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
    if ANSWER_METRICS.keys() & set(config.metric):
        room = max(1, planner.counter.max_length - config.max_new_tokens)
        add_answers(planner, "answer rows", planner.counter.prompts(data.records, data.total, room))
    if "accuracy" in config.metric:
        _choose(planner, data, choices or ())
    if "perplexity" in config.metric:
        rows = planner.counter.examples(data.records, data.total)
        planner.read("weigh references", sizes_of(rows, logits=True))
    mean = sum(len(record.text) for record in data.records) / max(len(data.records), 1)
    planner.disk["artifact"] = round(2 * mean * data.total)
    return planner.plan()


def _choose(planner: Planner, data: Sample, choices: Sequence[str]) -> None:
    """Count weighing each row's choices, its prompt read once for those that fit into the budget with it."""
    variants = [
        (number, replace(record, completion=text, answer_parts={}))
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
        answer = len(example.input_ids) - example.answer_start
        read = max(answer - 1, 0)
        prompt = (owner, example.input_ids[: example.answer_start])
        if previous == prompt and sizes[-1][0] + read <= planner.counter.token_budget:
            sizes[-1] = (sizes[-1][0] + read, sizes[-1][1] + answer)
        else:
            sizes.append((example.answer_start + read, answer))
        previous = prompt
    planner.read("weigh choices", sizes)
