"""What a person sees: bars on a terminal, lines in a log, numbers in a table."""

import datetime
import io
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from p2d_cli.cli import render, terminal
from p2d_cli.core.geometry import ReadingHeads
from p2d_cli.engine.stage_run import StageResult
from p2d_cli.runtime.progress import SilentProgress


class FakeClock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def lines_at(clock):
    """Progress in lines, by a clock that began at 23:59:50 on some day."""
    began = datetime.datetime(2026, 3, 1, 23, 59, 50)
    return terminal.LineProgress(clock, lambda: began + datetime.timedelta(seconds=clock.now))


@pytest.fixture
def said(monkeypatch):
    """Collect what is written to both streams."""
    streams = {"out": io.StringIO(), "err": io.StringIO()}
    monkeypatch.setattr(render, "out", Console(file=streams["out"], width=80, highlight=False))
    monkeypatch.setattr(terminal, "err", Console(file=streams["err"], width=80, highlight=False))
    return streams


def test_off_a_terminal_a_line_is_written_now_and_then(capsys):
    clock = FakeClock()
    with lines_at(clock).task("read rows", 100) as advance:
        advance(10)
        assert capsys.readouterr().err == ""
        clock.now = 10
        advance(10)
        assert capsys.readouterr().err == "00:00:00 read rows: 20/100, 10 s, about 40 s left\n"
        clock.now = 19
        advance(10)
        assert capsys.readouterr().err == ""


def test_work_of_unknown_length_says_how_far_it_is(capsys, said):
    clock = FakeClock()
    with lines_at(clock).task("count rows", None) as advance:
        clock.now = 12
        advance(1024)
    assert capsys.readouterr().err == "00:00:02 count rows: 1024, 12 s\n"
    with terminal.BarProgress().task("count rows", None) as advance:
        advance(3)


def test_what_an_interrupted_run_finished_does_not_count_as_speed(capsys):
    clock = FakeClock()
    with lines_at(clock).task("train", 100, found=60) as advance:
        advance(60)
        clock.now = 10
        advance(0)
        assert capsys.readouterr().err == "00:00:00 train: 60/100, 10 s\n"
        clock.now = 20
        advance(8)
        assert capsys.readouterr().err == "00:00:10 train: 68/100, 20 s, about 80 s left\n"
        clock.now = 900
        advance(8)
        assert capsys.readouterr().err == "00:14:50 train: 76/100, 900 s, about 22 min left\n"


def test_what_is_told_stands_in_the_line_and_some_of_it_at_once(capsys):
    clock = FakeClock()
    progress = lines_at(clock)
    with progress.task("train", 100) as advance:
        advance(0, "held-out 1.900", at_once=True)
        assert capsys.readouterr().err == "23:59:50 train: 0/100, 0 s; held-out 1.900\n"
        clock.now = 9
        advance(9, "loss 1.200 · held-out 1.900")
        assert capsys.readouterr().err == ""
        clock.now = 10
        advance(1)
        assert capsys.readouterr().err == (
            "00:00:00 train: 10/100, 10 s, about 90 s left; loss 1.200 · held-out 1.900\n"
        )
    progress.note("going on from checkpoint-3 of the interrupted run")
    assert capsys.readouterr().err == "00:00:00 going on from checkpoint-3 of the interrupted run\n"


