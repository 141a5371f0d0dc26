"""The text part of a model that reads images or sound as well: what p2d scores and trains, and all that it changes.

The other parts (towers, projectors) stay as they are stored, bit for bit. A model of text alone is its own text part.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch


def has_other_parts(model: Any) -> bool:
    """Say whether a plain model has parts beside its text model."""
    return model.config.get_text_config() is not model.config


def is_of_text(model: Any, names: Iterable[str]) -> dict[str, bool]:
    """Say of each name of a plain model's weights whether it belongs to the text part.

    That is the decoder with its embeddings, and the head on top of it.
    """
    if not has_other_parts(model):
        return dict.fromkeys(names, True)
    parts = {id(part) for part in (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())}
    prefixes = tuple(f"{name}." for name, module in model.named_modules() if id(module) in parts)
    return {name: name.startswith(prefixes) for name in names}


def text_parameters(model: Any) -> Iterator[torch.nn.Parameter]:
    """Yield the parameters of a plain model's text part, tied ones once."""
    named = dict(model.named_parameters())
    for name, belongs in is_of_text(model, named).items():
        if belongs:
            yield named[name]


def digest_other_parts(model: Any) -> dict[str, str]:
    """Return a digest of each tensor of a plain model that is not of its text part, by name, to see what changes.

    Adapters that others made may reach into a vision tower, whose projections are called as those of the decoder are.
    """
    state: dict[str, torch.Tensor] = model.state_dict()
    others = [name for name, belongs in is_of_text(model, state).items() if not belongs]
    flat = {name: state[name].detach().cpu().contiguous().flatten() for name in others}
    return {name: hashlib.blake2b(tensor.view(torch.uint8).numpy().data).hexdigest() for name, tensor in flat.items()}
