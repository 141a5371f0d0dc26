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
        """Return all heads of the layer."""
        shape, layer = self.task.reader.shape, self.task.config.layer
        chosen = shape.num_layers // 2 if layer is None else layer
        if chosen >= shape.num_layers:
            raise UsageError(f"--layer {chosen}: the model has layers 0 to {shape.num_layers - 1}")
        heads_LH = np.zeros((shape.num_layers, shape.num_heads), dtype=np.bool_)
        heads_LH[chosen] = True
        return heads_LH
