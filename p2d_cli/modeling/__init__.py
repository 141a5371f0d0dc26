"""Models: loading, head layouts, attention capture, adapters, generation."""
