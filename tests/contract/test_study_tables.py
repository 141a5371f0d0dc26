"""What the README and RESULTS.md say of the study is what its raw results say."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "tests" / "benchmarks" / "study"


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("study_tables", STUDY / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_results_are_made_from_the_raw_ones(tables, capsys):
    tables.main()
    assert capsys.readouterr().out == (STUDY / "RESULTS.md").read_text(encoding="utf-8")


def test_every_recipe_of_a_table_is_in_the_study(tables):
    for study in tables.STUDIES:
        assert (STUDY / f"{study.recipe}.toml").is_file()
        report = json.loads((STUDY / "results" / f"{study.recipe}.json").read_text(encoding="utf-8"))["report"]
        assert len(report["rows"]) > 2


def test_the_readme_quotes_scores_of_the_results():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    measured = readme[readme.index("### A mixed pool") : readme.index("### What each scope reaches")]
    in_tables = "\n".join(line for line in measured.splitlines() if line.startswith("|"))
    quoted = set(re.findall(r"[+-]?\d\.\d{3} \[[^]]*\]|\[[+-][^]]*\]", in_tables))
    results = (STUDY / "RESULTS.md").read_text(encoding="utf-8")
    assert len(quoted) > 20
    assert [value for value in sorted(quoted) if value not in results] == []
