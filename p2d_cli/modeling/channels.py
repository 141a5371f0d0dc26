"""Channels of MLPs: which weight rows and columns each one owns, as `p2d_cli.modeling.layouts` says it of heads.

A channel is one hidden unit of an MLP: its rows of the projections that lead to it, gate and up, and its column of the
projection down from it. S2FT (arXiv:2412.06289) trains channels beside heads. Axes: I channels, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from p2d_cli.core.head_layout import Placement
from p2d_cli.errors import ModelError
from p2d_cli.modeling.layouts import decoder_blocks, linear_features, linear_modules, plain_model

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
    for layer, block in enumerate(decoder_blocks(model)):
        if layer < first_layer:
            continue
        mlps = list(_mlps(model, block))
        if len(mlps) != 1:
            found = "experts, or no MLP that p2d knows" if not mlps else f"{len(mlps)} MLPs"
            raise ModelError(
                f"--channels: layer {layer} of {model.config.model_type} has {found}", hint="leave out --channels"
            )
        placed |= _placed(mlps[0], share)
    return placed


def channel_outputs(model: Any) -> frozenset[str]:
    """Return the names of the modules of which a channel owns a column."""
    model = plain_model(model)
    return frozenset(mlp.out_of for block in decoder_blocks(model) for mlp in _mlps(model, block))


def _placed(mlp: _Mlp, share: float) -> dict[str, Placement]:
    count = max(1, round(share * mlp.channels))
    chosen_n = np.arange(count) * mlp.channels // count
    fused = 2 if mlp.is_fused else 1
    rows = tuple(np.concatenate([chosen_n + part * mlp.channels for part in range(fused)]).tolist())
    into = Placement(rows, on_input=False, width=mlp.width, size=fused * mlp.channels)
    out_of = Placement(tuple(chosen_n.tolist()), on_input=True, width=mlp.width, size=mlp.channels)
    return dict.fromkeys(mlp.into, into) | {mlp.out_of: out_of}


def _mlps(model: Any, block: Any) -> Iterator[_Mlp]:
    """Find the MLPs of a layer by the names and sizes of their parts."""
    adaptable = set(linear_modules(model))
    names = {module: name for name, module in model.named_modules()}
    for module in block.modules():
        parts = dict(module.named_children())
        for into, out_of in _MLPS:
            if not {*into, out_of} <= parts.keys():
                continue
            full = [names[parts[part]] for part in (*into, out_of)]
            if adaptable.issuperset(full):
                (width, made, _), (channels, _, _) = linear_features(parts[into[0]]), linear_features(parts[out_of])
                if made in (channels, 2 * channels):
                    yield _Mlp(tuple(full[:-1]), full[-1], channels, width, is_fused=made == 2 * channels)
            break
