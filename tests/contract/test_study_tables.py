"""What the README, findings.md and RESULTS.md say of the study is what its raw results say."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "tests" / "benchmarks" / "study"
TASKS = ("snips_parse", "banking77", "gsm8k")


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
    pools = [f"{pool.name}_{target}" for pool in tables.POOLS for target in tables.found(pool.name)]
    for name in [*pools, *(study.recipe for study in tables.STUDIES)]:
        assert (STUDY / f"{name}.toml").is_file()
        report = read(f"tests/benchmarks/study/results/{name}.json")["report"]
        assert len(report["rows"]) > 2


def test_scores_of_a_pool_of_one_task_are_those_of_the_results():
    lines = "\n".join(table_lines("README.md", "### A pool of one task", "## The commands"))
    quoted = set(re.findall(r"[+-]?\d\.\d{3} \[[^]]*\]|\[[+-][^]]*\]", lines))
    results = (STUDY / "RESULTS.md").read_text(encoding="utf-8")
    assert len(quoted) >= 12
    assert [value for value in sorted(quoted) if value not in results] == []


def test_the_readme_shows_the_tables_of_the_pools(tables):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for pool in tables.POOLS:
        assert tables.scores(tables.found(pool.name)) in readme


def test_the_scopes_are_means_over_seeds():
    results = {name: read(f"tests/benchmarks/results/scopes_{name}.json")["results"] for name in TASKS}
    _, _, *lines = table_lines("tests/benchmarks/study/findings.md", "## What each scope reaches", None)
    for line, scope in zip(lines, ("heads", "lora", "attention", "full"), strict=True):
        _, *cells = line.strip("| ").split(" | ")
        of_scope = {name: [row for row in rows if row["scope"] == scope] for name, rows in results.items()}
        scores = [of_seeds(of_scope[name], "exact_match") for name in ("snips_parse", "banking77")]
        assert cells[:2] == [f"{value:.3f} [{low:.3f}, {high:.3f}]" for value, low, high in scores]
        assert cells[2] == f"{of_seeds(of_scope['gsm8k'], 'perplexity')[0]:.2f}"
        seconds = [row["train_seconds"] for row in of_scope["banking77"]]
        assert cells[3] == f"{sum(seconds) / len(seconds):.0f}"


def of_seeds(rows, metric):
    ends = [[row["metrics"][metric][end] for row in rows] for end in ("value", "low", "high")]
    return [sum(values) / len(values) for values in ends]


def table_lines(page, begin, end):
    text = (ROOT / page).read_text(encoding="utf-8")
    part = text[text.index(begin) : end and text.index(end)]
    return [line for line in part.splitlines() if line.startswith("|")]


def read(path):
    return json.loads((ROOT / path).read_text(encoding="utf-8"))
