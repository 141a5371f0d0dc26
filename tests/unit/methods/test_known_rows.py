"""The sample that a readout is fitted on: random, and of rows that were read where those were a random sample too."""

from types import SimpleNamespace

import numpy as np
import pytest

from p2d_cli.artifacts.readings import Readings
from p2d_cli.data.pool import Pool
from p2d_cli.data.records import Message, Record
from p2d_cli.engine.readings import digests_of
from p2d_cli.methods.known_rows import KnownRows

HEADS_LH = np.ones((1, 1), dtype=np.bool_)
SIZE = 10


@pytest.fixture
def records():
    return [Record(str(row), (Message("user", f"question {row}"),), "yes", None, {}, str(row)) for row in range(50)]


def drawn(records, kept, pool="this"):
    inputs = SimpleNamespace(entries={"pool": SimpleNamespace(digest=pool)})
    job, config = SimpleNamespace(inputs=inputs), SimpleNamespace(seed=0)
    task = SimpleNamespace(pool=Pool.of(records), config=config, job=job, target=())
    known = KnownRows(task, HEADS_LH, SIZE)
    known._draw(kept)
    assert np.flatnonzero(known.is_known_M).tolist() == known.sample.tolist()
    return known.sample.tolist()


def readings(records, *, targets=0, pool="this"):
    outputs = np.zeros((len(records), 1, 2, 1), dtype=np.float32)
    return Readings("context", digests_of(records), outputs, HEADS_LH, targets=targets, pool=pool)


def test_rows_that_were_read_come_first(records):
    read = records[5:30:5]
    sample = drawn(records, readings(read))
    assert set(range(5, 30, 5)) <= set(sample)
    assert len(sample) == SIZE


def test_rows_of_the_target_and_of_another_pool_are_drawn_like_any(records):
    """A target's rows stand for the task, and another pool's for that pool: neither is a random sample of this one."""
    by_chance = drawn(records, None)
    assert drawn(records, readings(records[:30], targets=30)) == by_chance
    assert drawn(records, readings(records[:30], pool="another")) == by_chance
    assert drawn(records, readings(records[:30])) != by_chance
