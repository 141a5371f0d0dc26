"""What reading rows with a model takes: floating-point operations, and memory by part. Estimates, but for weights.

Sizes are read from the shapes of the stored tensors, so that weights, optimizer state and adapters are exact for every
family; operations and activations are those of a decoder layer with attention and a gated MLP.

Axes: L layers, H query heads a layer, G key/value groups, d head_dim, D hidden size, I width of the MLP, V vocabulary.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from p2d_cli.core.adapter_rank import common_rank
from p2d_cli.core.geometry import share_count

FLOAT32, FLOAT64 = 4, 8
_LOGIT_ROWS_IN_FP32 = 512
_LAYER = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.")
_OTHER_PARTS = re.compile(r"(?:^|\.)(?:vision|visual|audio)")
"""Layers of towers, which read no text."""
_BUFFERS = re.compile(r"inv_freq$|masked_bias$|attn\.bias$|attention\.bias$")
_FUSED = frozenset({"phi3", "gpt2", "gpt_neox"})

WorkKind = Literal["read", "learn", "answer", "compare"]


@dataclass(frozen=True)
class ModelSize:
    """The numbers that a model's costs follow from."""

    layers: int
    heads: int
    groups: int
    head_dim: int
    hidden: int
    mlp: int
    vocabulary: int
    parameters: int
    """All of them, tied ones once."""
    layer_weights: int
    """Weights of a layer that a token is multiplied with; of experts, those that it is sent to."""
    fused: bool
    """Whether q, k and v are one module."""

    @property
    def queries(self) -> int:
        """Width of all query heads of a layer, `H * d`."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all key groups of a layer, `G * d`."""
        return self.groups * self.head_dim

    @property
    def attention_weights(self) -> int:
        """Weights of q, k, v and o in all layers."""
        return self.layers * self.hidden * 2 * (self.queries + self.keys)


def model_size(config: Mapping[str, Any], tensors: Mapping[str, Sequence[int]]) -> ModelSize:
    """Read a model's sizes from its `config.json` and the shapes of its stored tensors, by name."""
    text: Mapping[str, Any] = config.get("text_config", config)

    def number(*names: str, default: int | None = None) -> int:
        found = next((text[name] for name in names if isinstance(text.get(name), int)), default)
        return 0 if found is None else int(found)

    hidden = number("hidden_size", "n_embd")
    heads = number("num_attention_heads", "n_head")
    layers = number("num_hidden_layers", "n_layer")
    stored = {name: math.prod(shape) for name, shape in tensors.items() if not _BUFFERS.search(name)}
    if text.get("tie_word_embeddings", config.get("tie_word_embeddings", text.get("model_type") == "gpt2")):
        stored = {name: size for name, size in stored.items() if not name.endswith("lm_head.weight")}
    experts = number("num_experts", "num_local_experts", "n_routed_experts", default=1) or 1
    used = number("num_experts_per_tok", default=experts) / experts
    in_layers = sum(
        size * (used if ".experts." in name else 1)
        for name, size in stored.items()
        if _LAYER.search(name) and not _OTHER_PARTS.search(name) and len(tensors[name]) > 1
    )
    return ModelSize(
        layers=layers,
        heads=heads,
        groups=number("num_key_value_heads", default=heads),
        head_dim=number("head_dim", default=hidden // max(heads, 1)),
        hidden=hidden,
        mlp=number("intermediate_size", "n_inner", default=4 * hidden),
        vocabulary=number("vocab_size"),
        parameters=sum(stored.values()),
        layer_weights=round(in_layers / max(layers, 1)),
        fused=str(config.get("model_type")) in _FUSED,
    )


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
    depth = size.layers if layers is None else layers
    weights = 2.0 * size.layer_weights * shape.tokens
    attention = 2.0 * size.queries * shape.tokens * shape.length  # causal: half of all pairs
    return depth * (weights + attention) + 2.0 * size.hidden * size.vocabulary * shape.logits


def backward_flops(size: ModelSize, shape: BatchShape, *, layers: int | None = None, trained: int = 0) -> float:
    """Return the operations of a backward pass.

    The gradient runs through the upper `layers` layers, and is computed of so many `trained` weights.
    """
    depth = size.layers if layers is None else layers
    activations = depth * (2.0 * size.layer_weights * shape.tokens + 4.0 * size.queries * shape.tokens * shape.length)
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
    return 2 * size.layers * size.keys * rows * length * itemsize


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


def heads_trained(size: ModelSize, heads_LH: NDArray[np.bool_], projections: Iterable[str]) -> Trained:
    """Return what training these heads trains: their own rows of q and o, and the k and v rows of their groups."""
    groups_LG = np.zeros((heads_LH.shape[0], size.groups), dtype=np.bool_)
    layers, heads = np.nonzero(heads_LH)
    groups_LG[layers, heads * size.groups // size.heads] = True
    units = {"q": heads_LH, "k": groups_LG, "v": groups_LG, "o": heads_LH}
    rows_L = {name: units[name].sum(axis=1) * size.head_dim for name in projections}
    modules = [
        (np.sum([rows_L[name] for name in names], axis=0), end) for names, end in _modules(size, tuple(rows_L)).items()
    ]
    # On disk the factors of all modules have one rank.
    rank = common_rank([int(count_L.max(initial=0)) for count_L, _ in modules])
    return Trained(
        parameters=size.hidden * sum(int(each.sum()) for each in rows_L.values()),
        placing=sum(int(count_L.sum()) * end for count_L, end in modules),
        layers=size.layers - (int(layers.min()) if len(layers) else 0),
        saved=rank * sum(int((count_L > 0).sum()) * (size.hidden + end) for count_L, end in modules),
    )


def lora_trained(size: ModelSize, rank: int, projections: Iterable[str]) -> Trained:
    """Return what a LoRA of this rank on these projections of every layer trains."""
    ends = sum(size.hidden + end for end in _modules(size, tuple(dict.fromkeys(projections))).values())
    return Trained(size.layers * rank * ends, 0, size.layers, size.layers * rank * ends)


def _modules(size: ModelSize, projections: tuple[str, ...]) -> dict[tuple[str, ...], int]:
    """Return the width of each module that has some of these projections, on the side of the heads."""
    widths = {"q": size.queries, "k": size.keys, "v": size.keys, "o": size.queries}
    if not size.fused:
        return {(name,): widths[name] for name in projections}
    inputs = tuple(name for name in projections if name != "o")
    fused = {inputs: size.queries + 2 * size.keys} if inputs else {}
    return fused | ({("o",): size.queries} if "o" in projections else {})


def assumed_heads(size: ModelSize, ratio: float) -> NDArray[np.bool_]:
    """Return heads that stand for a selection that is still to be made: spread evenly, down from the very last."""
    total = size.layers * size.heads
    count = share_count(ratio, total)
    heads_LH = np.zeros(total, dtype=np.bool_)
    heads_LH[[(index + 1) * total // count - 1 for index in range(count)]] = True
    return heads_LH.reshape(size.layers, size.heads)
