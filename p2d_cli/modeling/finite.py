"""Finding a weight that is no number, before it silently decides what is selected, trained or written."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from p2d_cli.errors import NonFiniteError


def require_finite_weights(named: Iterable[tuple[str, torch.Tensor]], doing: str, *, hint: str) -> None:
    """Refuse floating-point weights of which one is not finite; quantised layers have integers.

    Args:
        named: name and tensor.
        doing: what the message begins with.
        hint: what to do next.

    Raises:
        NonFiniteError: naming the first tensor.
    """
    for name, tensor in named:
        if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.is_meta:
            continue
        # Both are NaN if one value is; unlike `isfinite`, it needs no memory and takes a thirtieth of the time.
        low, high = torch.aminmax(tensor.detach())
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise NonFiniteError(f"{doing}: {name} holds values that are not finite", hint=hint)
