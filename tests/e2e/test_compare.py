"""compare: two evaluations of the same rows, on their metrics and row by row."""

import hashlib
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from p2d_cli.cli import terminal


@pytest.fixture(scope="module")
def evaluations(p2d, pipeline, tiny_folder, few, tmp_path_factory):
    """Two evaluations, without and with the adapter, with all kinds of metrics."""
    folder = tmp_path_factory.mktemp("evaluations")
    choices = folder / "choices.json"
    choices.write_text(json.dumps([json.loads(line)["completion"] for line in few["test"].read_text().splitlines()]))
    for name, adapter in (("base", ()), ("adapted", ("--adapter", pipeline / "adapter"))):
        done = p2d(
            *("eval", "--model", tiny_folder, "--dtype", "float32", *adapter, "--data", few["test"]),
            *("--metric", "token_f1,exact_match,accuracy,perplexity", "--choices", choices, "--max-new-tokens", 8),
            *("--out", folder / name),
        )
        assert done.code == 0, done.said
    return folder / "base", folder / "adapted"


@pytest.fixture
def rewritten(tmp_path):
    """Change an evaluation's predictions, or its metrics, and make it a valid artifact again."""

    def rewrite(folder, name, change_rows=lambda rows: rows, change_metrics=lambda metrics: metrics):
        copy = shutil.copytree(folder, tmp_path / name)
        rows = change_rows(pq.read_table(copy / "predictions.parquet").to_pylist())
        pq.write_table(pa.Table.from_pylist(rows), copy / "predictions.parquet")
        metrics = change_metrics(json.loads((copy / "metrics.json").read_text()))
        (copy / "metrics.json").write_text(json.dumps(metrics))
        manifest = json.loads((copy / "manifest.json").read_text())
        for file, entry in manifest["outputs"].items():
            content = (copy / file).read_bytes()
            entry |= {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        manifest.pop("digest", None)
        (copy / "manifest.json").write_text(json.dumps(manifest))
        return copy

    return rewrite


def test_the_document_is_the_arithmetic_of_both(p2d, evaluations):
    found = p2d("compare", *evaluations, "--json").json
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in evaluations]
    tables = [pq.read_table(folder / "predictions.parquet").to_pydict() for folder in evaluations]
    assert found["rows"] == 10
    assert found["differences"] == ["input adapter"]
    assert list(found["metrics"]) == ["token_f1", "exact_match", "accuracy", "perplexity"]
    for name, metric in found["metrics"].items():
        assert (metric["first"], metric["second"]) == tuple(pytest.approx(of[name]["value"]) for of in metrics)
        assert metric["difference"] == pytest.approx(metric["second"] - metric["first"])
        assert metric["low"] <= metric["difference"] <= metric["high"]
        first, second = (np.array(table["log_likelihood" if name == "perplexity" else name]) for table in tables)
        assert (metric["won"], metric["lost"]) == ((second > first).sum(), (second < first).sum())
    assert found["changed_rows"] == len(found["changed"]) > 0
    for row in found["changed"]:
        place = tables[0]["id"].index(row["id"])
        assert row["prompt"] == tables[0]["prompt"][place]
        assert row["reference"] == tables[0]["reference"][place]
        column = "choice" if set(row["changes"]) == {"accuracy"} else "prediction"
        assert row["answers"] == [table[column][place] for table in tables]
        for name, pair in row["changes"].items():
            assert pair == [table[name][place] for table in tables]
            assert pair[0] != pair[1]


def test_a_run_compared_with_itself(p2d, evaluations):
    found = p2d("compare", evaluations[0], evaluations[0], "--json").json
    assert found["changed"] == found["differences"] == found["left_out"] == []
    for name, metric in found["metrics"].items():
        assert metric["difference"] == metric["won"] == metric["lost"] == 0
        # Ten rows on which nothing changes do not show that nothing ever would.
        assert (metric["low"] < 0) == (name in {"exact_match", "accuracy"})
        assert -metric["low"] == pytest.approx(metric["high"], abs=1e-12)


def test_metrics_on_which_neither_scores_are_named(p2d, evaluations, rewritten):
    assert "both score 0" not in p2d("compare", *evaluations).out.replace("both score 0 on exact_match", "")

    def all_wrong(rows):
        return [row | {"exact_match": 0.0, "accuracy": 0.0, "token_f1": 0.5} for row in rows]

    wrong = [rewritten(folder, folder.name, all_wrong) for folder in evaluations]
    told = "both score 0 on exact_match, accuracy: no difference can show there"
    assert f"warning: {told}" in p2d("compare", *wrong).out
    assert p2d("compare", *wrong, "--json").json["warnings"] == [told]


