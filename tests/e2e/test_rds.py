"""rds against RDS+ written out row by row with transformers alone."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="module")
def mined(p2d, tiny_folder, few, tmp_path_factory):
    out = tmp_path_factory.mktemp("rds") / "subset"
    common = ("--model", tiny_folder, "--dtype", "float32", "--template", "plain", "--method", "rds")
    done = p2d("mine-data", *common, "--target", few["target"], "--pool", few["pool"], "--count", 12, "--out", out)
    assert done.code == 0, done.said
    return out


def states(folder, path):
    """Return a state a row: the mean of the last layer's, normed, where token i counts i times."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    found = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        ids = [*tokenizer(f"{row['prompt']}\n{row['completion']}")["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
        mean = sum((i + 1) * vector for i, vector in enumerate(hidden)) / sum(range(1, len(ids) + 1))
        found.append((mean / mean.norm()).numpy())
    return np.array(found)


def test_the_rows_are_those_of_the_published_method(mined, tiny_folder, few):
    likeness = states(tiny_folder, few["pool"]) @ states(tiny_folder, few["target"]).T
    ids = [json.loads(line)["id"] for line in few["pool"].read_text().splitlines()]
    left, expected = list(range(len(ids))), []
    while left:
        asking = len(expected) % likeness.shape[1]
        expected.append(max(left, key=lambda row: likeness[row, asking]))
        left.remove(expected[-1])
    assert pq.read_table(mined / "subset.parquet")["id"].to_pylist() == [ids[row] for row in expected[:12]]
    scores = pq.read_table(mined / "pool_scores.parquet")["score"].to_numpy()
    assert np.argsort(-scores).tolist() == expected


def test_another_number_of_rows_costs_nothing(p2d, mined, tiny_folder, few, tmp_path):
    words = ("--model", tiny_folder, "--pool", few["pool"], "--method", "rds", "--template", "plain")
    done = p2d("mine-data", *words, "--scores", mined, "--count", 5, "--out", tmp_path / "fewer")
    assert done.code == 0, done.said
    first = pq.read_table(mined / "subset.parquet")["id"].to_pylist()[:5]
    assert pq.read_table(tmp_path / "fewer" / "subset.parquet")["id"].to_pylist() == first


def test_it_needs_target_rows(p2d, tiny_folder, few, tmp_path):
    words = ("--model", tiny_folder, "--pool", few["pool"], "--method", "rds")
    done = p2d("mine-data", *words, "--out", tmp_path / "out")
    assert done.code == 2
    assert "--method rds needs --target" in done.said
