"""What a user should be told of a result before relying on it: the `warnings` of a summary. Imports no torch.

Each is one sentence, or there is none. The result shows them, as `inspect` does later; dry runs show those that are
known beforehand and that a long run would be wasted on.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from statistics import fmean

from p2d_cli.config import TrainConfig, flag_name
from p2d_cli.core.wording import count_text, ratio_text
from p2d_cli.data.prompts import EncodedExample
from p2d_cli.data.records import Record
from p2d_cli.engine.readings import distinct

FEW_TARGET_ROWS = 8
FEW_TEST_ROWS = 30
FEW_UPDATES = 30
FAR_RATE = 10.0
"""How many times the default rate, or what part of it, is far from it."""
MOST_AT_AN_END = 10
"""Of how many updates the loss is taken, at most, at either end of a training."""


def of_target(target: Sequence[Record]) -> list[str]:
    """Say so if there are few target rows; rows that repeat each other count once."""
    count = len(distinct(target))
    if not 0 < count < FEW_TARGET_ROWS:
        return []
    rows = "one target row describes" if count == 1 else f"{count} different target rows describe"
    return [f"{rows} a task poorly: {FEW_TARGET_ROWS} or more are better"]


def of_plan(updates: int, rate: float, default_rate: float) -> list[str]:
    """Say what is unusual about a training before it begins.

    Args:
        updates: that all epochs take.
        rate: the peak learning rate.
        default_rate: the rate of a training that names none.
    """
    found = []
    if updates < FEW_UPDATES:
        made = "one update is" if updates == 1 else f"{updates} updates are"
        found.append(f"{made} few to learn from: more --epochs or a smaller --batch-size make more of them")
    # Rates are typed in decimal: 0.03 is not far from 0.003 for its last bit.
    if abs(math.log10(rate / default_rate)) > math.log10(FAR_RATE) + 1e-9:
        is_above = rate > default_rate
        times = f"{ratio_text(rate / default_rate)} times" if is_above else f"1/{ratio_text(default_rate / rate)} of"
        found.append(f"--lr {rate:g} is {times} the default of such a training, {default_rate:g}")
    return found


def of_unused(config: TrainConfig, aimed: Collection[str]) -> list[str]:
    """Say which settings do nothing in the scope of a training.

    Args:
        config: its settings.
        aimed: those that were given for it alone, by name.
    """
    scope = config.resolved_scope
    idle = [] if scope == "heads" else ["heads", "channels"]
    idle += [] if scope in {"heads", "lora"} else ["projections"]
    idle += [] if scope == "lora" else [name for name in TrainConfig.model_fields if name.startswith("lora_")]
    found = [flag_name(name) for name in idle if name in aimed]
    said = [f"of no use with scope {scope}: {', '.join(found)}"] if found else []
    if scope == "lora" and {"projections", "lora_targets"} <= set(aimed):
        said.append("of no use beside --lora-targets: --projections")
    return said


def of_processes(batch_size: int, accumulation: int, processes: int) -> list[str]:
    """Say so if some processes have no row in an update."""
    if batch_size // accumulation >= processes:
        return []
    enough = accumulation * processes
    return [
        f"{processes} processes share micro-batches of {count_text(batch_size // accumulation, 'row')}, and some wait: "
        f"--batch-size {enough} gives each a row"
    ]


def of_rank(rank: int, sizes: Collection[tuple[int, int]]) -> list[str]:
    """Say so if a LoRA's rank is higher than that of any change of the modules that it adapts.

    Args:
        rank: of the LoRA.
        sizes: the two sizes of each module.
    """
    if rank <= (most := max(map(min, sizes))):
        return []
    return [f"--lora-rank {rank} is more than any adapted module can use: rank {most} changes as much"]


def of_held_out(rows: Sequence[EncodedExample], held_out: Sequence[EncodedExample]) -> list[str]:
    """Say so if all held-out rows are learnt: their loss, which chooses the weights, says nothing of other rows."""
    learnt = {row.input_ids for row in rows}
    if not held_out or any(row.input_ids not in learnt for row in held_out):
        return []
    return ["all rows of --eval-data are in --data too: the loss that chooses the weights is on rows that are learnt"]


def of_losses(log: Sequence[Mapping[str, float]], untrained: float | None, best: float | None) -> list[str]:
    """Say so if a training made the model worse: on held-out rows, if there were any, else on its own.

    Args:
        log: an entry an update (`loss`).
        untrained: loss on held-out rows before the first update; None if it was not measured.
        best: the lowest one behind an update.
    """
    failed = [entry["step"] for entry in log if entry["step"] and not math.isfinite(entry.get("eval_loss", 0.0))]
    if failed:
        return [
            f"the held-out loss was not finite after update {failed[0]:.0f}; weights that gave a finite one are kept"
        ]
    if untrained is not None and best is not None and best > untrained:
        return [
            f"the untrained model does better on the held-out rows: its loss there is {untrained:.3f}, the lowest after"
            f" any update {best:.3f}; lower --lr, or look at the rows"
        ]
    return _risen([entry["loss"] for entry in log if "loss" in entry])


def _risen(losses: Sequence[float]) -> list[str]:
    """Say so if the losses of the last updates are higher on average than those of the first, or all above the first.

    The rows of one update differ from those of another, so that two of them say little. The very first one is that of
    the untrained model, which a rate that is far too high leaves behind at once.
    """
    ends = min(MOST_AT_AN_END, len(losses) // 3)
    if not ends:
        return []
    first, last = fmean(losses[:ends]), fmean(losses[-ends:])
    which = "update" if ends == 1 else f"{ends} updates"
    if last > first:
        return [f"the loss rose, from {first:.3f} in the first {which} to {last:.3f} in the last: try a lower --lr"]
    if min(losses[-ends:]) > losses[0]:
        began = f"from {losses[0]:.3f} in the first update"
        return [f"the loss rose, {began} to {last:.3f} in the last {which}: try a lower --lr"]
    return []


def of_answers(rows: int, cut: int, longest: int) -> list[str]:
    """Say so if an evaluation has few rows, or if some of its answers were cut.

    Args:
        rows: that were evaluated.
        cut: answers that ended at the limit.
        longest: that limit, in tokens.
    """
    found = []
    if rows < FEW_TEST_ROWS:
        found.append(
            f"{rows} test row{'s are' if rows > 1 else ' is'} few: scores of {FEW_TEST_ROWS} or more tell more"
        )
    if cut:
        found.append(f"{cut} of {rows} answers were cut at --max-new-tokens {longest}")
    return found
