"""What heads put out on rows that were read, kept beside a heads artifact so that mining does not read them again.

Rows are known by a digest of what a template shows of them; what else decides a reading (model, tokenizer, template,
precision) has a digest of its own, the context, and readings of another context are of no use.

Axes: n rows, K heads in (layer, head) order, P places (answer and prompt), d head_dim.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from p2d_cli.errors import ArtifactError

READINGS_NAME = "readings.safetensors"
_METADATA_KEY = "p2d"
PLACES = 2
"""Heads are read over a row's answer, and over its prompt."""
Digests = NDArray[np.uint64]
"""128 bits a row, `[n, 2]`."""


@dataclass(frozen=True)
class Readings:
    """Mean outputs of some heads over the answers and over the prompts of rows."""

    context: str
    digests_n2: Digests
    outputs_nKPd: NDArray[np.float32]
    heads_LH: NDArray[np.bool_]
    """The heads, bool [L, H]."""
    targets: int = 0
    """How many of the rows, the first ones, are of a target; the others are a random sample of a pool."""
    pool: str = ""
    """Digest of that pool."""

    def of(self, heads_LH: NDArray[np.bool_]) -> Readings:
        """Return the readings of some of the heads alone."""
        return replace(self, outputs_nKPd=self.outputs_nKPd[:, heads_LH[self.heads_LH]], heads_LH=heads_LH)

    @property
    def sample_n2(self) -> Digests:
        """The digests of the pool's rows."""
        return self.digests_n2[self.targets :]

    def find(self, digests_M2: Digests) -> NDArray[np.int64]:
        """Return where each of these rows stands among those that were read, -1 for one that was not."""
        return find_rows(self.digests_n2, digests_M2)


def find_rows(known_n2: Digests, asked_M2: Digests) -> NDArray[np.int64]:
    """Return the place of each row among the known ones, by its digest; -1 where there is none."""
    if not len(known_n2):
        return np.full(len(asked_M2), -1, dtype=np.int64)
    order_n = np.lexsort((known_n2[:, 1], known_n2[:, 0]))
    ordered_n = known_n2[order_n, 0]
    # Two different rows with the first half in common are as good as impossible; the second half makes sure.
    at_M = order_n[np.searchsorted(ordered_n, asked_M2[:, 0]).clip(max=len(ordered_n) - 1)]
    return np.where((known_n2[at_M] == asked_M2).all(axis=1), at_M, -1)


def save_readings(folder: Path, readings: Readings) -> None:
    """Write `readings.safetensors`; equal readings give equal bytes."""
    described = {"context": readings.context, "targets": readings.targets, "pool": readings.pool}
    save_file(
        {
            "digests": np.ascontiguousarray(readings.digests_n2),
            "outputs": np.ascontiguousarray(readings.outputs_nKPd, dtype=np.float32),
            "heads": np.ascontiguousarray(readings.heads_LH),
        },
        folder / READINGS_NAME,
        metadata={_METADATA_KEY: json.dumps(described, sort_keys=True)},
    )


def load_readings(folder: Path) -> Readings | None:
    """Read `readings.safetensors`; None where the artifact has none.

    Raises:
        ArtifactError: the file is damaged, or its tensors do not fit together.
    """
    path = folder / READINGS_NAME
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            described = json.loads((file.metadata() or {})[_METADATA_KEY])
            context, targets, pool = str(described["context"]), int(described["targets"]), str(described["pool"])
            digests, outputs, heads = (file.get_tensor(name) for name in ("digests", "outputs", "heads"))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RecursionError) as problem:
        raise ArtifactError(f"{path} cannot be read: {problem}", hint="rerun p2d score-heads") from None
    fits = (
        (digests.dtype, digests.ndim, outputs.dtype, outputs.ndim) == (np.uint64, 2, np.float32, 4)
        and heads.dtype == np.bool_
        and digests.shape == (len(outputs), 2)
        and outputs.shape[1:3] == (heads.sum(), PLACES)
        and 0 <= targets <= len(outputs)
    )
    if not fits or not np.isfinite(outputs).all():
        raise ArtifactError(f"{path}: the readings do not fit together", hint="rerun p2d score-heads")
    return Readings(context, digests, outputs, heads, targets, pool)
