"""The rows of a training, their order, and how those of a batch are laid out.

Legend: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Sampler

from p2d_cli.core.batches import MEGABATCHES
from p2d_cli.errors import UsageError
from p2d_cli.modeling.gradients import IGNORED_LABEL
from p2d_cli.modeling.likelihood import are_alike, padded
from p2d_cli.modeling.loading import attention_that_runs, input_device
from p2d_cli.modeling.ranks import Ranks

Batch = dict[str, Any]
_PROBED_TOKENS = 8


@dataclass(frozen=True)
class TrainingRow:
    """One row as tokens."""

    name: str
    """What messages call it."""
    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    """The ids of the tokens to learn, -100 elsewhere; not shifted."""


class LengthGrouped(Sampler[int]):
    """Rows in random order, those of an update of similar length; an epoch's order depends on seed and number alone."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = tuple(lengths)
        self.batch_size = batch_size
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that comes next; accelerate calls it."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = torch.Generator().manual_seed(self._seed + self._epoch)
        lengths = torch.tensor(self.lengths)
        order = torch.randperm(len(lengths), generator=rng)
        batches: list[torch.Tensor] = []
        for part in torch.split(order, MEGABATCHES * self.batch_size):
            by_length = part[torch.argsort(lengths[part], descending=True, stable=True)]
            batches.extend(torch.split(by_length, self.batch_size))
        # The batch that is not full, if any, stays last.
        full = len(batches) - (len(batches[-1]) < self.batch_size if batches else 0)
        for index in [*torch.randperm(full, generator=rng).tolist(), *range(full, len(batches))]:
            yield from batches[index].tolist()


class RankBatches(Sampler[list[int]]):
    """One rank's micro-batches: each of those of a single process, cut among the ranks row by row.

    All ranks have the same number of them; where an epoch ends, some may be empty.
    """

    def __init__(self, order: LengthGrouped, accumulation: int, ranks: Ranks) -> None:
        self.batch_sampler = order
        """Where Trainer looks for what has epochs."""
        self._rows = order.batch_size // accumulation
        self._ranks = ranks

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that comes next."""
        self.batch_sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return math.ceil(len(self.batch_sampler) / self._rows)

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self.batch_sampler)
        for start in range(0, len(order), self._rows):
            yield order[start : start + self._rows][self._ranks.rank :: self._ranks.size]


def collate_or_none(batch: Sequence[TrainingRow], pad_id: int, *, packing: bool) -> Batch:
    """Return the rows as a batch; without rows, one token that is padding, as all ranks have to take part in a step."""
    found = batch or [TrainingRow("", (pad_id,), (IGNORED_LABEL,))]
    laid_out = pack(found) if packing else collate(found, pad_id)
    return laid_out | {"names": [row.name for row in batch], "rows": found}


def collate(batch: Sequence[TrainingRow], pad_id: int) -> dict[str, Any]:
    """Pad on the right, without a mask: under causal attention no real token looks at the padding."""
    input_ids = padded([row.input_ids for row in batch], pad_id)
    labels = padded([row.labels for row in batch], IGNORED_LABEL)
    return {"input_ids": input_ids, "labels": labels, "names": [row.name for row in batch]}


def pack(batch: Sequence[TrainingRow]) -> dict[str, Any]:
    """Lay the rows one after the other in a single sequence; positions that start anew keep them apart.

    transformers builds the attention mask, or the lengths for flash attention, from the positions.
    """
    columns = {
        "input_ids": [token for row in batch for token in row.input_ids],
        "labels": [label for row in batch for label in (IGNORED_LABEL, *row.labels[1:])],
        "position_ids": [position for row in batch for position in range(len(row.input_ids))],
    }
    return {name: torch.tensor([values]) for name, values in columns.items()} | {"names": [row.name for row in batch]}


@torch.no_grad()
def keeps_rows_apart(model: Any) -> bool:
    """Say whether a model keeps packed rows apart, by having it read two short ones packed and alone.

    Recurrent layers and short convolutions carry a row on into the next one, and some models of images (Qwen2-VL,
    GLM-4V) take the positions of packed rows for those of one row.

    Args:
        model: in eval mode, as it was loaded.
    """
    embeddings, length = model.get_input_embeddings(), _PROBED_TOKENS
    ids_2T = torch.arange(2 * length, device=input_device(model)).reshape(2, length) % embeddings.num_embeddings
    rows = [TrainingRow("", tuple(ids), tuple(ids)) for ids in ids_2T.tolist()]
    packed = {name: pack(rows)[name].to(ids_2T.device) for name in ("input_ids", "position_ids")}
    with attention_that_runs(model):
        alone_TV = model(input_ids=ids_2T[1:], use_cache=False).logits[0].float()
        behind_TV = model(**packed, use_cache=False).logits[0, length:].float()
    return are_alike(behind_TV, alone_TV, model.dtype)


def require_packing(model: Any) -> None:
    """Refuse a model that does not keep packed rows apart, see `keeps_rows_apart`.

    Raises:
        UsageError: it does not.
    """
    if not keeps_rows_apart(model):
        raise UsageError(
            f"--packing: {model.config.model_type} does not keep the rows of a packed sequence apart",
            hint="leave out --packing",
        )
