from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from p2d_cli.core.geometry import LayerHeads
from p2d_cli.core.head_selection import (
    candidate_heads,
    candidate_layers,
    contrast_scores,
    expected_jaccard,
    head_levels,
    jaccard,
    repeatability,
    select_readers,
    select_spread,
    select_top,
    select_uniform,
    spearman,
)
from p2d_cli.errors import NonFiniteError, UsageError


def every(scores):
    """Return that all heads are there."""
    return np.ones(np.shape(scores), dtype=bool)


def grouped(layers, heads, groups):
    """Return so many equal layers."""
    return (LayerHeads(heads, groups, 8),) * layers


def top(repeats, count):
    """Return what `repeatability` needs to know of a selection of the best."""
    candidates = every(repeats[0])
    return candidates, lambda scores: select_top(scores, count, candidates)


_few_values = st.integers(-2, 2).map(float)  # many ties


@settings(deadline=None)
@given(
    scores=hnp.arrays(np.float64, hnp.array_shapes(min_dims=2, max_dims=2, max_side=5), elements=_few_values),
    data=st.data(),
)
def test_select_top_is_a_plain_sort_by_score_layer_head(scores: np.ndarray, data: st.DataObject):
    count = data.draw(st.integers(1, scores.size))
    places = sorted(np.ndindex(*scores.shape), key=lambda place: (-scores[place], *place))
    selected = select_top(scores, count, every(scores))
    assert selected.dtype == np.bool_
    assert sorted(map(tuple, np.argwhere(selected).tolist())) == sorted(places[:count])


def test_selections_of_growing_size_contain_each_other_and_follow_a_permutation():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(4, 3))
    selections = [select_top(scores, count, every(scores)) for count in range(1, 13)]
    assert all((small <= large).all() for small, large in itertools.pairwise(selections))
    order = rng.permutation(4)
    assert (select_top(scores[order], 5, every(scores)) == selections[4][order]).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_named(bad: float):
    scores = np.zeros((3, 4))
    scores[1, 2] = scores[2, 0] = bad
    with pytest.raises(NonFiniteError, match=r"\(layer 1, head 2\)"):
        select_top(scores, 2, every(scores))


@pytest.mark.parametrize("count", [0, 7, -1])
def test_an_impossible_number_of_heads_is_refused(count: int):
    for select in (
        lambda: select_top(np.zeros((2, 3)), count, np.ones((2, 3), bool)),
        lambda: select_uniform(count, np.ones((2, 3), bool)),
    ):
        with pytest.raises(UsageError, match=f"from 1 to 6, found {count}"):
            select()


@settings(deadline=None)
@given(layers=st.integers(1, 12), heads=st.integers(1, 12), data=st.data())
def test_uniform_spreads_heads_evenly_over_layers_and_within_them(layers: int, heads: int, data: st.DataObject):
    count = data.draw(st.integers(1, layers * heads))
    selected = select_uniform(count, np.ones((layers, heads), bool))
    assert selected.shape == (layers, heads)
    assert selected.sum() == count
    per_layer = selected.sum(axis=1)
    assert per_layer.max() - per_layer.min() <= 1
    # Evenly over depth: down to any layer, no more and no less than its share of the heads, within one.
    shares = count * np.arange(1, layers + 1) / layers
    assert np.abs(np.cumsum(per_layer) - shares).max() < 1
    gaps = np.diff(np.flatnonzero(selected.ravel()))
    assert gaps.size == 0 or gaps.max() - gaps.min() <= 1


def test_a_single_uniform_head_is_the_middle_one():
    assert np.argwhere(select_uniform(1, np.ones((5, 3), bool))).tolist() == [[2, 1]]


