"""What a dry run foretells is what the run then does: tokens, passes, parameters; nothing heavy is loaded for it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from p2d_cli.engine import counting


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


@pytest.fixture
def foretold(p2d, tmp_path):
    """Plan a command, then do it; the plan and the manifest."""

    def run(*words, out=None):
        out = out or tmp_path / "out"
        planned = p2d(*words, "--dtype", "float32", "--out", out, "--dry-run", "--json")
        assert planned.code == 0, planned.said
        assert not out.exists()
        done = p2d(*words, "--dtype", "float32", "--out", out)
        assert done.code == 0, done.said
        return planned.json["plan"], manifest(out)

    return run


@pytest.mark.parametrize(
    "options",
    [
        ("--method", "readout", "--repeats", 2),
        ("--method", "contrast", "--episodes", 8),
        ("--method", "taylor", "--token-budget", 300),
        ("--method", "pad", "--proxy-epochs", 2),
    ],
    ids=lambda options: options[1],
)
def test_scoring_heads_reads_as_many_tokens_as_foretold(foretold, tiny_folder, few, options):
    plan, made = foretold(
        *("score-heads", "--model", tiny_folder, "--target", few["target"], "--pool", few["pool"]), *options
    )
    assert plan["exact"]
    assert plan["tokens"] == made["tokens"] > 0


@pytest.mark.parametrize(
    "options",
    [
        ("--background", 20, "--refine", 1, "--floor-quantile", 0),
        ("--affinity", "attention", "--token-budget", 700),
        ("--method", "data-whisperer", "--perf", "none"),
        ("--method", "ifd"),
        ("--method", "embedding"),
    ],
    ids=str,
)
def test_mining_reads_as_many_tokens_as_foretold(foretold, pipeline, tiny_folder, few, options):
    plan, made = foretold(
        *("mine-data", "--model", tiny_folder, "--heads", pipeline / "heads", "--target", few["target"]),
        *("--pool", few["pool"], *options),
    )
    assert plan["exact"]
    assert plan["tokens"] == made["tokens"] > 0
    assert plan["rows"]["chosen"] == made["summary"]["rows_selected"]


@pytest.mark.parametrize(
    ("scope", "options"),
    [
        ("heads", ("--projections", "q,k,v,o", "--accumulation", 2)),
        ("lora", ("--packing",)),
        ("attention", ()),
        ("full", ("--max-steps", 2)),
    ],
)
def test_training_takes_what_was_foretold(foretold, pipeline, tiny_folder, few, tmp_path, scope, options):
    heads = ("--heads", pipeline / "heads") if scope == "heads" else ()
    plan, made = foretold(
        *("train", "--model", tiny_folder, "--data", few["pool"], "--scope", scope, *heads),
        *("--epochs", 2, "--eval-data", few["test"], *options),
    )
    summary = made["summary"]
    assert plan["tokens"] == pytest.approx(made["tokens"], rel=0.0 if scope != "full" else 0.1)
    [train, look] = plan["works"]
    assert train["backward_passes"] == summary["updates"] * (2 if scope == "heads" else 1)
    assert look["passes"] > 0
    assert plan["memory"]["optimizer state"] == 8 * summary["trained_parameters"]
    if scope in {"heads", "lora"}:
        with safe_open(tmp_path / "out" / "adapter_model.safetensors", "np") as file:
            stored = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118 - no dictionary
        assert plan["disk"]["artifact"] == stored
        assert plan["memory"]["adapter"] <= stored, "it trains without the padding"
    assert plan["memory"]["weights"] == 4 * summary["total_parameters"]


def test_weighing_choices_and_references_reads_as_many_tokens_as_foretold(foretold, tiny_folder, few, tmp_path):
    (tmp_path / "choices.json").write_text('["a", "bcd", "e f g h"]')
    plan, made = foretold(
        *("eval", "--model", tiny_folder, "--data", few["test"], "--metric", "accuracy,perplexity"),
        *("--choices", tmp_path / "choices.json", "--limit", 7),
    )
    assert plan["rows"] == {"data": 7}
    assert plan["tokens"] == made["tokens"]


def test_answers_are_taken_to_be_as_long_as_the_references(p2d, tiny_folder, few, tmp_path):
    plan = p2d(
        *("eval", "--model", tiny_folder, "--data", few["test"], "--max-new-tokens", 3, "--dtype", "float32"),
        *("--out", tmp_path / "out", "--dry-run", "--json"),
    ).json["plan"]
    [work] = plan["works"]
    assert work["passes"] <= 3
    # Two for keys and values, 4 layers of 4 groups of 16, in fp32.
    assert plan["memory"]["key/value cache"] % (2 * 4 * 4 * 16 * 4) == 0
    assert any("at most 3 steps" in note for note in plan["notes"])


def test_of_a_large_file_a_sample_stands_for_all(p2d, tiny_folder, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(counting, "EXACT_ROWS", 100)
    monkeypatch.setattr(counting, "READ_ROWS", 600)
    words = ("mine-data", "--model", tiny_folder, "--pool", rows["pool"], "--method", "loss", "--out", tmp_path / "out")
    plan = p2d(*words, "--dry-run", "--json").json["plan"]
    assert plan["rows"]["pool"] == 1800
    assert not plan["exact"]
    monkeypatch.undo()
    exact = p2d(*words, "--dry-run", "--json").json["plan"]
    assert exact["exact"]
    assert plan["tokens"] == pytest.approx(exact["tokens"], rel=0.05)


def test_unfinished_work_is_told(p2d, pipeline, tiny_folder, few, tmp_path, monkeypatch):
    words = (
        *("mine-data", "--model", tiny_folder, "--heads", pipeline / "heads", "--target", few["target"]),
        *("--pool", few["pool"], "--token-budget", 300, "--affinity", "attention", "--out", tmp_path / "out"),
    )
    from p2d_cli.methods import episodes

    read, left = episodes._attention_and_likelihood, [3]

    def stop(*arguments, **options):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return read(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(episodes, "_attention_and_likelihood", stop)
        assert p2d(*words).code == 130
    plan = p2d(*words, "--dry-run", "--json").json["plan"]
    [work] = plan["works"]
    assert plan["resume"] == [f"read episodes: 3 of {work['passes']} batches"]
    assert f"would resume read episodes: 3 of {work['passes']} batches" in p2d(*words, "--dry-run").said


def test_a_recipe_is_planned_with_stand_ins_for_what_is_still_to_be_made(p2d, tiny_folder, few, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f"""\
out = "{tmp_path / "out"}"
controls = false
[defaults]
model = "{tiny_folder}"
dtype = "float32"
target = "{few["target"]}"
pool = "{few["pool"]}"
[score-heads]
method = "readout"
background = 20
[mine-data]
ratio = 0.5
floor_quantile = 0
[train]
epochs = 1
[eval]
data = "{few["test"]}"
max_new_tokens = 2
"""
    )
    planned = p2d("run", recipe, "--dry-run", "--json")
    assert planned.code == 0, planned.said
    assert not (tmp_path / "out").exists()
    plans = [stage["plan"] for stage in planned.json["stages"]]
    done = p2d("run", recipe, "--json")
    assert done.code == 0, done.said
    for stage in planned.json["stages"]:
        made = manifest(Path(stage["out"]))
        if stage["stage"] in {"score-heads", "mine-data"}:
            assert stage["plan"]["tokens"] == pytest.approx(made["tokens"], rel=0.02)
        if stage["stage"] == "train":
            assert stage["plan"]["tokens"] == pytest.approx(made["tokens"], rel=0.25)
            trained = 8 * made["summary"]["trained_parameters"]
            assert stage["plan"]["memory"]["optimizer state"] == pytest.approx(trained, rel=0.4)
    total = planned.json["total"]
    assert total["tokens"] == sum(plan["tokens"] for plan in plans)
    assert total["peak_memory_bytes"] == max(plan["memory_bytes"] for plan in plans)


def test_a_timing_foretells_seconds(p2d, tiny_folder, few, tmp_path):
    words = ("score-heads", "--model", tiny_folder, "--target", few["target"], "--pool", few["pool"])
    plan = p2d(*words, "--out", tmp_path / "out", "--dry-run", "--time", "--json").json["plan"]
    assert plan["seconds"] > 0
    assert all(work["seconds"] > 0 for work in plan["works"])
    shown = p2d("train", "--model", tiny_folder, "--data", few["pool"], "--out", tmp_path / "a", "--dry-run", "--time")
    assert shown.code == 0, shown.said
    assert "time: about" in shown.said
    assert not list(tmp_path.iterdir())


def test_a_time_without_a_dry_run_is_refused(p2d, tiny_folder, few, tmp_path):
    done = p2d("score-heads", "--model", tiny_folder, "--target", few["target"], "--out", tmp_path / "o", "--time")
    assert done.code == 2
    assert "--dry-run" in done.said


def test_a_plan_needs_no_torch(tiny_folder, few, tmp_path):
    words = ["train", "--model", str(tiny_folder), "--data", str(few["pool"]), "--out", str(tmp_path / "o")]
    code = (
        "import sys; from p2d_cli.cli.app import app\n"
        f"sys.argv = ['p2d', *{words!r}, '--dry-run']\n"
        "try: app()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "tokens" in done.stdout


def test_a_plan_refuses_what_the_run_would_refuse(p2d, tiny_folder, few, tmp_path):
    out = ("--out", tmp_path / "out")
    evaluate = ("eval", "--model", tiny_folder, "--data", few["test"], "--metric", "accuracy", *out)
    layers = ("score-heads", "--model", tiny_folder, "--method", "random", "--layers", "0-0", "--ratio", 0.9, *out)
    twins = ("mine-data", "--model", tiny_folder, "--pool", few["target"], "--target", few["target"], *out)
    for words, code, said in (
        (evaluate, 65, "needs choices"),
        (layers, 2, "layers 0-0 have 8"),
        ((*twins, "--method", "lexical"), 65, "there is nothing to choose from"),
    ):
        for more in ((), ("--dry-run",)):
            done = p2d(*words, *more)
            assert done.code == code, done.said
            assert said in done.said


def test_answers_of_all_chunks_are_told_together(p2d, pipeline, tiny_folder, few, tmp_path, monkeypatch):
    monkeypatch.setattr("p2d_cli.data.pool.CHUNK_ROWS", 20)
    plan = p2d(
        *("mine-data", "--model", tiny_folder, "--heads", pipeline / "heads", "--target", few["target"]),
        *("--pool", few["pool"], "--affinity", "attention", "--answer-weight", "generate", "--max-new-tokens", 4),
        *("--out", tmp_path / "out", "--dry-run", "--json"),
    ).json["plan"]
    [answers] = [work for work in plan["works"] if work["kind"] == "answer"]
    [note] = [note for note in plan["notes"] if "answers as long as" in note]
    assert f" {answers['passes']:,} steps" in note
