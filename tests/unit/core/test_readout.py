"""The readout against scikit-learn's discriminant and ROC area, and what it must not depend on."""

import numpy as np
import pytest
from scipy import stats
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import roc_auc_score

from p2d_cli.core.readout import (
    Background,
    fit_readout,
    floor_below,
    held_out_affinity,
    held_out_area,
    prompt_share,
    separation,
    shrinkage_for,
)
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
    readout = fit_readout(target, Background.of(background), shrinkage=1e-9)
    for head in range(K):
        centre = background[:, head].mean(axis=0)
        shift = target[:, head].mean(axis=0) - centre
        # Two classes with the background's covariance each, whose means lie as far apart as ours.
        both = np.concatenate([background[:, head], background[:, head] + shift])
        oracle = LinearDiscriminantAnalysis(solver="lsqr").fit(both, np.repeat([0, 1], len(background)))
        cosine = oracle.coef_[0] @ readout.weights_Jd[head]
        cosine /= np.linalg.norm(oracle.coef_) * np.linalg.norm(readout.weights_Jd[head])
        assert cosine == pytest.approx(1, abs=1e-9)


def test_values_are_standardised_over_the_background_and_affinity_is_their_mean(rows):
    target, background = rows
    readout = fit_readout(target, Background.of(background))
    values = readout.values(background)
    np.testing.assert_allclose(values.mean(axis=0), 0, atol=1e-10)
    np.testing.assert_allclose(values.std(axis=0), 1)
    np.testing.assert_allclose(readout.affinity(target), readout.values(target).mean(axis=1))
    assert readout.affinity(target).mean() > 1


def test_a_slow_plain_version(rows):
    target, background = rows
    readout = fit_readout(target, Background.of(background), shrinkage=0.3)
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
    plain = fit_readout(target, Background.of(background)).values(target)
    moved = fit_readout(target * factor + offset, Background.of(background * factor + offset)).values(
        target * factor + offset
    )
    np.testing.assert_allclose(moved, plain, rtol=1e-6, atol=1e-8)


def test_separation_is_the_cross_validated_roc_area(rows):
    target, background = rows
    expected = np.zeros(K)
    for half in (0, 1):
        readout = fit_readout(target[half::2], Background.of(background[half::2]))
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
    assert not fit_readout(target, Background.of(background)).values(target)[:, 2].any()


def test_too_few_rows_and_numbers_that_are_none(rows):
    target, background = rows
    with pytest.raises(DataError, match="2 pool rows"):
        Background.of(background[:1])
    with pytest.raises(DataError, match="found 1 and 300"):
        separation(target[:1], background)
    target = target.copy()
    target[3, 1, 2] = np.nan
    with pytest.raises(NonFiniteError):
        fit_readout(target, Background.of(background))


def test_a_row_is_held_out_of_the_readout_that_scores_it(rows):
    target, background = rows
    scores = held_out_affinity(target, Background.of(background), folds=3)
    for place in range(len(target)):
        others = [row for row in range(len(target)) if row % 3 != place % 3]
        alone = fit_readout(target[others], Background.of(background)).affinity(target[place : place + 1])
        assert scores[place] == pytest.approx(alone[0], abs=1e-12)
    assert scores.mean() < fit_readout(target, Background.of(background)).affinity(target).mean()


def test_more_folds_than_rows_leave_one_out(rows):
    target, background = rows
    few = held_out_affinity(target[:3], Background.of(background), folds=8)
    assert few[1] == pytest.approx(
        fit_readout(target[[0, 2]], Background.of(background)).affinity(target[1:2])[0], abs=1e-12
    )
    with pytest.raises(DataError, match="at least 2 target rows"):
        held_out_affinity(target[:1], Background.of(background))


@pytest.mark.parametrize("count", [2, 3, 8, 64])
def test_a_floor_loses_its_share_of_new_rows(count):
    """Rows of the task that no readout has seen lie below the 10% floor one time in ten, however few set it."""
    rng = np.random.default_rng(1)
    lost = []
    for _ in range(300):
        scores = rng.normal(3, 2, size=count)
        lost.append(stats.norm.cdf(floor_below(scores, 0.1), 3, 2))
    assert np.mean(lost) == pytest.approx(0.1, abs=0.03)


def test_a_floor_is_the_bound_of_a_new_value():
    scores = np.array([1.0, 2.0, 4.0])
    low, _ = stats.t.interval(0.9, 2, loc=scores.mean(), scale=scores.std(ddof=1) * np.sqrt(4 / 3))
    assert floor_below(scores, 0.05) == pytest.approx(low)


def test_new_rows_pass_the_floor_of_held_out_ones():
    rng = np.random.default_rng(1)
    background, shift = Background.of(rng.normal(size=(300, K, D))), np.full((K, D), 0.5)
    kept = []
    for _ in range(30):
        target, new = rng.normal(size=(64, K, D)) + shift, rng.normal(size=(200, K, D)) + shift
        floor = floor_below(held_out_affinity(target, background), 0.1)
        kept.append((fit_readout(target, background).affinity(new) >= floor).mean())
    assert 0.87 < np.mean(kept) < 0.95


def test_shrinkage_grows_with_the_head_and_with_fewer_rows():
    dims = np.array([64, 256])
    small, large = shrinkage_for(dims, 1000, 64)
    assert small == pytest.approx(0.4 * (np.sqrt(0.064) + 1 / 8))
    assert large > small
    assert (shrinkage_for(dims, 250, 64) > (small, large)).all()
    assert (shrinkage_for(dims, 1000, 8) > (small, large)).all()
    assert shrinkage_for(np.array([4096]), 4, 1) == 0.9


