"""inspect on the index of a pool: what it holds, what it cost, and that its files verify."""

import json

import numpy as np
import pytest

from p2d_cli.artifacts.pool_index import INDEX_NAME, IndexFound, PoolIndex
from p2d_cli.core.wording import bytes_text
from p2d_cli.errors import ArtifactError
from p2d_cli.stages.inspection import inspect

HEADS = [(0, 1), (2, 0), (2, 5)]


@pytest.fixture
def index(tmp_path):
    """An index of two shards, used by three artifacts."""
    made = PoolIndex(
        tmp_path / "index", context="c", heads=HEADS, head_dim=4, source={"model": 64 * "d", "longest": 2048}
    )
    rng = np.random.default_rng(0)
    with made.adding():
        for rows, seconds, tokens, by in ((5, 1.5, 100, "first"), (2, 0.25, 40, "second")):
            digests = rng.integers(0, 2**60, size=(rows, 2), dtype=np.uint64)
            made.add(
                digests,
                rng.normal(size=(rows, len(HEADS), 2, 4)),
                np.zeros(rows, bool),
                seconds=seconds,
                tokens=tokens,
                by=by,
            )
    made.charge("third")
    return made.folder


def test_an_index_says_what_it_holds(index):
    found = inspect(index)
    assert isinstance(found, IndexFound)
    assert (found.rows, found.heads, found.depth, found.head_dim, found.shards) == (7, 3, 3, 4, 2)
    assert found.bytes == sum(path.stat().st_size for path in index.glob("*.npy"))
    assert (found.seconds, found.tokens, found.targets) == (1.75, 140, 3)
    assert found.source == {"model": 64 * "d", "longest": 2048}


def test_the_command_shows_an_index(p2d, index):
    done = p2d("inspect", index)
    assert done.code == 0
    text = " ".join(done.out.split())
    assert f"7 rows by 3 heads of the first 3 layers, {bytes_text(inspect(index).bytes)}" in text
    assert "cost 1.75 s and 140 tokens; used for 3 subsets" in text
    assert "longest 2048" in text
    document = p2d("inspect", index, "--json").json
    assert (document["kind"], document["verified"], document["rows"], document["targets"]) == ("index", True, 7, 3)


def test_an_index_without_rows_can_be_shown(tmp_path):
    made = PoolIndex(tmp_path / "index", context="c", heads=HEADS, head_dim=4, source={})
    with made.adding():
        pass
    found = inspect(made.folder)
    assert (found.rows, found.bytes, found.targets) == (0, 0, 0)


@pytest.mark.parametrize("name", ["00001.outputs.npy", "00000.rows.npy", INDEX_NAME])
def test_a_damaged_index_is_refused(index, name):
    content = bytearray((index / name).read_bytes())
    content[-3] ^= 0xFF
    (index / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=name):
        inspect(index)


def test_an_index_whose_heads_are_no_pairs_is_refused(index):
    described = json.loads((index / INDEX_NAME).read_text())
    (index / INDEX_NAME).write_text(json.dumps(described | {"heads": [[0, 1], [2]]}))
    with pytest.raises(ArtifactError, match=INDEX_NAME):
        inspect(index)


def test_a_shard_that_is_gone_is_named(index):
    (index / "00001.rows.npy").unlink()
    with pytest.raises(ArtifactError, match=r"00001\.rows\.npy"):
        inspect(index)


def test_another_folder_is_no_index(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        inspect(tmp_path)
