"""A pool that is read in chunks says the same as one that is held."""

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2d_cli.data import pool as pools
from p2d_cli.data.episodes import duplicate_groups
from p2d_cli.data.pool import open_pool
from p2d_cli.data.records import Message, Record
from p2d_cli.errors import DataError

WORDS = st.lists(st.sampled_from(["a", "A ", "b", "c", "d"]), min_size=1, max_size=20)


def records(words, ids=None):
    ids = ids or [f"r{place}" for place in range(len(words))]
    return [
        Record(name, (Message("user", word),), "yes", None, {"word": word}, f"f:{place + 1}")
        for place, (name, word) in enumerate(zip(ids, words, strict=True))
    ]


def scan_of(rows):
    """A source of these records that counts how often it is read."""

    def scan(*, skip, with_fields=False):
        del skip
        scan.reads += 1
        yield from rows if with_fields else (replace(row, fields={}) for row in rows)

    scan.reads = 0
    return scan


@settings(deadline=None)
@given(words=WORDS, target=st.lists(st.sampled_from(["a", "c", "x"]), max_size=3), size=st.integers(1, 8))
def test_chunks_are_the_rows_that_are_no_target_rows(words, target, size):
    rows, shown = records(words), records(target)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pools, "CHUNK_ROWS", size)
        pool = open_pool(scan_of(rows), shown)
        chunks = list(pool.chunks())
    row_groups, target_groups = duplicate_groups(rows, shown)
    others = np.flatnonzero(~np.isin(row_groups, target_groups)).tolist()
    assert [row.id for chunk in chunks for row in chunk.records] == [f"r{place}" for place in others]
    assert (pool.num_rows, pool.size) == (len(rows), len(others))
    assert pool.places(range(pool.size)).tolist() == others
    assert [rows[place].id for place in np.flatnonzero(pool.is_excluded_N)] == [
        row.id for place, row in enumerate(rows) if place not in others
    ]
    assert [chunk.start for chunk in chunks] == np.cumsum([0, *(len(c.records) for c in chunks)])[:-1].tolist()
    sizes = {len(chunk.records) for chunk in chunks}
    assert max(sizes, default=0) <= size
    assert max(sizes, default=0) - min(sizes, default=0) <= 1, "no chunk is too small for an episode"
    same_text = {row.plain_text: group for row, group in zip(shown, duplicate_groups(shown)[0], strict=True)}
    assert pool.twin_groups.tolist() == [same_text[rows[place].plain_text] for place in pool.twins]


@settings(deadline=None)
@given(words=WORDS, target=st.lists(st.sampled_from(["a", "c", "x"]), max_size=3), data=st.data())
def test_a_pool_of_some_rows_only(words, target, data):
    rows, shown = records(words), records(target)
    whole = open_pool(scan_of(rows), shown)
    listed = sorted(data.draw(st.sets(st.integers(0, whole.size - 1)))) if whole.size else []
    pool = whole.only(listed)
    places = whole.places(listed).tolist()
    assert (pool.num_rows, pool.size) == (len(rows), len(listed))
    assert pool.places(range(pool.size)).tolist() == places
    assert [row.id for chunk in pool.chunks() for row in chunk.records] == [f"r{place}" for place in places]
    assert np.flatnonzero(~pool.is_excluded_N).tolist() == places
    half = listed[::2]
    again = pool.only(range(0, len(listed), 2))
    assert again.places(range(again.size)).tolist() == whole.places(half).tolist()
    assert again.twins.tolist() == whole.twins.tolist()


def test_a_small_pool_is_read_once_and_again_for_its_columns():
    scan = scan_of(records("abcd"))
    pool = open_pool(scan)
    assert [len(chunk.records) for chunk in pool.chunks()] == [4]
    assert [row.id for row in pool.take([3, 0, 3])] == ["r3", "r0", "r3"]
    assert scan.reads == 1
    assert [row.fields for row in pool.read(with_fields=True)] == [{"word": word} for word in "abcd"]
    assert scan.reads == 2


def test_long_rows_make_small_chunks(monkeypatch):
    monkeypatch.setattr(pools, "CHUNK_CHARACTERS", 100)
    pool = open_pool(scan_of(records(["x" * 60] * 5)))
    assert [len(chunk.records) for chunk in pool.chunks()] == [1, 1, 1, 2]
    assert pool.held is None
    assert [chunk.part for chunk in pool.chunks()][3] == "4 to 5 of 5"


def test_ids_that_repeat_are_found_without_holding_them():
    pool = open_pool(scan_of(records("abcde", ["x", "y", "z", "y", "z"])))
    assert pool.notes == ("ids repeat ('y' stands 2 times): rows are named by their place in the file instead",)
    assert [row.id for row in pool.read()] == [f"f:{line}" for line in range(1, 6)]
    assert [row.id for row in pool.take([4])] == ["f:5"]


@pytest.mark.parametrize(
    ("change", "found"), [(lambda rows: rows.pop(), "3"), (lambda rows: rows.append(rows[0]), "more")]
)
def test_a_pool_that_changes_while_it_is_read(change, found, monkeypatch):
    monkeypatch.setattr(pools, "CHUNK_ROWS", 2)
    rows = records("abcd")
    pool = open_pool(scan_of(rows))
    change(rows)
    with pytest.raises(DataError, match=f"changed while it was being read: expected 4 rows, found {found}"):
        list(pool.read())


def test_progress_is_told_now_and_then():
    told = []
    open_pool(scan_of(records([str(random.Random(n).random()) for n in range(2500)])), advance=told.append)
    assert told == [1024, 1024]
