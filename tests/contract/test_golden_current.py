"""Artifacts that earlier versions wrote are up to date for the same command today, and stale for another."""

import importlib.util
import re
import shutil

import pytest

from p2d_cli.artifacts.manifest import read_manifest

KINDS = ("heads", "subset", "adapter", "evaluation", "model")
"""Of a report, the reference was not kept."""
CHOSEN_SINCE = {
    "heads": (
        *("--method", "contrast", "--selection", "top"),
        *("--layers", "all", "--depth", "trained", "--background", "1000"),
    ),
    "subset": ("--affinity", "attention"),
    "adapter": ("--projections", "q,k,v"),
}
"""What today's defaults would do otherwise than those that the artifacts were made with."""
CHANGES = {
    "heads": (("--layers", "0-1"), "setting layers"),
    "subset": (("--draws", "3"), "setting draws"),
    "adapter": (("--patience", "2", "--eval-data", "fixtures/data/test.jsonl"), "setting patience, input eval_data"),
    "evaluation": (("--system", "Be brief."), "setting system"),
    "model": (("--dtype", "float32"), "setting dtype"),
}


def without_values(said):
    return re.sub(r" \([^()]* there, [^()]* now\)", "", said)


@pytest.fixture
def commands(tiny_folder, tmp_path, monkeypatch):
    """The commands that made the golden artifacts, on copies of these, by the kind of artifact."""
    fixtures = tiny_folder.parent
    monkeypatch.chdir(fixtures.parent)
    spec = importlib.util.spec_from_file_location("make_golden", fixtures / "make_golden.py")
    make_golden = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_golden)
    copies = shutil.copytree(fixtures / "golden" / "v1", tmp_path / "v1")
    rows = {name: make_golden.cut(name, count, tmp_path) for name, count in make_golden.ROWS.items()}
    made = {words[-1]: words for words in make_golden.commands(copies, rows, tmp_path)}
    return {kind: (*made[str(copies / kind)], *CHOSEN_SINCE.get(kind, ())) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_up_to_date_for_the_command_that_made_it(p2d, commands, tiny_folder, kind):
    done = p2d(*commands[kind], "--json")
    assert done.code == 0, done.said
    assert done.json["status"] == "up-to-date"
    assert done.json["key"] == read_manifest(tiny_folder.parent / "golden" / "v1" / kind).key


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_stale_for_another_and_the_message_names_what_differs_alone(p2d, commands, kind):
    flags, difference = CHANGES[kind]
    done = p2d(*commands[kind], *flags)
    assert done.code == 73
    assert f"would not make: it differs in {difference} try:" in without_values(done.said)


@pytest.mark.parametrize(
    ("kind", "difference"),
    [
        ("heads", "setting background, setting depth, setting layers, setting method, setting selection"),
        ("subset", "setting affinity, setting background, setting floor_quantile, setting pick"),
        ("adapter", "setting projections"),
    ],
)
def test_a_default_that_changed_since_makes_it_stale(p2d, commands, kind, difference):
    words = commands[kind][: -len(CHOSEN_SINCE[kind])]
    assert f"it differs in {difference} try:" in without_values(p2d(*words).said)


def test_a_report_knows_the_evaluation_by_the_same_digest(p2d, tiny_folder, tmp_path):
    golden = tiny_folder.parent / "golden" / "v1"
    done = p2d("report-aer", golden / "evaluation", "--reference", golden / "evaluation", "--out", tmp_path / "report")
    assert done.code == 0, done.said
    then, now = (read_manifest(folder / "report").identity for folder in (golden, tmp_path))
    assert now["settings"] == then["settings"]
    assert now["inputs"]["evaluation 1"] == then["inputs"]["evaluation 1"]