@settings(deadline=None)
@given(data=st.data(), size=st.integers(2, 12))
def test_spearman_is_scipys_with_ties(data: st.DataObject, size: int):
    a, b = (np.array(data.draw(st.lists(_few_values, min_size=size, max_size=size))) for _ in range(2))
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        assert math.isnan(spearman(a, b))
    else:
        assert spearman(a, b) == pytest.approx(scipy.stats.spearmanr(a, b).statistic, abs=1e-12)
        assert spearman(a, b) == spearman(b, a) == pytest.approx(spearman(np.exp(a), b), abs=1e-12)
        assert spearman(a, -b) == pytest.approx(-spearman(a, b), abs=1e-12)


def test_spearman_has_no_value_without_ranks():
    assert math.isnan(spearman([1.0, math.nan, 2.0], [1.0, 2.0, 3.0]))
    assert math.isnan(spearman([], []))
    assert math.isnan(spearman([1.0], [2.0]))
    assert spearman([[1.0, 2.0], [3.0, 4.0]], [[10.0, 20.0], [30.0, 40.0]]) == 1.0
    with pytest.raises(ValueError, match="cannot correlate 2 with 3"):
        spearman([1, 2], [1, 2, 3])


def test_jaccard_counts_common_over_all():
    assert jaccard([True, True, False, False], [True, False, True, False]) == pytest.approx(1 / 3)
    assert jaccard([[True, False]], [[True, False]]) == 1.0
    assert jaccard([True, False], [False, True]) == 0.0
    assert jaccard([False], [False]) == 1.0
    with pytest.raises(ValueError, match="cannot compare"):
        jaccard([True], [True, False])


@pytest.mark.parametrize(("total", "count"), [(1, 1), (5, 0), (5, 2), (6, 3), (6, 5), (6, 6)])
def test_expected_jaccard_is_the_mean_over_all_pairs_of_sets(total: int, count: int):
    fixed = set(range(count))
    overlaps = [
        len(fixed & set(other)) / len(fixed | set(other)) if count else 1.0
        for other in itertools.combinations(range(total), count)
    ]
    assert expected_jaccard(total, count) == pytest.approx(sum(overlaps) / len(overlaps), rel=1e-12)


def test_expected_jaccard_of_a_tenth_of_a_large_model():
    count, total = 1024, 10240
    common = np.arange(count + 1)
    probability = scipy.stats.hypergeom.pmf(common, total, count, count)
    assert expected_jaccard(total, count) == pytest.approx(
        (probability * common / (2 * count - common)).sum(), rel=1e-6
    )
    with pytest.raises(ValueError, match="cannot select 6 of 5"):
        expected_jaccard(5, 6)


def test_repeatability_averages_all_pairs_of_repeats():
    repeats = np.random.default_rng(0).normal(size=(3, 4, 5))
    found = repeatability(repeats, *top(repeats, 4))
    assert found is not None
    pairs = [(0, 1), (0, 2), (1, 2)]
    rank = [scipy.stats.spearmanr(repeats[i].ravel(), repeats[j].ravel()).statistic for i, j in pairs]
    assert found.mean_spearman == pytest.approx(np.mean(rank))
    tops = [set(np.argsort(-scores.ravel())[:4].tolist()) for scores in repeats]
    assert found.mean_jaccard == pytest.approx(
        np.mean([len(tops[i] & tops[j]) / len(tops[i] | tops[j]) for i, j in pairs])
    )
    assert found.chance_jaccard == expected_jaccard(20, 4)
    assert found.draws == 3


def test_repeatability_is_that_of_the_selection_that_is_made():
    scores = np.array([[[9.0, 8.0], [2.0, 1.0]], [[9.0, 1.0], [8.0, 2.0]]])
    best = repeatability(scores, *top(scores, 2))
    everything = every(scores[0])
    spread = repeatability(scores, everything, lambda each: select_spread(each, 2, everything, grouped(2, 2, 2)))
    assert (best.mean_jaccard, spread.mean_jaccard) == (1 / 3, 1.0)


