"""The short timing behind `--dry-run --time`: a batch of middling size of each work, on the model itself.

The tokens are made up. What a batch took per operation is taken to hold for all batches of its work.

Legend: B batch, T tokens, L layers, H query heads a layer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from p2d_cli.config import TrainConfig
from p2d_cli.core.cost import BatchShape, ModelSize, Work, forward_flops
from p2d_cli.modeling.gradients import IGNORED_LABEL
from p2d_cli.modeling.model_files import ModelFiles
from p2d_cli.runtime.hardware import synchronizer
from p2d_cli.stages.execution import StageRun
from p2d_cli.stages.workbench import Workbench, open_workbench

SHORTEST_SECONDS = 0.2
"""A batch is read again until its readings take so long together."""
STEPS = 8
"""Generated tokens that are timed."""


class PlanTimer:
    """Times the works of one stage.

    Args:
        job: the stage that is planned.
        files: the model that it would run.
        size: the model's sizes.
        heads_LH: the heads that it would train, for a training of heads.
    """

    def __init__(
        self, job: StageRun[Any], files: ModelFiles, size: ModelSize, heads_LH: NDArray[np.bool_] | None
    ) -> None:
        self._job = job
        self._files = files
        self._size = size
        self._heads_LH = heads_LH
        self.start_seconds: float | None = None
        """What a training takes before its first update."""

    def rate(self, work: Work) -> float:
        """Return the seconds of an operation of this work, from an earlier timing of its like if there was one."""
        key = self._key(work)
        rates = self._job.options.rates
        if key not in rates:
            rates[key] = self._seconds_per_flop(work), self.start_seconds
        rate, self.start_seconds = rates[key]
        return rate

    def _key(self, work: Work) -> tuple[Any, ...]:
        config, shape = self._job.config, work.typical
        name = work.name if work.kind == "learn" else ""
        # Batches of about the same size run about equally fast.
        about = () if shape is None else (shape.tokens.bit_length(), shape.length.bit_length(), shape.logits > 0)
        scope = (config.resolved_scope, config.accumulation) if isinstance(config, TrainConfig) else ()
        return (str(self._files.folder), config.dtype, config.device, work.kind, name, *about, *scope)

    def _seconds_per_flop(self, work: Work) -> float:
        if work.kind == "compare" or work.typical is None:
            return self._compare() / work.typical_flops
        if work.kind == "read":
            return self._read(work.typical) / forward_flops(self._size, work.typical)
        if work.kind == "answer":
            return self._answer(work.typical) / work.typical_flops
        return self._learn(work, work.typical) / work.typical_flops

    @cached_property
    def _bench(self) -> Workbench:
        return open_workbench(self._job, self._files, self._job.config)

    def _ids(self, shape: BatchShape) -> torch.Tensor:
        lowest, highest = min(5, self._size.vocabulary - 1), self._size.vocabulary
        rng = torch.Generator().manual_seed(0)
        return torch.randint(lowest, highest, (shape.rows, shape.length), generator=rng).to(self._bench.device)

    def _read(self, shape: BatchShape) -> float:
        from p2d_cli.modeling.likelihood import answer_logits_only, forward_inputs

        bench, input_ids_BT = self._bench, self._ids(shape)
        keep_BT = torch.zeros_like(input_ids_BT, dtype=torch.bool)
        keep_BT.view(-1)[: min(shape.logits, keep_BT.numel())] = True
        inputs = forward_inputs(input_ids_BT, torch.ones_like(input_ids_BT))

        def forward() -> None:
            with torch.no_grad(), answer_logits_only(bench.model, keep_BT):
                bench.model(**inputs)

        return self._repeated(forward)

    def _answer(self, shape: BatchShape) -> float:
        from p2d_cli.modeling.generation import generate_greedy

        bench, prompts = self._bench, self._ids(shape).tolist()

        def generate(tokens: int) -> float:
            return self._repeated(
                lambda: generate_greedy(bench.model, bench.tokenizer, prompts, max_new_tokens=tokens) and None
            )

        first = generate(1)
        each = max(generate(1 + STEPS) - first, 0.0) / STEPS
        return first + each * (shape.logits - 1)

    def _learn(self, work: Work, shape: BatchShape) -> float:
        config = self._job.config
        if isinstance(config, TrainConfig):
            from p2d_cli.stages.train import time_update

            self.start_seconds, update = time_update(
                self._job, self._files, self._heads_LH, rows=shape.rows, length=shape.length, labels=shape.logits
            )
            return update / config.accumulation
        return self._tune(shape) if work.name == "tune the proxy" else self._taylor(shape)

    def _batch(self, shape: BatchShape) -> dict[str, torch.Tensor]:
        input_ids_BT = self._ids(shape)
        labels_BT = input_ids_BT.clone()
        learnt = max(1, min(shape.length - 1, round(shape.logits / shape.rows)))
        labels_BT[:, : shape.length - learnt] = IGNORED_LABEL
        return {"input_ids": input_ids_BT, "labels": labels_BT}

    def _tune(self, shape: BatchShape) -> float:
        from p2d_cli.modeling.layouts import model_layout
        from p2d_cli.modeling.proxy import AttentionProxy

        batch = self._batch(shape)
        proxy = AttentionProxy(self._bench.model, model_layout(self._bench.model), lr=1e-8)
        seconds = self._repeated(lambda: list(proxy.steps([batch])) and None)
        proxy.restore()
        return seconds

    def _taylor(self, shape: BatchShape) -> float:
        from p2d_cli.modeling.importance import taylor_scores
        from p2d_cli.modeling.layouts import model_layout

        batch, model = self._batch(shape), self._bench.model
        return self._repeated(lambda: list(taylor_scores(model, model_layout(model), [batch])) and None)

    def _compare(self) -> float:
        """Return the seconds of comparing one layer of a checkpoint with itself."""
        from p2d_cli.core.head_importance import score_layer
        from p2d_cli.modeling.checkpoints import CheckpointReader, read_layer_weights, skeleton
        from p2d_cli.modeling.layouts import model_layout

        layer = read_layer_weights(CheckpointReader(self._files.folder), model_layout(skeleton(self._files.folder))[0])
        config = self._job.config
        options = {"weights": config.weights, "distance": config.distance, "temperature": config.temperature}
        return self._repeated(lambda: score_layer(layer, layer, **options) is None)

    def _repeated(self, work: Callable[[], Any]) -> float:
        """Return the mean seconds of doing something, after once to warm up."""
        synchronize = synchronizer(str(self._bench.device) if "_bench" in vars(self) else "cpu")
        work()
        synchronize()
        started, times = time.perf_counter(), 0
        while times == 0 or time.perf_counter() - started < SHORTEST_SECONDS:
            work()
            synchronize()
            times += 1
        return (time.perf_counter() - started) / times
