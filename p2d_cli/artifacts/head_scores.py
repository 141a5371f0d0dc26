"""The payload of a heads artifact: one safetensors file.

Legend: R repeats, L layers, H query heads a layer.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from p2d_cli.core.geometry import HeadGeometry, ReadingHeads
from p2d_cli.errors import ArtifactError

HEAD_SCORES_NAME = "head_scores.safetensors"
METADATA_KEY = "p2d"
_READERS = ("reads_all", "reads_best")
"""Tensors of the heads that read all rows, and the best of them."""


@dataclass(frozen=True)
class HeadScores:
    """Scores and selection of every head of a model."""

    scores_LH: NDArray[np.float32]
    """Higher is more important; the mean over the repeats. Nan where a layer has no such head."""
    selected_LH: NDArray[np.bool_]
    """The heads that are trained; they read rows too where there are no others for that."""
    repeats_RLH: NDArray[np.float32]
    method: str
    geometry: HeadGeometry
    reading: ReadingHeads | None = None


def save_head_scores(folder: Path, heads: HeadScores) -> None:
    """Write `head_scores.safetensors`; equal heads give equal bytes."""
    described = {"method": heads.method, "geometry": heads.geometry.to_dict()}
    reading = {} if heads.reading is None else _reading_tensors(heads.reading)
    save_file(
        {
            "scores": np.ascontiguousarray(heads.scores_LH, dtype=np.float32),
            "selected": np.ascontiguousarray(heads.selected_LH, dtype=np.bool_),
            "repeats": np.ascontiguousarray(heads.repeats_RLH, dtype=np.float32),
            "exists": np.ascontiguousarray(heads.geometry.exists_LH),
            **reading,
        },
        folder / HEAD_SCORES_NAME,
        # One key only: safetensors orders several by a hash that varies from run to run.
        metadata={METADATA_KEY: json.dumps(described, sort_keys=True)},
    )


def _reading_tensors(reading: ReadingHeads) -> dict[str, NDArray[np.bool_]]:
    stages = zip(_READERS, (reading.shallow_LH, reading.deep_LH), strict=True)
    return {name: np.ascontiguousarray(heads_LH, dtype=np.bool_) for name, heads_LH in stages}


def load_head_scores(folder: Path) -> HeadScores:
    """Read `head_scores.safetensors`.

    Raises:
        ArtifactError: the file is missing, damaged, or its tensors do not fit together.
    """
    path = folder / HEAD_SCORES_NAME
    try:
        with safe_open(path, framework="numpy") as file:
            described = json.loads((file.metadata() or {})[METADATA_KEY])
            tensors = {name: file.get_tensor(name) for name in ("scores", "selected", "repeats")}
            readers = {name: file.get_tensor(name) for name in _READERS if name in file.keys()}  # noqa: SIM118
        geometry = HeadGeometry.from_dict(described["geometry"])
        method = str(described["method"])
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RecursionError) as problem:
        raise ArtifactError(f"{path} cannot be read: {problem}", hint="rerun p2d score-heads") from None
    _check_tensors(path, tensors, geometry.exists_LH)
    _check_readers(path, readers, geometry.exists_LH)
    return HeadScores(
        scores_LH=tensors["scores"],
        selected_LH=tensors["selected"].astype(np.bool_),
        repeats_RLH=tensors["repeats"],
        method=method,
        geometry=geometry,
        reading=ReadingHeads(*(readers[name] for name in _READERS)) if readers else None,
    )


def _check_readers(path: Path, readers: dict[str, NDArray[Any]], exists_LH: NDArray[np.bool_]) -> None:
    if readers and (
        len(readers) != len(_READERS)
        or any(heads.dtype != np.bool_ or heads.shape != exists_LH.shape for heads in readers.values())
        or any(not heads.any() or (heads & ~exists_LH).any() for heads in readers.values())
    ):
        raise ArtifactError(f"{path}: the heads that read rows do not fit the model", hint="rerun p2d score-heads")


def _check_tensors(path: Path, tensors: dict[str, NDArray[Any]], exists_LH: NDArray[np.bool_]) -> None:
    shape = exists_LH.shape
    if tensors["scores"].shape != shape or tensors["selected"].shape != shape:
        found = tensors["scores"].shape, tensors["selected"].shape
        raise ArtifactError(f"{path}: expected scores and selected of shape {shape}, found {found}")
    if tensors["repeats"].shape[1:] != shape:
        raise ArtifactError(f"{path}: expected repeats of shape [R, {shape[0]}, {shape[1]}]")
    if tensors["selected"].dtype != np.bool_ or not tensors["selected"].any():
        raise ArtifactError(f"{path} selects no heads", hint="rerun p2d score-heads")
    if (tensors["selected"] & ~exists_LH).any():
        raise ArtifactError(f"{path} selects heads that the model has not", hint="rerun p2d score-heads")
    if not all(np.issubdtype(tensors[name].dtype, np.floating) for name in ("scores", "repeats")):
        raise ArtifactError(f"{path}: the scores are no floating-point numbers", hint="rerun p2d score-heads")
    if not np.isfinite(tensors["scores"][exists_LH]).all():
        raise ArtifactError(f"{path} holds scores that are not finite numbers", hint="rerun p2d score-heads")
