"""The order of rows."""

import pytest

from p2d_cli.modeling.training import LengthGrouped, TrainingRow, collate

LENGTHS = [(7 * index) % 41 + 1 for index in range(997)]


def batches(order, size):
    return [order[start : start + size] for start in range(0, len(order), size)]


@pytest.mark.parametrize("size", [1, 4, 16, 997, 2000])
def test_every_row_once_and_the_full_batches_first(size):
    order = list(LengthGrouped(LENGTHS, size, seed=0))
    assert sorted(order) == list(range(len(LENGTHS)))
    assert len(LengthGrouped(LENGTHS, size, seed=0)) == len(LENGTHS)


def test_rows_of_a_batch_are_of_similar_length():
    grouped = batches(list(LengthGrouped(LENGTHS, 16, seed=0)), 16)
    padding = sum(
        max(LENGTHS[row] for row in batch) * len(batch) - sum(LENGTHS[row] for row in batch) for batch in grouped
    )
    assert padding < 0.05 * sum(LENGTHS)


def test_an_order_depends_on_seed_and_epoch_and_nothing_else():
    sampler = LengthGrouped(LENGTHS, 16, seed=1)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(LengthGrouped(LENGTHS, 16, seed=2)) != first
    sampler.set_epoch(0)
    assert list(sampler) == first


def test_the_lengths_of_the_batches_follow_no_order():
    means = [sum(LENGTHS[row] for row in batch) for batch in batches(list(LengthGrouped(LENGTHS, 16, seed=0)), 16)]
    assert means != sorted(means, reverse=True)


def test_padding_has_no_labels():
    rows = [TrainingRow("a", (1, 2, 3), (-100, 2, 3)), TrainingRow("b", (4,), (4,))]
    batch = collate(rows, pad_id=9)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [4, -100, -100]]
    assert batch["names"] == ["a", "b"]
