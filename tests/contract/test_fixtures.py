"""The fixture is what its script makes, small, and honest: no row tells its skill, no test row stands in the pool."""

import importlib.util
import json
import sys

import pytest
import torch


@pytest.fixture(scope="module")
def fixtures(tiny_folder):
    return tiny_folder.parent


@pytest.fixture(scope="module")
def script(fixtures):
    spec = importlib.util.spec_from_file_location("make_fixtures", fixtures / "make_fixtures.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_fixtures"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["make_fixtures"]


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_all_of_it_is_small(fixtures):
    assert sum(path.stat().st_size for path in fixtures.rglob("*") if path.is_file()) <= 8_000_000


def test_rows_say_nothing_of_their_skill_and_stand_once(fixtures):
    everything = [row for name in ("pool", "target", "test") for row in rows_of(fixtures / "data" / f"{name}.jsonl")]
    assert all(set(row) == {"id", "prompt", "completion"} for row in everything)
    assert len({row["prompt"] for row in everything}) == len(everything)
    assert len({row["id"] for row in everything}) == len(everything)


def test_the_truth_covers_the_pool(fixtures, script):
    skills = json.loads((fixtures / "data" / "skills.json").read_text())
    pool = rows_of(fixtures / "data" / "pool.jsonl")
    assert set(skills) == {row["id"] for row in pool}
    assert set(skills.values()) == set(script.SKILLS)


def test_the_script_makes_the_same_data_again(fixtures, script, tmp_path):
    script.write_data(tmp_path, script.draw_data())
    for name in ("pool.jsonl", "target.jsonl", "test.jsonl", "skills.json"):
        assert (tmp_path / name).read_bytes() == (fixtures / "data" / name).read_bytes()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="the script needs torch 2.9")
def test_training_is_deterministic(script):
    """Two short runs of the same training end in the same bits."""
    torch.manual_seed(0)
    weights = []
    deterministic = torch.are_deterministic_algorithms_enabled()
    for _ in range(2):
        torch.manual_seed(script.SEED)
        torch.use_deterministic_algorithms(True)
        tokenizer = script.build_tokenizer()
        model = script.build_model(tokenizer)
        script.pretrain(model, tokenizer, 2, batch_size=4)
        weights.append(torch.cat([weight.detach().flatten() for weight in model.parameters()]))
    torch.use_deterministic_algorithms(deterministic)
    assert torch.equal(*weights)


def test_the_quickstart_finds_the_target_skill(p2d, fixtures, tmp_path):
    """The compass works on the fixture: mined rows are of the target's skill, far over their share of the pool."""
    common = ("--model", fixtures / "tiny-model", "--dtype", "float32", "--pool", fixtures / "data" / "pool.jsonl")
    target = ("--target", fixtures / "data" / "target.jsonl")
    assert p2d("score-heads", *common, *target, "--out", tmp_path / "heads").code == 0
    done = p2d("mine-data", *common, *target, "--heads", tmp_path / "heads", "--out", tmp_path / "subset")
    assert done.code == 0, done.said
    import pyarrow.parquet as pq

    skills = json.loads((fixtures / "data" / "skills.json").read_text())
    chosen = pq.read_table(tmp_path / "subset" / "subset.parquet")["id"].to_pylist()
    share = sum(skills[row] == "route" for row in chosen) / len(chosen)
    assert 140 < len(chosen) < 180, "a tenth, less what is not taken for the task's"
    assert share > 0.7, f"{share:.0%} of the mined rows are of the target's skill; by chance it is 10%"
