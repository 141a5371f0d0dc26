"""What a training takes: its updates and looks at held-out rows, counted from the rows alone, or timed by a few.

Legend: L layers, H query heads a layer.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from p2d_cli.core.batches import MEGABATCHES
from p2d_cli.core.head_layout import PROJECTIONS
from p2d_cli.core.head_selection import lowest_layer
from p2d_cli.core.wording import bytes_text, count_text
from p2d_cli.engine import caveats
from p2d_cli.engine.cost import (
    FLOAT32,
    BatchShape,
    ModelSize,
    Trained,
    backward_flops,
    forward_flops,
    largest_of,
    learn_bytes,
    lora_trained,
    rows_trained,
)
from p2d_cli.engine.counting import CountingReader
from p2d_cli.engine.passes import Steps, repeated
from p2d_cli.engine.rate_probe import PROBED_FACTORS, PROBED_UPDATES, TOO_FEW_ROWS, lent
from p2d_cli.engine.reader import ModelReader
from p2d_cli.engine.tuning import TokenizedRows, Tuning, is_sharded
from p2d_cli.modeling.suitability import attention_sizes, linear_sizes
from p2d_cli.runtime.seeding import derive_seed

TIMED_UPDATES = 4
CHECKPOINTS_AT_ONCE = 3
"""Two are kept, and a third is there while it is being written."""
FOUR_BITS = 0.56
"""Bytes a weight, with the scales of its block."""


class TrainingCosts:
    """What one training takes, by the settings that it would run with."""

    def __init__(self, tuning: Tuning) -> None:
        self._tuning = tuning
        self._config = tuning.config

    def count(self, reader: CountingReader, rows: TokenizedRows, held_out: TokenizedRows | None) -> None:
        """Have a reader count the updates, and what they need of memory and disk."""
        config, size, trained = self._config, reader.size, self._trained(reader)
        reader.notes += rows.notes if reader.is_exact else ()
        batch_size = self._tuning.batch_size(len(rows.sizes))
        an_epoch = -(-len(rows.sizes) // batch_size)
        updates = min(float(np.ceil(an_epoch * config.epochs)), config.max_steps or np.inf)
        epochs, first = updates / an_epoch, min(updates / an_epoch, 1.0)
        frozen = self._frozen_layers(size, trained) if epochs > first else 0
        works = [self._updates(reader, rows, trained, times=first)]
        if epochs > first:
            works.append(self._updates(reader, rows, trained, times=epochs - first, above=frozen))
        if held_out is not None:
            # One before the first update, and one behind the last.
            looks = 1 + math.ceil(updates / (config.eval_steps or an_epoch))
            works.append(self._looks(held_out, batch_size, times=looks))
        if config.lr == "probe":
            works += self._probe(reader, rows, held_out, trained, updates=updates)
        reader.run(works)
        if frozen:
            kept = sum(length for length, _ in rows.sizes) * size.hidden * reader.itemsize
            said = f"{count_text(frozen, 'frozen layer')} computed once a row: {bytes_text(kept)} of outputs kept"
            reader.notes.insert(0, said)
        said = f"{count_text(round(updates), 'update')} of {trained.parameters:,} parameters"
        reader.notes.insert(0, f"{said}, batch size {batch_size}, peak lr {self._rates()}")
        learnt = updates if config.makes_adapter else math.ceil(an_epoch * config.epochs)
        reader.notes += caveats.of_plan(round(learnt), self._tuning.rate, self._tuning.default_rate)
        adapter = (trained.parameters + trained.placing) * FLOAT32 if config.makes_adapter else 0
        weights = self._weight_bytes(size, trained.parameters, reader.itemsize)
        reader.need({"gradients": FLOAT32 * trained.parameters, "optimizer state": trained.optimizer_bytes})
        reader.memory["weights"] = weights
        reader.need({"adapter": adapter})
        whole = size.parameters * reader.itemsize
        reader.disk["artifact"] = trained.saved * FLOAT32 if config.makes_adapter else whole
        kept = (adapter if config.makes_adapter else weights) + trained.optimizer_bytes
        reader.disk["checkpoints"] = CHECKPOINTS_AT_ONCE * kept
        if config.eval_data is None:
            reader.notes.append(f"checkpoints only if it takes more than {config.checkpoint_minutes:g} minutes")

    def _probe(
        self,
        reader: CountingReader,
        rows: TokenizedRows,
        held_out: TokenizedRows | None,
        trained: Trained,
        *,
        updates: float,
    ) -> list[Steps]:
        """Return the updates of the rates that are tried, each with one look at held-out rows behind it."""
        places = range(len(rows.sizes))
        learnt, looked_at = lent(places, range(len(held_out.sizes)) if held_out else (), self._config.seed)
        if not looked_at:
            reader.notes.append(TOO_FEW_ROWS)
            return []
        batch_size = self._tuning.batch_size(len(rows.sizes))
        tries, seen = len(PROBED_FACTORS), (held_out or rows).only(looked_at)
        times = tries * min(PROBED_UPDATES, updates) / -(-len(learnt) // batch_size)
        return [
            self._updates(reader, rows.only(learnt), trained, times=times),
            self._looks(seen, batch_size, times=tries),
        ]

    def _rates(self) -> str:
        """Return the peak learning rate, or those that are tried, in words."""
        rate = self._tuning.rate
        if self._config.lr != "probe":
            return f"{rate:g}"
        *others, last = (f"{rate * factor:.2g}" for factor in PROBED_FACTORS)
        return f"{', '.join(others)} or {last}"

    def _trained(self, reader: CountingReader) -> Trained:
        config, size = self._config, reader.size
        if self._tuning.heads is not None:
            lowest = lowest_layer(self._tuning.heads.selected_LH)
            return rows_trained(self._tuning.placed, reader.layout.num_layers - lowest)
        if config.resolved_scope == "full":
            return Trained(size.text_parameters, 0, size.depth)
        if config.resolved_scope == "lora":
            return lora_trained(self.adapted().values(), config.lora_rank, size.depth)
        modules = attention_sizes(self._tuning.files, PROJECTIONS, once=True).values()
        return Trained(sum(map(math.prod, modules)), 0, size.depth)

    def adapted(self) -> dict[str, tuple[int, int]]:
        """Return the two sizes of each module that a LoRA adapts."""
        targets = self._config.resolved_lora_targets
        if targets == ("all-linear",):
            return linear_sizes(self._tuning.files)
        return attention_sizes(self._tuning.files, [name for name in PROJECTIONS if name in targets])

    def _frozen_layers(self, size: ModelSize, trained: Trained) -> int:
        """Return how many layers are computed once a row, where the model allows it."""
        is_kept = self._config.cache_frozen and self._config.makes_adapter and not is_sharded()
        return size.depth - trained.layers if is_kept else 0

    def _weight_bytes(self, size: ModelSize, trained: int, itemsize: int) -> int:
        """Return the bytes of the model's own weights, of which so many are trained."""
        scope = self._config.resolved_scope
        if scope == "full":
            return size.parameters * FLOAT32
        if scope == "attention":
            return size.parameters * itemsize + trained * (FLOAT32 - itemsize)
        if self._config.base_quantization == "none":
            return size.weight_bytes(itemsize)
        quantised = round(size.first()[0])
        return (size.parameters - quantised) * itemsize + round(quantised * FOUR_BITS)

    def _updates(
        self, reader: CountingReader, rows: TokenizedRows, trained: Trained, *, times: float, above: int = 0
    ) -> Steps:
        """Return the micro-batches of an epoch, which are done so many times, above so many layers."""
        config, shapes = self._config, self._micro_batches(rows.sizes)

        def flops(size: ModelSize, shape: BatchShape) -> float:
            below = forward_flops(size, replace(shape, logits=0), layers=above)
            forward = (forward_flops(size, shape) - below) * (2 if config.checkpointing else 1)
            return forward + backward_flops(size, shape, layers=trained.layers, trained=trained.parameters)

        def memory(size: ModelSize, itemsize: int) -> dict[str, int]:
            return learn_bytes(
                size,
                largest_of(shapes),
                itemsize,
                layers=trained.layers,
                weights_trained=not config.makes_adapter,
                recompute=config.checkpointing,
            )

        return Steps(
            work="train",
            kind="learn",
            rows=round(len(rows.sizes) * times),
            shapes=shapes,
            times=times,
            flops=flops,
            seconds=lambda _, step: self._time(reader, shapes[step]),
            memory=memory,
        )

    def _looks(self, held_out: TokenizedRows, batch_size: int, times: int) -> Steps:
        """Return the batches of a look at held-out rows, which is taken so many times."""
        micro = batch_size // self._config.accumulation
        starts = range(0, len(held_out.sizes), micro)

        def seconds(load: Callable[[], ModelReader], step: int) -> float:
            model, chosen = load(), held_out.examples[starts[step] : starts[step] + micro]
            examples = [(example.input_ids, example.answer_start) for example in chosen]
            return repeated(lambda: model.completion_losses(examples), model.device)

        return Steps(
            work="look at held-out rows",
            kind="read",
            rows=len(held_out.sizes) * times,
            shapes=[BatchShape.of(held_out.sizes[start : start + micro]) for start in starts],
            times=times,
            flops=forward_flops,
            seconds=seconds,
            memory=lambda *_: {},
            counted=False,
        )

    def _micro_batches(self, sizes: Sequence[tuple[int, int]]) -> list[BatchShape]:
        """Return the micro-batches of an epoch: rows in random order, sorted by length within so many batches."""
        config = self._config
        batch_size = self._tuning.batch_size(len(sizes))
        micro = batch_size // config.accumulation
        order = np.random.default_rng(derive_seed(config.seed, "plan", "order")).permutation(len(sizes))
        part = MEGABATCHES * batch_size
        shapes = []
        for start in range(0, len(order), part):
            by_length = sorted((sizes[index] for index in order[start : start + part]), key=lambda size: -size[0])
            for first in range(0, len(by_length), micro):
                rows = by_length[first : first + micro]
                # Packed, they are one sequence.
                packed = [(sum(length for length, _ in rows), sum(labels for _, labels in rows))]
                shapes.append(BatchShape.of(packed if config.tries_packing else rows))
        return shapes

    def _time(self, reader: CountingReader, shape: BatchShape) -> float:
        """Return the seconds of a micro-batch, from a few updates on made-up rows, and tell those before the first."""
        from p2d_cli.modeling.completion_trainer import TrainingHooks
        from p2d_cli.modeling.gradients import IGNORED_LABEL
        from p2d_cli.modeling.training import train
        from p2d_cli.modeling.training_batches import TrainingRow

        model, packs = self._tuning.build()
        learnt = max(1, min(shape.length - 1, round(shape.logits / shape.rows)))
        ids = tuple(5 + place % 50 for place in range(shape.length))
        row = TrainingRow("made up", ids, (IGNORED_LABEL,) * (shape.length - learnt) + ids[shape.length - learnt :])
        ends: list[float] = []
        settings = self._tuning.settings(shape.rows)
        plan = replace(
            settings,
            batch_size=shape.rows * settings.accumulation,
            epochs=1.0,
            max_steps=TIMED_UPDATES,
            trackers=(),
            eval_steps=None,
            patience=None,
            checkpoint_minutes=math.inf,
            packing=packs,
        )
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            train(
                model,
                [row] * (plan.batch_size * TIMED_UPDATES),
                plan,
                pad_id=reader.tokenizer.pad_token_id,
                scratch=Path(scratch),
                hooks=TrainingHooks(on_step=lambda _: ends.append(time.perf_counter())),
            )
        update = (ends[-1] - ends[0]) / (len(ends) - 1)
        reader.starts_with(max(ends[0] - started - update, 0.0))
        return update / settings.accumulation