def test_a_bar_shows_what_is_told_in_a_line_below_that_fits_the_terminal(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(terminal, "err", Console(file=stream, width=80, force_terminal=True, color_system=None))
    told = "loss 1.234 · lr 2.8e-03 · 1,240 tokens/s · held-out 1.101"
    with terminal.BarProgress().task("train (heads)", 189) as advance:
        advance(63, told)
        advance(1)
    shown = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", stream.getvalue()).replace("\r", "\n").splitlines()
    assert max(map(len, shown)) <= 80
    last = max(place for place, line in enumerate(shown) if " 64/189 " in line)
    assert shown[last + 1].rstrip() == f"  {told}"


def test_progress_fits_the_listener(monkeypatch, said):
    assert isinstance(terminal.progress_for(quiet=True), SilentProgress)
    assert isinstance(terminal.progress_for(quiet=False), terminal.LineProgress)
    monkeypatch.setattr(terminal, "err", Console(file=said["err"], force_terminal=True))
    assert isinstance(terminal.progress_for(quiet=False), terminal.BarProgress)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert isinstance(terminal.progress_for(quiet=False), SilentProgress)


def test_bars_and_notes(said):
    bars = terminal.BarProgress()
    with bars.task("train", 3) as advance:
        advance(3)
    bars.note("[not markup]")
    assert "note: [not markup]" in said["err"].getvalue()


def test_a_heat_map_marks_what_is_selected(said):
    scores = np.arange(6, dtype=float).reshape(2, 3)
    render.print_heat_map(scores, scores > 3)
    lines = said["out"].getvalue().splitlines()
    assert "##" not in lines[2]
    assert lines[3].count("##") == 2
    assert "0 to 5" in lines[-1]


def cells(text, layers, start=6):
    """Return the cells of each layer's lines, joined."""
    found = [line[start:] for line in text.splitlines() if line[:5].strip().isdigit()]
    return ["".join(found[layer::layers]) for layer in range(layers)]


MARKS = {(0, 0, 0): ".", (1, 0, 0): "#", (0, 1, 0): "a", (0, 0, 1): "b", (0, 1, 1): "c"}
MARKS |= {(1, 1, 0): "A", (1, 0, 1): "B", (1, 1, 1): "C"}


@pytest.mark.parametrize(("shape", "wide"), [((30, 9), 2), ((3, 37), 2), ((3, 64), 1), ((3, 74), 1), ((3, 200), 1)])
def test_a_heat_map_marks_who_reads_and_fits_80_columns(said, shape, wide):
    scores = np.random.default_rng(0).random(shape)
    selected, first, best = (np.random.default_rng(seed).random(shape) > 0.6 for seed in (1, 2, 3))
    render.print_heat_map(scores, selected, ReadingHeads(first, best))
    text = said["out"].getvalue()
    assert max(len(line) for line in text.splitlines()) <= 80
    assert cells(text, shape[0]) == [
        "".join(MARKS[tuple(int(heads[layer, head]) for heads in (selected, first, best))] * wide
                for head in range(shape[1]))
        for layer in range(shape[0])
    ]  # fmt: skip
    assert "# trained, a reads all rows, b the best, c both; capital: trained too" in text
    assert ("heads 74 to 147" in text) is (shape[1] == 200)


def test_the_legend_of_a_heat_map_names_the_marks_that_are_there(said):
    first, best = np.eye(2, 3, dtype=bool), np.eye(2, 3, k=1, dtype=bool)
    render.print_heat_map(np.ones((2, 3)), np.eye(2, 3, k=2, dtype=bool), ReadingHeads(first, best))
    lines = said["out"].getvalue().splitlines()
    assert lines[2] == "  # trained, a reads all rows, b the best"
    assert lines[3:5] == ["    0 aabb##", "    1 ..aabb"]


@pytest.mark.parametrize("no_color", [True, False])
def test_a_heat_map_says_without_colours_what_it_can(monkeypatch, no_color):
    stream = io.StringIO()
    monkeypatch.setattr(
        render, "out", Console(file=stream, width=80, force_terminal=True, color_system="256", no_color=no_color)
    )
    scores = np.array([[0.0, 1.0, np.nan]])
    render.print_heat_map(scores, scores > 0.5)
    written = stream.getvalue()
    assert ("48;5;" in written) is not no_color
    row = re.sub(r"\x1b\[[\d;]*m", "", written).splitlines()[2]
    assert row == ("    0 ..##  " if no_color else "    0   ##  ")


HEADS = {
    "method": "readout", "heads_selected": 27, "heads_total": 270, "groups_touched": 20, "groups_total": 90,
    "layers_touched": 15,
}  # fmt: skip


@pytest.mark.parametrize(
    ("counts", "depths", "line"),
    [
        ((27, 27), [3, 20], "27 heads of the first 3 layers read all rows, 27 of the first 20 layers the best"),
        ((8, 4), [1, 3], "8 heads of the first layer read all rows, 4 of the first 3 layers the best"),
        ((1, 1), [1, 1], "1 head of the first layer reads all rows, 1 of the first layer the best"),
    ],
)
def test_which_heads_read_is_said_of_heads(said, counts, depths, line):
    summary = HEADS | {"heads_reading_all": counts[0], "heads_reading_best": counts[1], "depths": depths}
    render.print_summary(SimpleNamespace(kind="heads", summary=summary))
    assert said["out"].getvalue().splitlines()[1] == f"  {line}"


def test_of_older_heads_nobody_says_who_reads(said):
    render.print_summary(SimpleNamespace(kind="heads", summary=HEADS))
    assert "read all" not in said["out"].getvalue()


def test_equal_scores_do_not_break_a_heat_map(said):
    render.print_heat_map(np.ones((1, 2)), np.zeros((1, 2), bool))
    assert "1 to 1" in said["out"].getvalue()


def test_only_work_that_was_done_has_a_time(said):
    result = StageResult("train", Path("adapter"), "would-run", "key", {}, None, 1.5)
    render.print_result(result)
    assert said["out"].getvalue() == "train would run  adapter\n"
    summary = {"parameters": 12, "dtype": "float32", "base": "model"}
    manifest = SimpleNamespace(kind="model", summary=summary)
    render.print_result(replace(result, status="done", manifest=manifest))
    render.print_result(replace(result, status="up-to-date", manifest=manifest))
    assert said["out"].getvalue().splitlines()[1::2] == ["train done  1.5 s  adapter", "train up to date  adapter"]


def row(**changes):
    metric = {"value": 0.5, "low": 0.4, "high": 0.6, "count": 10}
    fields = {"name": "run", "metrics": {"exact_match": metric}, "aer": 0.1, "speedup": 10.0, "str_ratio": 0.05}
    fields |= {"total_seconds": 1.0, "trainable_share": 0.02, "is_control": False, "is_reference": False, "mixed": []}
    return fields | changes


def test_report_cells_carry_marks_margins_and_gaps():
    assert render._report_cells(row(), "exact_match")[:4] == ["run", "0.500 [0.400, 0.600]", "0.100", "10.0x"]
    marked = render._report_cells(row(is_control=True, mixed=["precision"], speedup=None, metrics={}), "exact_match")
    assert marked[:4] == ["run *!", "", "0.100", ""]
    bare = {"exact_match": {"value": 0.5, "low": None, "high": None, "count": 1}}
    assert render._report_cells(row(is_reference=True, metrics=bare), "exact_match")[:2] == ["run =", "0.500"]


def test_a_report_fits_80_columns(said):
    rows = [row(name="contrast heads, p2d rows (heads-contrast-p2d-s0)"), row(is_reference=True)]
    summary = {"rows": rows, "reference": {"extrapolated": True}, "warnings": ["a control does as well"]}
    for line in render._report_lines(summary):
        render.out.print(line)
    text = said["out"].getvalue()
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "extrapolated" in text
    render.print_summary(SimpleNamespace(kind="report", summary=summary))
    assert said["out"].getvalue().splitlines()[-1] == "  warning: a control does as well"


ADAPTER = {
    "scope": "heads", "first_loss": 2.5, "final_loss": 1.25, "updates": 189, "rows": 1050, "learning_rate": 3e-3,
    "trained_parameters": 5, "total_parameters": 100, "trainable_share": 0.05,
}  # fmt: skip


@pytest.mark.parametrize(
    ("more", "lines"),
    [
        ({}, []),
        ({"best_update": None, "best_eval_loss": None, "untrained_eval_loss": None}, []),
        (
            {"best_update": 126, "best_eval_loss": 1.101},
            ["held-out loss 1.101 after update 126, whose weights are kept"],
        ),
        (
            {"best_update": 126, "best_eval_loss": 1.101, "untrained_eval_loss": 1.93},
            ["held-out loss 1.930 untrained, 1.101 after update 126, whose weights are kept"],
        ),
    ],
)
def test_a_training_says_which_update_was_kept(said, more, lines):
    """Adapters of earlier versions do not know of the untrained model, and some of no held-out rows."""
    render.print_summary(SimpleNamespace(kind="adapter", summary=ADAPTER | more))
    assert [line.strip() for line in said["out"].getvalue().splitlines()[1:-1]] == lines


@pytest.mark.parametrize(
    ("kept", "text"), [("memory", ", 2 frozen layers computed once a row"), ("nowhere", ""), (None, "")]
)
def test_a_training_shows_its_batch_size_and_the_layers_computed_once(said, kept, text):
    more = {"batch_size": 8, "frozen_layers": 2, "frozen_kept": kept}
    render.print_summary(SimpleNamespace(kind="adapter", summary=ADAPTER | more))
    first, last = said["out"].getvalue().splitlines()
    assert "1050 rows, batch size 8, peak lr" in first.replace(",050", "050")
    assert last.endswith(f"(5.00%){text}")


def test_one_update_on_one_row_is_singular(said):
    render.print_summary(SimpleNamespace(kind="adapter", summary=ADAPTER | {"updates": 1, "rows": 1}))
    assert "1 update on 1 row, peak" in said["out"].getvalue()


def test_warnings_stand_below_the_result(said):
    render.print_summary(SimpleNamespace(kind="adapter", summary=ADAPTER | {"warnings": ["the [red]loss[/] rose"]}))
    assert said["out"].getvalue().splitlines()[-1] == "  warning: the [red]loss[/] rose"


def test_warnings_of_stages_that_are_not_shown_name_their_folders_and_are_said_once(said):
    results = [
        StageResult(
            "train", Path(f"runs/x/adapter/{name}"), "done", "key", {}, SimpleNamespace(summary={"warnings": told}), 1.0
        )
        for name, told in {"a": ["12 updates"], "b": [], "c": ["12 updates", "it rose"], "d": ["12 updates"]}.items()
    ]
    more = [replace(results[0], out=Path("elsewhere")), replace(results[0], manifest=None)]
    render.print_warnings_of([*results, *more], Path("runs/x"))
    assert said["out"].getvalue().splitlines() == [
        "  warning: adapter/a, adapter/c, adapter/d and 1 more: 12 updates",
        "  warning: adapter/c: it rose",
    ]
