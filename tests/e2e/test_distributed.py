"""The same commands under torchrun: the same artifacts, whatever the number of processes, and no hanging.

A process group takes seconds to start, so few are started, and each runs many commands.
"""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

LAUNCHED = Path(__file__).with_name("launched.py")
SLOW = os.environ.get("P2D_SLOW") == "1"
SCORING = ("pad", "taylor", "contrast", "readout")
LIMIT_SECONDS = 1800  # a guard against hanging, far above what a loaded machine takes


class Launch:
    """What a process group did."""

    def __init__(self, folder, size, done, seconds):
        self.folder, self.size, self.seconds = folder, size, seconds
        self.code, self.out, self.err = done.returncode, done.stdout, done.stderr

    def ended(self, rank):
        """How each command ended on a rank, as far as the rank lived."""
        path = self.folder / f"commands.json.rank{rank}"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def codes(self, rank):
        return [entry["code"] for entry in self.ended(rank)]


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")

README = (LAUNCHED.parents[2] / "README.md").read_text(encoding="utf-8")


def block_of_readme(language, words):
    """The fenced block of that language that holds these words."""
    blocks = [block.split("```", 1)[0] for block in README.split(f"```{language}\n")[1:]]
    [found] = [block for block in blocks if words in block]
    return found


ACCELERATE_CONFIG = block_of_readme("yaml", "distributed_type: FSDP")
BATCH_SCRIPT = block_of_readme("bash", "scontrol requeue")
JOB_ARRAY = block_of_readme("bash", "SLURM_ARRAY_TASK_ID")


def launch(folder, size, commands, launcher=TORCHRUN, **environment):
    folder.mkdir(exist_ok=True)
    words = [([str(word) for word in command], fault) for command, fault in commands]
    (folder / "commands.json").write_text(json.dumps(words))
    line = (sys.executable, *launcher, str(size))
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(LAUNCHED.parents[2])} | environment
    started = time.monotonic()
    done = subprocess.run(
        (*line, str(LAUNCHED), str(folder / "commands.json")),
        capture_output=True,
        text=True,
        check=False,
        env=variables,
        timeout=LIMIT_SECONDS,
    )
    return Launch(folder, size, done, time.monotonic() - started)


@pytest.fixture(scope="module")
def work(tiny_folder, few, pipeline):
    """The commands by name, for an output folder."""
    common = ("--model", tiny_folder, "--dtype", "float32")
    selection = (*common, "--target", few["target"], "--pool", few["pool"], "--token-budget", 100)
    training = ("train", *common, "--data", few["test"], "--epochs", 2, "--seed", 3)
    heads = ("--heads", pipeline / "heads", "--projections", "q,k,v,o")
    held_out = ("--eval-data", few["target"], "--eval-steps", 2, "--patience", 2)

    def make(out):
        scoring = {
            method: ("score-heads", "--method", method, *selection, "--episodes", 12, "--repeats", 2)
            for method in SCORING
        }
        others = {
            "subset": ("mine-data", *selection, "--heads", pipeline / "heads", "--background", 20),
            "evaluation": (
                *("eval", *common, "--data", few["test"], "--token-budget", 60),
                *("--metric", "exact_match,perplexity", "--max-new-tokens", 4),
            ),
            "best": (*training, *heads, *held_out, "--packing", "--batch-size", 4),
            "full": (*training, "--scope", "full", "--batch-size", 8, "--accumulation", 2),
        }
        return {name: (*words, "--out", out / name) for name, words in (scoring | others).items()}

    return make


@pytest.fixture(scope="module")
def alone(p2d, work, tmp_path_factory):
    """What one process makes of it."""
    out = tmp_path_factory.mktemp("alone")
    for words in work(out).values():
        done = p2d(*words)
        assert done.code == 0, done.said
    return out


def shared_work(work, folder):
    """All commands; some that are stopped and taken up again; one whose numbers go wrong; one that crashes, at last."""
    steps = work(folder)
    again = work(folder / "again")
    mining, training = again["subset"], (*again["best"], "--checkpoint-minutes", 0)
    return [
        *((words, None) for words in steps.values()),
        (steps["subset"], None),
        (mining, ("stop", 2)),
        (mining, None),
        (training, ("SIGINT", 2)),
        (training, ("SIGTERM", 3)),
        (training, None),
        ((*steps["full"][:-1], folder / "nan"), ("nan", 3)),
        ((*steps["full"][:-1], folder / "crash"), ("crash", 3)),
    ]


SHARED_CODES = [0] * 8 + [0, 75, 0, 130, 75, 0, 70, 70]


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.skipif(not SLOW, reason="P2D_SLOW=1"))])
def shared(request, work, tmp_path_factory):
    """What several processes make of it."""
    folder = tmp_path_factory.mktemp("shared")
    return launch(folder, request.param, shared_work(work, folder))


