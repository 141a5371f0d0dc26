"""What a GPU makes of p2d: updates of heads, LoRA and full fine-tuning, and reading rows, by each attention there is.

    python tests/benchmarks/gpu.py --out OUT [--device cuda] [--minutes 10]
        [--attention eager sdpa flash_attention_2] [--shapes 1B 8B] [--rows 16] [--tokens 512] [--small]

Nothing is downloaded: the models have the shapes of Llama 3 and random weights, and rows are random tokens, from a
quarter of `--tokens` to all of them, the last quarter of each an answer. Updates are those of `p2d train`: seconds are
the median of all but the first, which warms up. Reading is that of `p2d mine-data`, by the heads that read all rows and
by those that read the best, beside a bare forward over the same batches. What is not installed, does not fit into
memory, or would not be done in time is said so.

`--small` does the same on a CPU in seconds, with a model that is tiny. `OUT/gpu.json` holds all figures.

Axes: B batch, T tokens, L layers, H query heads, P places.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from p2d_cli.core.head_selection import select_readers, select_uniform
from p2d_cli.data.batching import pad_mask, token_batches
from p2d_cli.engine.reader import heads_by_layer
from p2d_cli.errors import P2DError, is_out_of_memory
from p2d_cli.modeling.attention_kernels import require_installed
from p2d_cli.modeling.completion_trainer import TrainingHooks
from p2d_cli.modeling.gradients import IGNORED_LABEL
from p2d_cli.modeling.head_adapter import attach_heads, attach_lora, prepare_full
from p2d_cli.modeling.head_outputs import mean_head_outputs
from p2d_cli.modeling.layouts import model_layout
from p2d_cli.modeling.loading import quiet_transformers, resolve_device, resolve_dtype
from p2d_cli.modeling.training import TrainingPlan, train
from p2d_cli.modeling.training_batches import TrainingRow
from p2d_cli.runtime.hardware import (
    describe_hardware,
    forget_peak_memory,
    package_versions,
    peak_memory_gib,
    synchronizer,
)

SHAPES: dict[str, dict[str, Any]] = {
    "1B": {
        "num_hidden_layers": 16, "hidden_size": 2048, "intermediate_size": 8192, "vocab_size": 128256,
        "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True,
    },
    "8B": {
        "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256,
        "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
    },
    "tiny": {
        "num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 64, "vocab_size": 256,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
}  # fmt: skip
LARGEST_IN_FULL = 2e9
"""Parameters above which full fine-tuning is left out: weights, gradients and moments take 16 bytes each."""
UPDATES = 6
ROWS_READ, TOKEN_BUDGET = 256, 8192
COMPILING = 240
"""Seconds that compiling is given: it comes again with batches of other shapes."""
SPARE = 0.1
"""Share of the minutes that is kept for the piece which is running as they end."""


@dataclass(frozen=True)
class Measured:
    """One line of the table."""

    shape: str
    attention: str
    work: str
    seconds: float | None = None
    """Of an update, or of reading all rows."""
    all_seconds: float | None = None
    """Of all updates together, with warming up and compiling."""
    tokens_a_second: float | None = None
    """Of the rows' own tokens; padding is not counted."""
    of_bare: float | None = None
    """Tokens a second, as a share of those of the bare forward."""
    peak_gib: float | None = None
    why_not: str = ""


@dataclass(frozen=True)
class Work:
    """An update to be timed."""

    name: str
    prepare: Callable[[Any], Any]
    packing: bool = False
    compiled: bool = False
    float32: bool = False
    tf32: bool = False


