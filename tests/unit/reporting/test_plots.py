import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from p2d_cli.core.geometry import ReadingHeads
from p2d_cli.errors import UnavailableError
from p2d_cli.reporting import plots
from p2d_cli.reporting.plots import aer_scatter, head_heatmap, loss_curve, score_histogram

pytestmark = pytest.mark.usefixtures("pictures")
SCORES_LH = np.exp(np.random.default_rng(0).normal(size=(4, 6))) * 1e-7
SELECTED_LH = SCORES_LH > 1.5e-7


def _heads(path, scores=SCORES_LH, selected=SELECTED_LH):
    head_heatmap(scores, selected, path, title="pad: 3 of 24 heads")


def _histogram(path, scores=tuple(range(50)), cut=40.0):
    score_histogram(np.array(scores), cut, path, title="p2d")


def _loss(path):
    loss_curve([1, 2, 3], [3.0, 2.0, 1.5], path)


def _pixels(path):
    from matplotlib.image import imread

    return imread(path)


@pytest.fixture
def draw(report):
    return {
        "heads": _heads,
        "histogram": _histogram,
        "loss": _loss,
        "scatter": lambda path: aer_scatter(report, path),
    }


@pytest.mark.parametrize("name", ["heads", "histogram", "loss", "scatter"])
def test_the_bytes_are_those_of_the_input_alone(draw, name, tmp_path):
    import matplotlib

    draw[name](tmp_path / "a.png")
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "savefig.dpi": 20, "text.usetex": True}):
        draw[name](tmp_path / "b.png")
        assert matplotlib.rcParams["font.size"] == 30
    assert dict(matplotlib.rcParams) == before
    written = (tmp_path / "a.png").read_bytes()
    assert written == (tmp_path / "b.png").read_bytes()
    assert written.startswith(b"\x89PNG")
    assert not any(word in written for word in (b"Software", b"Matplotlib", b"Creation", b"tIME"))
    assert _pixels(tmp_path / "a.png").std() > 0.01


