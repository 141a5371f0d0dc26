"""What reading rows with a model takes: floating-point operations, and memory by part. Estimates, but for weights.

Sizes are read from the shapes of the stored tensors, so that weights, optimizer state and adapters are exact for every
family; operations and activations are those of a decoder layer with attention and a gated MLP.

Axes: L layers, H query heads a layer, G key/value groups, d head_dim, D hidden size, I width of the MLP, V vocabulary.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from p2d_cli.core.adapter_rank import common_rank
from p2d_cli.core.geometry import HeadGeometry, LayerHeads
from p2d_cli.core.head_layout import Placement, weights_of
from p2d_cli.core.head_selection import candidate_heads

FLOAT32, FLOAT64 = 4, 8
_LOGIT_ROWS_IN_FP32 = 512
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_OTHER_PARTS = re.compile(r"(?:^|\.)(?:vision|visual|audio)")
"""Layers of towers, which read no text."""
_BUFFERS = re.compile(r"inv_freq$|masked_bias$|attn\.bias$|attention\.bias$")

WorkKind = Literal["read", "learn", "answer", "compare"]


@dataclass(frozen=True)
class LayerSize:
    """The numbers that a layer's costs follow from."""

    weights: float
    """Those that a token is multiplied with; of experts, those that it is sent to."""
    queries: int
    """Width of all query heads, `H * d`; 0 without attention."""
    keys: int
    """Width of all key/value groups, `G * d`."""


@dataclass(frozen=True)
class ModelSize:
    """The numbers that a model's costs follow from."""

    layers: tuple[LayerSize, ...]
    hidden: int
    mlp: int
    vocabulary: int
    parameters: int
    """All of them, tied ones once."""
    text_parameters: int
    """Those of the text part, which full fine-tuning trains."""
    packed: int = 0
    """Parameters that stay packed in memory (see `p2d_cli.modeling.quantised`)."""
    packed_bytes: int = 0
    """What these take."""

    def weight_bytes(self, itemsize: int) -> int:
        """Return the bytes of the weights, where those that are not packed take so many each."""
        return (self.parameters - self.packed) * itemsize + self.packed_bytes

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @property
    def queries(self) -> int:
        """Width of all query heads of the widest layer."""
        return max(layer.queries for layer in self.layers)

    @property
    def keys(self) -> int:
        """Width of all key/value groups of the widest layer."""
        return max(layer.keys for layer in self.layers)

    @cached_property
    def _sums(self) -> NDArray[np.float64]:
        """Weights, queries and keys of the first 0, 1, ... layers together, `[3, L + 1]`."""
        each = np.array([(layer.weights, layer.queries, layer.keys) for layer in self.layers]).T
        return np.concatenate([np.zeros((3, 1)), each.cumsum(axis=1)], axis=1)

    def first(self, layers: int | None = None) -> tuple[float, float, float]:
        """Return weights, queries and keys of the first layers together, of all if it is not said how many."""
        weights, queries, keys = self._sums[:, self.depth if layers is None else layers].tolist()
        return weights, queries, keys

    def last(self, layers: int | None = None) -> tuple[float, float, float]:
        """Return weights, queries and keys of the last layers together, of all if it is not said how many."""
        below = self._sums[:, 0 if layers is None else self.depth - layers]
        weights, queries, keys = (self._sums[:, -1] - below).tolist()
        return weights, queries, keys


