"""Rows: where they lie, what they say, how they are prompted and batched."""