@pytest.mark.parametrize("name", ["heads", "histogram", "loss", "scatter"])
def test_without_matplotlib_it_says_what_to_install(draw, name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UnavailableError, match=r'pip install "p2d-cli\[plot\]"'):
        draw[name](tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_pyplot_is_never_imported_and_the_module_loads_without_matplotlib(tmp_path):
    code = (
        "import sys; from p2d_cli.reporting.plots import loss_curve\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"loss_curve([1, 2], [2.0, 1.0], {str(tmp_path / 'a.png')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules and 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_heat_map_shows_scores_and_selection(tmp_path):
    _heads(tmp_path / "a.png")
    _heads(tmp_path / "b.png", selected=np.roll(SELECTED_LH, 1, axis=1))
    _heads(tmp_path / "c.png", scores=SCORES_LH[::-1])
    first, other_heads, other_scores = (_pixels(tmp_path / f"{name}.png") for name in "abc")
    assert not np.array_equal(first, other_heads)
    assert not np.array_equal(first, other_scores)


@pytest.mark.parametrize(
    "scores",
    [
        np.zeros((2, 3)),
        np.full((2, 3), 4.2e-7),
        np.full((2, 3), np.nan),
        np.array([[1.0, np.nan, np.inf], [-1.0, 0.0, 2.0]]),
        np.array([[0.0, 1e-9, 1e-9], [1e-9, 1e-9, 1.0]]),
        np.ones((1, 1)),
        np.random.default_rng(1).random((70, 3)),
    ],
    ids=["zeros", "equal", "nan", "not finite", "heavy tail", "one head", "deep"],
)
def test_any_scores_can_be_drawn_as_a_map(scores, tmp_path):
    _heads(tmp_path / "a.png", scores=scores, selected=np.zeros_like(scores, dtype=bool))
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_a_heavy_tail_makes_the_colours_logarithmic():
    from matplotlib.colors import LogNorm

    tail, even = np.array([[1.0, 1.0, 1.0, 1000.0]]), np.array([[1.0, 2.0, 3.0, 4.0]])
    assert isinstance(plots._colour_scale(tail)[0], LogNorm)
    assert not isinstance(plots._colour_scale(even)[0], LogNorm)
    assert not isinstance(plots._colour_scale(tail - 1.5)[0], LogNorm)


@pytest.mark.parametrize(
    ("scores", "cut"),
    [
        ([], np.nan),
        ([np.nan, -np.inf], np.nan),
        ([1.0] * 5, 1.0),
        ([1.0, 2.0, np.nan, -np.inf, np.inf], 2.0),
        ([1.0, 2.0], -np.inf),
    ],
)
def test_any_scores_can_be_drawn_as_a_histogram(scores, cut, tmp_path):
    _histogram(tmp_path / "a.png", scores, cut)
    assert (tmp_path / "a.png").stat().st_size > 1000


@settings(max_examples=60)
@given(arrays(np.float64, st.integers(1, 200), elements=st.floats(-1e3, 1e3)))
def test_bins_hold_every_score(scores):
    edges = plots._bin_edges(scores)
    assert 2 <= len(edges) <= plots.MAX_BINS + 1
    assert np.histogram(scores, edges)[0].sum() == len(scores)


@pytest.mark.parametrize("losses", [[], [2.0], [2.0, np.nan, 1.0], list(np.linspace(3, 1, 300)), [np.nan] * 100])
def test_any_losses_can_be_drawn(losses, tmp_path):
    loss_curve(np.arange(len(losses)), losses, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("held_out", "star"),
    [
        ([(0, 2.0), (4, 1.5), (8, 1.7)], (4, 1.5)),
        ([(0, 1.0), (4, 1.5), (8, 1.7)], (4, 1.5)),  # the untrained model is better, and is not what is kept
        ([(0, 2.0), (4, np.nan), (8, 1.7)], (8, 1.7)),
        ([(0, np.nan), (4, np.nan)], None),
    ],
)
def test_the_star_is_at_the_weights_that_are_kept(tmp_path, monkeypatch, held_out, star):
    from matplotlib.axes import Axes

    plot, stars = Axes.plot, []

    def noted(self, *args, marker="", **more):
        if marker == "*":
            stars.append(args)
        return plot(self, *args, marker=marker, **more)

    monkeypatch.setattr(Axes, "plot", noted)
    loss_curve([1, 2, 3], [3.0, 2.0, 1.0], tmp_path / "a.png", held_out=held_out)
    assert stars == ([] if star is None else [star])


@settings(max_examples=60)
@given(st.lists(st.floats(-10, 10) | st.just(np.nan), min_size=9, max_size=40), st.sampled_from([3, 5, 9]))
def test_the_running_mean_is_that_of_the_neighbours(values, width):
    found = plots._running_mean(np.array(values), width)
    for index in range(len(values)):
        near = [value for value in values[max(0, index - width // 2) : index + width // 2 + 1] if value == value]
        expected = sum(near) / len(near) if near else np.nan
        assert found[index] == pytest.approx(expected, abs=1e-9, nan_ok=True)


@pytest.mark.parametrize("name", ["$x^2$", "a$b \\frac{", "漢字\ntwo lines", "x" * 300, ""])
def test_names_are_drawn_as_they_are(name, row, make_report, tmp_path):
    aer_scatter(make_report(row(name, 100.0)), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_many_runs_get_numbers_and_a_key(row, make_report, tmp_path):
    aer_scatter(make_report(row("a", 100.0)), tmp_path / "few.png")
    crowd = [row(f"a rather long name of a run {number}", 100.0 + number, 0.80) for number in range(30)]
    aer_scatter(make_report(*crowd), tmp_path / "many.png")
    few, many = (_pixels(tmp_path / f"{name}.png").shape for name in ("few", "many"))
    assert many[0] > few[0]
    assert many[1] > few[1]


def test_a_report_without_scores_can_be_drawn(row, make_report, tmp_path):
    report = make_report()
    aer_scatter(type(report)(report.reference, (row("a", score=None),), (), ()), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


@pytest.fixture
def drawn(monkeypatch):
    """Keep the figures that are drawn."""
    figures, figure_of = [], plots._figure

    @contextmanager
    def keep(*arguments, **options):
        with figure_of(*arguments, **options) as figure:
            figures.append(figure)
            yield figure

    monkeypatch.setattr(plots, "_figure", keep)
    return figures


def _reading(scores):
    layers, heads = np.indices(scores.shape)
    return ReadingHeads(shallow_LH=layers < 1, deep_LH=(layers < 3) & (heads % 3 == 0))


@pytest.mark.parametrize("shape", [(4, 8), (30, 9), (80, 64), (1, 1)])
def test_title_and_legend_of_the_heat_map_neither_overlap_nor_are_clipped(drawn, tmp_path, shape):
    scores = np.random.default_rng(0).random(shape)
    title = "contrast: 51,200 of 512,000 heads"
    head_heatmap(scores, scores > 0.9, tmp_path / "a.png", title=title, reading=_reading(scores))
    [figure] = drawn
    axes, [legend] = figure.axes[0], figure.legends
    renderer = figure.canvas.get_renderer()
    named, told = (part.get_window_extent(renderer) for part in (axes._left_title, legend))
    for part in (named, told):
        assert figure.bbox.x0 <= part.x0 < part.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= part.y0 < part.y1 <= figure.bbox.y1
    assert told.y1 <= axes.get_tightbbox(renderer).y0
    assert named.y0 >= axes.get_window_extent(renderer).y1
    assert not axes._right_title.get_text()


def test_the_heat_map_marks_both_selections(drawn, tmp_path):
    scores = np.random.default_rng(0).random((5, 6))
    selected, reading = scores > 0.7, _reading(scores)
    head_heatmap(scores, selected, tmp_path / "a.png", title="readout", reading=reading)
    head_heatmap(scores, selected, tmp_path / "b.png", title="pad")
    marked, plain = (figure.axes[0].collections for figure in drawn)
    found = {legend.get_label(): marks for marks, legend in zip(marked[::2], marked[1::2], strict=True)}
    assert set(found) == {"trained", "reads all rows", "reads the best rows"}
    wanted = selected, reading.shallow_LH, reading.deep_LH
    for marks, heads_LH in zip(found.values(), wanted, strict=True):
        assert {(y, x) for x, y in marks.get_offsets().tolist()} == {tuple(at) for at in np.argwhere(heads_LH).tolist()}
    sizes = [marks.get_sizes()[0] for marks in found.values()]
    assert sizes == sorted(sizes, reverse=True), "one inside the other, so that a head may have all"
    assert [marks.get_label() for marks in plain[1::2]] == ["selected"]


def test_marks_show_on_dark_cells_and_on_bright_ones(tmp_path):
    reading = ReadingHeads(np.array([[True, False] * 2]), np.array([[False, True] * 2]))
    scores, none = np.array([[0.0, 0.0, 1.0, 1.0]]), np.zeros((1, 4), bool)
    for name, selected, readers in (("a", none, None), ("b", none, reading), ("c", ~none, None)):
        head_heatmap(scores, selected, tmp_path / f"{name}.png", title="", reading=readers)
    bare, *others = (_pixels(tmp_path / f"{name}.png")[:, :, :3].mean(axis=2) for name in "abc")
    cells = np.array_split(np.arange(int(bare.shape[1] * 0.1), int(bare.shape[1] * 0.82)), 4)
    for other in others:
        for columns in cells:
            change = np.abs(other - bare)[: int(0.6 * bare.shape[0]), columns]
            assert change.max() > 0.3
