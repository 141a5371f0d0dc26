"""Which weight rows belong to which attention head, layer by layer.

A weight has "rows" (outputs) and "columns" (inputs) as in `nn.Linear`, `[out, in]`; GPT-2's Conv1D stores the
transpose, as `Projection.transposed` says, so that everyone else may think in rows.

Axes: L layers, H query heads, G key/value groups, d head dimension.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from p2d_cli.core.geometry import HeadGeometry, LayerHeads
from p2d_cli.errors import UsageError

ProjectionName = Literal["q", "k", "v", "o"]
PROJECTIONS: tuple[ProjectionName, ...] = ("q", "k", "v", "o")

Range = tuple[int, int]


@dataclass(frozen=True)
class Projection:
    """One of a layer's q, k, v, o: a module and the ranges that its heads (q, o) or groups (k, v) own."""

    module: str
    """Full dotted name in the plain model; fused families repeat it for q, k and v."""
    rows: tuple[Range, ...]
    """(start, stop) of each head or group: output rows for q, k, v, and input columns for o."""
    width: int
    """Length of such a row or column."""
    size: int
    """All rows of the module; for o, all columns."""
    transposed: bool = False
    """Whether the weight is stored `[in, out]` (Conv1D)."""

    @property
    def weight_name(self) -> str:
        """Name of the weight among the model's parameters."""
        return f"{self.module}.weight"

    def indices(self, units: Iterable[int]) -> tuple[int, ...]:
        """Rows (for o: columns) of these heads or groups, ascending, each once."""
        return tuple(sorted({row for unit in units for row in range(*self.rows[unit])}))


@dataclass(frozen=True)
class LayerLayout:
    """The attention of one layer."""

    layer: int
    module: str
    """Full dotted name of the attention module."""
    heads: LayerHeads
    query_dim: int
    """Size of a head's queries and keys; values may be of another."""
    q: Projection
    """Where a head's query comes with a gate (Qwen3-Next), its rows are those of the query, then those of the gate."""
    k: Projection | None
    """None where the layer takes keys and values that another layer has computed (Gemma 3n, Gemma 4)."""
    v: Projection | None
    """None there too, and where keys serve as values (Gemma 4)."""
    o: Projection
    kv_layer: int
    """The layer whose keys and values are read: this one, or an earlier one."""

    def projection(self, name: ProjectionName) -> Projection | None:
        """Return the projection of this name, None where the layer has none."""
        found: Projection | None = getattr(self, name)
        return found

    @property
    def projections(self) -> dict[ProjectionName, Projection]:
        """Those that the layer has."""
        found = {name: self.projection(name) for name in PROJECTIONS}
        return {name: projection for name, projection in found.items() if projection is not None}

    def units(self, name: ProjectionName, heads: Iterable[int]) -> tuple[int, ...]:
        """Return what these query heads own of a projection: themselves for q and o, their groups for k and v."""
        chosen = heads if name in ("q", "o") else (self.heads.group_of(head) for head in heads)
        return tuple(sorted(set(chosen)))


@dataclass(frozen=True)
class Placement:
    """Rows of a module that belong to selected heads or channels."""

    rows: tuple[int, ...]
    """Ascending; columns where `on_input`."""
    on_input: bool
    """Whether they are columns, of a projection out of heads or channels."""
    width: int
    """Length of such a row or column."""
    size: int
    """All rows of the module; `on_input`, all columns."""


def weights_of(placed: Mapping[str, Placement]) -> int:
    """Return how many weights these rows and columns of modules have."""
    return sum(len(place.rows) * place.width for place in placed.values())


@dataclass(frozen=True)
class ModelLayout:
    """The attention of all layers that have any."""

    num_layers: int
    """Layers without attention among them."""
    hidden_size: int
    layers: tuple[LayerLayout, ...]
    """In order, those without attention left out."""

    def __iter__(self) -> Iterator[LayerLayout]:
        """Go through the layers with attention."""
        return iter(self.layers)

    def __len__(self) -> int:
        """Return the number of layers with attention."""
        return len(self.layers)

    def __getitem__(self, layer: int) -> LayerLayout:
        """Return the attention of a layer, by the layer's number; KeyError if it has none."""
        return self._by_number[layer]

    @cached_property
    def _by_number(self) -> dict[int, LayerLayout]:
        return {one.layer: one for one in self.layers}

    @cached_property
    def geometry(self) -> HeadGeometry:
        """The numbers and sizes of layers, heads and groups."""
        layers = (
            self._by_number[layer].heads if layer in self._by_number else LayerHeads()
            for layer in range(self.num_layers)
        )
        return HeadGeometry(tuple(layers), self.hidden_size)

    def placements(
        self, selected_LH: NDArray[np.bool_], projections: Collection[ProjectionName]
    ) -> dict[str, Placement]:
        """Return which rows of which modules the selected heads own in these projections, by module name.

        Without projections these are none, but the heads have to fit.

        Raises:
            ArtifactError: the heads are of a model of another shape.
            UsageError: no head is selected, or none of them has rows of its own in these projections.
        """
        self.geometry.require_fits(selected_LH)
        if not selected_LH.any():
            raise UsageError(
                "no head is selected, so there is nothing to train", hint="select heads with a larger --ratio"
            )
        placed: dict[str, Placement] = {}
        if not projections:
            return placed
        for layer in self.layers:
            heads = np.flatnonzero(selected_LH[layer.layer]).tolist()
            parts = {name: part for name, part in layer.projections.items() if name in projections and heads}
            for name, part in parts.items():
                earlier = placed[part.module].rows if part.module in placed else ()
                rows = sorted({*earlier, *part.indices(layer.units(name, heads))})
                placed[part.module] = Placement(tuple(rows), name == "o", part.width, part.size)
        if not placed:
            raise UsageError(
                f"the selected heads have no {', '.join(projections)} of their own: their layers take keys and values"
                " from other layers",
                hint="train q and o as well: --projections q,k,v,o",
            )
        return placed
