"""Benchmarks run, in small: those of a GPU on the CPU, and those against a peer without the peer."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

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


def test_the_benchmark_of_peers_without_one(benchmark, rows, tiny_folder, tmp_path, capsys):
    peers = benchmark("peers")
    peers.main(
        [
            *("--model", str(tiny_folder), "--data", str(rows["pool"]), "--held-out", str(rows["test"])),
            *("--rows", "8", "--held-out-rows", "4", "--epochs", "1", "--batch-size", "4", "--threads", "1"),
            *("--arms", "trl-lora", "p2d-lora", "--out", str(tmp_path)),
        ]
    )
    found = json.loads((tmp_path / "peers.json").read_text())
    assert set(found["results"]) == {"p2d-lora"}, "without its Python there is no peer"
    one = found["results"]["p2d-lora"]
    assert one["total_seconds"] > one["seconds"] > 0
    assert all(one[name] > 0 for name in ("peak_gib", "loss", "held_out_loss"))
    assert "p2d-lora" in capsys.readouterr().out
    trained = json.loads((tmp_path / "p2d-lora" / "adapter_config.json").read_text())
    # As the peer's is made.
    assert (trained["r"], trained["lora_alpha"]) == (peers.RANK, peers.ALPHA)
    targets = {name.rsplit(".", 1)[-1] for name in trained["target_modules"]}
    assert targets == {f"{name}_proj" for name in peers.PROJECTIONS}


def test_a_peer_is_given_the_tokens_that_p2d_learns(benchmark, rows, tiny_folder, tmp_path):
    peers = benchmark("peers")
    path = peers.cut(str(rows["pool"]), 5, tmp_path / "rows.jsonl")
    asked = {"model": str(tiny_folder), "rows": path, "template": "auto", "dtype": "float32", "device": "cpu"}
    assert peers.write_tokens(asked) == {"device": "cpu", "dtype": "float32"}
    texts = [json.loads(line) for line in Path(path).read_text().splitlines()]
    given = [json.loads(line) for line in (tmp_path / "tokens.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    for text, one in zip(texts, given, strict=True):
        learnt = [token for token, is_learnt in zip(*one.values(), strict=True) if is_learnt]
        assert tokenizer.decode(learnt, skip_special_tokens=True).strip() == text["completion"]
        assert learnt[-1] == tokenizer.eos_token_id
        assert text["prompt"] in tokenizer.decode(one["input_ids"])


def test_targets_are_compared_where_both_were_measured(benchmark):
    peers = benchmark("peers")
    results = {"p2d-lora": {"seconds": 4.0}, "trl-lora": {"seconds": 10.0}}
    found = peers.compare(results, *peers.TARGETS[0])
    assert (found["found"], found["met"]) == (0.4, True)
    assert not peers.compare(results | {"trl-lora": {"seconds": 8.0}}, *peers.TARGETS[0])["met"]
    assert peers.compare(results, *peers.TARGETS[1]) is None
    assert peers.compare(results, *peers.TARGETS[2]) is None
