"""Readings that lie beside a heads artifact: found again by their rows, and refused where they are damaged."""

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from p2d_cli.artifacts.readings import PLACES, READINGS_NAME, Readings, find_rows, load_readings, save_readings
from p2d_cli.errors import ArtifactError

N, D = 6, 3


@pytest.fixture
def heads_LH():
    return np.array([[True, False, True], [False, False, False], [False, True, True]])


@pytest.fixture
def readings(heads_LH):
    rng = np.random.default_rng(0)
    outputs_nKPd = rng.normal(size=(N, int(heads_LH.sum()), PLACES, D)).astype(np.float32)
    digests_n2 = rng.integers(0, 2**64, size=(N, 2), dtype=np.uint64)
    return Readings("abc", digests_n2, outputs_nKPd, heads_LH, targets=2, pool="def")


def test_they_come_back_as_they_were_saved(tmp_path, readings):
    save_readings(tmp_path, readings)
    found = load_readings(tmp_path)
    assert (found.context, found.targets, found.pool) == ("abc", 2, "def")
    np.testing.assert_array_equal(found.sample_n2, readings.digests_n2[2:])
    for name in ("digests_n2", "outputs_nKPd", "heads_LH"):
        one, other = getattr(found, name), getattr(readings, name)
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_equal_readings_give_equal_bytes(tmp_path, readings):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_readings(tmp_path / name, readings)
    assert (tmp_path / "a" / READINGS_NAME).read_bytes() == (tmp_path / "b" / READINGS_NAME).read_bytes()


def test_an_artifact_without_readings_has_none(tmp_path):
    assert load_readings(tmp_path) is None


def test_the_readings_of_some_heads_are_theirs(readings, heads_LH):
    some_LH = heads_LH.copy()
    some_LH[0, 0] = some_LH[2, 2] = False
    some = readings.of(some_LH)
    np.testing.assert_array_equal(some.outputs_nKPd, readings.outputs_nKPd[:, [1, 2]])
    np.testing.assert_array_equal(some.heads_LH, some_LH)
    assert (some.context, some.targets, some.pool) == (readings.context, readings.targets, readings.pool)


@pytest.mark.parametrize("most", [3, 2**64])
def test_rows_are_found_as_in_a_dictionary(most):
    """Of few numbers, so that rows share the first half of their digests, or both halves, with others."""
    rng = np.random.default_rng(1)
    every = rng.integers(0, most, size=(60, 2), dtype=np.uint64)
    known = np.unique(every[:40], axis=0)[::-1] if most > 3 else unlike_in_the_first_half(every)
    place_of = {tuple(row): place for place, row in enumerate(known.tolist())}
    found = find_rows(known, every)
    assert found.tolist() == [place_of.get(tuple(row), -1) for row in every.tolist()]
    assert (found >= 0).any()
    assert (found < 0).any()


def unlike_in_the_first_half(every):
    """Rows of which no two share the first half, in no order."""
    return every[np.sort(np.unique(every[:, 0], return_index=True)[1])][::-1]


def test_nothing_is_found_among_nothing():
    empty, asked = np.empty((0, 2), dtype=np.uint64), np.ones((3, 2), dtype=np.uint64)
    assert find_rows(empty, asked).tolist() == [-1, -1, -1]
    assert find_rows(asked, empty).tolist() == []


def resave(folder, **changed):
    """Save the file anew with other tensors, or without those that are None."""
    with safe_open(folder / READINGS_NAME, framework="numpy") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in ("digests", "outputs", "heads")}
    tensors = {name: tensor for name, tensor in (tensors | changed).items() if tensor is not None}
    save_file(tensors, folder / READINGS_NAME, metadata=metadata)


@pytest.mark.parametrize(
    "changed",
    [
        {"digests": np.zeros((N - 1, 2), dtype=np.uint64)},
        {"digests": np.zeros((N, 3), dtype=np.uint64)},
        {"digests": np.zeros((N, 2), dtype=np.int64)},
        {"outputs": np.zeros((N, 3, PLACES, D), dtype=np.float32)},
        {"outputs": np.zeros((N, 4, 1, D), dtype=np.float32)},
        {"outputs": np.zeros((N, 4, D), dtype=np.float32)},
        {"outputs": np.zeros((N, 4, PLACES, D), dtype=np.float16)},
        {"outputs": np.full((N, 4, PLACES, D), np.nan, dtype=np.float32)},
        {"heads": np.ones((3, 3), dtype=np.bool_)},
        {"heads": np.ones((2, 2), dtype=np.uint8)},
    ],
    ids=lambda changed: "-".join(f"{name}{list(array.shape)}{array.dtype}" for name, array in changed.items()),
)
def test_tensors_that_do_not_fit_together_are_refused(tmp_path, readings, changed):
    save_readings(tmp_path, readings)
    resave(tmp_path, **changed)
    with pytest.raises(ArtifactError, match="do not fit together"):
        load_readings(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "empty", "junk", "no tensor", "no context"])
def test_a_damaged_file_is_refused(tmp_path, readings, damage):
    save_readings(tmp_path, readings)
    path = tmp_path / READINGS_NAME
    whole = path.read_bytes()
    if damage == "no tensor":
        resave(tmp_path, heads=None)
    elif damage == "no context":
        save_file({"digests": readings.digests_n2, "outputs": readings.outputs_nKPd, "heads": readings.heads_LH}, path)
    else:
        path.write_bytes({"cut": whole[:-8], "empty": b"", "junk": b"junk" * 20}[damage])
    with pytest.raises(ArtifactError, match="cannot be read") as problem:
        load_readings(tmp_path)
    assert str(path) in str(problem.value)
