"""Artifacts: the one layer that reads and writes what a stage leaves on disk."""
