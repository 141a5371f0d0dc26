"""The layers below the lowest trained one: computed once a row, and read from then on.

Nothing below the lowest trained layer changes while a model is trained, so the hidden states of a row there are the
same in each epoch. They are kept when they are first computed, and later forwards begin above them.

Axes: B batch, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from p2d_cli.errors import is_out_of_memory
from p2d_cli.modeling.hidden_store import HiddenStates, Tokens
from p2d_cli.modeling.layouts import decoder_blocks, plain_model
from p2d_cli.modeling.likelihood import ForwardStopped, are_alike, padded
from p2d_cli.modeling.loading import input_device

_HALVES = (torch.bfloat16, torch.float16)
_PROBED = (8, 5)
"""Tokens of the two rows that show whether a model can begin above its frozen layers."""
_PROBLEMS = (RuntimeError, ValueError, LookupError, TypeError, AttributeError)
"""What a model raises that misses what its lower layers had handed on."""


def frozen_depth(model: Any) -> int:
    """Return how many layers, from the first, lie below everything that is trained."""
    blocks = decoder_blocks(plain_model(model))
    inside = {parameter for block in blocks for parameter in block.parameters()}
    if any(parameter.requires_grad and parameter not in inside for parameter in model.parameters()):
        return 0
    trained = (any(parameter.requires_grad for parameter in block.parameters()) for block in blocks)
    return next((layer for layer, is_trained in enumerate(trained) if is_trained), 0)


def frozen_layers(model: Any, *, pad_id: int, autocast: torch.dtype) -> FrozenLayers | None:
    """Return the frozen layers of a model, or None if it has none or cannot begin above them.

    Args:
        model: in the mode in which it is trained.
        pad_id: token to pad with.
        autocast: the precision it is computed in.
    """
    depth = frozen_depth(model)
    layers = FrozenLayers(model, depth, pad_id=pad_id, autocast=autocast) if depth else None
    return layers if layers is not None and layers.can_be_skipped() else None


class FrozenLayers:
    """The frozen layers of a model that is being trained.

    On a CPU each row is read by itself, so that its hidden states do not depend on the rows it is batched with: in
    float32 they are the same to the bit whether they were kept or are computed anew. Elsewhere the rows that are
    missing are read as one padded batch.
    """

    def __init__(self, model: Any, depth: int, *, pad_id: int, autocast: torch.dtype) -> None:
        """Take the first `depth` layers of a model; nothing is kept before `keep` says where."""
        self._model = plain_model(model)
        self._device = input_device(self._model)
        self._autocast = partial(torch.autocast, self._device.type, autocast, enabled=autocast in _HALVES)
        self._blocks = decoder_blocks(self._model)
        self._depth = depth
        self._store: HiddenStates | None = None
        self._pad_id = pad_id
        self._make_output: list[Callable[[Tensor], Any]] = []

    @property
    def depth(self) -> int:
        """How many layers they are."""
        return self._depth

    def keep(self, store: HiddenStates) -> None:
        """Keep hidden states from now on."""
        self._store = store

    def states(self, rows: Sequence[Tokens]) -> list[Tensor]:
        """Return the hidden states of rows above the frozen layers, `[T, D]` each, on the model's device or the CPU."""
        found = {row: None if self._store is None else self._store.get(row) for row in rows}
        missing = [row for row, states in found.items() if states is None]
        at_once = 1 if self._device.type == "cpu" else max(len(missing), 1)
        for start in range(0, len(missing), at_once):
            batch = missing[start : start + at_once]
            for row, states_TD in zip(batch, self._read(batch), strict=True):
                found[row] = states_TD[: len(row)]
                if self._store is not None:
                    self._store.put(row, states_TD[: len(row)])
        return [states for row in rows if (states := found[row]) is not None]

    @contextmanager
    def skipped(self, rows: Sequence[Tokens], *, packing: bool) -> Iterator[None]:
        """Make the forward of the `with` block, which reads these rows as one batch, begin above the frozen layers."""
        states = [states_TD.to(self._device) for states_TD in self.states(rows)]
        states_BTD = torch.cat(states)[None] if packing else pad_sequence(states, batch_first=True)
        with self._replaced(states_BTD):
            yield

    @torch.no_grad()
    def _read(self, rows: Sequence[Tokens]) -> Tensor:
        """Read rows up to the lowest trained layer, and return what it is given, `[B, T, D]`."""
        read: list[Tensor] = []

        def stop(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            read.append(arguments[0] if arguments else named["hidden_states"])
            raise ForwardStopped

        hook = self._blocks[self._depth].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with suppress(ForwardStopped), self._autocast():
                self._model(input_ids=padded(rows, self._pad_id).to(self._device), use_cache=False)
        finally:
            hook.remove()
        return read[0]

    @contextmanager
    def _replaced(self, states_BTD: Tensor) -> Iterator[None]:
        """Have each frozen layer return these hidden states, whatever it is given."""
        blocks = self._blocks[: self._depth]
        try:
            for block, make_output in zip(blocks, self._make_output, strict=True):
                # Through the module's own call, since a hook on the layer above would not be there any more when
                # gradient checkpointing computes that layer a second time.
                block.forward = _returning(make_output(states_BTD))
            yield
        finally:
            for block in blocks:
                vars(block).pop("forward", None)

    def _learn_outputs(self, rows: Sequence[Tokens]) -> Tensor:
        """Read a batch as a whole, note what kind of output each frozen layer has, and return the logits."""
        kinds: dict[int, Callable[[Tensor], Any]] = {}

        def note(layer: int) -> Callable[[nn.Module, Any, Any], None]:
            return lambda _module, _arguments, output: kinds.update({layer: _like(output)})

        hooks = [block.register_forward_hook(note(layer)) for layer, block in enumerate(self._blocks[: self._depth])]
        try:
            logits = self._logits(rows)
        finally:
            for hook in hooks:
                hook.remove()
        self._make_output = [kinds[layer] for layer in range(self._depth)]
        return logits

    def _logits(self, rows: Sequence[Tokens]) -> Tensor:
        ids_BT = padded(rows, self._pad_id).to(self._device)
        with self._autocast():
            logits_BTV: Tensor = self._model(input_ids=ids_BT, use_cache=False).logits
        return torch.cat([logits_TV[: len(row)] for logits_TV, row in zip(logits_BTV, rows, strict=True)]).float()

    @torch.no_grad()
    def can_be_skipped(self) -> bool:
        """Find out by two short rows whether the model computes the same when it begins above these layers.

        It does not where a layer is random (dropout), hands on more than hidden states, or is needed by one above it,
        such as for its keys and values.
        """
        count = self._model.get_input_embeddings().num_embeddings
        ids = [number % count for number in range(sum(_PROBED))]
        rows = [tuple(ids[: _PROBED[0]]), tuple(ids[_PROBED[0] :])]
        try:
            whole = self._learn_outputs(rows)
            once, again = self.states(rows), self.states(rows)
            with self.skipped(rows, packing=False):
                above = self._logits(rows)
        except _PROBLEMS as problem:
            if is_out_of_memory(problem):
                raise
            return False
        return all(map(torch.equal, once, again)) and are_alike(above, whole, self._model.dtype)


def _returning(output: Any) -> Callable[..., Any]:
    return lambda *_, **__: output


def _like(output: Any) -> Callable[[Tensor], Any]:
    """Return a function that makes a layer's output of hidden states.

    Raises:
        TypeError: the layer returns other tensors beside them, or none that are `[B, T, D]`.
    """
    states, *others = output if isinstance(output, tuple) else (output,)
    if not isinstance(states, Tensor) or states.ndim != len("BTD") or any(isinstance(one, Tensor) for one in others):
        raise TypeError("a layer returns more than hidden states [B, T, D]")
    if isinstance(output, tuple):
        return lambda states_BTD: (states_BTD, *others)
    return lambda states_BTD: states_BTD
