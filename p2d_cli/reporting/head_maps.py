"""Maps of a model's heads side by side: how each method ranked them, and which it selected. Inline SVG, no scripts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from p2d_cli.core.aer import HeadMap

_CELL = 10
"""Side of a head's square, in the drawing's own units."""
_USERS_SHOWN = 3
HEAD_MAP_STYLE = """
.maps { display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: 20px 28px; margin-top: 12px; }
.maps figcaption b { color: var(--ink); } .maps svg { max-height: 420px; margin-top: 4px; }
.maps .level { fill: var(--method); stroke: none; } .maps .bed { fill: var(--panel); stroke: none; }
.maps .chosen { fill: none; stroke: var(--control); stroke-width: 2; }
"""


def head_maps_html(maps: Sequence[HeadMap]) -> str:
    """Return the maps as figures; nothing where there are none."""
    if not maps:
        return ""
    figures = "".join(map(_figure, maps))
    return (
        '<p class="muted">Layers downward, heads to the right. The stronger its colour, the higher a head ranks; those'
        f' with an edge were selected.</p>\n<div class="maps">\n{figures}</div>\n'
    )


def _figure(found: HeadMap) -> str:
    width, height = found.num_heads * _CELL, found.num_layers * _CELL
    names = list(dict.fromkeys(found.used_by))
    more = f" and {len(names) - _USERS_SHOWN} more" if len(names) > _USERS_SHOWN else ""
    users = ", ".join(names[:_USERS_SHOWN]) + more
    title = f"{found.method}: {len(found.selected)} of {found.num_layers * found.num_heads} heads"
    return (
        f"<figure><figcaption><b>{escape(title)}</b><br>{escape(users)}</figcaption>\n"
        f'<svg viewBox="-1 -1 {width + 2} {height + 2}" role="img" aria-label="{escape(title)}">\n'
        f'<rect class="bed" x="0" y="0" width="{width}" height="{height}"/>\n'
        f"{''.join(_shades(found))}"
        f'<path class="chosen" d="{_squares(found, found.selected)}"/>\n</svg></figure>\n'
    )


def _shades(found: HeadMap) -> Iterator[str]:
    """Yield a path for the heads of each tenth of the ranking."""
    for level in range(1, 10):
        heads = [index for index, digit in enumerate(found.levels) if digit == str(level)]
        if heads:
            yield f'<path class="level" opacity="{level / 9:.2f}" d="{_squares(found, heads)}"/>\n'


def _squares(found: HeadMap, heads: Sequence[int]) -> str:
    corners = (((head % found.num_heads) * _CELL, (head // found.num_heads) * _CELL) for head in heads)
    return "".join(f"M{x} {y}h{_CELL}v{_CELL}h-{_CELL}z" for x, y in corners)
