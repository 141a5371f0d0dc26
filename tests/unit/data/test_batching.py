import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from p2d_cli.data.batching import pad_mask, token_batches
from p2d_cli.errors import UsageError

ROWS = st.lists(st.lists(st.integers(1, 99), max_size=9), min_size=1, max_size=6)


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(0, 50)),
    budget=st.integers(1, 120),
    max_rows=st.none() | st.integers(1, 5),
)
def test_every_row_is_in_one_batch_and_no_batch_is_over_budget(lengths, budget, max_rows):
    batches = token_batches(lengths, token_budget=budget, max_rows=max_rows)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        padded = len(batch) * max(lengths[index] for index in batch)
        assert padded <= budget or len(batch) == 1
        assert max_rows is None or len(batch) <= max_rows
    assert [lengths[index] for batch in batches for index in batch] == sorted(lengths, reverse=True)


def test_batches_are_as_full_as_the_budget_allows():
    assert token_batches([3, 3, 3, 3, 5], token_budget=10) == [[4, 0], [1, 2, 3]]


@pytest.mark.parametrize("limits", [{"token_budget": 0}, {"token_budget": 9, "max_rows": 0}])
def test_impossible_limits_are_refused(limits):
    with pytest.raises(UsageError, match="needs room"):
        token_batches([1], **limits)


@settings(deadline=None)
@given(ROWS)
def test_padding_keeps_the_rows_and_marks_the_rest(rows):
    right, right_mask = pad_mask(rows, 7), pad_mask([[1] * len(row) for row in rows], 0)
    assert right.dtype == right_mask.dtype == torch.long
    for index, row in enumerate(rows):
        count = len(row)
        assert right[index].tolist()[:count] == row
        assert set(right[index].tolist()[count:]) <= {7}
        assert right_mask[index].tolist() == [1] * count + [0] * (right.shape[1] - count)


def test_masks_take_the_type_of_their_fill():
    assert pad_mask([[True], [False, True]], False).tolist() == [[True, False], [False, True]]
    assert pad_mask([[True]], False).dtype == torch.bool
    assert pad_mask([[0], [-1, 1]], -1).tolist() == [[0, -1], [-1, 1]]
    assert pad_mask([[0]], -100).dtype == torch.long
    assert pad_mask([], -1).shape == (0, 0)
