"""pad: heads whose weights a fine-tuning on the task moves (ALPS, arXiv:2505.18799).

The task model is a fine-tuned checkpoint, or a proxy: the attention of the model itself, tuned on some target rows
(`p2d_cli.modeling.proxy`).

Legend: L layers, H query heads a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from p2d_cli.artifacts.journal import Entry, Journal
from p2d_cli.config import ScoreHeadsConfig
from p2d_cli.core.wording import count_text
from p2d_cli.data.prompts import EncodedExample
from p2d_cli.engine.cost import (
    FLOAT32,
    BatchShape,
    ModelSize,
    backward_flops,
    forward_flops,
    largest_of,
    learn_bytes,
)
from p2d_cli.engine.passes import Steps, repeated
from p2d_cli.engine.reader import ModelReader
from p2d_cli.errors import DataError
from p2d_cli.methods.head_method import HeadMethod, HeadTask, RepeatScores
from p2d_cli.modeling.model_files import ModelFiles
from p2d_cli.modeling.suitability import Needs, require
from p2d_cli.runtime import distributed, signals

if TYPE_CHECKING:
    from p2d_cli.core.head_importance import LayerWeights
    from p2d_cli.modeling.gradients import Batch
    from p2d_cli.modeling.proxy import AttentionProxy

REPEATS = "repeats"
PHASES = ("proxy", "score")
"""What tuning the proxy and comparing its weights are charged to."""
PROMISE = "of the proxy finished draws alone are kept, the same command begins this one anew"


class Pad(HeadMethod):
    """Distance between each head's weights before and after (eq. 5-7)."""

    name = "pad"
    takes_task_model = True
    reads_apart = False

    def __init__(self, task: HeadTask) -> None:
        super().__init__(task)
        self._scores_LH: NDArray[np.float64] = np.empty((0, 0))
        self._examples: Sequence[EncodedExample] = ()
        """The rows that the proxy is tuned on."""
        self._batches: list[list[int]] = []
        """Indices of the rows of each step."""
        self._proxy: AttentionProxy | None = None
        """The tuned one; None where an interrupted run has what it led to."""
        self._earlier: Entry | None = None
        """What an interrupted run found in this repeat, if it finished it."""
        self._losses: list[float] = []
        self._tokens = 0

    @classmethod
    def takes_target(cls, config: ScoreHeadsConfig) -> bool:
        """Say whether it needs target rows: those that a proxy is tuned on."""
        return config.task_model is None

    @classmethod
    def repeats(cls, config: ScoreHeadsConfig) -> int:
        """Return as often as asked for; two checkpoints are compared once."""
        return config.repeats if cls.takes_target(config) else 1

    @classmethod
    def needs(cls) -> Needs:
        """Return what a proxy takes."""
        return Needs(tokenizer=True, heads=True, logits=True, plain="--method pad")

    @classmethod
    def check_model(cls, model: ModelFiles, task_model: ModelFiles | None) -> int:
        """Refuse models whose heads cannot be told apart, or one that a proxy of cannot learn."""
        if task_model is None:
            return require(model, cls.needs())
        compared = Needs(heads=True, plain="--method pad")
        require(task_model, compared)
        return require(model, compared)

    def passes(self) -> Iterator[Steps]:
        """Tune the proxy, if there is to be one, and compare the weights."""
        task = self.task
        if task.task_model is not None:
            yield self._comparison(lambda _: self._compare_checkpoints(), whole_models=False)
            return
        rows = task.sample()
        self._examples = task.reader.examples(rows)
        orders = [task.rng.permutation(len(rows)) for _ in range(task.config.proxy_epochs)]
        size = task.config.proxy_batch_size
        self._batches = [order[at : at + size].tolist() for order in orders for at in range(0, len(order), size)]
        yield self._tuning()
        yield self._comparison(self._compare_with_proxy, whole_models=True)

    def _compare_checkpoints(self) -> None:
        """Compare two checkpoints on disk, one layer in memory at a time."""
        from p2d_cli.modeling.checkpoints import CheckpointReader, read_layer_weights, skeleton
        from p2d_cli.modeling.layouts import geometry, model_layout

        task, tuned = self.task, self.task.task_model
        assert tuned is not None, "there is no proxy to compare with"
        empty = skeleton(tuned)
        if geometry(empty) != task.shape:
            raise DataError(
                f"--task-model has another shape than --model: {geometry(empty)} and {task.shape}",
                hint="give a model that was fine-tuned from --model",
            )
        checkpoints = [CheckpointReader(files.folder) for files in (task.reader.files, tuned)]
        layout = model_layout(empty)
        pairs = (tuple(read_layer_weights(one, layout, layer.layer) for one in checkpoints) for layer in layout)
        with task.job.timer.phase("score"):
            self._scores_LH = _distances(task, pairs, len(layout))

    def _comparison(self, run: Callable[[ModelReader], None], *, whole_models: bool) -> Steps:
        """Return the comparison of each head's weights before and after: no tokens, one layer at a time."""
        task = self.task

        def flops(size: ModelSize, _: BatchShape) -> float:
            # For each head two maps of D x D, each from factors of rank d, and passes over both in float64.
            shape = task.shape
            return shape.num_heads * size.hidden**2 * (4.0 * shape.head_dim + 40)

        def memory(size: ModelSize, _: int) -> dict[str, int]:
            return {} if whole_models else {"weights": 2 * 2 * size.hidden * (size.queries + size.keys) * FLOAT32}

        def seconds(*_: Any) -> float:
            from p2d_cli.modeling.checkpoints import CheckpointReader, read_layer_weights, skeleton
            from p2d_cli.modeling.layouts import model_layout

            files = task.reader.files
            layout = model_layout(skeleton(files))
            layer = read_layer_weights(CheckpointReader(files.folder), layout, layout.layers[0].layer)
            return repeated(lambda: _distance(task.config, layer, layer))

        return Steps(
            work="compare layers",
            kind="compare",
            rows=0,
            shapes=[BatchShape(0, 0, 0)] * int(task.shape.exists_LH.any(axis=1).sum()),
            flops=flops,
            seconds=seconds,
            memory=memory,
            run=run,
        )

    def score(self) -> RepeatScores:
        """Return the distances."""
        if not self._losses:
            return RepeatScores(self._scores_LH)
        notes = {
            "proxy_rows": len(self._examples),
            "proxy_steps": len(self._losses),
            "proxy_first_loss": self._losses[0],
            "proxy_last_loss": self._losses[-1],
        }
        return RepeatScores(self._scores_LH, notes)

    @classmethod
    def describe(cls, summary: dict[str, Any]) -> list[str]:
        """Say how the proxy learned."""
        if "proxy_first_loss" not in summary:
            return []
        return [
            f"proxy: {count_text(summary['proxy_steps'], 'update')} on {count_text(summary['proxy_rows'], 'row')},"
            f" loss {summary['proxy_first_loss']:.3f} -> {summary['proxy_last_loss']:.3f}"
        ]

    # --- the proxy

    def _tuning(self) -> Steps:
        """Return the work of tuning; a repeat that an interrupted run had finished is not done again."""
        task, examples = self.task, self._examples
        sizes = [(len(example.input_ids), len(example.input_ids) - example.answer_start) for example in examples]
        shapes = [BatchShape.of([sizes[row] for row in batch]) for batch in self._batches]

        def flops(size: ModelSize, shape: BatchShape) -> float:
            return forward_flops(size, shape) + backward_flops(size, shape, trained=_tuned_weights(size))

        def memory(size: ModelSize, itemsize: int) -> dict[str, int]:
            tuned = _tuned_weights(size)
            return learn_bytes(size, largest_of(shapes), itemsize, layers=size.depth) | {
                "weights": size.parameters * itemsize,
                "base weights aside": tuned * itemsize,
                "master weights": tuned * FLOAT32,
                "gradients": tuned * FLOAT32,
                "optimizer state": 2 * tuned * FLOAT32,
            }

        return Steps(
            work="tune the proxy",
            kind="learn",
            rows=len(examples) * task.config.proxy_epochs,
            shapes=shapes,
            flops=flops,
            seconds=self._time,
            memory=memory,
            run=self._tune,
        )

    def _time(self, load: Callable[[], ModelReader], step: int) -> float:
        from p2d_cli.modeling.proxy import AttentionProxy

        reader = load()
        batch = reader.labelled([self._examples[row] for row in self._batches[step]])
        proxy = AttentionProxy(reader.model, reader.layout, lr=1e-8)
        seconds = repeated(lambda: list(proxy.steps([batch])), reader.device)
        proxy.restore()
        return seconds

    def _tune(self, reader: ModelReader) -> None:
        """Take all steps; all ranks take the same, and share their rows."""
        from p2d_cli.modeling.proxy import AttentionProxy

        job = self.task.job
        self._earlier = distributed.from_main(self._recall)
        if self._earlier is not None:
            return
        self._before = dict(job.timer.seconds)
        model, layout = reader.model, reader.layout
        task = job.progress.task("tune the proxy", len(self._batches))
        with job.timer.phase("proxy"), signals.promising(lambda: PROMISE), task as advance:
            self._proxy = AttentionProxy(
                model, layout, lr=self.task.config.proxy_lr, sum_over_ranks=distributed.sum_tensors
            )
            for loss in self._proxy.steps(self._own_rows(reader)):
                self._losses.append(loss)
                advance(1)
                if distributed.world_size() > 1:
                    distributed.stop_together(signals.stop_requested(), PROMISE)

    def _own_rows(self, reader: ModelReader) -> Iterator[Batch | None]:
        """Yield this rank's rows of each step, None where it has none."""
        for batch in self._batches:
            mine = [self._examples[row] for row in batch[distributed.rank() :: distributed.world_size()]]
            self._tokens += len(mine) * max((len(example.input_ids) for example in mine), default=0)
            yield reader.labelled(mine) if mine else None

    def _compare_with_proxy(self, reader: ModelReader) -> None:
        """See how far each head's weights moved, and put the base back."""
        job, earlier = self.task.job, self._earlier
        if earlier is not None:
            for phase, seconds in zip(PHASES, earlier.arrays["spent"][-len(PHASES) :].tolist(), strict=True):
                job.timer.charge(phase, seconds)
            reader.tokens += earlier.tokens
            job.progress.note(f"draw {self.task.repeat + 1} of the proxy was finished before")
            self._scores_LH, self._losses = earlier.arrays["scores"], earlier.arrays["losses"].tolist()
            return
        proxy, layout = self._proxy, reader.layout
        assert proxy is not None, "it was tuned"
        with job.timer.phase("score"), signals.promising(lambda: PROMISE):
            pairs = ((proxy.base_weights(layer.layer), proxy.task_weights(layer.layer)) for layer in layout)
            self._scores_LH = _distances(self.task, pairs, len(layout))
            proxy.restore()
        self._proxy = None
        tokens = sum(distributed.exchange(self._tokens))
        reader.tokens += tokens
        if job.is_main:
            spent = np.array([job.timer.seconds[phase] - self._before.get(phase, 0.0) for phase in PHASES])
            arrays = {"scores": self._scores_LH, "losses": np.array(self._losses), "spent": spent}
            with self._journal() as journal:
                journal.add(self.task.repeat, arrays, seconds=float(spent.sum()), tokens=tokens)

    def _recall(self) -> Entry | None:
        with self._journal() as journal:
            return journal.finished.get(self.task.repeat)

    def _journal(self) -> Journal:
        return self.task.job.journal(REPEATS, [[repeat] for repeat in range(self.task.config.repeats)])


def _tuned_weights(size: ModelSize) -> int:
    """Return how many weights of q, k and v are tuned."""
    _, queries, keys = size.first()
    return round(size.hidden * (queries + 2 * keys))


def _distances(task: HeadTask, pairs: Iterable[tuple[LayerWeights, ...]], layers: int) -> NDArray[np.float64]:
    """Return the distance between each head's weights before and after, `[L, H]`; `layers` are those with attention."""
    scores = []
    with task.job.progress.task("compare layers", layers) as advance:
        for before, after in pairs:
            scores.append(_distance(task.config, before, after))
            advance(1)
    return task.shape.table(np.concatenate(scores))


def _distance(config: ScoreHeadsConfig, before: LayerWeights, after: LayerWeights) -> NDArray[np.float64]:
    from p2d_cli.core.head_importance import score_layer

    distances_H: NDArray[np.float64] = score_layer(
        before, after, weights=config.weights, distance=config.distance, temperature=config.temperature
    ).numpy()
    return distances_H
