"""A method is a file; its name, its line of help and its class agree."""

from pathlib import Path

import pytest

import p2d_cli
from p2d_cli.config import MineDataConfig, ScoreHeadsConfig, resolve
from p2d_cli.errors import UsageError
from p2d_cli.methods.head_method import HeadMethod
from p2d_cli.methods.row_method import RowMethod
from p2d_cli.registry import HEAD_METHODS, ROW_METHODS

STAGES = {"heads": (HEAD_METHODS, HeadMethod), "rows": (ROW_METHODS, RowMethod)}
FILES = sorted((Path(p2d_cli.__file__).parent / "methods").glob("*/[!_]*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_file_is_a_method(path):
    registry, base = STAGES[path.parent.name]
    name = path.stem.replace("_", "-")
    method = registry[name]
    assert method.name == name
    assert issubclass(method, base)
    assert path.read_text(encoding="utf-8").startswith(f'"""{name}: ')
    assert f"{name}: " in registry.describe()


def test_names_are_those_of_the_files():
    assert set(HEAD_METHODS) == {"contrast", "pad", "random", "readout", "taylor", "uniform"}
    assert "p2d" in ROW_METHODS
    assert "__init__" not in ROW_METHODS
    with pytest.raises(KeyError):
        ROW_METHODS["foo"]


def test_a_method_may_be_added_for_a_while():
    class Mine(RowMethod):
        name = "mine"

    with ROW_METHODS.added(Mine):
        assert ROW_METHODS["mine"] is Mine
        assert "mine" in ROW_METHODS.names()
    assert "mine" not in ROW_METHODS


def test_a_method_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(UsageError, match=r"--method: input should be 'auto', 'contrast', .* or 'uniform'; got 'foo'"):
        resolve(ScoreHeadsConfig, flags={"model": "m", "out": "o", "method": "foo"})


MINING = {"model": "m", "pool": "p", "out": "o", "method": "loss"}


def test_settings_keep_their_former_names(monkeypatch):
    monkeypatch.setenv("P2D_PERF_METRIC", "rougeL")
    config = resolve(MineDataConfig, flags=MINING, recipe={"perf": "none"}).config
    assert (config.answer_weight, config.answer_metric) == ("none", "rougeL")


def test_a_former_name_is_suggested_too():
    with pytest.raises(UsageError) as refused:
        resolve(MineDataConfig, flags=MINING, environ={"P2D_PERFF": "none"})
    assert refused.value.hint == "did you mean P2D_PERF?"
    with pytest.raises(UsageError) as refused:
        resolve(MineDataConfig, flags=MINING, recipe={"perff": "none"}, environ={})
    assert refused.value.hint == "did you mean 'perf'?"


def test_a_setting_is_given_under_one_of_its_names():
    with pytest.raises(UsageError, match="has 'answer_weight' twice, once as 'perf'"):
        resolve(MineDataConfig, flags=MINING, recipe={"answer_weight": "generate", "perf": "none"}, environ={})
    with pytest.raises(UsageError, match="P2D_PERF and P2D_ANSWER_WEIGHT are one setting"):
        resolve(MineDataConfig, flags=MINING, environ={"P2D_ANSWER_WEIGHT": "generate", "P2D_PERF": "none"})


def test_a_method_that_an_artifact_names_may_be_missing():
    with pytest.raises(UsageError, match="--scores x names the method 'twice', which this p2d does not have"):
        HEAD_METHODS.require("twice", "--scores x")
