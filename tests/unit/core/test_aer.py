from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2d_cli.core.aer import (
    MetricValue,
    Reference,
    RunCost,
    StageCost,
    compare,
    control_warnings,
    pareto_front,
    reference_seconds,
)
from p2d_cli.core.metrics import lower_is_better
from p2d_cli.errors import ArtifactError, UsageError

FULL_SETTINGS = {"scope": "full", "trainable_share": 1.0, "data_method": "full", "row_share": 1.0}


def _stage(stage: str, artifact: str, seconds: dict[str, float] | float, **other) -> StageCost:
    phases = {stage: seconds} if isinstance(seconds, int | float) else seconds
    return StageCost(
        **{"stage": stage, "artifact": artifact, "seconds": phases, "hardware": "H200", "precision": "bfloat16"}
        | {"model": "tiny"}
        | other
    )


def _train(artifact: str, seconds: dict[str, float] | float, *, done: int = 100, planned: int = 100, **other):
    defaults = {"epochs": 3.0, "steps_done": done, "steps_planned": planned}
    return _stage("train", artifact, seconds, **(defaults | other))


def _run(name: str, *stages: StageCost, score: float = 0.5, metric: str = "exact_match") -> RunCost:
    return RunCost(name, stages, {metric: MetricValue(score, score - 0.1, score + 0.1, 100)}, f"runs/{name}")


def _full(seconds: dict[str, float] | float = 1000.0, **other) -> RunCost:
    data = _stage(
        "mine-data", "all", {"select": 5.0}, settings={"method": "full", "rows_selected": 50, "rows_total": 50}
    )
    return _run("full", data, _train("full", seconds, settings=FULL_SETTINGS, **other))


def _method(name: str = "p2d", heads: str = "pad", data: str = "p2d", score: float = 0.6, **train) -> RunCost:
    run = _run(
        name,
        _stage("score-heads", f"h-{heads}", {"load": 9.0, "proxy": 20.0, "score": 10.0}, peak_gib=3.0)
        if heads == "none"
        else _stage(
            "score-heads",
            f"h-{heads}",
            {"load": 9.0, "proxy": 20.0, "score": 10.0},
            peak_gib=3.0,
            settings={"method": heads, "ratio": 0.1},
        ),
        _stage(
            "mine-data",
            f"d-{data}",
            {"load": 9.0, "mine": 20.0},
            peak_gib=4.0,
            settings={"method": data, "ratio": 0.1, "rows_selected": 7, "rows_total": 70},
        ),
        _train(
            f"t-{name}",
            {"load": 9.0, "compile": 50.0, "train": 100.0, "save": 10.0, "evaluate": 5.0},
            peak_gib=2.0,
            settings={
                "scope": "heads",
                "trainable_share": 0.02,
                "head_share": 0.1,
                "row_share": 0.1,
                "heads_method": heads,
                "data_method": data,
            },
            **train,
        ),
        _stage("eval", f"e-{name}", {"load": 9.0, "generate": 77.0}, peak_gib=50.0),
        score=score,
    )
    return replace(run, is_control="random" in (heads, data))


def test_the_ratio_by_hand():
    report = compare([_method()], _full())
    assert [row.name for row in report.rows] == ["p2d", "full"]
    p2d, full = report.rows
    assert (p2d.score_heads_seconds, p2d.mine_data_seconds, p2d.train_seconds) == (30.0, 20.0, 110.0)
    assert p2d.total_seconds == 160.0
    assert p2d.aer == pytest.approx(0.16)
    assert p2d.speedup == pytest.approx(6.25)
    assert p2d.str_ratio == pytest.approx(0.05)
    assert (p2d.head_share, p2d.row_share, p2d.trainable_share, p2d.peak_gib) == (0.1, 0.1, 0.02, 4.0)
    assert (p2d.is_control, p2d.is_reference, p2d.mixed) == (False, False, ())
    assert (full.is_control, full.is_reference) == (False, True)
    assert (full.total_seconds, full.aer, full.speedup, full.str_ratio) == (1000.0, 1.0, 1.0, 0.0)
    assert (full.row_share, full.trainable_share) == (1.0, 1.0)
    assert report.reference == Reference(1000.0, False, 100, 100, "H200", "bfloat16")
    assert (report.flags, report.warnings) == ((), ())