def test_a_row_that_stands_for_three_is_three_rows(rows):
    target, background = rows
    weights = np.where(np.arange(len(background)) < 20, 3.0, 1.0)
    weighted = Background.of(background, weights)
    repeated = Background.of(np.concatenate([background, background[:20], background[:20]]))
    found, expected = (fit_readout(target, one, shrinkage=0.2).values(target) for one in (weighted, repeated))
    np.testing.assert_allclose(found, expected)
    assert weighted.rows == pytest.approx(weights.sum() ** 2 / (weights**2).sum())
    assert Background.of(background).rows == pytest.approx(len(background))


def test_the_area_of_all_heads_has_wilsons_interval_over_target_rows(rows):
    target, background = rows
    found = held_out_area(target, background)
    interval = stats.binomtest(round(found.value * 1000), 1000).proportion_ci(method="wilson")
    assert found.low < interval.low < found.value < interval.high < found.high
    seen, folds = [], np.arange(len(target)) % 8
    for half in (0, 1):
        part = Background.of(background[half::2])
        for fold in range(8):
            readout = fit_readout(target[folds != fold], part)
            low = readout.affinity(background[1 - half :: 2])
            seen += [(low < value).mean() for value in readout.affinity(target[folds == fold])]
    assert found.value == pytest.approx(np.mean(seen))
    apart = held_out_area(target[:3] + 100, background)
    assert apart.value == 1.0
    low, _ = stats.binomtest(3, 3).proportion_ci(method="wilson")
    assert (apart.low, apart.high) == (pytest.approx(low), 1.0)


def test_a_small_head_among_large_ones_has_the_readout_that_it_has_alone():
    rng = np.random.default_rng(0)
    target, background = rng.normal(0.5, 1, size=(20, 3, 8)), rng.normal(size=(60, 3, 8))
    target[:, 1, 5:] = background[:, 1, 5:] = 0.0
    dims_K = np.array([8, 5, 8])
    together = fit_readout(target, Background.of(background, dims_K=dims_K))
    alone = fit_readout(target[:, 1:2, :5], Background.of(background[:, 1:2, :5]))
    np.testing.assert_allclose(together.values(target)[:, 1], alone.values(target[:, 1:2, :5])[:, 0], rtol=1e-10)
    np.testing.assert_array_equal(together.weights_Jd[1, 5:], 0.0)
    areas = separation(target, background, dims_K=dims_K)
    assert areas[1] == separation(target[:, 1:2, :5], background[:, 1:2, :5])[0]
    held_out = held_out_affinity(target[:, 1:2], Background.of(background[:, 1:2], dims_K=dims_K[1:2]))
    np.testing.assert_allclose(
        held_out, held_out_affinity(target[:, 1:2, :5], Background.of(background[:, 1:2, :5])), rtol=1e-10
    )


def test_a_heads_readout_is_the_mean_of_those_of_answer_and_prompt(rows):
    target, background = rows
    rng = np.random.default_rng(3)
    mixing = rng.normal(size=(D, D))
    both = [np.stack([part, (part + rng.normal(size=part.shape)) @ mixing], axis=2) for part in (target, background)]
    found = fit_readout(both[0], Background.of(both[1], prompt=0.3)).values(both[0])
    alone = [
        fit_readout(both[0][:, :, place], Background.of(both[1][:, :, place])).values(both[0][:, :, place])
        for place in (0, 1)
    ]
    np.testing.assert_allclose(found, 0.7 * alone[0] + 0.3 * alone[1])
    areas = separation(*both)
    assert areas.shape == (K,)
    for part in both:
        part[:, :, 1] = 0.0  # rows without prompts
    assert prompt_share(*both) == 0.0
    np.testing.assert_allclose(separation(*both), separation(both[0][:, :, 0], both[1][:, :, 0]))


def test_the_prompt_counts_as_far_as_it_tells_held_out_target_rows(rows):
    target, background = (np.stack([part, part], axis=2) for part in rows)
    target[:, :, 0] = 0.0  # the answer is not asked
    scores = held_out_affinity(target[:, :, 1], Background.of(background[:, :, 1]))
    below = fit_readout(target[:, :, 1], Background.of(background[:, :, 1])).affinity(background[:, :, 1])
    area = stats.norm.cdf((scores.mean() - below.mean()) / below.std() / np.sqrt(2))
    assert 0.5 < area < 1
    assert prompt_share(target, background) == pytest.approx(0.3 * (2 * area - 1) ** 2)
    rng = np.random.default_rng(0)
    assert prompt_share(rng.normal(size=(40, K, 2, D)), rng.normal(size=(300, K, 2, D))) < 0.1
    assert prompt_share(target + 100, background) == pytest.approx(0.3)
    assert prompt_share(target[:1] + 100, background) == 0.0


def test_a_small_head_is_small_at_both_places():
    rng = np.random.default_rng(0)
    target, background = rng.normal(0.5, 1, size=(20, 3, 2, 8)), rng.normal(size=(60, 3, 2, 8))
    target[:, 1, :, 5:] = background[:, 1, :, 5:] = 0.0
    dims_K = np.array([8, 5, 8])
    together = fit_readout(target, Background.of(background, dims_K=dims_K)).values(target)
    alone = fit_readout(target[:, 1:2, :, :5], Background.of(background[:, 1:2, :, :5])).values(target[:, 1:2, :, :5])
    np.testing.assert_allclose(together[:, 1], alone[:, 0], rtol=1e-10)
    small = prompt_share(target[:, 1:2, :, :5], background[:, 1:2, :, :5])
    assert prompt_share(target[:, 1:2], background[:, 1:2], dims_K=dims_K[1:2]) == pytest.approx(small)
