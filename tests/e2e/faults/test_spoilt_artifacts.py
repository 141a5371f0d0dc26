"""Artifacts whose digests fit but whose contents do not say what p2d writes: refused by name, before they are used."""

import json
import shutil
from hashlib import sha256

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file


@pytest.fixture
def golden(tiny_folder):
    return tiny_folder.parent / "golden" / "v1"


@pytest.fixture
def copy_of_golden(golden, tmp_path):
    return lambda kind: shutil.copytree(golden / kind, tmp_path / kind)


def seal(folder, change=lambda manifest: None):
    """Make the manifest fit its payload, and change it."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_bytes())
    for name, entry in manifest["outputs"].items():
        content = (folder / name).read_bytes()
        entry |= {"sha256": sha256(content).hexdigest(), "bytes": len(content)}
    change(manifest)
    manifest.pop("digest", None)
    path.write_text(json.dumps(manifest))
    return folder


def refused(done, *words):
    assert done.code == 65, done.said
    for word in words:
        assert word in done.said, done.said


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("heads", lambda manifest: manifest["summary"].pop("method"), "method: Field required"),
        ("heads", lambda manifest: manifest["summary"].update(repeatability={}), "repeatability.draws"),
        ("subset", lambda manifest: manifest["summary"].update(rows_selected="8"), "rows_selected"),
        ("adapter", lambda manifest: manifest["summary"].update(template=["chat"]), "template"),
        ("evaluation", lambda manifest: manifest["summary"].update(metrics={"f1": 0.5}), "metrics.f1"),
        ("report", lambda manifest: manifest["summary"].update(rows=[{}]), "rows.0.name"),
        ("model", lambda manifest: manifest.update(hardware={}), "hardware.label"),
        ("model", lambda manifest: manifest.update(config={"out": {"value": 1}}), "config.out.origin"),
        ("heads", lambda manifest: manifest.update(identity={}), "identity.settings"),
        ("heads", lambda manifest: manifest.update(ledger=[{}]), "ledger.0.artifact"),
        ("heads", lambda manifest: manifest["seconds"].update(score=float("nan")), "finite"),
        ("heads", lambda manifest: manifest.update(schema="p2d.heads/" + "9" * 5000), "no schema that p2d knows"),
        ("model", lambda manifest: manifest["summary"].update(base="\ud800"), "not a valid manifest"),
    ],
)
def test_manifests_that_say_something_else(p2d, copy_of_golden, kind, change, words):
    refused(p2d("inspect", seal(copy_of_golden(kind), change)), "manifest.json", words)


@pytest.mark.parametrize(
    ("name", "change", "word"),
    [
        ("scores", lambda array: array * np.nan, "not finite"),
        ("scores", lambda array: array.astype(np.int8), "floating-point"),
        ("selected", lambda array: array & False, "selects no heads"),
        ("repeats", lambda array: array[0], "repeats"),
    ],
)
def test_heads_that_are_no_scores(p2d, copy_of_golden, name, change, word):
    folder = copy_of_golden("heads")
    path = folder / "head_scores.safetensors"
    with safe_open(path, framework="numpy") as file:
        described = file.metadata()
    tensors = load_file(path)
    save_file(tensors | {name: np.ascontiguousarray(change(tensors[name]))}, path, metadata=described)
    refused(p2d("inspect", seal(folder)), "head_scores.safetensors", word)


BYTES = pa.array([b"\xff"] * 8).view(pa.string())


@pytest.mark.parametrize(
    ("kind", "file", "column", "values", "word"),
    [
        ("evaluation", "predictions.parquet", "prediction", BYTES, "cannot be read"),
        ("evaluation", "predictions.parquet", "prompt", pa.array(range(8)), "'prompt' does not hold texts"),
        ("evaluation", "predictions.parquet", "token_f1", pa.array(["x"] * 8), "'token_f1' of the predictions"),
        ("subset", "subset.parquet", "score", pa.nulls(8), "'id' and 'score'"),
        ("subset", "subset.parquet", "id", BYTES, "cannot be read"),
    ],
)
def test_tables_with_other_columns(p2d, golden, copy_of_golden, kind, file, column, values, word):
    folder = copy_of_golden(kind)
    table = pq.read_table(folder / file)
    pq.write_table(table.set_column(table.column_names.index(column), column, values), folder / file)
    seal(folder)
    done = p2d("inspect", folder) if kind == "subset" else p2d("compare", folder, golden / kind)
    refused(done, word)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda cost: cost.update(seconds={"train": -1.0}), "seconds.train"),
        (lambda cost: cost.update(steps_done="10"), "steps_done"),
        (lambda cost: cost["settings"].update(head_share="all"), "settings.head_share"),
    ],
)
def test_costs_that_are_no_numbers(p2d, golden, copy_of_golden, tmp_path, change, word):
    folder = seal(copy_of_golden("evaluation"), lambda manifest: [change(cost) for cost in manifest["ledger"]])
    report = ("report-aer", folder, "--reference", golden / "evaluation", "--out", tmp_path / "report")
    refused(p2d(*report), "the costs in the manifest", word)


def test_a_metric_without_an_interval_is_reported(p2d, golden, copy_of_golden, tmp_path):
    """As lm-eval leaves it where it knows no standard error; this ended in a TypeError."""

    def change(manifest):
        for metric in manifest["summary"]["metrics"].values():
            metric |= {"low": None, "high": None}

    folder = seal(copy_of_golden("evaluation"), change)
    done = p2d("report-aer", folder, "--reference", folder, "--out", tmp_path / "report")
    assert done.code == 0, done.said
    assert p2d("inspect", tmp_path / "report").code == 0


@pytest.mark.parametrize(
    ("name", "text", "word"),
    [
        ("config.json", "[]", "no JSON object"),
        ("config.json", "[" * 100_000, "not valid JSON"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "../../secret"}}', "as a weight file"),
        ("model.safetensors.index.json", '{"weight_map": {"a": 3}}', "as a weight file"),
        ("model.safetensors.index.json", '{"weight_map": {"a": 3, "b": "c"}}', "not a valid index"),
    ],
)
def test_model_folders_that_are_none(p2d, tiny_folder, tmp_path, name, text, word):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    if "index" in name:
        (folder / "model.safetensors").unlink()  # transformers takes a single file where there are both
    (folder / name).write_text(text)
    refused(p2d("score-heads", "--model", folder, "--method", "random", "--out", tmp_path / "out"), name, word)