def test_an_artifact_is_charged_once_however_many_stages_used_it():
    heads = _stage("score-heads", "h", 30.0)
    run = _run("p2d", heads, _stage("mine-data", "d", 20.0), heads, _train("t", 50.0), heads)
    assert run.seconds_of("score-heads") == 30.0
    assert run.selection_seconds == 50.0
    assert run.total_seconds == 100.0
    other = _run("two", heads, _stage("score-heads", "h2", 5.0), _train("t", 50.0))
    assert other.seconds_of("score-heads") == 35.0
    assert other.seconds_of("mine-data") == 0.0


def test_a_reference_that_was_cut_short_is_extrapolated_by_its_updates_and_says_so():
    reference = _full({"load": 9.0, "prepare": 40.0, "train": 100.0, "evaluate": 3.0}, done=20, planned=200)
    found = reference_seconds(reference)
    assert found == Reference(40.0 + 1000.0, True, 20, 200, "H200", "bfloat16")
    report = compare([_method()], reference)
    assert report.rows[-1].train_seconds == 1040.0
    assert report.rows[0].aer == pytest.approx(160 / 1040)
    assert any("extrapolated from 20 of 200 updates" in flag for flag in report.flags)


def test_extrapolation_is_by_tokens_where_they_are_known():
    found = reference_seconds(
        _full({"prepare": 4.0, "train": 60.0}, done=12, planned=492, tokens=9_000, tokens_planned=300_000)
    )
    assert found.seconds == pytest.approx(4.0 + 2000.0)
    whole = reference_seconds(_full({"train": 60.0}, done=12, planned=12, tokens=9_000, tokens_planned=9_000))
    assert whole.seconds == 60.0


def test_without_a_train_phase_all_charged_seconds_are_scaled():
    found = reference_seconds(_full({"loop": 60.0, "other": 40.0, "load": 5.0}, done=10, planned=20))
    assert found.seconds == pytest.approx(200.0)


@settings(deadline=None)
@given(done=st.integers(1, 500), planned=st.integers(1, 500), each=st.floats(0.01, 100))
def test_extrapolation_is_what_the_whole_training_would_have_taken(done: int, planned: int, each: float):
    found = reference_seconds(_full({"train": done * each}, done=done, planned=planned))
    assert found.extrapolated == (done < planned)
    assert found.seconds == pytest.approx(max(done, planned) * each)


def test_a_reference_without_a_timed_training_is_refused():
    untrained = _run("base", _stage("eval", "e", 5.0))
    nothing = _full(0.0)
    no_updates = _full(12.0, done=0, planned=10)
    for reference, found in ((untrained, "no training"), (nothing, "0 s"), (no_updates, "for 0 updates")):
        with pytest.raises(UsageError, match=f"expected one timed training, found .*{found}"):
            compare([_method()], reference)


def test_the_reference_among_the_runs_appears_once():
    reference = _full()
    assert compare([_method(), reference], reference) == compare([reference, _method()], reference)
    assert [row.is_reference for row in compare([reference], reference).rows] == [True]
    assert [row.name for row in compare([], reference).rows] == ["full"]


@pytest.mark.parametrize(
    ("field", "value", "theirs"),
    [
        ("hardware", "A100", "H200"),
        ("precision", "float32", "bfloat16"),
        ("epochs", 1.0, "3.0"),
        ("model", "big", "tiny"),
    ],
)
def test_mixed_runs_are_refused_by_name_unless_allowed(field: str, value: object, theirs: str):
    runs = [_method(), _method("odd", **{field: value})]
    with pytest.raises(
        UsageError, match=f"run 'odd', train: {field} is {value}, the reference's is {theirs}"
    ) as caught:
        compare(runs, _full())
    assert "'p2d'" not in str(caught.value)
    assert caught.value.hint is not None
    assert "--allow-mixed" in caught.value.hint
    report = compare(runs, _full(), allow_mixed=True)
    assert {row.name: row.mixed for row in report.rows} == {"p2d": (), "odd": (field,), "full": ()}
    assert [flag for flag in report.flags if "'odd'" in flag and field in flag]


def test_where_the_heads_were_scored_matters_but_not_where_the_run_was_evaluated():
    run = _method()
    elsewhere = replace(run, stages=tuple(replace(s, hardware="A100") if s.stage == "eval" else s for s in run.stages))
    assert compare([elsewhere], _full()).rows[0].mixed == ()
    scored = replace(
        run, stages=tuple(replace(s, hardware="A100") if s.stage == "score-heads" else s for s in run.stages)
    )
    with pytest.raises(UsageError, match="run 'p2d', score-heads: hardware is A100"):
        compare([scored], _full())


