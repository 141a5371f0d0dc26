"""How many attention heads a model has, which of them share keys and values, and what "10%" of them means.

Layers may differ in heads, groups and head size, and may have no attention at all. Whatever is kept of heads has the
shape `[L, H]` all the same, with H the heads of the layer that has most; `exists_LH` says which of them there are.

Axes: L layers, H query heads of a layer, G key/value groups of a layer, d head dimension, K existing heads in (layer,
head) order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from p2d_cli.errors import ArtifactError, UsageError

_CEIL_SLACK = 1e-9  # 0.07 * 100 is 7.000000000000001 in floating point, and its ceiling 8
_BY_LAYER = ("num_heads", "num_groups", "head_dim")


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
class LayerHeads:
    """The attention heads of one layer; a layer without attention has none, and sizes of 0.

    With `num_groups == num_heads` this is multi-head, with one group multi-query attention.

    Raises:
        ValueError: some sizes are 0 and others are not, or there are more groups than heads.
    """

    num_heads: int = 0
    num_groups: int = 0
    head_dim: int = 0
    """Size of a head's output; that of its queries and keys as well in nearly all families."""

    def __post_init__(self) -> None:
        sizes = self.num_heads, self.num_groups, self.head_dim
        if min(sizes) < (1 if any(sizes) else 0):
            raise ValueError(f"heads, groups and head_dim of a layer must be at least 1, or all 0, found {sizes}")
        if self.num_groups > self.num_heads:
            raise ValueError(f"{self.num_groups} key/value groups cannot serve {self.num_heads} heads")

    def group_of(self, head: int) -> int:
        """Return the key/value group that query head `head` reads: `floor(h * G / H)`."""
        if not 0 <= head < self.num_heads:
            raise ValueError(f"head {head} is not one of the {self.num_heads} heads of a layer")
        return head * self.num_groups // self.num_heads


