"""What every method finds on a small pool, as p2d found it when it still held pools in memory.

A pool of one chunk gives what it gave then, to the row, and so do many small chunks for the methods that look at one
row at a time. `golden_mining.json` was written by that version: `python tests/contract/test_mining.py FILE`. Of it
`readout` and `heads-readout` were written anew when heads came to be read over the prompt too.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

FIXTURES = Path(__file__).parents[2] / "fixtures"
GOLDEN = Path(__file__).with_name("golden_mining.json")
TARGET = ("--target", "TARGET")
HEADS = ("--heads", "HEADS")
BY_ROW = {
    "readout": (*TARGET, *HEADS, "--background", 20, "--floor-quantile", 0),
    "loss": ("--method", "loss"),
    "ifd": ("--method", "ifd"),
    "embedding": (*TARGET, "--method", "embedding"),
    "embedding-of-pool": ("--method", "embedding"),
    "lexical": (*TARGET, "--method", "lexical"),
    "lexical-of-pool": ("--method", "lexical"),
    "random": (*TARGET, "--method", "random"),
    "full": ("--method", "full"),
}
BY_EPISODE = {
    "attention": (*TARGET, *HEADS, "--affinity", "attention"),
    "self-mining": (*HEADS, "--draws", 1),
    "data-whisperer": (*TARGET, "--method", "data-whisperer"),
}
OF_HEADS = {
    "heads-readout": ("--method", "readout", "--background", 30, "--repeats", 2, "--proxy-samples", 8),
    "heads-contrast": ("--method", "contrast", "--episodes", 12, "--repeats", 2),
}


def rows_of(name, count):
    return [json.loads(line) for line in (FIXTURES / "data" / f"{name}.jsonl").read_text().splitlines()[:count]]


class Mining:
    """Runs commands on 40 pool rows, of which two are target rows, and 10 target rows."""

    def __init__(self, p2d, folder):
        self.p2d, self.folder, self.count = p2d, folder, 0
        target, pool = rows_of("target", 10), rows_of("pool", 38)
        pool[5:5] = [target[3]]
        pool[20:20] = [target[7] | {"id": "shouted", "prompt": target[7]["prompt"].upper()}]
        for name, rows in (("pool", pool), ("target", target)):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.model = ("--model", FIXTURES / "tiny-model", "--dtype", "float32")
        self.places = {"TARGET": folder / "target.jsonl", "HEADS": folder / "uniform"}
        self.run("score-heads", *self.model, "--method", "uniform", "--depth", "trained", "--out", folder / "uniform")

    def run(self, *words):
        done = self.p2d(*words)
        assert done.code == 0, done.said

    def mine(self, options, *more):
        """Return the ids that were chosen, in order, and the score of every row."""
        self.count += 1
        out = self.folder / f"subset-{self.count}"
        given = [self.places.get(word, word) for word in options]
        pool = ("--pool", self.folder / "pool.jsonl")
        self.run("mine-data", *self.model, *pool, *given, "--ratio", 0.3, "--out", out, *more)
        scores = pq.read_table(out / "pool_scores.parquet")["score"].to_numpy()
        return pq.read_table(out / "subset.parquet")["id"].to_pylist(), scores

    def score_heads(self, options):
        self.count += 1
        out = self.folder / f"heads-{self.count}"
        rows = ("--pool", self.folder / "pool.jsonl", *TARGET)
        self.run("score-heads", *self.model, *(self.places.get(w, w) for w in rows), *options, "--out", out)
        return load_file(out / "head_scores.safetensors")["repeats"].ravel()


@pytest.fixture(scope="module")
def mining(p2d, tmp_path_factory):
    return Mining(p2d, tmp_path_factory.mktemp("mining"))


@pytest.fixture(scope="module")
def golden():
    return json.loads(GOLDEN.read_text())


def same(found, expected):
    expected = np.array([np.nan if value is None else value for value in expected])
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize("name", BY_ROW | BY_EPISODE)
def test_a_pool_of_one_chunk(mining, golden, name):
    ids, scores = mining.mine((BY_ROW | BY_EPISODE)[name])
    same(scores, golden[name]["scores"])
    assert ids == golden[name]["ids"]


@pytest.mark.parametrize("name", BY_ROW)
def test_chunks_of_a_few_rows_choose_the_same(mining, golden, name, monkeypatch):
    monkeypatch.setattr("p2d_cli.data.pool.CHUNK_ROWS", 7)
    ids, scores = mining.mine(BY_ROW[name])
    same(scores, golden[name]["scores"])
    assert ids == golden[name]["ids"]


@pytest.mark.parametrize("name", OF_HEADS)
@pytest.mark.parametrize("rows", [7, 100])
def test_heads_are_told_apart_on_the_same_rows(mining, golden, name, rows, monkeypatch):
    monkeypatch.setattr("p2d_cli.data.pool.CHUNK_ROWS", rows)
    same(mining.score_heads(OF_HEADS[name]), golden[name])


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import tempfile

    from conftest import run_p2d

    with tempfile.TemporaryDirectory() as folder:
        mining = Mining(run_p2d, Path(folder))
        found = {}
        for name, options in (BY_ROW | BY_EPISODE).items():
            ids, scores = mining.mine(options)
            plain = [None if np.isnan(score) else float(f"{score:.7g}") for score in scores]
            found[name] = {"ids": ids, "scores": plain}
        for name, options in OF_HEADS.items():
            found[name] = [float(f"{score:.7g}") for score in mining.score_heads(options)]
    Path(sys.argv[1]).write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