class Bench:
    """What all measurements share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = str(resolve_device(options.device))
        self.dtype = resolve_dtype("bfloat16" if self.device.startswith("cuda") else "auto", self.device)
        self.wait = synchronizer(self.device)
        self.until = time.monotonic() + 60 * options.minutes * (1 - SPARE)
        self.found: list[Measured] = []

    def add(
        self,
        shape: str,
        attention: str,
        work: str,
        measure: Callable[[], Measured | list[Measured]],
        *,
        takes: float = 0,
    ) -> None:
        """Measure, if there is memory for it, and time: some seconds, where it `takes` more than others."""
        line = Measured(shape, attention, work)
        try:
            made = measure() if time.monotonic() + takes < self.until else [told(line, "no time left")]
        except Exception as problem:
            if not is_out_of_memory(problem):
                raise
            made = [told(line, "out of memory")]
        release()
        self.found += made if isinstance(made, list) else [made]
        for one in made if isinstance(made, list) else [made]:
            print(line_of(one), flush=True)
        self.write()

    def write(self) -> None:
        document = {
            "hardware": describe_hardware(self.device),
            "versions": package_versions(),
            "dtype": str(self.dtype).removeprefix("torch."),
            "settings": {name: getattr(self.options, name) for name in ("rows", "tokens")} | {"updates": UPDATES},
            "measured": [asdict(one) for one in self.found],
        }
        path = self.options.out / "gpu.json"
        path.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(options)
    print(
        f"{describe_hardware(bench.device)['label']}, {bench.dtype}, {options.rows} x {options.tokens} tokens at most"
    )
    print(HEADING)
    with quiet_transformers():
        for shape in options.shapes:
            for attention in options.attention:
                measure_attention(bench, shape, attention)
        if not options.small:
            measure_settings(bench, options.shapes[0])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--attention", nargs="+", default=["eager", "sdpa", "flash_attention_2"])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["1B", "8B"])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args(arguments)
    if options.small:
        options.device, options.shapes, options.rows, options.tokens = "cpu", ["tiny"], 4, 32
    return options


def measure_attention(bench: Bench, shape: str, attention: str) -> None:
    """Measure updates of every scope, and reading."""
    try:
        require_installed(attention, torch.device(bench.device), bench.dtype)
    except P2DError as missing:
        bench.found.append(told(Measured(shape, attention, "all"), missing.message))
        print(line_of(bench.found[-1]), flush=True)
        bench.write()
        return
    works = [Work("heads", upper_heads), Work("LoRA", lora)]
    if parameters(shape) < LARGEST_IN_FULL:
        works.append(Work("full", full))
    if "flash" in attention:
        works += [Work(f"{work.name}, packed", work.prepare, packing=True) for work in works]
    for work in works:
        bench.add(shape, attention, work.name, partial(time_updates, bench, shape, attention, work))
    bench.add(shape, attention, "read", partial(time_reading, bench, shape, attention))


def measure_settings(bench: Bench, shape: str) -> None:
    """Measure what p2d leaves off: TF32, and compiling."""
    for work in (
        Work("LoRA, float32", lora, float32=True),
        Work("LoRA, TF32", lora, float32=True, tf32=True),
        Work("LoRA, compiled", lora, compiled=True),
    ):
        measure = partial(time_updates, bench, shape, "sdpa", work)
        bench.add(shape, "sdpa", work.name, measure, takes=COMPILING if work.compiled else 0)


# --- updates


def upper_heads(model: Any) -> Any:
    """Train a tenth of the heads, in the upper half of the layers."""
    shape = model_layout(model).geometry
    upper_LH = shape.exists_LH & (np.arange(shape.num_layers) >= shape.num_layers // 2)[:, None]
    return attach_heads(model, select_uniform(shape.head_budget(0.1), upper_LH), ("q", "k", "v", "o"))


def lora(model: Any) -> Any:
    return attach_lora(model, 16, 32, ("q", "k", "v", "o"), 0.0)


def full(model: Any) -> Any:
    prepare_full(model)
    return model


def time_updates(bench: Bench, shape: str, attention: str, work: Work) -> Measured:
    dtype = torch.float32 if work.float32 else bench.dtype
    model = work.prepare(build(bench, shape, attention, dtype))
    if work.compiled:
        model.compile()
    rows = make_rows(bench.options.rows * UPDATES, bench.options.tokens, SHAPES[shape]["vocab_size"])
    ends = [time.perf_counter()]

    def end(_: int) -> None:
        bench.wait()
        ends.append(time.perf_counter())

    plan = TrainingPlan(
        epochs=1.0, max_steps=None, learning_rate=1e-5, batch_size=bench.options.rows, accumulation=1,
        schedule="constant", warmup_ratio=0.0, weight_decay=0.0, max_grad_norm=1.0,
        autocast=str(dtype).removeprefix("torch."), device=bench.device, seed=0, checkpointing=False, trackers=(),
        packing=work.packing,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch, matmuls(tf32=work.tf32):
        train(model, rows, plan, pad_id=0, scratch=Path(scratch), hooks=TrainingHooks(on_step=end))
    update = statistics.median(np.diff(ends)[1:].tolist())
    tokens = sum(len(row.input_ids) for row in rows) / UPDATES
    return Measured(shape, attention, work.name, update, ends[-1] - ends[0], tokens / update, peak_gib=peak(bench))


@contextmanager
def matmuls(*, tf32: bool) -> Iterator[None]:
    """Let products of float32 be computed in TF32 within the block, or not."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# --- reading


