"""Benchmarks run, in small: those of a GPU on the CPU, and those against a peer without the peer."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    """Load a benchmark as a module."""

    def load(name):
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        # Dataclasses look their module up.
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, spec.name, module)
            spec.loader.exec_module(module)
        return module

    return load


def test_the_benchmark_of_gpus(benchmark, tmp_path, capsys):
    benchmark("gpu").main(["--small", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "gpu.json").read_text())["measured"]
    works = {(one["attention"], one["work"]) for one in found if one["seconds"]}
    expected = ("heads", "LoRA", "full", "bare forward", "read 2 layers", "read 3 layers")
    assert works == {(attention, work) for attention in ("eager", "sdpa") for work in expected}
    assert all(one["peak_gib"] > 0 and one["tokens_a_second"] > 0 for one in found if one["seconds"])
    [missing] = [one for one in found if not one["seconds"]]
    assert "flash_attention_2 runs on cuda" in missing["why_not"]
    table = capsys.readouterr().out
    assert all(one["work"] in table for one in found)


def test_what_has_no_room_or_time_is_said_so(benchmark, tmp_path, monkeypatch, capsys):
    gpu = benchmark("gpu")

    def full(*_):
        raise MemoryError

    monkeypatch.setattr(gpu, "time_reading", full)
    monkeypatch.setattr(gpu, "time_updates", full)
    gpu.main(["--small", "--out", str(tmp_path), "--attention", "sdpa"])
    assert capsys.readouterr().out.count("out of memory") == 4
    gpu.main(["--small", "--out", str(tmp_path), "--attention", "sdpa", "--minutes", "0"])
    assert capsys.readouterr().out.count("no time left") == 4
