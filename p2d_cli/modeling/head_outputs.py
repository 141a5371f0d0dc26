"""What chosen heads say about a text: their outputs before the output projection mixes them, averaged over tokens.

Axes: B batch, T tokens, K chosen heads in (layer, head) order, P places, d head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from p2d_cli.core.head_layout import ModelLayout
from p2d_cli.modeling.layouts import plain_model
from p2d_cli.modeling.likelihood import ForwardStopped, forward_inputs


@torch.no_grad()
def mean_head_outputs(
    model: Any,
    layout: ModelLayout,
    heads: Mapping[int, Sequence[int]],
    input_ids_BT: Tensor,
    attention_mask_BT: Tensor,
    token_masks_BPT: Tensor,
) -> Tensor:
    """Read a batch up to the deepest layer of `heads`, and average each head's output over some tokens of each row.

    A head's output is what the output projection reads in the head's columns, so that it works for every attention
    kernel and family whose layout is known.

    Args:
        model: see `p2d_cli.modeling.likelihood`.
        layout: the model's, see `model_layout`.
        heads: layer -> its heads to read, of K heads in all.
        input_ids_BT: token ids.
        attention_mask_BT: all ones will do, and be faster, where the padding is on the right, which no token looks at.
        token_masks_BPT: for each place, such as the answer, 1 for the tokens to average over. Where there is none, the
            output is 0.

    Returns:
        `[B, K, P, d]` float32 on the CPU; where layers differ in head size, d is that of the largest of these heads,
        and the outputs of the smaller ones are filled up with zeros.
    """
    plain = plain_model(model)
    weights_BPT = token_masks_BPT / token_masks_BPT.sum(dim=2, keepdim=True).clamp(min=1)
    chosen = {layer: tuple(sorted(heads[layer])) for layer in sorted(heads) if heads[layer]}
    largest = max(layout[layer].heads.head_dim for layer in chosen)
    means: dict[int, Tensor] = {}

    def read(layer: int, _module: nn.Module, arguments: tuple[Any, ...]) -> None:
        output_BTE: Tensor = arguments[0]
        columns = torch.tensor(layout[layer].o.indices(chosen[layer]), device=output_BTE.device)
        weights = weights_BPT.to(device=output_BTE.device, dtype=output_BTE.dtype)
        # Averaged in the model's precision with fp32 accumulation inside the product, a matrix product a row.
        means_BPE = torch.bmm(weights, output_BTE)
        batch, places, _ = means_BPE.shape
        means_BPKd = means_BPE[:, :, columns].float().reshape(batch, places, len(chosen[layer]), -1).cpu()
        means[layer] = functional.pad(means_BPKd.transpose(1, 2), (0, largest - means_BPKd.shape[3]))
        if layer == max(chosen):
            raise ForwardStopped

    with ExitStack() as hooks:
        hooks.enter_context(suppress(ForwardStopped))
        for layer in chosen:
            module = plain.get_submodule(layout[layer].o.module)
            hooks.enter_context(module.register_forward_pre_hook(partial(read, layer)))
        model(**forward_inputs(input_ids_BT, attention_mask_BT))
    return torch.cat([means[layer] for layer in chosen], dim=1)