@pytest.fixture(scope="module")
def sharded(work, few, tmp_path_factory):
    """Two processes that each hold half of the model; the last command loses one of them."""
    folder = tmp_path_factory.mktemp("sharded")
    steps = work(folder)
    commands = [(steps["best"], None), (steps["full"], None), (steps["subset"], ("kill", 2))]
    config = folder / "fsdp.yaml"
    config.write_text(ACCELERATE_CONFIG)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    launcher = ("-m", "accelerate.commands.launch", "--config_file", str(config), "--main_process_port", port)
    return launch(folder, 2, commands, (*launcher, "--num_processes"), ACCELERATE_TORCH_DEVICE="cpu")


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


def close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor, rtol=0, atol=tolerance, err_msg=name)


def same_weights(found, expected):
    for path in expected.glob("*model.safetensors"):
        close(load_file(found / path.name), load_file(path), 2e-5)
    assert sorted(path.name for path in found.iterdir()) == sorted(path.name for path in expected.iterdir())


def losses(folder):
    entries = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    return [entry.get("loss", entry.get("eval_loss")) for entry in entries]


def test_every_rank_ends_every_command_with_the_same_code(shared):
    codes = [shared.codes(rank) for rank in range(shared.size)]
    assert codes == [SHARED_CODES] * shared.size, shared.err
    assert shared.code == 1, "torchrun has one code for all failures"


def test_heads_are_the_same(shared, alone):
    for method in SCORING:
        found, expected = (load_file(folder / method / "head_scores.safetensors") for folder in (shared.folder, alone))
        assert np.array_equal(found["selected"], expected["selected"])
        # Sums over batches are taken in the order of the batches; those of gradients in the order of the ranks.
        tolerance = 1e-5 * np.abs(expected["scores"]).max() if method == "pad" else 0.0
        close(found, expected, tolerance)


def test_rows_and_predictions_are_the_same(shared, alone):
    for name in ("subset/pool_scores", "subset/subset", "evaluation/predictions"):
        found, expected = (pq.read_table(folder / f"{name}.parquet").to_pydict() for folder in (shared.folder, alone))
        assert repr(found) == repr(expected), name  # nan is not equal to nan


@pytest.mark.parametrize("name", ["best", "full"])
def test_updates_are_the_same(shared, alone, name):
    same_weights(shared.folder / name, alone / name)
    assert losses(shared.folder / name) == pytest.approx(losses(alone / name), rel=1e-5)


def test_ranks_share_the_outputs_of_frozen_layers(shared, alone):
    found = [manifest_of(folder / "best")["summary"] for folder in (alone, shared.folder)]
    assert [summary["frozen_kept"] for summary in found] == ["memory", "disk"]
    assert found[0]["frozen_layers"] == found[1]["frozen_layers"] > 0


@pytest.mark.parametrize("name", ["best", "full"])
def test_updates_of_a_sharded_model_are_the_same(sharded, alone, name):
    assert sharded.codes(0)[:2] == sharded.codes(1)[:2] == [0, 0], sharded.err
    assert manifest_of(sharded.folder / name)["summary"]["sharded"] is True
    same_weights(sharded.folder / name, alone / name)
    assert losses(sharded.folder / name) == pytest.approx(losses(alone / name), rel=1e-5)


def test_costs_are_those_of_all_ranks(shared, alone):
    for name in (*SCORING, "subset", "evaluation", "full"):
        found, expected = manifest_of(shared.folder / name), manifest_of(alone / name)
        assert found["key"] == expected["key"]
        assert found["ledger"][-1]["hardware"].startswith(f"{shared.size} processes on "), name
        assert found["hardware"]["processes"] == shared.size
        assert found["peak_memory_gib"]["host"] > 0
        # Rows that are cut among ranks are padded to other lengths.
        cut = name in {"pad", "full"}
        assert found["tokens"] == (pytest.approx(expected["tokens"], rel=0.5) if cut else expected["tokens"])


def test_only_rank_0_speaks(shared):
    for said, name in (("up to date", "subset"), (" done ", "pad")):
        lines = [line for line in shared.out.splitlines() if said in line and line.rstrip().endswith(f"/{name}")]
        assert len(lines) == 1, shared.out
    stops = ("interrupted after update 2 of 6, which is kept", "stopped after update 3 of 6")
    for said in (*stops, "the loss of update 2 is nan"):
        assert shared.err.count(said) == 1, shared.err
    assert "Traceback" not in shared.err.split("error: ")[1]