def test_what_was_not_recorded_is_not_mixed():
    assert compare([_method(epochs=None, model="")], _full()).rows[0].mixed == ()
    assert compare([_method(epochs=3.0 + 1e-12)], _full()).rows[0].mixed == ()


@pytest.mark.parametrize(
    ("method_score", "control_score", "metric", "warned"),
    [
        (0.6, 0.6, "exact_match", True),
        (0.6, 0.7, "exact_match", True),
        (0.6, 0.5, "exact_match", False),
        (9.0, 8.0, "perplexity", True),
        (9.0, 9.5, "perplexity", False),
        (math.nan, 0.5, "exact_match", False),
    ],
)
def test_a_control_that_does_as_well_for_no_more_is_pointed_out(
    method_score: float, control_score: float, metric: str, warned: bool
):
    def scored(run: RunCost, score: float) -> RunCost:
        return replace(run, metrics={metric: MetricValue(score, score, score, 10), "other": MetricValue(0, 0, 0, 10)})

    method = scored(_method(), method_score)
    control = scored(_method("dice", heads="random", data="random"), control_score)
    warnings = compare([method, control], _full()).warnings
    assert [w for w in warnings if "'p2d' is not better than a control: 'dice'" in w] == list(warnings)
    assert bool(warnings) is warned


def test_a_control_that_costs_more_or_lacks_the_metric_is_no_rival():
    control = _method("dice", heads="random", data="random", score=0.9)
    costly = replace(control, stages=(*control.stages, _stage("mine-data", "d2", 1.0, settings={"method": "random"})))
    assert compare([_method(), costly], _full()).warnings == ()
    other = replace(control, metrics={"token_f1": MetricValue(1, 1, 1, 10)})
    assert compare([_method(), other], _full()).warnings == ()
    assert compare([replace(_method(), metrics={}), control], _full()).warnings == ()


def test_a_reference_that_is_no_full_fine_tuning_and_an_unfinished_run_are_pointed_out():
    warnings = compare([_method("cut", done=5, planned=50)], _method("lora-ish")).warnings
    assert any("'lora-ish' is no full fine-tuning: it was trained with scope 'heads'" in text for text in warnings)
    assert any("'lora-ish' was trained on 10.0% of the rows" in text for text in warnings)
    assert any("'cut' stopped after 5 of 50 updates" in text for text in warnings)


def test_the_untrained_model_costs_nothing_and_has_no_speedup():
    row = compare([_run("base", _stage("eval", "e", 5.0))], _full()).rows[0]
    assert (row.name, row.aer, row.speedup, row.total_seconds, row.peak_gib) == ("base", 0.0, None, 0.0, None)
    assert (row.head_share, row.row_share, row.trainable_share) == (None, None, None)


def test_both_selections_are_charged_where_other_heads_mined():
    """Random heads trained on rows that contrast heads mined."""
    mining = _stage("score-heads", "h1", 20.0, settings={"method": "contrast", "ratio": 0.1})
    trained = _stage("score-heads", "h2", 1.0, settings={"method": "random", "ratio": 0.1})
    settings = {"scope": "heads", "heads_method": "random", "head_share": 0.1, "data_method": "p2d", "row_share": 0.1}
    for order in ((mining, trained), (trained, mining)):
        row = compare([_run("r", *order, _train("t", 5.0, settings=settings))], _full()).rows[0]
        assert row.score_heads_seconds == 21.0
        assert row.head_share == 0.1


def test_rows_are_sorted_by_cost_then_name():
    cheap = _run("z-cheap", _train("a", 1.0))
    twin = _run("a-cheap", _train("b", 1.0))
    slow = _run("slow", _train("c", 5000.0))
    assert [row.name for row in compare([slow, cheap, twin], _full()).rows] == ["a-cheap", "z-cheap", "full", "slow"]


def test_costs_survive_json():
    cost = _train("t", {"train": 1.5, "load": 2.0}, tokens=12, peak_gib=0.5, settings={"scope": "heads"})
    assert StageCost.from_dict(json.loads(json.dumps(cost.to_dict()))) == cost
    assert cost.charged_seconds == 1.5
    short = {"stage": "eval", "artifact": "e", "seconds": {"load": 1}, "hardware": "H200", "precision": "float32"}
    assert StageCost.from_dict(short).settings == {}


