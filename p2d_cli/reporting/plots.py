"""Pictures as PNG files: head scores, sample scores, the cost-against-score plot, and the loss.

matplotlib is an optional extra and is imported when a picture is drawn; where it is not installed, each function raises
`UnavailableError`. Figures are objects with a canvas of their own (no pyplot, no display), drawn with matplotlib's
defaults whatever a user's matplotlibrc says; the same input gives the same bytes with the same version of matplotlib.
Axes: L layers, H query heads a layer.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from p2d_cli.core.aer import AerReport
from p2d_cli.core.geometry import ReadingHeads
from p2d_cli.errors import UnavailableError
from p2d_cli.reporting.scatter import (
    CUT_SHORT,
    KIND_NAMES,
    Box,
    Kind,
    Labels,
    Layout,
    label_text,
    scatter_layout,
    tick_texts,
)
from p2d_cli.reporting.table import better_is

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 160
INK, MUTED, FAINT, NO_SCORE = "#1b1f24", "#626b76", "#c3c9d0", "#d9dde2"
BLUE, VERMILLION, GREY = "#0072b2", "#d55e00", "#8b949e"  # of Okabe and Ito's palette, safe for colour-blind readers
HEAVY_TAIL = 10.0
"""Above this ratio of the largest head score to the median, colours are logarithmic."""
MAX_BINS = 60
MANY_STEPS = 60
"""With more losses than these, a running mean is drawn over them."""
_POINT = DPI / 72  # pixels
_SCATTER_INCHES, _KEY_INCHES, _KEY_LINE_INCHES = (8.2, 5.5), 3.0, 0.17
_FRAME: Box = (0.8 * DPI, 0.55 * DPI, 7.95 * DPI, 4.65 * DPI)
_LABEL_POINTS = 8.5
_DOTTED: dict[str, Any] = {"color": INK, "linewidth": 0.8, "linestyle": (0, (1, 3)), "zorder": 1}
_KINDS: dict[Kind, dict[str, Any]] = {
    "method": {"marker": "o", "s": 46, "facecolors": BLUE, "edgecolors": BLUE},
    "control": {"marker": "o", "s": 46, "facecolors": "white", "edgecolors": VERMILLION},
    "reference": {"marker": "D", "s": 50, "facecolors": INK, "edgecolors": INK},
    "untrained": {"marker": "o", "s": 46, "facecolors": GREY, "edgecolors": GREY},
}


def head_heatmap(
    scores_LH: ArrayLike, selected_LH: ArrayLike, path: Path | str, *, title: str, reading: ReadingHeads | None = None
) -> None:
    """Draw the scores of heads, [L, H], layers downward and heads to the right, and mark those that are chosen.

    `selected_LH`, bool [L, H], are outlined; of the `reading` heads those that read all rows have a ring, those that
    read the best a dot. Where a layer has no such head, the score is nan and the cell blank; on a logarithmic scale a
    score of 0 is drawn grey.
    """
    scores = np.asarray(scores_LH, dtype=np.float64)
    num_layers, num_heads = scores.shape
    cell = float(np.clip(7.0 / max(num_layers, num_heads), 0.11, 0.3))  # inches
    with _figure(path, (max(4.6, cell * num_heads + 2.0), max(2.8, cell * num_layers + 1.6))) as figure:
        from matplotlib import colormaps
        from matplotlib.cm import ScalarMappable

        axes = figure.add_subplot()
        norm, scale = _colour_scale(scores)
        shown = np.ma.masked_invalid(np.ma.masked_less_equal(scores, 0.0) if scale else scores)
        colours = colormaps["viridis"].with_extremes(bad=NO_SCORE)
        there = np.where(np.isnan(scores), 0.0, 1.0)
        axes.imshow(shown, cmap=colours, norm=norm, alpha=there, aspect="auto", interpolation="nearest")
        label = "head" if there.all() else "head (blank: there is none)"
        axes.set(xlabel=label, ylabel="layer", xticks=_every(num_heads), yticks=_every(num_layers))
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        bar = figure.colorbar(ScalarMappable(norm, colours), ax=axes, label=f"score{scale}", fraction=0.05, pad=0.02)
        bar.outline.set_visible(False)
        _title(axes, title, "")
        _mark_heads(axes, np.asarray(selected_LH, dtype=bool), reading, cell)


def score_histogram(scores: ArrayLike, cut: float, path: Path | str, *, title: str) -> None:
    """Draw how the scores of all rows are distributed, and the `cut`, the score of the last row that was chosen.

    Rows of higher scores are chosen first; those whose score is not finite are counted in a note.
    """
    every = np.asarray(scores, dtype=np.float64).ravel()
    finite = every[np.isfinite(every)]
    above = finite >= cut
    with _figure(path, (7.0, 3.6)) as figure:
        axes = figure.add_subplot()
        if finite.size:
            edges = _bin_edges(finite)
            # Counted here: matplotlib would take several copies of every score.
            counts = [np.histogram(finite[rows], bins=edges)[0] for rows in (above, ~above)]
            axes.hist(
                [edges[:-1], edges[:-1]], bins=edges.tolist(), weights=counts, stacked=True, color=[BLUE, FAINT],
                label=[f"at or above the cut: {above.sum():,} rows", f"below: {(~above).sum():,} rows"],
            )  # fmt: skip
        if math.isfinite(cut):
            axes.axvline(cut, color=VERMILLION, linewidth=1.4, label=f"cut: {cut:.4g}")
        axes.set(xlabel="score", ylabel="rows")
        axes.locator_params("y", integer=True)
        _finish(axes)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8.5)
        left_out = every.size - finite.size
        _title(axes, title, f"{every.size:,} rows" + (f", {left_out:,} without a finite score" if left_out else ""))


def aer_scatter(report: AerReport, path: Path | str) -> None:
    """Draw the main metric with its interval against AER, the Pareto front, and the name of each run.

    Controls are hollow; the reference is a diamond, or a line alone where it was cut short and its score is not known.
    Where the names do not fit beside their points, points are numbered as in the report's table and a key stands at
    the right.
    """
    layout = scatter_layout(report, _FRAME)
    with _figure(path, _SCATTER_INCHES, layout=None) as figure:
        from matplotlib.font_manager import FontProperties

        renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]  # of the Agg canvas
        font = FontProperties(size=_LABEL_POINTS)

        def width_of(text: str) -> float:
            return float(renderer.get_text_width_height_descent(text, font, False)[0])

        line, radius = _LABEL_POINTS * 1.25 * _POINT, 4.0 * _POINT
        labels = layout.labels(width_of, height=line, radius=radius)
        if labels.are_numbers:
            width, height = _SCATTER_INCHES
            figure.set_size_inches(width + _KEY_INCHES, max(height, 0.9 + _KEY_LINE_INCHES * len(layout.points)))
        axes = _scatter_axes(figure, layout)
        _draw_points(axes, layout)
        if layout.cut_short_x is not None:
            axes.axvline(layout.cut_short_x, **_DOTTED)
            note = layout.cut_short_label(width_of(CUT_SHORT), line, radius)
            axes.text(note.left, note.middle, CUT_SHORT, fontsize=_LABEL_POINTS, color=MUTED, va="center_baseline")
        _draw_labels(axes, layout, labels)
        metric = layout.metric
        _title(axes, "Score against cost", f"{better_is(metric)} and further left is better" if metric else "")


def loss_curve(
    steps: ArrayLike, losses: ArrayLike, path: Path | str, held_out: Sequence[tuple[float, float]] = ()
) -> None:
    """Draw the training loss, [n], over optimizer updates, [n], with a running mean where there are many.

    A loss that is not finite leaves a gap. Of `held_out`, update and loss of each look at held-out rows, 0 being the
    one before the first update, the lowest loss behind an update is marked: its weights are kept.
    """
    x, y = (np.asarray(values, dtype=np.float64).ravel() for values in (steps, losses))
    with _figure(path, (7.0, 3.6)) as figure:
        axes = figure.add_subplot()
        is_long = y.size > MANY_STEPS
        marker = "o" if y.size <= 2 else ""
        axes.plot(x, y, color=FAINT if is_long else BLUE, linewidth=0.9 if is_long else 1.5, marker=marker)
        note = ""
        if is_long:
            width = max(5, y.size // 25)
            axes.plot(x, _running_mean(y, width), color=BLUE, linewidth=1.7)
            note = f"blue: mean of {width} neighbouring updates"
        if held_out:
            looks, values = zip(*held_out, strict=True)
            axes.plot(looks, values, color=VERMILLION, linewidth=1.5, marker="o", markersize=3)
            kept = [look for look in held_out if look[0] > 0 and math.isfinite(look[1])]
            for update, loss in [min(kept, key=lambda look: look[1])] if kept else []:
                axes.plot(update, loss, color=VERMILLION, marker="*", markersize=12)
            note = "; ".join(filter(None, (note, "orange: held-out rows, a star at the weights that are kept")))
        axes.set(xlabel="update", ylabel="loss")
        if y.size:
            axes.locator_params("x", integer=True)
        _finish(axes)
        _title(axes, "Training loss", note or f"{y.size:,} updates logged")


# --- what all pictures share


@contextmanager
def _figure(path: Path | str, size: tuple[float, float], *, layout: Any = "constrained") -> Iterator[Figure]:
    """Yield an empty figure of `size` inches and write it to `path` when the body has drawn it."""
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UnavailableError(
            f"drawing {Path(path).name}: expected matplotlib, which is not installed;"
            ' pip install "p2d-cli[plot]" adds it'
        ) from None
    with matplotlib.rc_context(), warnings.catch_warnings():
        # A run may be called by letters that the font lacks; boxes in their place are no reason to fail.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        matplotlib.rcdefaults()
        matplotlib.rc("font", size=9.5)
        matplotlib.rc("text", color=INK)
        matplotlib.rc("axes", labelcolor=INK, edgecolor=FAINT)
        matplotlib.rc("xtick", color=MUTED)
        matplotlib.rc("ytick", color=MUTED)
        figure = Figure(figsize=size, dpi=DPI, layout=layout)
        FigureCanvasAgg(figure)
        yield figure
        figure.savefig(path, format="png", dpi=DPI, metadata={"Software": None})


def _title(axes: Axes, title: str, note: str) -> None:
    axes.set_title(_plain(title), loc="left", fontsize=11, fontweight="bold")
    axes.set_title(_plain(note), loc="right", fontsize=8.5, color=MUTED)


def _finish(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=3, color=FAINT)
    axes.grid(axis="y", color="#eceff2", linewidth=0.8)
    axes.set_axisbelow(True)


def _plain(text: str) -> str:
    """Return text that is drawn as it is: no formulas, one line."""
    return " ".join(text.split()).replace("$", r"\$")


# --- heat map


def _colour_scale(scores_LH: NDArray[np.float64]) -> tuple[Any, str]:
    """Return how scores become colours, and what the colour bar says of it: linear, or logarithmic if heavy-tailed."""
    from matplotlib.colors import LogNorm, Normalize

    finite = scores_LH[np.isfinite(scores_LH)]
    if not finite.size or finite.min() == finite.max():
        middle = float(finite.flat[0]) if finite.size else 0.0
        reach = abs(middle) or 1.0
        return Normalize(middle - reach, middle + reach), ""
    positive = finite[finite > 0]
    if finite.min() >= 0 and finite.max() > HEAVY_TAIL * np.median(finite) and positive.min() < positive.max():
        return LogNorm(float(positive.min()), float(positive.max())), ", logarithmic"
    return Normalize(float(finite.min()), float(finite.max())), ""


def _mark_heads(axes: Axes, selected_LH: NDArray[np.bool_], reading: ReadingHeads | None, cell: float) -> None:
    """Mark the chosen heads in cells of `cell` inches, and say below the axes what the marks mean.

    Marks are black with a white rim, so that they show on dark cells as on bright ones.
    """
    from matplotlib.patheffects import withStroke

    marks = [("selected" if reading is None else "trained", selected_LH, "s", 0.78, "none")]
    if reading is not None:
        marks += [
            ("reads all rows", reading.shallow_LH, "o", 0.46, "none"),
            ("reads the best rows", reading.deep_LH, "o", 0.2, INK),
        ]
    points = 72 * cell
    line = min(1.3, 0.085 * points)
    rim = [withStroke(linewidth=2.4 * line, foreground="white")]
    look: dict[str, Any] = {"edgecolors": INK, "linewidths": line}
    for label, heads_LH, marker, size, face in marks:
        layers, heads = np.nonzero(heads_LH)
        axes.scatter(heads, layers, (size * points) ** 2, marker=marker, facecolors=face, path_effects=rim, **look)
        # Those of the legend are of one size, whatever that of the cells.
        axes.scatter([], [], (size * 13) ** 2, marker=marker, facecolors=face, label=label, **look)
    figure = axes.get_figure()
    assert figure is not None, "the axes are those of a figure"
    figure.legend(loc="outside lower left", ncols=3, frameon=False, fontsize=8.5, handletextpad=0.3, columnspacing=1.2)


def _every(count: int) -> list[int]:
    """Return at most about sixteen indices of `count`, a round number apart."""
    step = next(step for step in (1, 2, 4, 8, 16, 32, 64, count) if count <= 16 * step)
    return list(range(0, count, step))


# --- histogram and loss


def _bin_edges(finite: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return evenly spaced edges: as many bins as the data deserve (Freedman and Diaconis), within reason."""
    reach = float(finite.max() - finite.min())
    if reach <= max(1e-9 * float(np.abs(finite).max()), 1e-300):
        return np.asarray(np.histogram_bin_edges(finite, bins=1))
    width = 2 * float(np.subtract(*np.percentile(finite, [75, 25]))) / finite.size ** (1 / 3)
    bins = math.ceil(reach / width) if width > reach / MAX_BINS else MAX_BINS
    return np.asarray(np.histogram_bin_edges(finite, bins=max(bins, 8)))


