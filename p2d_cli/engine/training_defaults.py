"""What a training takes where the user does not say: the peak learning rate, and the rows of an update.

Legend: D hidden size.
"""

from __future__ import annotations

import math

from p2d_cli.config import Scope

ANCHOR_RATE: dict[Scope, float] = {"heads": 3e-3, "attention": 1e-3, "lora": 3e-3, "full": 3e-4}
"""The best peak rates of sweeps on SmolLM2-135M (`tests/benchmarks/study/choices.md`). Heads: a tenth of them."""
ANCHOR_WIDTH = 576
"""The hidden size of that model."""
WIDTH_POWER: dict[Scope, float] = {"heads": 1.0, "attention": 1.0, "lora": 0.78, "full": 1.0}
HIGHEST_RATE = 1e-2
BATCH_SIZES = (16, 8, 4, 2)
ENOUGH_UPDATES = 60


def default_learning_rate(scope: Scope, hidden_size: int, head_share: float | None = None) -> float:
    """Return the peak learning rate of a training that names none, to two digits.

    Wider models take smaller steps: rates of whole weights, and of heads, fall with the hidden size, and that of LoRA
    with its power of 0.78. At a hidden size of 4,096 a tenth of the heads has 4.2e-4, full fine-tuning 4.2e-5 and LoRA
    6.5e-4. Published rates at that size agree: 2e-4 to 1e-3 for sparse parts, 5e-5 to 2e-4 for LoRA and 1e-5 for full
    fine-tuning in S2FT (arXiv:2412.06289); `get_lr` of the tinker cookbook has 5e-5 * 10 * (2000/D)^0.781 for LoRA on
    Llama. Models narrower than the anchor keep its rates.

    The more heads move together, the less each may move: their rate is the power of their share that leads from that of
    a tenth to that of all attention.
    """
    width = min(1.0, ANCHOR_WIDTH / hidden_size) ** WIDTH_POWER[scope] if hidden_size else 1.0
    rate = ANCHOR_RATE[scope]
    if scope == "heads" and head_share is not None:
        of_all = ANCHOR_RATE["attention"]
        rate = min(of_all * head_share ** math.log10(of_all / rate), HIGHEST_RATE)
    return float(f"{rate * width:.2g}")


def batch_size_for(rows: int, epochs: float, multiple: int = 1) -> int:
    """Return the largest of 16, 8, 4 and 2 rows an update that leaves enough updates, or the smallest.

    Args:
        rows: rows of an epoch.
        epochs: passes over them.
        multiple: what the rows of an update have to be a multiple of: their micro-batches.
    """
    sizes = sorted({max(size - size % multiple, multiple) for size in BATCH_SIZES}, reverse=True)
    enough = (size for size in sizes if math.ceil(math.ceil(rows / size) * epochs) >= ENOUGH_UPDATES)
    return next(enough, sizes[-1])
