"""Rows that the chat template refuses: named by file and line, or left out by every stage as if they were not there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

LAUNCHED = Path(__file__).parents[1] / "launched.py"
ALTERNATING = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[U] {{ m.content | trim }} [/U]{% else %} {{ m.content | trim }}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)
REFUSED = "the chat template alternating.jinja refuses a conversation of user, user"
BY_MODEL = {
    "loss": (),
    "ifd": (),
    "embedding": (),
    "p2d": ("--background", 6),
    "data-whisperer": ("--demos", 2, "--queries", 2, "--draws", 1),
}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def conversation(number):
    turns = [user(f"what is {number}?"), assistant("it is"), user(f"and {number + 1}?"), assistant(f"it is {number}")]
    return {"id": f"row {number}", "messages": turns}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refused")
    (folder / "alternating.jinja").write_text(ALTERNATING)
    refused = {"id": "no", "messages": [user("hi"), user("there"), assistant("yo")]}
    files = {
        "clean": [conversation(number) for number in range(14)],
        "dirty": [*(conversation(number) for number in range(3)), refused, *(conversation(n) for n in range(3, 14))],
        "target": [conversation(number) for number in range(50, 58)],
    }
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def run(p2d, tiny_folder, folder):
    def run_command(command, *options):
        template = ("--chat-template", folder / "alternating.jinja")
        return p2d(command, "--model", tiny_folder, "--dtype", "float32", *template, *options)

    return run_command


@pytest.fixture(scope="module")
def heads(run, folder):
    done = run("score-heads", "--target", folder / "target.jsonl", *("--method", "taylor", "--out", folder / "heads"))
    assert done.code == 0, done.said
    return folder / "heads"


@pytest.fixture(scope="module")
def commands(folder, heads):
    """The commands that show rows to a model, for the rows at a path."""
    target, rows = ("--target", folder / "target.jsonl"), ("--proxy-samples", 4, "--background", 6, "--episodes", 4)

    def make(path):
        mined = {
            f"mine {method}": ("mine-data", "--method", method, "--pool", path, "--count", 4, *options)
            for method, options in BY_MODEL.items()
        }
        for method in ("mine p2d", "mine embedding", "mine data-whisperer"):
            mined[method] += target
        mined["mine p2d"] += ("--heads", heads, "--floor-quantile", 0)  # the few rows differ more than the task's would
        mined["shortlist"] = (*mined["mine embedding"], "--shortlist", 0.5)
        scored = {
            f"score {method}": ("score-heads", "--method", method, *target, "--pool", path, *rows)
            for method in ("readout", "contrast")
        }
        return {
            "train": ("train", "--scope", "lora", "--data", path, "--max-steps", 1),
            "train on last answers": (
                "train",
                "--scope",
                "lora",
                "--data",
                path,
                "--max-steps",
                1,
                "--loss-on",
                "last",
            ),
            "eval": ("eval", "--data", path, "--max-new-tokens", 2, "--metric", "exact_match,perplexity"),
            "score pad": ("score-heads", "--method", "pad", "--target", path, "--proxy-epochs", 1),
            **mined,
            **scored,
        }

    return make


NAMES = [
    *("train", "train on last answers", "eval", "score pad", "score readout", "score contrast", "shortlist"),
    *(f"mine {method}" for method in BY_MODEL),
]


@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["done", "planned"])
@pytest.mark.parametrize("name", NAMES)
def test_the_row_is_named_before_a_model_is_loaded(run, commands, folder, tmp_path, no_model, name, dry):
    done = run(*commands(folder / "dirty.jsonl")[name], *dry, "--out", tmp_path / "out")
    assert done.code == 65, done.said
    assert f"dirty.jsonl:4: {REFUSED}" in done.said
    assert "--skip-bad-rows" in done.said
    assert not (tmp_path / "out").exists()


def summary(out):
    return json.loads((out / "manifest.json").read_text())["summary"]


def payload(out):
    """All numbers that an artifact holds."""
    if (out / "pool_scores.parquet").exists():
        table = pq.read_table(out / "pool_scores.parquet").to_pydict()
        return {
            "ids": table["id"],
            "ranks": table["rank"],
            "scores": np.nan_to_num(np.array(table["score"]), nan=-9).round(9).tolist(),
        }
    if (out / "metrics.json").exists():
        rows = pq.read_table(out / "predictions.parquet").drop_columns(["log_likelihood"]).to_pylist()
        return {"metrics": json.loads((out / "metrics.json").read_text()), "rows": rows}
    files = sorted(out.glob("*.safetensors"))  # scored heads have their readings beside them
    return {f"{path.name} {name}": tensor.tolist() for path in files for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("name", NAMES)
def test_without_it_the_artifact_is_that_of_the_other_rows(run, commands, folder, tmp_path, name):
    options = ("--skip-bad-rows", "--seed", 3)
    clean = run(*commands(folder / "clean.jsonl")[name], *options, "--out", tmp_path / "clean")
    dirty = run(*commands(folder / "dirty.jsonl")[name], *options, "--out", tmp_path / "dirty")
    assert (clean.code, dirty.code) == (0, 0), dirty.said
    expected, found = summary(tmp_path / "clean"), summary(tmp_path / "dirty")
    assert payload(tmp_path / "dirty") == payload(tmp_path / "clean")
    [left_out] = found.pop("bad_rows").values()
    assert left_out["count"] == 1
    assert left_out["first"][0].startswith(f"dirty.jsonl:4: {REFUSED}")
    for counted in ("rows", "rows_total", "rows_background"):
        assert found.get(counted) == expected.get(counted)
    assert f"dirty.jsonl: 1 bad rows left out, first: dirty.jsonl:4: {REFUSED}" in dirty.said.replace(f"{folder}/", "")


CONTROLS = ["random", "lexical", "coverage", "full"]


@pytest.mark.parametrize("method", CONTROLS)
def test_methods_that_show_nothing_to_a_model_take_every_row(run, folder, tmp_path, no_model, method):
    out = tmp_path / "out"
    done = run("mine-data", "--method", method, "--pool", folder / "dirty.jsonl", "--out", out)
    assert done.code == 0, done.said
    assert summary(out)["rows_total"] == 15
    assert "bad_rows" not in summary(out)


@pytest.mark.parametrize("method", CONTROLS)
def test_no_method_chooses_rows_that_training_leaves_out(run, folder, tmp_path, no_model, method):
    """If they are to be left out: a control is as large as the subset that it is one of."""
    out, target = tmp_path / "out", ("--target", folder / "target.jsonl") if method == "lexical" else ()
    words = ("mine-data", "--method", method, "--pool", folder / "dirty.jsonl", "--skip-bad-rows", "--json", *target)
    words += ("--out", out) if method == "full" else ("--count", 14, "--out", out)
    planned = json.loads(run(*words, "--dry-run").out)
    done = run(*words)
    assert done.code == 0, done.said
    found = json.loads(done.out)["summary"]
    assert (found["rows_total"], found["rows_selected"]) == (14, 14)
    assert (planned["plan"]["rows"]["pool"], planned["plan"]["rows"]["chosen"]) == (14, 14)
    assert planned["bad_rows"] == found["bad_rows"]
    assert found["bad_rows"]["pool"]["first"][0].startswith(f"dirty.jsonl:4: {REFUSED}")
    assert "no" not in pq.read_table(out / "subset.parquet")["id"].to_pylist()


def test_lexical_rows_are_chosen_again_without_the_refused_one(run, folder, tmp_path):
    words = ("mine-data", "--method", "lexical", "--pool", folder / "dirty.jsonl", "--skip-bad-rows")
    first = (*words, "--target", folder / "target.jsonl", "--count", 4, "--out", tmp_path / "first")
    assert run(*first).code == 0
    done = run(*words, "--count", 6, "--scores", tmp_path / "first", "--out", tmp_path / "again")
    assert done.code == 0, done.said
    assert payload(tmp_path / "again") == payload(tmp_path / "first")


def test_a_plan_counts_the_rows_that_are_left(run, commands, folder, tmp_path):
    words = (*commands(folder / "dirty.jsonl")["train"], "--skip-bad-rows", "--out", tmp_path / "out")
    done = run(*words, "--dry-run")
    assert done.code == 0, done.said
    assert "rows: data 14" in done.said
    planned = json.loads(run(*words, "--dry-run", "--json").out)
    assert run(*words).code == 0
    assert planned["bad_rows"] == summary(tmp_path / "out")["bad_rows"]
    assert planned["bad_rows"]["data"]["count"] == 1
    assert "bad_rows" not in json.loads(run(*words, "--dry-run", "--json").out)  # its manifest has them


def test_a_plan_of_a_recipe_counts_bad_rows_of_what_is_there(p2d, tiny_folder, folder, tmp_path):
    """Rows still to be mined have none: those of their pool that stand for them are no bad rows of theirs."""
    dirty, target = str(folder / "dirty.jsonl"), str(folder / "target.jsonl")
    template = str(folder / "alternating.jinja")
    lines = [
        *('name = "r"', f"out = {json.dumps(str(tmp_path / 'out'))}", "[defaults]"),
        *(f"model = {json.dumps(str(tiny_folder))}", f"chat-template = {json.dumps(template)}", "skip-bad-rows = true"),
        *("[score-heads]", f"target = {json.dumps(target)}", f"pool = {json.dumps(dirty)}"),
        *("[mine-data]", f"target = {json.dumps(target)}", f"pool = {json.dumps(dirty)}", "ratio = 0.5"),
        *("[train]", "epochs = 1", "[eval]", f"data = {json.dumps(dirty)}", "max-new-tokens = 2"),
        *("[grid]", 'heads = ["readout"]', 'data = ["p2d", "random"]', "seed = [0]"),
    ]
    (tmp_path / "recipe.toml").write_text("\n".join(lines))
    done = p2d("run", tmp_path / "recipe.toml", "--dry-run", "--json")
    assert done.code == 0, done.said
    left_out = [
        (stage["stage"], {name: bad["count"] for name, bad in stage.get("bad_rows", {}).items()})
        for stage in json.loads(done.out)["stages"]
        if stage["plan"]["rows"]  # heads at random read none
    ]
    expected = {"score-heads": {"pool": 1}, "mine-data": {"pool": 1}, "train": {}, "eval": {"data": 1}}
    assert {stage for stage, _ in left_out} == set(expected)
    assert left_out == [(stage, expected[stage]) for stage, _ in left_out]


def test_rows_are_chosen_again_by_their_scores(run, commands, folder, tmp_path):
    words = commands(folder / "dirty.jsonl")["mine loss"]
    assert run(*words, "--skip-bad-rows", "--out", tmp_path / "first").code == 0
    again = ("--skip-bad-rows", "--scores", tmp_path / "first")
    done = run(*words[:-2], "--count", 6, *again, "--out", tmp_path / "again")
    assert done.code == 0, done.said
    assert summary(tmp_path / "again")["rows_total"] == 14
    assert payload(tmp_path / "again") == payload(tmp_path / "first")


def test_a_pool_is_checked_once(run, commands, folder, tmp_path, monkeypatch):
    """Though it is read again for each use; the passes agree, and so do the chunks."""
    from p2d_cli.engine import prompts

    checked, plain = [], prompts._require_shown

    def counting(template, tokenizer, record, shown):
        checked.append(record.where)
        plain(template, tokenizer, record, shown)

    monkeypatch.setattr(prompts, "_require_shown", counting)
    monkeypatch.setattr("p2d_cli.data.pool.CHUNK_ROWS", 4)
    done = run(*commands(folder / "dirty.jsonl")["mine loss"], "--skip-bad-rows", "--out", tmp_path / "out")
    assert done.code == 0, done.said
    assert checked == [f"dirty.jsonl:{line}" for line in range(1, 16)]
    assert pq.read_table(tmp_path / "out" / "pool_scores.parquet")["id"].to_pylist() == [f"row {n}" for n in range(14)]


def test_an_interrupted_run_goes_on_without_the_row(run, commands, folder, tmp_path, monkeypatch):
    from p2d_cli.artifacts.journal import Journal

    words = (*commands(folder / "dirty.jsonl")["mine loss"], "--skip-bad-rows", "--token-budget", 200)
    assert run(*words, "--out", tmp_path / "undisturbed").code == 0
    add, calls = Journal.add, []

    def add_and_stop(self, *arguments, **costs):
        add(self, *arguments, **costs)
        calls.append(self)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "add", add_and_stop)
    assert run(*words, "--out", tmp_path / "out").code == 130
    done = run(*words, "--out", tmp_path / "out")
    assert done.code == 0, done.said
    assert "finished before" in done.said
    assert payload(tmp_path / "out") == payload(tmp_path / "undisturbed")


def test_several_processes_leave_out_the_same_rows(run, commands, folder, tiny_folder, tmp_path):
    common = ("--model", tiny_folder, "--dtype", "float32", "--chat-template", folder / "alternating.jinja")
    chosen = commands(folder / "dirty.jsonl")
    shared = {name: (*chosen[name], "--skip-bad-rows", "--token-budget", 200) for name in ("mine loss",)}
    shared["train"] = (*chosen["train"], "--skip-bad-rows", "--batch-size", 4)
    words = [
        ([str(word) for word in (*words, *common, "--out", tmp_path / name)], None) for name, words in shared.items()
    ]
    (tmp_path / "commands.json").write_text(json.dumps(words))
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(LAUNCHED.parents[2])}
    done = subprocess.run(
        (*launcher, str(LAUNCHED), str(tmp_path / "commands.json")),
        capture_output=True,
        text=True,
        check=False,
        env=variables,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for name, words in shared.items():
        assert run(*words, "--out", tmp_path / f"alone {name}").code == 0
        assert summary(tmp_path / name)["bad_rows"] == summary(tmp_path / f"alone {name}")["bad_rows"]
        if name != "train":
            assert payload(tmp_path / name) == payload(tmp_path / f"alone {name}")
    assert summary(tmp_path / "train")["rows"] == 14


@pytest.mark.parametrize("role", ["critic", "system"])
def test_a_turn_that_the_template_passes_over_makes_a_bad_row(p2d, tiny_folder, tmp_path, role):
    """Templates that know three roles leave a turn of another one out without a word, and late system messages."""
    (tmp_path / "three.jinja").write_text(
        "{% for m in messages %}{% if m.role in ['user', 'assistant'] or loop.first %}<{{ m.role }}>{{ m.content }}"
        "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    turns = [user("a"), {"role": role, "content": "no"}, user("b"), assistant("c")]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    words = ("eval", "--model", tiny_folder, "--data", tmp_path / "rows.jsonl", "--max-new-tokens", 2)
    done = p2d(*words, "--chat-template", tmp_path / "three.jinja", "--out", tmp_path / "out")
    assert done.code == 65
    assert f"rows.jsonl:1: the chat template three.jinja does not show the turn of the role '{role}'" in done.said
    assert p2d(*words, "--template", "plain", "--out", tmp_path / "out").code == 0


def test_what_has_no_place_in_episodes_is_refused(run, heads, folder, tmp_path):
    called = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    rows = [conversation(number) for number in range(6)]
    rows[2]["messages"][-1] = called
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("mine-data", "--method", "data-whisperer", "--pool", tmp_path / "pool.jsonl", "--out", tmp_path / "out")
    done = run(*words, "--target", folder / "target.jsonl")
    assert done.code == 65
    assert "pool.jsonl:3: few-shot episodes cannot show tools and their calls" in done.said