def test_a_report_becomes_valid_json_with_every_field_of_its_rows():
    unknown = replace(_method(), metrics={"exact_match": MetricValue(0.5, math.nan, math.nan, 1)})
    document = compare([unknown], _full()).to_dict()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert set(document) == {"reference", "rows", "flags", "warnings", "groups", "head_maps", "confidence"}
    row, full = document["rows"]
    assert row["metrics"]["exact_match"] == {"value": 0.5, "low": None, "high": None, "count": 1}
    assert (row["aer"], row["mixed"], full["is_reference"]) == (pytest.approx(0.16), [], True)
    assert document["reference"]["seconds"] == 1000.0


def test_damaged_costs_are_refused_by_key():
    entry = _train("t", 1.0).to_dict()
    with pytest.raises(ArtifactError, match="missing or not known: colour, hardware"):
        StageCost.from_dict({key: value for key, value in entry.items() if key != "hardware"} | {"colour": 1})
    for seconds in (3.0, {"train": "long"}, {"train": None}):
        with pytest.raises(ArtifactError, match="expected seconds by phase"):
            StageCost.from_dict(entry | {"seconds": seconds})


_points = st.lists(st.tuples(st.integers(0, 4).map(float), st.sampled_from([0.0, 1.0, 2.0, math.nan])), max_size=8)


@settings(deadline=None)
@given(points=_points)
def test_the_pareto_front_is_every_point_that_no_other_beats(points: list[tuple[float, float]]):
    def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
        return a[0] <= b[0] and a[1] >= b[1] and a != b

    known = {i: p for i, p in enumerate(points) if not math.isnan(p[1])}
    expected = {i for i, p in known.items() if not any(beats(other, p) for other in known.values())}
    front = pareto_front(points)
    assert set(front) == expected
    assert len(front) == len(expected)
    assert [points[i][0] for i in front] == sorted(points[i][0] for i in front)


def test_lower_is_better_for_metrics_of_lm_eval_too():
    assert lower_is_better("perplexity")
    assert lower_is_better("wikitext/word_perplexity")
    assert lower_is_better("task/brier_score,strict")
    assert not lower_is_better("task/acc,none")
    control = _method("control", heads="random", data="random", score=9.0)
    runs = [replace(run, metrics={"t/word_perplexity": MetricValue(value, value, value, 5)})
            for run, value in ((_method(), 8.0), (control, 9.0))]  # fmt: skip
    assert not control_warnings(compare(runs, _full()).rows)


def test_the_level_of_the_intervals_is_told():
    def at(run, level):
        return replace(
            run, stages=(*run.stages, _stage("eval", f"judged-{run.name}", 1.0, settings={"confidence": level}))
        )

    assert compare([_method()], _full()).confidence == 0.95
    assert compare([at(_method(), 0.9)], at(_full(), 0.9)).confidence == 0.9
    mixed = compare([at(_method(), 0.9)], at(_full(), 0.95))
    assert mixed.confidence is None
    assert any("several levels: 0.9, 0.95" in flag for flag in mixed.flags)


def _of_zeros(**others: float) -> list[RunCost]:
    """A method, a control and the reference; each scores 0 on the main metric, and `others` on more of them."""
    scores = {"exact_match": 0.0, **others}
    metrics = {name: MetricValue(value, value, value + 0.1, 40) for name, value in scores.items()}
    runs = [_method("p2d"), replace(_method("random", heads="none"), is_control=True), _full()]
    return [replace(run, metrics=metrics) for run in runs]


def test_a_table_of_zeros_says_so_and_holds_nothing_against_a_control():
    *runs, full = _of_zeros()
    [warning] = compare(runs, full).warnings
    assert warning.startswith(
        "every run scores 0 on exact_match, so that it tells none from another; look at the answers"
    )


def test_another_metric_may_tell_runs_of_zeros_apart():
    *runs, full = _of_zeros(token_f1=0.3, rougeL=0.0)
    [warning] = compare(runs, full).warnings
    assert warning.endswith("; token_f1 may tell them apart")


@pytest.mark.parametrize("metric", ["perplexity", "task/word_perplexity,none"])
def test_zeros_are_no_failure_where_lower_is_better(metric):
    runs = [replace(run, metrics={metric: MetricValue(0.0, 0.0, 0.0, 4)}) for run in _of_zeros()]
    assert not any("scores 0" in warning for warning in compare(runs[:-1], runs[-1]).warnings)


def test_one_hit_is_enough():
    *runs, full = _of_zeros()
    scored = replace(full, metrics={"exact_match": MetricValue(0.025, 0.0, 0.1, 40)})
    assert not any("scores 0" in warning for warning in compare(runs, scored).warnings)