@dataclass(frozen=True)
class HeadGeometry:
    """The sizes that name and count a model's attention heads; a head is the pair `(layer, head)`.

    Every size is read from the attention modules, because `head_dim` is not `hidden_size / num_heads` in all families.

    Raises:
        ValueError: there are no layers, none of them has heads, or the hidden size is below 1.
    """

    layers: tuple[LayerHeads, ...]
    hidden_size: int

    def __post_init__(self) -> None:
        if self.hidden_size < 1:
            raise ValueError(f"hidden_size must be at least 1, found {self.hidden_size}")
        if not any(layer.num_heads for layer in self.layers):
            raise ValueError(f"expected layers with heads, found {len(self.layers)} layers without any")

    @classmethod
    def even(cls, num_layers: int, *, num_heads: int, num_groups: int, head_dim: int, hidden_size: int) -> HeadGeometry:
        """Return the geometry of a model whose layers are all alike."""
        return cls((LayerHeads(num_heads, num_groups, head_dim),) * num_layers, hidden_size)

    @classmethod
    def from_dict(cls, described: Mapping[str, Any]) -> HeadGeometry:
        """Read what `to_dict` wrote.

        Raises:
            ValueError, TypeError, KeyError: it is nothing of the kind.
        """
        count = described["num_layers"]
        columns = [
            described[name] if isinstance(described[name], list) else [described[name]] * count for name in _BY_LAYER
        ]
        layers = tuple(LayerHeads(*sizes) for sizes in zip(*columns, strict=True))
        if len(layers) != count:
            raise ValueError(f"sizes of {len(layers)} layers, expected those of {count}")
        return cls(layers, described["hidden_size"])

    def to_dict(self) -> dict[str, Any]:
        """Return the sizes in plain JSON types: a number where all layers have the same, else one a layer."""
        columns = {name: [getattr(layer, name) for layer in self.layers] for name in _BY_LAYER}
        alike = {name: sizes[0] if len(set(sizes)) == 1 else sizes for name, sizes in columns.items()}
        return alike | {"num_layers": self.num_layers, "hidden_size": self.hidden_size}

    @property
    def num_layers(self) -> int:
        """Number of layers L, those without attention among them."""
        return len(self.layers)

    @property
    def num_heads(self) -> int:
        """Width H of a table of heads: the heads of the layer that has most."""
        return max(layer.num_heads for layer in self.layers)

    @property
    def total_heads(self) -> int:
        """Number of query heads in the whole model, K."""
        return sum(layer.num_heads for layer in self.layers)

    @property
    def total_groups(self) -> int:
        """Number of key/value groups in the whole model."""
        return sum(layer.num_groups for layer in self.layers)

    @property
    def head_dim(self) -> int:
        """The largest head dimension."""
        return max(layer.head_dim for layer in self.layers)

    @cached_property
    def exists_LH(self) -> NDArray[np.bool_]:
        """Which heads there are, bool `[L, H]`."""
        counts_L = np.array([layer.num_heads for layer in self.layers])
        return np.asarray(np.arange(self.num_heads) < counts_L[:, None])

    def dims(self, heads_LH: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Return the head dimension of each of these heads, bool `[L, H]`, in (layer, head) order."""
        dims_L = np.array([layer.head_dim for layer in self.layers], dtype=np.int64)
        return dims_L[np.nonzero(heads_LH)[0]]

    def table(self, values_K: ArrayLike) -> NDArray[np.float64]:
        """Return a value of each existing head as float64 `[L, H]`, nan where there is none."""
        table_LH = np.full(self.exists_LH.shape, np.nan)
        table_LH[self.exists_LH] = np.asarray(values_K, dtype=np.float64)
        return table_LH

    def head_budget(self, ratio: float) -> int:
        """Return how many heads a share of all heads is: `ceil(ratio * K)`.

        Raises:
            UsageError: `ratio` is outside (0, 1].
        """
        return share_count(ratio, self.total_heads)

    def require_fits(self, selected_LH: NDArray[np.bool_]) -> None:
        """Refuse a selection that was made for a model with other heads.

        Raises:
            ArtifactError: it has another shape, or heads that the model has not.
        """
        found, expected = list(selected_LH.shape), list(self.exists_LH.shape)
        if found != expected:
            raise ArtifactError(
                f"the selected heads are [layers, heads] = {found}, this model has {expected}",
                hint="score the heads of this model",
            )
        if (missing := np.argwhere(selected_LH & ~self.exists_LH)).size:
            layer, head = missing[0].tolist()
            raise ArtifactError(
                f"head {head} of layer {layer} is selected; that layer of this model has"
                f" {self.layers[layer].num_heads or 'no'} heads",
                hint="score the heads of this model",
            )

    def groups_of(self, selected_LH: NDArray[np.bool_]) -> set[tuple[int, int]]:
        """Return the key/value groups `(layer, group)` that at least one selected head (bool `[L, H]`) reads.

        Raises:
            ArtifactError: see `require_fits`.
        """
        selected_LH = np.asarray(selected_LH, dtype=np.bool_)
        self.require_fits(selected_LH)
        return {(layer, self.layers[layer].group_of(head)) for layer, head in np.argwhere(selected_LH).tolist()}


@dataclass(frozen=True)
class ReadingHeads:
    """The heads that read rows, where these are others than the trained ones; each bool [L, H]."""

    shallow_LH: NDArray[np.bool_]
    """Those of the first layers, which read all rows."""
    deep_LH: NDArray[np.bool_]
    """Those that read the rows which the others found best."""

    @property
    def all_LH(self) -> NDArray[np.bool_]:
        """Both."""
        return self.shallow_LH | self.deep_LH

    @property
    def depths(self) -> tuple[int, int]:
        """How many layers are computed to read by the first, and by both."""
        return depth_of(self.shallow_LH), depth_of(self.all_LH)


def depth_of(heads_LH: NDArray[np.bool_]) -> int:
    """Return how many layers are computed to read these heads, bool [L, H]."""
    return int(np.flatnonzero(heads_LH.any(axis=1)).max()) + 1


@dataclass(frozen=True)
class SelectedHeads:
    """Some of a model's heads."""

    selected_LH: NDArray[np.bool_]
    """Those that are trained; they read rows too where there are no others for that."""
    total: int
    """How many heads the model has."""
    reading: ReadingHeads | None = None

    @property
    def count(self) -> int:
        """How many are selected."""
        return int(self.selected_LH.sum())

    @property
    def share(self) -> float:
        """The selected ones over all that there are."""
        return self.count / self.total
