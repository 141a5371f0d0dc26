"""p2d: adapt a causal language model with a tenth of its data and a tenth of its attention heads."""

__version__ = "0.1.0"
