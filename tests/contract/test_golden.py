"""Artifacts that earlier versions wrote: every later p2d reads them, and they stay as they were written."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from p2d_cli.artifacts.evaluation import load_metrics
from p2d_cli.artifacts.head_scores import load_head_scores
from p2d_cli.artifacts.manifest import SCHEMA_VERSIONS, read_manifest
from p2d_cli.artifacts.store import open_artifact
from p2d_cli.artifacts.subset import load_extreme_rows, load_pool_scores
from p2d_cli.core.aer import StageCost

KINDS = sorted(SCHEMA_VERSIONS)


@pytest.fixture(scope="session")
def golden(tiny_folder):
    return tiny_folder.parent / "golden" / "v1"


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_version_1_is_read_and_verifies(golden, kind):
    manifest = open_artifact(golden / kind, kind)
    assert manifest.schema_ == f"p2d.{kind}/1"
    for entry in manifest.ledger:
        assert StageCost.from_dict(entry).to_dict() == entry


@pytest.mark.parametrize("kind", KINDS)
def test_a_manifest_keeps_its_fields(golden, kind):
    """Reading and writing a manifest of version 1 loses and adds nothing."""
    text = (golden / kind / "manifest.json").read_text(encoding="utf-8")
    assert read_manifest(golden / kind).to_json() == text


def test_golden_heads(golden):
    heads = load_head_scores(golden / "heads")
    raw = load_file(golden / "heads" / "head_scores.safetensors")
    assert heads.geometry.total_heads == 32
    assert heads.selected_LH.sum() == 4
    assert np.array_equal(heads.scores_LH, raw["scores"])
    assert heads.repeats_RLH.shape[0] == 2


def test_golden_subset(golden):
    (rows, _), pool = load_extreme_rows(golden / "subset", 40), load_pool_scores(golden / "subset")
    assert len(rows) == 8
    assert len(pool.ids) == 40
    assert [row["id"] for row in rows] == [pool.ids[index] for index in np.argsort(pool.ranks_N)[:8]]


def test_golden_evaluation_and_report(golden):
    assert set(load_metrics(golden / "evaluation")) == {"exact_match", "token_f1"}
    report = json.loads((golden / "report" / "aer.json").read_text())
    assert report["schema"] == "p2d.aer/1"
    assert len(report["rows"]) == 2


def test_the_pipeline_goes_on_from_golden_artifacts(p2d, golden, tiny_folder, rows, tmp_path):
    done = p2d(
        *("train", "--model", tiny_folder, "--heads", golden / "heads", "--data", golden / "subset"),
        *("--max-steps", 1, "--out", tmp_path / "adapter", "--json"),
    )
    assert done.code == 0, done.said
    evaluate = ("eval", "--model", tiny_folder, "--data", rows["test"], "--limit", 2, "--max-new-tokens", 2)
    assert p2d(*evaluate, "--adapter", golden / "adapter", "--out", tmp_path / "e").code == 0
    assert p2d("eval", "--model", golden / "model", *evaluate[3:], "--out", tmp_path / "m").code == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_later_version_is_refused(p2d, golden, tmp_path, kind):
    folder = shutil.copytree(golden / kind, tmp_path / kind)
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace(f"p2d.{kind}/1", f"p2d.{kind}/9"))
    done = p2d("inspect", folder)
    assert done.code == 65
    assert f"p2d.{kind}/9" in done.said
