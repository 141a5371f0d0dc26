import numpy as np
import pytest
from scipy import sparse
from sklearn.preprocessing import normalize

from p2d_cli.core.coverage import order_by_coverage


def plain_choice(rows_MW, count):
    """The greedy choice, from all likenesses and every row looked at anew each time."""
    likeness_MM = rows_MW @ rows_MW.T
    nearest_M, chosen = np.zeros(len(rows_MW)), []
    for _ in range(count):
        gains = [np.maximum(likeness_MM[:, row] - nearest_M, 0).sum() for row in range(len(rows_MW))]
        best = max((row for row in range(len(rows_MW)) if row not in chosen), key=lambda row: gains[row])
        chosen.append(best)
        nearest_M = np.maximum(nearest_M, likeness_MM[:, best])
    return chosen


def rows(count, width, seed, density=0.1):
    dense = np.random.default_rng(seed).random((count, width))
    return normalize(np.where(dense < density, dense + 0.1, 0.0))


@pytest.mark.parametrize(("count", "width", "chosen"), [(60, 40, 12), (200, 30, 200), (5, 4, 3), (1, 1, 1), (40, 9, 0)])
def test_the_choice_is_that_of_a_plain_greedy_one(count, width, chosen):
    for seed in range(5):
        dense = rows(count, width, seed)
        order = order_by_coverage(sparse.csr_matrix(dense), chosen)
        assert sorted(order) == list(range(count)), "every row has one place"
        found, plain = order[:chosen], plain_choice(dense, chosen)
        likeness_MM = dense @ dense.T
        for place in range(1, chosen + 1):  # equal gains may be told apart by rounding: what is covered is not
            covered, expected = (likeness_MM[:, list(choice[:place])].max(axis=1).sum() for choice in (found, plain))
            assert covered == pytest.approx(expected, abs=1e-9)


def test_one_row_of_each_kind_comes_before_a_second_of_any():
    kinds = normalize(np.eye(6)[np.repeat(np.arange(6), [30, 20, 10, 5, 2, 1])] + 0.01)
    order = order_by_coverage(sparse.csr_matrix(kinds), 6)
    assert [int(row) for row in order[:6]] == [0, 30, 50, 60, 65, 67], "the larger kind first, its first row"


def test_rows_without_words_and_repeated_rows():
    dense = np.zeros((6, 3))
    dense[[1, 2]] = [1.0, 0.0, 0.0]
    dense[4] = [0.0, 1.0, 0.0]
    assert order_by_coverage(sparse.csr_matrix(dense), 2)[:2].tolist() == [1, 4]
    assert sorted(order_by_coverage(sparse.csr_matrix(dense), 6)) == list(range(6))
