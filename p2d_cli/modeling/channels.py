"""Channels of MLPs: which weight rows and columns each one owns, as `p2d_cli.modeling.layouts` says it of heads.

A channel is one hidden unit of an MLP: its rows of the projections that lead to it, gate and up, and its column of the
projection down from it. S2FT (arXiv:2412.06289) trains channels beside heads. Axes: I channels, D hidden size.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2d_cli.core.head_layout import Placement, ProjectionName
from p2d_cli.core.head_selection import lowest_layer
from p2d_cli.errors import ModelError
from p2d_cli.modeling.layouts import decoder_blocks, linear_features, linear_modules, model_layout, plain_model

_MLPS = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("gate_up_proj",), "down_proj"),
    (("up_proj",), "down_proj"),
    (("w1", "w3"), "w2"),
    (("c_fc",), "c_proj"),
    (("fc1",), "fc2"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
)
"""What the parts of an MLP are called: the projections that lead to its channels, and the one from them."""


@dataclass(frozen=True)
class _Mlp:
    into: tuple[str, ...]
    """Full names of the projections to the channels, `[I, D]` each."""
    out_of: str
    """That of the projection from the channels, `[D, I]`."""
    channels: int
    width: int
    """D."""
    is_fused: bool
    """Whether gate and up are one projection, `[2 I, D]`, the gate first."""


def channel_placements(model: Any, share: float, first_layer: int) -> dict[str, Placement]:
    """Return the weight rows and columns of evenly spread channels, by module name.

    Args:
        model: may be on the meta device.
        share: of the channels of each layer, in (0, 1]; at least one is taken.
        first_layer: the lowest layer whose channels are taken; those of all layers above it are too.

    Raises:
        ModelError: one of these layers has no MLP with linear projections of its own, such as one with experts.
    """
    model = plain_model(model)
    placed: dict[str, Placement] = {}
    for layer, mlps in enumerate(_mlps_of_layers(model)):
        if layer < first_layer:
            continue
        if len(mlps) != 1:
            found = "experts, or no MLP that p2d knows" if not mlps else f"{len(mlps)} MLPs"
            raise ModelError(
                f"--channels: layer {layer} of {model.config.model_type} has {found}", hint="leave out --channels"
            )
        placed |= _placed(mlps[0], share)
    return placed


def placed_rows(
    model: Any, selected_LH: NDArray[np.bool_], projections: Collection[ProjectionName], channels: float
) -> dict[str, Placement]:
    """Return the weight rows and columns of selected heads, and of a share of the channels from their lowest layer on.

    Raises:
        ModelError, ArtifactError, UsageError: see `model_layout`, `ModelLayout.placements` and `channel_placements`.
    """
    placed = model_layout(model).placements(selected_LH, projections)
    return placed | channel_placements(model, channels, lowest_layer(selected_LH)) if channels else placed


def channel_outputs(model: Any) -> frozenset[str]:
    """Return the names of the modules of which a channel owns a column."""
    return frozenset(mlp.out_of for mlps in _mlps_of_layers(plain_model(model)) for mlp in mlps)


def _placed(mlp: _Mlp, share: float) -> dict[str, Placement]:
    count = max(1, round(share * mlp.channels))
    chosen_n = np.arange(count) * mlp.channels // count
    fused = 2 if mlp.is_fused else 1
    rows = tuple(np.concatenate([chosen_n + part * mlp.channels for part in range(fused)]).tolist())
    into = Placement(rows, on_input=False, width=mlp.width, size=fused * mlp.channels)
    out_of = Placement(tuple(chosen_n.tolist()), on_input=True, width=mlp.width, size=mlp.channels)
    return dict.fromkeys(mlp.into, into) | {mlp.out_of: out_of}


def _mlps_of_layers(model: Any) -> list[list[_Mlp]]:
    """Find the MLPs of each layer by the names and sizes of their parts."""
    adaptable = set(linear_modules(model))
    names = {module: name for name, module in model.named_modules()}
    found = []
    for block in decoder_blocks(model):
        mlps = (_mlp(dict(module.named_children()), names) for module in block.modules())
        found.append([mlp for mlp in mlps if mlp is not None and adaptable.issuperset((*mlp.into, mlp.out_of))])
    return found


def _mlp(parts: Mapping[str, Any], names: Mapping[Any, str]) -> _Mlp | None:
    """Return the MLP that a module with these parts is; None if it is none."""
    for into, out_of in _MLPS:
        if {*into, out_of} <= parts.keys():
            (width, made, _), (channels, _, _) = linear_features(parts[into[0]]), linear_features(parts[out_of])
            if made in (channels, 2 * channels):
                leading = tuple(names[parts[part]] for part in into)
                return _Mlp(leading, names[parts[out_of]], channels, width, is_fused=made == 2 * channels)
    return None