@torch.no_grad()
def time_reading(bench: Bench, shape: str, attention: str) -> list[Measured]:
    """Time the bare decoder, the heads that read all rows, and those that read the best, over the same batches."""
    model = build(bench, shape, attention, bench.dtype)
    layout = model_layout(model)
    geometry = layout.geometry
    ranking_LH = np.arange(geometry.exists_LH.size).reshape(geometry.exists_LH.shape)
    readers = select_readers(ranking_LH, "auto", geometry.exists_LH, geometry.layers)
    rows = make_rows(ROWS_READ // (16 if bench.options.small else 1), bench.options.tokens, SHAPES[shape]["vocab_size"])
    groups = token_batches([len(row.input_ids) for row in rows], token_budget=TOKEN_BUDGET)
    batches = [batch_of([rows[place] for place in group], bench.device) for group in groups]

    def bare() -> None:
        for ids_BT, _ in batches:
            model.get_decoder()(input_ids=ids_BT, use_cache=False)

    def read(heads_LH: np.ndarray) -> None:
        for ids_BT, places_BPT in batches:
            ones_BT = torch.ones_like(ids_BT)
            mean_head_outputs(model, layout, heads_by_layer(heads_LH), ids_BT, ones_BT, places_BPT)

    works = {
        "bare forward": bare,
        f"read {readers.depths[0]} layers": partial(read, readers.shallow_LH),
        f"read {readers.depths[1]} layers": partial(read, readers.all_LH),
    }
    tokens, found = sum(len(row.input_ids) for row in rows), list[Measured]()
    for name, work in works.items():
        forget_peak_memory()
        timed(bench, work)  # warms up
        seconds = min(timed(bench, work) for _ in range(2))
        share = found[0].seconds / seconds if found and found[0].seconds else 1.0
        found.append(Measured(shape, attention, name, seconds, None, tokens / seconds, share, peak(bench)))
    return found


def batch_of(rows: Sequence[TrainingRow], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids `[B, T]`, and for answer and prompt which tokens are theirs `[B, 2, T]`."""
    answers = [[int(label != IGNORED_LABEL) for label in row.labels] for row in rows]
    prompts = [[1 - is_answer for is_answer in row] for row in answers]
    places_BPT = torch.stack([pad_mask(answers, 0), pad_mask(prompts, 0)], dim=1)
    return pad_mask([row.input_ids for row in rows], 0).to(device), places_BPT.to(device)


def timed(bench: Bench, work: Callable[[], None]) -> float:
    bench.wait()
    started = time.perf_counter()
    work()
    bench.wait()
    return time.perf_counter() - started


# --- models, rows and lines


def build(bench: Bench, shape: str, attention: str, dtype: torch.dtype) -> Any:
    """Make a model with random weights where it is to be."""
    release()
    forget_peak_memory()
    torch.manual_seed(0)
    make: Any = LlamaForCausalLM._from_config
    with torch.device(bench.device):
        return make(LlamaConfig(**SHAPES[shape]), attn_implementation=attention, dtype=dtype).eval()


def parameters(shape: str) -> int:
    with torch.device("meta"):
        return sum(weight.numel() for weight in LlamaForCausalLM(LlamaConfig(**SHAPES[shape])).parameters())


def make_rows(count: int, longest: int, vocabulary: int) -> list[TrainingRow]:
    draw, rows = random.Random(0), []
    for number in range(count):
        length = draw.randint(longest // 4, longest)
        ids = tuple(draw.randrange(5, vocabulary) for _ in range(length))
        prompt = length - math.ceil(length / 4)
        rows.append(TrainingRow(f"row {number}", ids, (IGNORED_LABEL,) * prompt + ids[prompt:]))
    return rows


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak(bench: Bench) -> float:
    peaks = peak_memory_gib(bench.device)
    return peaks.get("device", peaks["host"])


def told(line: Measured, why_not: str) -> Measured:
    return Measured(line.shape, line.attention, line.work, why_not=why_not)


HEADING = (
    f"{'shape':6}{'attention':20}{'work':18}{'seconds':>9}{'all':>9}{'tokens/s':>11}{'of bare':>9}{'peak GiB':>10}"
)


def line_of(one: Measured) -> str:
    if one.why_not:
        return f"{one.shape:6}{one.attention:20}{one.work:18} {one.why_not}"
    cells = (
        shown(one.seconds, "9.3f"), shown(one.all_seconds, "9.3f"), shown(one.tokens_a_second, "11,.0f"),
        shown(one.of_bare, "9.2f"), shown(one.peak_gib, "10.2f"),
    )  # fmt: skip
    return f"{one.shape:6}{one.attention:20}{one.work:18}{''.join(cells)}"


def shown(value: float | None, form: str) -> str:
    return format("" if value is None else value, form if value is not None else f">{form.split('.')[0].rstrip(',')}")


if __name__ == "__main__":
    main()