def _running_mean(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Return the mean of the finite values among `width` neighbours, fewer at the ends."""
    known = np.isfinite(values)
    window = np.ones(width)
    sums = np.convolve(np.where(known, values, 0.0), window, "same")
    counts = np.convolve(known.astype(np.float64), window, "same")
    return np.asarray(np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0.5))


# --- score against cost


def _scatter_axes(figure: Figure, layout: Layout) -> Axes:
    """Add axes whose coordinates are the layout's pixels, y pointing down."""
    width, height = (float(inches) * DPI for inches in figure.get_size_inches())
    left, top, right, bottom = layout.frame
    axes = figure.add_axes((left / width, 1 - bottom / height, (right - left) / width, (bottom - top) / height))
    axes.set(xlim=(left, right), ylim=(bottom, top), ylabel=_plain(layout.metric or "score"))
    log = ", logarithmic" if layout.along.is_log else ""
    axes.set_xlabel(f"AER: cost, selection included, over that of full fine-tuning{log}")
    axes.xaxis.set_ticks([layout.x(tick) for tick in layout.along.ticks], tick_texts(layout.along))
    axes.yaxis.set_ticks([layout.y(tick) for tick in layout.up.ticks], tick_texts(layout.up))
    _finish(axes)
    if layout.slot_x is not None:
        axes.axvline(layout.slot_x, color=FAINT, linewidth=1, linestyle=(0, (2, 2)))
    return axes


def _draw_points(axes: Axes, layout: Layout) -> None:
    """Draw the front, and each run with its interval; one off the scale becomes an arrow head at the scale's end."""
    along, up = [corner[0] for corner in layout.front], [corner[1] for corner in layout.front]
    axes.plot(along, up, color=GREY, linewidth=1.3, zorder=2, label="Pareto front")
    for point in layout.points:
        style, x, y = _KINDS[point.kind], layout.x(point.cost), layout.y(point.score)
        if not layout.up.holds(point.score):
            style = style | {"marker": "v" if point.score < layout.up.low else "^"}
        elif point.kind == "reference":
            axes.axvline(x, **_DOTTED)
            axes.axhline(y, **_DOTTED)
        ends = layout.y(point.low), layout.y(point.high)
        axes.vlines(x, min(ends), max(ends), color=style["edgecolors"], linewidth=1.1, alpha=0.6, zorder=3)
        axes.scatter([x], [y], **style, linewidths=1.6, zorder=4)
    for kind, style in _KINDS.items():
        if any(point.kind == kind for point in layout.points):
            axes.scatter([], [], **style, linewidths=1.6, label=KIND_NAMES[kind])
    axes.legend(
        frameon=False, fontsize=8.5, ncols=5, handletextpad=0.5, loc="upper center", bbox_to_anchor=(0.5, -0.125)
    )


def _draw_labels(axes: Axes, layout: Layout, labels: Labels) -> None:
    """Write the labels and, where they are numbers, at the right of the plot which number is which run."""
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=2.5, foreground="white")]
    for point, text, label in zip(layout.points, labels.texts, labels.places, strict=True):
        if label.is_far:
            x, y = layout.x(point.cost), layout.y(point.score)
            axes.plot([x, label.nearest_x(x)], [y, label.middle], color=GREY, linewidth=0.7, zorder=3.5)
        axes.text(
            label.left, label.middle, _plain(text), fontsize=_LABEL_POINTS, va="center_baseline",
            path_effects=halo, zorder=5,
        )  # fmt: skip
    for line, point in enumerate(layout.points if labels.are_numbers else ()):
        x, y = layout.frame[2] + 0.45 * DPI, layout.frame[1] + (0.07 + line * _KEY_LINE_INCHES) * DPI
        axes.text(x, y, str(point.number), fontsize=8, ha="right", color=MUTED)
        axes.text(x + 0.1 * DPI, y, _plain(label_text(point, layout.up)), fontsize=8)
