"""Numbers as messages say them."""

from __future__ import annotations

_LARGE_RATIO = 1000
"""From here on a ratio is written with a power of ten."""


def bytes_text(size: float) -> str:
    """Return a number of bytes in the unit that suits it."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def count_text(count: int, noun: str) -> str:
    """Return a number of things: `1 row`, `1,200 rows`."""
    return f"{count:,} {noun}" + "s" * (count != 1)


def ratio_text(ratio: float) -> str:
    """Return a ratio of at least 1 as a whole number of at most three digits, or with a power of ten."""
    return f"{ratio:.0f}" if round(ratio) < _LARGE_RATIO else f"{ratio:.1e}"


def an(word: str) -> str:
    """Return a word behind its article."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
