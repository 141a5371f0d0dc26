"""What rows carry beside prompt and answer, through the real commands: heeded, refused, or counted in one note."""

import json

import pyarrow.parquet as pq
import pytest


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text} | more


@pytest.fixture
def run(p2d, tiny_folder, tmp_path):
    def run_command(row, command, *options, count=4):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for _ in range(count)))
        words = ("--data", path, "--out", tmp_path / "out", "--dtype", "float32", "--force")
        return p2d(command, "--model", tiny_folder, *words, *options), tmp_path / "out"

    return run_command


def test_a_history_is_in_the_prompt(run):
    row = {"instruction": "and now?", "input": "", "output": "blue", "history": [["colour of grass?", "green"]]}
    done, out = run(row | {"system": "be brief"}, "eval", "--max-new-tokens", 2)
    assert done.code == 0, done.said
    found = pq.read_table(out / "predictions.parquet").to_pylist()[0]
    assert (found["prompt"], found["reference"]) == ("colour of grass?\ngreen\nand now?", "blue")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [user("<image> what?"), assistant("a cat")], "images": ["a.png"]}, "column 'images' holds more"),
        ({"messages": [user("a"), assistant("WRONG", weight=0)]}, "no turn of the assistant is to be learnt"),
        ({"messages": [user("a"), assistant("b", weight=0.5)]}, "messages[1].weight must be 0 or 1"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "the columns chosen, rejected state which answer"),
    ],
)
@pytest.mark.parametrize("command", ["train", "eval"])
def test_rows_that_are_refused(run, row, words, command):
    done, out = run(row, command, "--dry-run")
    assert done.code == 65
    assert f"rows.jsonl:1: {words}" in done.said
    assert not out.exists()


@pytest.mark.parametrize("command", ["train", "eval"])
def test_what_is_not_heeded_is_told(run, command):
    row = {"prompt": "a", "completion": "b", "rejected": "c", "documents": ["d"], "source": "s"}
    options = ("--max-steps", 1, "--scope", "lora") if command == "train" else ("--max-new-tokens", 1)
    done, _ = run(row, command, *options)
    assert done.code == 0, done.said
    assert done.err.count("neither shows to the model nor heeds") == 1
    assert "4 rows carry what p2d neither shows to the model nor heeds, first rows.jsonl:1: column " in done.said
    assert "rejected (4)" in done.said
    assert "documents (4)" in done.said


def test_what_is_not_heeded_is_told_of_a_pool(p2d, tiny_folder, tmp_path):
    """Once, though the pool is read again and again."""
    rows = [{"prompt": f"a {number}", "completion": "b", "rejected": "c"} for number in range(6)]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("--pool", tmp_path / "pool.jsonl", "--method", "lexical", "--count", 2, "--out", tmp_path / "out")
    done = p2d("mine-data", "--model", tiny_folder, *words)
    assert done.code == 0, done.said
    assert done.err.count("6 rows carry what p2d neither shows to the model nor heeds") == 1


def test_a_turn_that_is_not_learnt_is_no_reference(run):
    turns = [user("one"), assistant("right"), user("two"), assistant("WRONG", weight=0)]
    done, out = run({"messages": turns}, "eval", "--max-new-tokens", 2)
    assert done.code == 0, done.said
    found = pq.read_table(out / "predictions.parquet").to_pylist()[0]
    assert (found["prompt"], found["reference"]) == ("one", "right")
