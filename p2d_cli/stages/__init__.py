"""The stages: load, compute, save, return a result."""
