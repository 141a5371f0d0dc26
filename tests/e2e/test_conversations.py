"""Conversations, chat templates and system prompts through the command line."""

import json

import pytest

TURNS = [
    {"role": "user", "content": "#O IIIIO"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "#D EEDED"},
    {"role": "assistant", "content": "2"},
]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def train(p2d, tiny_folder, tmp_path):
    def run(rows, *extra, out="adapter"):
        data = write_rows(tmp_path / "rows.jsonl", rows)
        common = ("--model", tiny_folder, "--dtype", "float32", "--scope", "lora", "--max-steps", 1)
        return p2d("train", *common, "--data", data, *extra, "--out", tmp_path / out)

    return run


def test_all_answers_are_learnt_unless_the_last_is_asked_for(train, monkeypatch):
    import p2d_cli.modeling.training as training

    learnt, real = [], training.train

    def watch(model, rows, *rest, **named):
        learnt.append([sum(label >= 0 for label in row["labels"]) for row in rows])
        return real(model, rows, *rest, **named)

    monkeypatch.setattr(training, "train", watch)
    for number, how in enumerate(([], ["--loss-on", "last"])):
        done = train([{"messages": TURNS}, {"messages": TURNS[:2]}], *how, out=f"adapter-{number}")
        assert done.code == 0, done.said
    [both, last], [one, same] = learnt
    assert both == 2 * one
    assert last == same == one


def test_answers_that_are_cut_are_counted(train):
    done = train([{"messages": TURNS}], "--max-length", 12)
    assert done.code == 0, done.said
    assert "1 earlier answers were cut and are not learnt" in done.said