def test_seed_and_confidence_count(p2d, evaluations):
    def interval(*flags):
        metric = p2d("compare", *evaluations, "--json", *flags).json["metrics"]["perplexity"]
        return metric["low"], metric["high"]

    assert interval() == interval()
    assert interval() != interval("--seed", 1)
    assert interval()[0] < interval("--confidence", 0.5)[0]
    refused = p2d("compare", *evaluations, "--confidence", 1)
    assert (refused.code, "--confidence 1.0" in refused.said) == (2, True)


def test_rows_limit_what_is_shown(p2d, evaluations):
    everything = p2d("compare", *evaluations, "--json").json
    assert p2d("compare", *evaluations, "--json", "--rows", 1).json["changed"] == everything["changed"][:1]
    few_rows = p2d("compare", *evaluations, "--rows", 0).out
    assert f"{everything['changed_rows']} of 10 rows changed" in few_rows
    assert f"--rows {everything['changed_rows']} shows all" in few_rows
    assert everything["changed"][0]["id"] not in few_rows
    assert everything["changed"][-1]["id"] in p2d("compare", *evaluations, "--rows", 10).out


def test_it_reads_well_at_80_columns(p2d, evaluations, monkeypatch):
    monkeypatch.setattr(terminal.out, "_width", 80)
    shown = p2d("compare", *evaluations, "--rows", 10).out
    lines = [line for line in shown.splitlines() if str(evaluations[0].parent) not in line]
    assert max(map(len, lines)) <= 80
    header = next(line for line in lines if line.startswith("metric"))
    assert header.split() == ["metric", "A", "B", "B", "-", "A", "95%", "interval", "won", "lost"]
    assert all(any(line.startswith(name) for line in lines) for name in ("token_f1", "accuracy", "perplexity"))
    assert "reference" in shown


def test_only_a_perplexity_lists_rows_by_how_far_they_moved(p2d, evaluations, rewritten):
    def keep(metrics):
        return {"perplexity": metrics["perplexity"]}

    folders = [rewritten(folder, folder.name, change_metrics=keep) for folder in evaluations]
    changed = p2d("compare", *folders, "--json").json["changed"]
    moves = [abs(row["changes"]["log_likelihood"][1] - row["changes"]["log_likelihood"][0]) for row in changed]
    assert len(moves) == 10
    assert moves == sorted(moves, reverse=True)


def test_what_only_one_has_is_left_out_and_said(p2d, evaluations, rewritten):
    def drop(metrics):
        return {name: metrics[name] for name in ("exact_match", "perplexity")} | {"corpus_bleu": metrics["token_f1"]}

    other = rewritten(evaluations[1], "other", change_metrics=drop)
    found = p2d("compare", evaluations[0], other, "--json").json
    assert list(found["metrics"]) == ["exact_match", "perplexity"]
    assert found["left_out"] == ["token_f1", "accuracy", "corpus_bleu"]
    assert "not compared: token_f1, accuracy, corpus_bleu" in p2d("compare", evaluations[0], other).said


def test_rows_without_a_score_are_left_out_of_their_metric(p2d, evaluations, rewritten):
    def blank(rows):
        return [row | {"token_f1": None} if number < 4 else row for number, row in enumerate(rows)]

    found = p2d("compare", rewritten(evaluations[0], "blank", blank), evaluations[1], "--json").json
    assert found["metrics"]["token_f1"]["count"] == 6
    assert found["metrics"]["exact_match"]["count"] == 10


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: rows[:-1], ("the first has 10 rows, the second 9",)),
        (lambda rows: [*rows[:-1], rows[-1] | {"reference": "another"}], ("1 of 10", "reference", "row 10", "another")),
        (lambda rows: [rows[0] | {"prompt": "?"}, *rows[1:]], ("1 of 10", "prompt", "row 1", "'?'")),
        (lambda rows: rows[::-1], ("in the prompt", "row 1")),
    ],
    ids=["count", "reference", "prompt", "order"],
)
def test_other_rows_are_refused(p2d, evaluations, rewritten, change, words):
    refused = p2d("compare", evaluations[0], rewritten(evaluations[1], "other", change))
    assert refused.code == 65
    assert "evaluations of other rows" in refused.said
    for word in words:
        assert word in refused.said


def test_what_is_no_evaluation_is_refused(p2d, pipeline, evaluations, tmp_path):
    refused = p2d("compare", evaluations[0], pipeline / "subset", "--json")
    assert (refused.code, refused.json["exit_code"]) == (65, 65)
    assert "kind subset" in refused.said
    assert p2d("compare", evaluations[0], tmp_path).code == 65
    damaged = shutil.copytree(evaluations[1], tmp_path / "damaged")
    (damaged / "predictions.parquet").write_bytes(b"PAR1")
    assert p2d("compare", evaluations[0], damaged).code == 65