def test_repeatability_of_one_repeat_is_unknown_and_of_equal_ones_perfect():
    scores = np.arange(6.0).reshape(1, 2, 3)
    assert repeatability(scores, *top(scores, 2)) is None
    same = repeatability(np.repeat(scores, 2, axis=0), *top(scores, 2))
    assert same is not None
    assert (same.mean_spearman, same.mean_jaccard) == (1.0, 1.0)
    constant = repeatability(np.zeros((2, 2, 3)), *top(scores, 2))
    assert constant is not None
    assert math.isnan(constant.mean_spearman)
    with pytest.raises(NonFiniteError):
        repeatability(np.full((2, 2, 3), np.nan), *top(scores, 2))


def test_contrast_is_the_mean_share_beyond_chance():
    shares = np.array([[0.2, 0.9], [0.2, 0.7]])
    assert contrast_scores(shares, 5) == pytest.approx([0.0, 0.6])
    assert contrast_scores(shares.reshape(2, 2, 1), 5).shape == (2, 1)
    assert contrast_scores(shares[::-1], 5) == pytest.approx(contrast_scores(shares, 5))
    with pytest.raises(ValueError, match="needs episodes"):
        contrast_scores(np.zeros((0, 2)), 5)


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.sampled_from([1, 2, 3]), st.integers(0, 2**32 - 1), st.data())
def test_a_spread_selection_is_even_and_takes_the_best_that_may_be_taken(layers, groups, per_group, seed, data):
    heads = groups * per_group
    count = data.draw(st.integers(1, layers * heads))
    scores = np.random.default_rng(seed).normal(size=(layers, heads))
    selected = select_spread(scores, count, every(scores), grouped(layers, heads, groups))
    assert selected.sum() == count
    share = -(-count // layers)
    by_group = selected.reshape(layers, groups, per_group).sum(axis=2)
    if share <= groups:  # there are groups enough, so none is taken twice, and no layer gets more than its share
        assert by_group.max() <= 1
        assert selected.sum(axis=1).max() <= share
    best = np.unravel_index(scores.argmax(), scores.shape)
    assert selected[best]


def test_a_spread_selection_by_hand():
    scores = np.array([[9.0, 8.0, 1.0, 2.0], [7.0, 6.0, 5.0, 0.0]])
    expected = np.array([[1, 0, 0, 1], [1, 0, 1, 0]], dtype=bool)  # 8 and 6 share the groups of 9 and 7
    np.testing.assert_array_equal(select_spread(scores, 4, every(scores), grouped(2, 4, 2)), expected)
    level = select_spread(np.zeros((2, 4)), 2, every(scores), grouped(2, 4, 2))
    np.testing.assert_array_equal(level, [[1, 0, 0, 0], [1, 0, 0, 0]])


def test_candidate_layers_are_named_by_the_first_and_the_last():
    assert candidate_layers(None, 3) == range(3)
    assert candidate_layers("1-2", 3) == range(1, 3)
    assert candidate_layers("2-2", 3) == range(2, 3)
    for wrong in ("0-3", "2-1", "7-9"):
        with pytest.raises(UsageError, match=f"layers 0 to 2, found {wrong}"):
            candidate_layers(wrong, 3)


def test_candidates_are_the_heads_that_there_are_in_the_layers():
    there = np.array([[True, True], [False, False], [True, False], [True, True]])
    assert candidate_heads("1-2", there).tolist() == [[False, False], [False, False], [True, False], [False, False]]
    np.testing.assert_array_equal(candidate_heads(None, there), there)


# Two layers of 4 and 2 heads, and between them one without attention.
UNEVEN = np.array([[0.4, 0.9, 0.8, 0.1], [np.nan] * 4, [0.7, 0.6, np.nan, np.nan]])
THERE = np.isfinite(UNEVEN)


def test_heads_that_a_layer_has_not_are_never_selected_and_count_for_nothing():
    layers = (LayerHeads(4, 2, 8), LayerHeads(), LayerHeads(2, 1, 16))
    assert np.argwhere(select_top(UNEVEN, 3, THERE)).tolist() == [[0, 1], [0, 2], [2, 0]]
    # A share of 2 for each of the two layers with heads; 0.6 shares the group of 0.7, and is passed over until the end.
    assert np.argwhere(select_spread(UNEVEN, 3, THERE, layers)).tolist() == [[0, 1], [0, 2], [2, 0]]
    assert np.argwhere(select_spread(UNEVEN, 5, THERE, layers)).tolist() == [[0, 0], [0, 1], [0, 2], [2, 0], [2, 1]]
    assert np.argwhere(select_uniform(3, THERE)).tolist() == [[0, 1], [0, 3], [2, 1]]
    for select in (lambda: select_top(UNEVEN, 7, THERE), lambda: select_uniform(7, THERE)):
        with pytest.raises(UsageError, match="from 1 to 6, found 7"):
            select()


def test_repeats_agree_by_the_heads_that_there_are():
    repeats = np.stack([UNEVEN, UNEVEN])
    found = repeatability(repeats, THERE, lambda scores: select_top(scores, 2, THERE))
    assert (found.mean_spearman, found.mean_jaccard) == (1.0, 1.0)
    assert found.chance_jaccard == expected_jaccard(6, 2)


def test_levels_are_tenths_of_the_heads_that_there_are():
    assert head_levels(UNEVEN, THERE) == "1860....53.."


@given(st.lists(st.integers(-9, 9), min_size=24, max_size=24))
def test_levels_follow_the_scores(scores):
    flat = np.array(scores, np.float32)
    levels = [int(level) for level in head_levels(flat.reshape(4, 6), np.ones((4, 6), dtype=bool))]
    for one in range(flat.size):
        assert levels[one] == 10 * int((flat < flat[one]).sum()) // flat.size


# --- heads that read rows, and layers to train


def hybrid(layers, heads, every_other):
    """Return heads that every so many layers have alone, the last of each group."""
    exists_LH = np.zeros((layers, heads), dtype=bool)
    exists_LH[every_other - 1 :: every_other] = True
    return exists_LH


@pytest.mark.parametrize(
    ("layers", "heads", "depths"),
    [
        (1, 8, (1, 1)),
        (4, 8, (2, 3)),
        (12, 12, (2, 8)),
        (30, 9, (3, 20)),
        (80, 64, (8, 54)),
        (4, 2, (4, 4)),
        (6, 1, (6, 6)),
    ],
)
def test_readers_of_a_tenth_and_two_thirds_of_the_layers(layers, heads, depths):
    """More layers where these have fewer than eight heads."""
    scores_LH = np.random.default_rng(0).random((layers, heads))
    groups_L = grouped(layers, heads, heads)
    found = select_readers(scores_LH, "auto", every(scores_LH), groups_L)
    shallow, deep = depths
    assert not found.shallow_LH[shallow:].any()
    assert not found.deep_LH[deep:].any()
    assert found.shallow_LH.sum() == min(32, shallow * heads)
    assert found.deep_LH.sum() == math.ceil(0.1 * layers * heads)
    counts_L = found.shallow_LH[:shallow].sum(axis=1)
    assert counts_L.max() - counts_L.min() <= 1
    candidates_LH = np.arange(layers)[:, None] < deep
    expected = select_spread(scores_LH, int(found.deep_LH.sum()), every(scores_LH) & candidates_LH, groups_L)
    assert (found.deep_LH == expected).all()


@pytest.mark.parametrize(("rows", "count"), [(64, 10), (16, 10), (12, 14), (8, 20), (2, 20)])
def test_few_target_rows_have_more_readers(rows, count):
    scores_LH = np.random.default_rng(0).random((10, 10))
    shape = every(scores_LH), grouped(10, 10, 10)
    found = select_readers(scores_LH, "auto", *shape, target_rows=rows)
    assert found.deep_LH.sum() == count
    assert (found.shallow_LH == select_readers(scores_LH, "auto", *shape).shallow_LH).all()


def test_the_first_readers_do_not_depend_on_the_task():
    one, other = (
        select_readers(np.random.default_rng(seed).random((12, 8)), "auto", np.ones((12, 8), bool), grouped(12, 8, 4))
        for seed in (0, 1)
    )
    assert (one.shallow_LH == other.shallow_LH).all()
    assert (one.deep_LH != other.deep_LH).any()


@pytest.mark.parametrize(
    ("exists_LH", "depths"),
    [
        (hybrid(24, 8, 4), (4, 16)),
        (hybrid(24, 16, 8), (8, 16)),
        (hybrid(40, 4, 6), (12, 27)),
        (hybrid(8, 3, 8), (8, 8)),
    ],
    ids=["a-quarter", "an-eighth", "few-heads", "the-last-alone"],
)
def test_readers_of_layers_that_have_heads(exists_LH, depths):
    heads = exists_LH.shape[1]
    groups_L = tuple(LayerHeads(heads, 1, 8) if has.any() else LayerHeads() for has in exists_LH)
    scores_LH = np.where(exists_LH, 1.0, np.nan)
    found = select_readers(scores_LH, "auto", exists_LH, groups_L)
    for heads_LH, depth in zip((found.shallow_LH, found.deep_LH), depths, strict=True):
        assert heads_LH.any()
        assert not (heads_LH & ~exists_LH).any()
        assert not heads_LH[depth:].any()
    assert found.shallow_LH.sum() == min(32, exists_LH[: depths[0]].sum())
    assert found.shallow_LH.sum() >= min(8, exists_LH.sum())


def test_depths_that_are_given():
    exists_LH = np.ones((10, 4), dtype=bool)
    rising_LH = np.arange(40.0).reshape(10, 4)
    found = select_readers(rising_LH, "2,5", exists_LH, grouped(10, 4, 4))
    assert found.depths == (2, 5)
    assert select_readers(rising_LH, "10,10", exists_LH, grouped(10, 4, 4)).depths == (10, 10)


@pytest.mark.parametrize(
    ("depths", "told"),
    [
        ("2,11", "the model has 10 layers, and the first 2 of them 0 heads"),
        ("11,12", "the model has 10 layers, and the first 10 of them 8 heads"),
        ("4,6", "the first 4 of them 0 heads"),
    ],
)
def test_depths_that_the_model_has_not(depths, told):
    exists_LH = hybrid(10, 4, 5)
    groups_L = tuple(LayerHeads(4, 1, 8) if has.any() else LayerHeads() for has in exists_LH)
    with pytest.raises(UsageError, match=told) as problem:
        select_readers(np.zeros(exists_LH.shape), depths, exists_LH, groups_L)
    assert problem.value.hint == "give numbers up to 10, the first of which is at least 5"


@pytest.mark.parametrize(
    ("layers", "heads", "count", "first"),
    [(4, 8, 4, 2), (5, 8, 4, 2), (12, 12, 15, 6), (30, 9, 27, 15), (80, 64, 512, 40), (4, 8, 24, 1), (4, 8, 99, 0)],
)
def test_the_upper_half_or_as_many_layers_as_have_enough_heads(layers, heads, count, first):
    found = candidate_heads("upper", np.ones((layers, heads), dtype=bool), count)
    assert found[first:].all()
    assert not found[:first].any()


@pytest.mark.parametrize("count", range(1, 30))
@pytest.mark.parametrize("every_other", [2, 3, 7])
def test_the_upper_layers_that_have_heads(every_other, count):
    """Against a plain search: the highest layer from which there are enough heads on, but no higher than the middle."""
    exists_LH = hybrid(14, 4, every_other)
    found = candidate_heads("upper", exists_LH, count)
    enough = [first for first in range(14) if exists_LH[first:].sum() >= min(count, exists_LH.sum())]
    first = min(7, max(enough))
    assert (found[first:] == exists_LH[first:]).all()
    assert not found[:first].any()
    assert found.sum() >= min(count, exists_LH.sum())
