"""The readout against scikit-learn's discriminant and ROC area, and what it must not depend on."""

import numpy as np
import pytest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import roc_auc_score

from p2d_cli.core.readout import fit_readout, held_out_affinity, separation
from p2d_cli.errors import DataError, NonFiniteError

K, D = 5, 7


@pytest.fixture
def rows():
    """Target and background; head 3 tells them apart best, head 0 not at all."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(K, D, D))
    shift = rng.normal(size=(K, D)) * np.array([0, 0.2, 0.4, 2.0, 0.4])[:, None]
    background = np.einsum("MKd,Kde->MKe", rng.normal(size=(300, K, D)), mixing)
    target = np.einsum("QKd,Kde->QKe", rng.normal(size=(40, K, D)) + shift, mixing)
    return target, background


def test_directions_are_those_of_the_linear_discriminant(rows):
    """With equal class means removed, scikit-learn's pooled covariance of the background alone is ours."""
    target, background = rows
    readout = fit_readout(target, background, shrinkage=1e-9)
    for head in range(K):
        centre = background[:, head].mean(axis=0)
        shift = target[:, head].mean(axis=0) - centre
        # Two classes with the background's covariance each, whose means lie as far apart as ours.
        both = np.concatenate([background[:, head], background[:, head] + shift])
        oracle = LinearDiscriminantAnalysis(solver="lsqr").fit(both, np.repeat([0, 1], len(background)))
        cosine = oracle.coef_[0] @ readout.weights_Kd[head]
        cosine /= np.linalg.norm(oracle.coef_) * np.linalg.norm(readout.weights_Kd[head])
        assert cosine == pytest.approx(1, abs=1e-9)


def test_values_are_standardised_over_the_background_and_affinity_is_their_mean(rows):
    target, background = rows
    readout = fit_readout(target, background)
    values = readout.values(background)
    np.testing.assert_allclose(values.mean(axis=0), 0, atol=1e-10)
    np.testing.assert_allclose(values.std(axis=0), 1)
    np.testing.assert_allclose(readout.affinity(target), readout.values(target).mean(axis=1))
    assert readout.affinity(target).mean() > 1


def test_a_slow_plain_version(rows):
    target, background = rows
    readout = fit_readout(target, background, shrinkage=0.3)
    for head in range(K):
        centre = sum(background[:, head]) / len(background)
        covariance = sum(np.outer(row - centre, row - centre) for row in background[:, head]) / len(background)
        shrunk = 0.7 * covariance + 0.3 * np.trace(covariance) / D * np.eye(D)
        direction = np.linalg.inv(shrunk) @ (sum(target[:, head]) / len(target) - centre)
        raw = [row @ direction for row in background[:, head]]
        expected = [(row @ direction - np.mean(raw)) / np.std(raw) for row in target[:, head]]
        np.testing.assert_allclose(readout.values(target)[:, head], expected)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_loudness_and_offset_of_a_head_change_nothing(rows, scale):
    target, background = rows
    factor, offset = np.ones((K, 1)), np.zeros((K, 1))
    factor[1], offset[2] = scale, 5
    plain = fit_readout(target, background).values(target)
    moved = fit_readout(target * factor + offset, background * factor + offset).values(target * factor + offset)
    np.testing.assert_allclose(moved, plain, rtol=1e-6, atol=1e-8)


def test_separation_is_the_cross_validated_roc_area(rows):
    target, background = rows
    expected = np.zeros(K)
    for half in (0, 1):
        readout = fit_readout(target[half::2], background[half::2])
        seen = [readout.values(part[1 - half :: 2]) for part in (target, background)]
        labels = np.repeat([1, 0], [len(part) for part in seen])
        expected += [roc_auc_score(labels, np.concatenate([part[:, head] for part in seen])) / 2 for head in range(K)]
    found = separation(target, background)
    np.testing.assert_allclose(found, expected)
    assert found.argmax() == 3
    assert found[0] == pytest.approx(0.5, abs=0.15)


def test_ties_count_half_and_a_silent_head_says_nothing(rows):
    target, background = (part.copy() for part in rows)
    target[:, 2] = background[:, 2] = 4.0
    assert separation(target, background)[2] == 0.5
    assert not fit_readout(target, background).values(target)[:, 2].any()


def test_too_few_rows_and_numbers_that_are_none(rows):
    target, background = rows
    with pytest.raises(DataError, match="2 pool rows"):
        fit_readout(target, background[:1])
    with pytest.raises(DataError, match="found 1 and 300"):
        separation(target[:1], background)
    target = target.copy()
    target[3, 1, 2] = np.nan
    with pytest.raises(NonFiniteError):
        fit_readout(target, background)


def test_a_row_is_held_out_of_the_readout_that_scores_it(rows):
    target, background = rows
    scores = held_out_affinity(target, background, folds=3)
    for place in range(len(target)):
        others = [row for row in range(len(target)) if row % 3 != place % 3]
        alone = fit_readout(target[others], background).affinity(target[place : place + 1])
        assert scores[place] == pytest.approx(alone[0], abs=1e-12)
    assert scores.mean() < fit_readout(target, background).affinity(target).mean()


def test_more_folds_than_rows_leave_one_out(rows):
    target, background = rows
    few = held_out_affinity(target[:3], background, folds=8)
    assert few[1] == pytest.approx(fit_readout(target[[0, 2]], background).affinity(target[1:2])[0], abs=1e-12)
    with pytest.raises(DataError, match="at least 2 target rows"):
        held_out_affinity(target[:1], background)


def test_a_quantile_of_held_out_rows_keeps_its_share_of_new_ones():
    """Rows of the task that no readout has seen pass the 10% quantile nine times in ten, give or take."""
    rng = np.random.default_rng(1)
    background, shift = rng.normal(size=(300, K, D)), np.full((K, D), 0.5)
    kept = []
    for _ in range(30):
        target, new = rng.normal(size=(64, K, D)) + shift, rng.normal(size=(200, K, D)) + shift
        floor = np.quantile(held_out_affinity(target, background), 0.1)
        kept.append((fit_readout(target, background).affinity(new) >= floor).mean())
    assert 0.87 < np.mean(kept) < 0.95


def test_a_small_head_among_large_ones_has_the_readout_that_it_has_alone():
    rng = np.random.default_rng(0)
    target, background = rng.normal(0.5, 1, size=(20, 3, 8)), rng.normal(size=(60, 3, 8))
    target[:, 1, 5:] = background[:, 1, 5:] = 0.0
    dims_K = np.array([8, 5, 8])
    together = fit_readout(target, background, dims_K=dims_K)
    alone = fit_readout(target[:, 1:2, :5], background[:, 1:2, :5])
    np.testing.assert_allclose(together.values(target)[:, 1], alone.values(target[:, 1:2, :5])[:, 0], rtol=1e-10)
    np.testing.assert_array_equal(together.weights_Kd[1, 5:], 0.0)
    areas = separation(target, background, dims_K=dims_K)
    assert areas[1] == separation(target[:, 1:2, :5], background[:, 1:2, :5])[0]
    held_out = held_out_affinity(target[:, 1:2], background[:, 1:2], dims_K=dims_K[1:2])
    np.testing.assert_allclose(held_out, held_out_affinity(target[:, 1:2, :5], background[:, 1:2, :5]), rtol=1e-10)