def model_size(
    config: Mapping[str, Any], tensors: Mapping[str, Sequence[int]], geometry: HeadGeometry | None = None
) -> ModelSize:
    """Read a model's sizes from its `config.json` and the shapes of its stored tensors, by name.

    Without a `geometry`, which is for models whose heads cannot be told apart, all layers have the heads that the
    config names.
    """
    text: Mapping[str, Any] = config.get("text_config", config)

    def number(*names: str, default: int | None = None) -> int:
        # A size for each layer is as good as the largest.
        values = (max(found) if isinstance(found := text.get(name), list) and found else found for name in names)
        value = next((value for value in values if isinstance(value, int)), default)
        return 0 if value is None else int(value)

    hidden = number("hidden_size", "n_embd", "d_model")
    heads = number("num_attention_heads", "n_head", "n_heads", "num_heads")
    layers = number("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    stored = {name: math.prod(shape) for name, shape in tensors.items() if not _BUFFERS.search(name)}
    if text.get("tie_word_embeddings", config.get("tie_word_embeddings", text.get("model_type") == "gpt2")):
        stored = {name: size for name, size in stored.items() if not name.endswith("lm_head.weight")}
    experts = number("num_experts", "num_local_experts", "n_routed_experts", default=1) or 1
    used = number("num_experts_per_tok", default=experts) / experts
    multiplied = {
        name: size * (used if ".experts." in name else 1)
        for name, size in stored.items()
        if len(tensors[name]) > 1 and not _OTHER_PARTS.search(name)
    }
    if geometry is None:
        head_dim = number("head_dim", default=hidden // max(heads, 1))
        alike = LayerHeads(heads, number("num_key_value_heads", default=heads), head_dim) if heads else LayerHeads()
        each = (alike,) * layers
    else:
        each = geometry.layers
    weights = _layer_weights(multiplied, len(each))
    return ModelSize(
        layers=tuple(
            LayerSize(weight, one.num_heads * one.head_dim, one.num_groups * one.head_dim)
            for weight, one in zip(weights, each, strict=True)
        ),
        hidden=hidden,
        mlp=number("intermediate_size", "n_inner", default=4 * hidden),
        vocabulary=number("vocab_size"),
        parameters=sum(stored.values()),
        text_parameters=sum(stored.values()),
    )


def _layer_weights(sizes: Mapping[str, float], layers: int) -> list[float]:
    """Return the weights of each layer of the text decoder: of several stacks of layers, the largest of that depth."""
    stacks: dict[str, dict[int, float]] = {}
    for name, size in sizes.items():
        if (found := _LAYER.search(name)) is not None:
            stack = stacks.setdefault(name[: found.start(1)], dict.fromkeys(range(layers), 0.0))
            stack[int(found[1])] = stack.get(int(found[1]), 0.0) + size
    fitting = [stack for stack in stacks.values() if len(stack) == layers]
    return list(max(fitting, key=lambda stack: sum(stack.values()), default=dict.fromkeys(range(layers), 0.0)).values())


# --- work


@dataclass(frozen=True)
class BatchShape:
    """The size of one batch."""

    rows: int
    length: int
    """Of the longest row, in tokens."""
    logits: int
    """Positions whose logits are computed; where answers are generated, the steps of the longest one."""

    @classmethod
    def of(cls, sizes: Sequence[tuple[int, int]]) -> BatchShape:
        """Return that of sequences, each of so many tokens and so many positions with logits."""
        return cls(len(sizes), max(length for length, _ in sizes), sum(logits for _, logits in sizes))

    @property
    def tokens(self) -> int:
        """Tokens, padding included."""
        return self.rows * self.length


@dataclass(frozen=True)
class Work:
    """One pass of a stage over some rows."""

    name: str
    """As the progress bar calls it, which is also the name of its journal."""
    kind: WorkKind
    rows: int
    passes: int
    """Forward passes: batches, and for `answer` the steps that generate."""
    backward_passes: int
    tokens: int
    """As the manifest counts them: with padding, but for `answer`, where prompts and answers count as they are."""
    flops: float
    typical: BatchShape | None = None
    """A batch of middling size, to be timed for all of them."""
    largest: BatchShape | None = None
    """The batch that takes the most memory."""
    typical_flops: float = 0.0
    seconds: float | None = None
    """Estimated from a short timing, where one was asked for."""
    counted: bool = True
    """Whether the manifest counts the tokens; it does not for looks at held-out rows."""


@dataclass(frozen=True)
class StagePlan:
    """What a stage would take."""

    rows: dict[str, int]
    exact: bool
    """Whether every row was read and tokenized; otherwise a sample stands for all."""
    works: tuple[Work, ...] = ()
    memory: dict[str, int] = field(default_factory=dict)
    """Bytes by part, on the device that works, at the largest batch."""
    disk: dict[str, int] = field(default_factory=dict)
    """Bytes by part."""
    resume: tuple[str, ...] = ()
    """What unfinished work of an interrupted run there is."""
    other_seconds: dict[str, float] = field(default_factory=dict)
    """Estimated seconds beside the model's passes, by phase, where a timing was asked for."""
    notes: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens that the manifest will count."""
        return sum(work.tokens for work in self.works if work.counted)

    @property
    def seconds(self) -> float | None:
        """All seconds but those of loading the model; None where nothing was timed."""
        timed = [work.seconds for work in self.works if work.seconds is not None]
        if not timed and not self.other_seconds:
            return None
        return math.fsum([*timed, *self.other_seconds.values()])

    def to_dict(self) -> dict[str, Any]:
        """Return the plan in plain JSON types, with its totals."""
        return asdict(self) | {
            "tokens": self.tokens,
            "flops": math.fsum(work.flops for work in self.works),
            "forward_passes": sum(work.passes for work in self.works),
            "backward_passes": sum(work.backward_passes for work in self.works),
            "memory_bytes": sum(self.memory.values()),
            "disk_bytes": sum(self.disk.values()),
            "seconds": self.seconds,
        }


def largest_of(shapes: Iterable[BatchShape]) -> BatchShape:
    """Return the batch that takes the most memory."""
    return max(shapes, key=lambda shape: (shape.tokens, shape.logits))


# --- operations


def forward_flops(size: ModelSize, shape: BatchShape, *, layers: int | None = None) -> float:
    """Return the operations of one forward pass through the first `layers` layers, and of the logits it keeps."""
    weights, queries, _ = size.first(layers)
    attention = 2.0 * queries * shape.tokens * shape.length  # causal: half of all pairs
    return 2.0 * weights * shape.tokens + attention + 2.0 * size.hidden * size.vocabulary * shape.logits


def backward_flops(size: ModelSize, shape: BatchShape, *, layers: int | None = None, trained: int = 0) -> float:
    """Return the operations of a backward pass.

    The gradient runs through the upper `layers` layers, and is computed of so many `trained` weights.
    """
    weights, queries, _ = size.last(layers)
    activations = 2.0 * weights * shape.tokens + 4.0 * queries * shape.tokens * shape.length
    return activations + 2.0 * size.hidden * size.vocabulary * shape.logits + 2.0 * trained * shape.tokens


# --- memory


def read_bytes(size: ModelSize, shape: BatchShape, itemsize: int) -> dict[str, int]:
    """Return the memory of one forward pass without gradients: that of the widest layer, and of the logits."""
    attention = 2 * size.queries + 4 * size.keys
    width = 3 * size.hidden + max(attention, 3 * size.mlp)
    logits = size.vocabulary * (shape.logits * itemsize + 2 * min(shape.logits, _LOGIT_ROWS_IN_FP32) * FLOAT32)
    return {"activations": shape.tokens * width * itemsize, "logits": logits}


def learn_bytes(
    size: ModelSize,
    shape: BatchShape,
    itemsize: int,
    *,
    layers: int,
    weights_trained: bool = False,
    recompute: bool = False,
) -> dict[str, int]:
    """Return the memory of a forward and backward pass, in which the upper `layers` layers keep their activations.

    Where whole weights are trained, their inputs are kept too; to `recompute`, only the inputs of the layers.
    """
    layer = 6 * size.hidden + 5 * size.queries + 3 * size.mlp
    layer += (size.hidden + size.queries + size.mlp) if weights_trained else 0
    kept = layers * size.hidden + layer if recompute else layers * layer
    logits = shape.logits * size.vocabulary * (itemsize + 3 * FLOAT32)
    return {"activations": shape.tokens * kept * itemsize, "logits": logits}


def cache_bytes(size: ModelSize, rows: int, length: int, itemsize: int) -> int:
    """Return the memory of the keys and values of `rows` sequences."""
    _, _, keys = size.first()
    return 2 * round(keys) * rows * length * itemsize


# --- what is trained


@dataclass(frozen=True)
class Trained:
    """Weights that are trained, and what stands beside them."""

    parameters: int
    placing: int
    """Values of the frozen 0/1 factors of a head adapter."""
    layers: int
    """How many layers, from the top, the gradient runs through."""
    saved: int = 0
    """Values of an adapter's factors on disk, where all modules have one rank."""

    @property
    def optimizer_bytes(self) -> int:
        """Two moments in fp32."""
        return 2 * FLOAT32 * self.parameters


def rows_trained(placed: Mapping[str, Placement], layers: int) -> Trained:
    """Return what training these rows and columns of modules trains, in so many layers from the top."""
    # On disk the factors of all modules have one rank.
    rank = common_rank([len(place.rows) for place in placed.values()])
    return Trained(
        parameters=weights_of(placed),
        placing=sum(len(place.rows) * place.size for place in placed.values()),
        layers=layers,
        saved=rank * sum(place.width + place.size for place in placed.values()),
    )


def lora_trained(modules: Collection[tuple[int, int]], rank: int, depth: int) -> Trained:
    """Return what a LoRA of this rank trains on modules of these two sizes, in a model of so many layers."""
    values = rank * sum(map(sum, modules))
    return Trained(values, 0, depth, values)


def assumed_heads(geometry: HeadGeometry, ratio: float, layers: str | None = None) -> NDArray[np.bool_]:
    """Return heads that stand for a selection that is still to be made: spread evenly, down from the very last."""
    there = np.flatnonzero(candidate_heads(layers, geometry.exists_LH, geometry.head_budget(ratio)))
    count = geometry.head_budget(ratio)
    heads_LH = np.zeros(geometry.exists_LH.size, dtype=np.bool_)
    heads_LH[there[[(index + 1) * len(there) // count - 1 for index in range(count)]]] = True
    return heads_LH.reshape(geometry.exists_LH.shape)
