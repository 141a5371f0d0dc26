"""The index of a pool: rows are added a shard at a time and found by their digests; a damaged index is refused."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from p2d_cli.artifacts.locking import write_lock
from p2d_cli.artifacts.pool_index import INDEX_NAME, PoolIndex
from p2d_cli.errors import ArtifactError, CannotCreateError, DataError, StoppedEarlyError

HEADS, D = [(0, 1), (0, 3), (1, 0)], 4
SOURCE = {"model": "m", "precision": "float32"}


def opened(folder, **changed):
    settings = {"context": "c", "heads": HEADS, "head_dim": D, "source": SOURCE}
    return PoolIndex(folder, **(settings | changed))


def some_rows(count, seed):
    rng = np.random.default_rng(seed)
    digests = rng.integers(0, 2**64, size=(count, 2), dtype=np.uint64)
    return digests, rng.normal(size=(count, len(HEADS), 2, D)).astype(np.float32)


def add(index, count, seed, *, by="k", seconds=1.0, tokens=10):
    digests, outputs = some_rows(count, seed)
    with index.adding():
        index.add(digests, outputs, np.zeros(len(digests), dtype=bool), seconds=seconds, tokens=tokens, by=by)
    return digests, outputs


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "index"


def test_opening_makes_no_folder(folder):
    index = opened(folder)
    assert index.num_rows == 0
    assert list(index.blocks()) == []
    assert index.find(some_rows(2, 0)[0]).tolist() == [-1, -1]
    assert not folder.exists()


def test_rows_are_found_with_their_outputs_in_every_shard(folder):
    parts = [add(opened(folder), count, seed) for seed, count in enumerate((3, 1, 5))]
    index = opened(folder)
    digests, outputs = (np.concatenate(part) for part in zip(*parts, strict=True))
    assert index.num_rows == 9
    asked = np.concatenate([digests[::-1], some_rows(2, 9)[0]])
    assert index.find(asked).tolist() == [*range(8, -1, -1), -1, -1]
    blocks = list(index.blocks())
    assert [(block.start, block.stop) for block, _ in blocks] == [(0, 3), (3, 4), (4, 9)]
    found = np.concatenate([part for _, part in blocks])
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, outputs.astype(np.float16))
    stored = sum(np.load(path).nbytes for path in folder.glob("*.npy"))
    assert index.row_bytes * index.num_rows == stored


def test_an_open_index_knows_what_others_added_once_it_may_add_itself(folder):
    one, other = opened(folder), opened(folder)
    digests, _ = add(one, 2, 0)
    assert other.find(digests).tolist() == [-1, -1]
    with other.adding():
        assert other.find(digests).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (
            {"context": "other", "source": SOURCE | {"precision": "bfloat16"}},
            "precision: float32 there, bfloat16 here$",
        ),
        ({"context": "other", "source": {"model": "n", "longest": 9}}, "longest: None there, 9 here, model: m there"),
        ({"heads": [(0, 1), (0, 2), (1, 0)]}, "with other heads"),
        ({"head_dim": 8}, "with other heads"),
    ],
    ids=["precision", "several", "heads", "head-dim"],
)
def test_an_index_that_was_made_otherwise_is_refused_with_what_differs(folder, changed, told):
    add(opened(folder), 2, 0)
    with pytest.raises(DataError, match=f"was made otherwise: {told}"):
        opened(folder, **changed)


def test_an_index_without_rows_is_bound_as_well(folder):
    with opened(folder).adding():
        pass
    with pytest.raises(DataError, match="made otherwise"):
        opened(folder, context="other", source={})


def test_a_shard_that_is_not_listed_is_written_over(folder, monkeypatch):
    """As if the process had died between the files of a shard and the list of shards."""
    first, _ = add(opened(folder), 2, 0)
    with monkeypatch.context() as patch:
        patch.setattr(PoolIndex, "_write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            add(opened(folder), 4, 1)
    assert (folder / "00001.rows.npy").exists()
    assert opened(folder).num_rows == 2
    second, outputs = add(opened(folder), 3, 2)
    index = opened(folder)
    assert index.num_rows == 5
    assert index.find(np.concatenate([first, second])).tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(list(index.blocks())[1][1], outputs.astype(np.float16))


@pytest.mark.parametrize("left", ["users", ".index.json.0123abcd", "users and .index.json.0123abcd"])
def test_what_a_process_leaves_that_dies_before_its_first_row_is_no_obstacle(folder, left):
    folder.mkdir()
    for name in left.split(" and "):
        (folder / name).mkdir() if name == "users" else (folder / name).write_text("{")
    add(opened(folder), 2, 0)
    assert opened(folder).num_rows == 2


@pytest.mark.parametrize("name", ["00000.outputs.npy", "00000.rows.npy"])
@pytest.mark.parametrize("damage", ["byte", "cut", "gone"])
def test_a_damaged_shard_is_refused_by_name(folder, name, damage):
    digests, _ = add(opened(folder), 3, 0)
    path = folder / name
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        content[-1] ^= 1
        path.write_bytes(content[:-4] if damage == "cut" else content)
    index = opened(folder)
    with pytest.raises(ArtifactError, match=f"{name} is damaged"):
        index.find(digests) if "rows" in name else list(index.blocks())


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "cannot be read"),
        (b"{}", "cannot be read"),
        (b"[" * 10_000, "cannot be read"),
        (b"\xff", "cannot be read"),
        ({"schema": "p2d.index/9"}, "this p2d knows p2d.index/1"),
        ({"shards": [{"name": "../../x", "rows": 1}]}, "cannot be read"),
    ],
)
def test_a_damaged_list_of_shards_is_refused(folder, content, told):
    add(opened(folder), 2, 0)
    path = folder / INDEX_NAME
    changed = content if isinstance(content, bytes) else json.dumps(json.loads(path.read_text()) | content).encode()
    path.write_bytes(changed)
    with pytest.raises(ArtifactError, match=told):
        opened(folder)


def test_a_folder_with_something_else_is_refused_and_left_alone(folder):
    folder.mkdir()
    (folder / "thesis.tex").write_text("x")
    with pytest.raises(CannotCreateError, match="holds something else than an index"):
        opened(folder)
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]
    with pytest.raises(CannotCreateError, match="something else"):
        opened(folder / "thesis.tex")


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CannotCreateError, match="--index"), opened(tmp_path / "file" / "index").adding():
        pass


# --- what each target is charged


def test_what_was_read_is_shared_among_those_who_use_it(folder):
    add(opened(folder), 4, 0, by="first", seconds=12.0, tokens=90)
    assert opened(folder).charge("first") == (12.0, 90, 1)
    assert opened(folder).charge("second") == (6.0, 45, 2)
    assert opened(folder).charge("third") == (4.0, 30, 3)
    assert opened(folder).charge("third") == (4.0, 30, 3), "who comes again is counted once"


def test_ones_own_shards_are_charged_in_full(folder):
    add(opened(folder), 4, 0, by="first", seconds=12.0, tokens=90)
    add(opened(folder), 4, 1, by="second", seconds=3.0, tokens=7)
    assert opened(folder).charge("second") == (12 / 2 + 3, 90 / 2 + 7, 2)
    assert opened(folder).charge("third") == (5.0, round(97 / 3), 3)


def test_nobody_is_charged_for_an_empty_index(folder):
    assert opened(folder).charge("first") == (0, 0, 1)


# --- two writers


def test_a_second_writer_is_refused(folder):
    index, other = opened(folder), opened(folder)
    with index.adding(), pytest.raises(StoppedEarlyError), other.adding():
        pytest.fail("two processes add rows")
    with other.adding():
        pass


def test_the_lock_lies_beside_the_folder(folder):
    """So that a folder with nothing but a lock is none with something else."""
    with write_lock(folder):
        add_only = opened(folder)
        assert add_only.num_rows == 0
    assert not folder.exists()


def test_a_writer_that_was_killed_holds_nothing(folder):
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from p2d_cli.artifacts.pool_index import PoolIndex\n"
        "index = PoolIndex(Path(sys.argv[1]), context='c', heads=[(0, 1), (0, 3), (1, 0)], head_dim=4, source={})\n"
        "with index.adding():\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    done = subprocess.run([sys.executable, "-c", code, folder], check=False, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == -signal.SIGKILL
    add(opened(folder), 2, 0)
    assert opened(folder).num_rows == 2


@pytest.mark.parametrize("value", [70_000.0, -1e30, np.inf, np.nan])
def test_values_beyond_those_of_float16_are_refused_and_nothing_is_added(folder, value):
    index = opened(folder)
    digests, outputs = some_rows(3, 0)
    outputs[1, 2, 0] = value
    with index.adding(), pytest.raises(DataError, match="beyond those of float16"):
        index.add(digests, outputs, np.zeros(len(digests), dtype=bool), seconds=1.0, tokens=1, by="k")
    assert opened(folder).num_rows == 0
    assert not list(Path(folder).glob("*.npy"))
