"""How many attention heads a model has, which of them share keys and values, and what "10%" of them means.

Axes: L layers, H query heads a layer, G key/value groups a layer, D hidden size, d head dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from p2d_cli.errors import ArtifactError, UsageError

_CEIL_SLACK = 1e-9  # 0.07 * 100 is 7.000000000000001 in floating point, and its ceiling 8


def share_count(ratio: float, total: int) -> int:
    """Return `ceil(ratio * total)`, at least 1, with the rounding error of the product taken out.

    Args:
        ratio: Share to keep, in (0, 1].
        total: Number of things there are, at least 1.

    Raises:
        UsageError: `ratio` is outside (0, 1] or not a number.
    """
    if not 0.0 < ratio <= 1.0:
        raise UsageError(
            f"a share must be above 0 and at most 1, found {ratio}", hint="write 10% as 0.1 and everything as 1"
        )
    return max(1, math.ceil(ratio * total - _CEIL_SLACK))


@dataclass(frozen=True)
class HeadGeometry:
    """The sizes that name and count a model's attention heads; a head is the pair `(layer, head)`.

    Every size is read from the attention modules, because `head_dim` is not `hidden_size / num_heads` in all
    families. With `num_groups == num_heads` this is multi-head, with one group multi-query attention.

    Raises:
        ValueError: a size is below 1, or there are more groups than heads.
    """

    num_layers: int
    num_heads: int
    num_groups: int
    head_dim: int
    hidden_size: int

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"{field.name} must be at least 1, found {getattr(self, field.name)}")
        if self.num_groups > self.num_heads:
            raise ValueError(f"{self.num_groups} key/value groups cannot serve {self.num_heads} heads")

    @property
    def total_heads(self) -> int:
        """Number of query heads in the whole model, `L * H`."""
        return self.num_layers * self.num_heads

    def group_of(self, head: int) -> int:
        """Return the key/value group that query head `head` of a layer reads: `floor(h * G / H)`."""
        if not 0 <= head < self.num_heads:
            raise ValueError(f"head {head} is not one of the {self.num_heads} heads of a layer")
        return head * self.num_groups // self.num_heads

    def head_budget(self, ratio: float) -> int:
        """Return how many heads a share of all heads is: `ceil(ratio * L * H)`.

        Raises:
            UsageError: `ratio` is outside (0, 1].
        """
        return share_count(ratio, self.total_heads)

    def groups_of(self, selected_LH: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return the key/value groups, bool [L, G], that at least one selected head (bool [L, H]) reads.

        Raises:
            ArtifactError: the selection was made for a model with other numbers of layers or heads.
        """
        selected_LH = np.asarray(selected_LH, dtype=np.bool_)
        expected = (self.num_layers, self.num_heads)
        if selected_LH.shape != expected:
            raise ArtifactError(
                f"selected heads of shape {list(selected_LH.shape)} do not fit a model of"
                f" {self.num_layers} layers with {self.num_heads} heads each",
                hint="score the heads of this very model",
            )
        groups_LG = np.zeros((self.num_layers, self.num_groups), dtype=np.bool_)
        layers, heads = np.nonzero(selected_LH)
        groups_LG[layers, heads * self.num_groups // self.num_heads] = True
        return groups_LG
