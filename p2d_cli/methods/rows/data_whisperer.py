"""data-whisperer: rows that target queries look at among few-shot demos, in one layer (arXiv:2505.12212)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from p2d_cli.errors import UsageError
from p2d_cli.methods.episodes import EpisodeMethod


class DataWhisperer(EpisodeMethod):
    """Weigh each demo by the attention of one layer, the middle one by default, and by how its episode is answered."""

    name = "data-whisperer"
    takes_target = True
    takes_shortlist = True

    def heads(self) -> NDArray[np.bool_]:
        """Return all heads of the layer: the middle one, or that with attention which is nearest to it."""
        shape, layer = self.task.reader.shape, self.task.config.layer
        there = np.flatnonzero(shape.exists_LH.any(axis=1))
        if layer is None:
            middle = shape.num_layers // 2
            layer = int(there[np.abs(there - middle).argmin()])
        if layer >= shape.num_layers:
            raise UsageError(f"--layer {layer}: the model has layers 0 to {shape.num_layers - 1}")
        if layer not in there:
            raise UsageError(
                f"--layer {layer}: that layer of the model has no attention",
                hint=f"choose one of {', '.join(map(str, there))}",
            )
        heads_LH = np.zeros_like(shape.exists_LH)
        heads_LH[layer] = shape.exists_LH[layer]
        return heads_LH