def test_a_signal_to_one_rank_stops_all_and_the_work_goes_on(shared, alone):
    assert "exit code 75: stopped early" in shared.err
    assert "batches were finished before" in shared.err
    assert "exit code 130: interrupted with Ctrl-C" in shared.err
    assert "going on from checkpoint-2" in shared.err
    assert "going on from checkpoint-3" in shared.err
    found, expected = (pq.read_table(f / "subset" / "pool_scores.parquet") for f in (shared.folder / "again", alone))
    assert repr(found.to_pydict()) == repr(expected.to_pydict())
    assert manifest_of(shared.folder / "again" / "subset")["tokens"] == manifest_of(alone / "subset")["tokens"]
    same_weights(shared.folder / "again" / "best", shared.folder / "best")
    assert losses(shared.folder / "again" / "best") == losses(shared.folder / "best")


def test_numbers_that_go_wrong_on_one_rank_stop_all(shared):
    assert not (shared.folder / "nan").exists()
    last = shared.size - 1
    assert f"error: rank {last}: the loss of update 2 is nan" in shared.err
    assert "exit code 70" in shared.err


def test_an_error_that_one_rank_meets_alone_ends_all_with_it(shared):
    """The others wait for its gradients; they learn of the error, and end with its code."""
    assert "no room for gradients" in shared.err
    assert not (shared.folder / "crash").exists()
    assert shared.ended(0)[-1]["seconds"] < 60


def test_a_rank_that_is_killed_is_missed(sharded):
    assert len(sharded.codes(1)) == 2
    assert sharded.codes(0)[2:] == [75], sharded.err
    assert "rank 1 of 2 has ended without a word" in sharded.err
    assert sharded.ended(0)[-1]["seconds"] < 60
    assert not (sharded.folder / "subset").exists()
    assert len(list(sharded.folder.glob(".subset.unfinished*"))) == 1, "what was finished is kept"


def test_what_a_lost_rank_left_is_taken_up_by_one_process(sharded, work, p2d, alone):
    done = p2d(*work(sharded.folder)["subset"])
    assert done.code == 0
    assert "batches were finished before" in done.said
    found, expected = (pq.read_table(f / "subset" / "pool_scores.parquet") for f in (sharded.folder, alone))
    assert repr(found.to_pydict()) == repr(expected.to_pydict())


# --- several machines


FAKES = {
    "scontrol": 'if [ "$1" = show ]; then echo localhost; else echo "$@" >> requeued; fi',
    "p2d": f'exec "{sys.executable}" -m p2d_cli "$@"',
    "srun": """\
while [ "${1#--}" != "$1" ]; do shift; done
export SLURM_NTASKS=2
for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=$task "$@" > "out.$task" 2> "err.$task" & tasks="$tasks $!"; done
code=0
for task in $tasks; do wait "$task" || { found=$?; [ $found -gt $code ] && code=$found; }; done
exit $code
""",
}

RECIPE = """\
out = "runs"

[defaults]
model = "{model}"
dtype = "float32"
target = "{target}"
pool = "{pool}"
data = "{test}"
batch-size = 4
epochs = 1
max-new-tokens = 4

[reference]
max-steps = 2
"""


def batch_job(folder, few, model):
    """Write the script, its recipe, and a stand-in for each of Slurm's commands."""
    (folder / "bin").mkdir()
    for name, body in FAKES.items():
        path = folder / "bin" / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    (folder / "job.sh").write_text(BATCH_SCRIPT)
    (folder / "recipe.toml").write_text(RECIPE.format(model=model, **few))
    launcher = {"RANK", "WORLD_SIZE", "LOCAL_RANK"}
    variables = {name: value for name, value in os.environ.items() if name not in launcher}
    return variables | {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(LAUNCHED.parents[2]),
        "OMP_NUM_THREADS": "1",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "localhost",
    }


@pytest.mark.parametrize("script", [BATCH_SCRIPT, JOB_ARRAY], ids=["nodes", "array"])
def test_the_batch_scripts_are_valid(tmp_path, script):
    (tmp_path / "job.sh").write_text(script)
    done = subprocess.run(("bash", "-n", "job.sh"), cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not SLOW, reason="P2D_SLOW=1")
def test_srun_does_a_whole_recipe(tmp_path, few, tiny_folder):
    variables = batch_job(tmp_path, few, tiny_folder)
    done = subprocess.run(
        ("bash", "job.sh"), cwd=tmp_path, env=variables, capture_output=True, check=False, timeout=LIMIT_SECONDS
    )
    said = [(tmp_path / f"err.{task}").read_text() for task in (0, 1)]
    assert done.returncode == 0, said
    assert (tmp_path / "out.1").read_text() + said[1] == "", "rank 1 says nothing"
    assert "stages, 0 of them up to date" in (tmp_path / "out.0").read_text()
    report = json.loads((tmp_path / "runs" / "report" / "manifest.json").read_text())
    assert report["status"] == "complete"
    trained = next((tmp_path / "runs" / "adapter").glob("*/manifest.json"))
    assert json.loads(trained.read_text())["hardware"]["label"].startswith("2 processes on ")
