from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2d_cli.core.geometry import HeadGeometry, share_count
from p2d_cli.errors import ArtifactError, UsageError


def _geometry(layers: int, heads: int, groups: int) -> HeadGeometry:
    return HeadGeometry(num_layers=layers, num_heads=heads, num_groups=groups, head_dim=4, hidden_size=8)


def test_rounding_errors_do_not_add_a_head():
    assert 0.07 * 100 > 7
    assert (0.1 + 0.2) * 10 > 3
    assert _geometry(10, 10, 5).head_budget(0.07) == 7
    assert _geometry(30, 9, 3).head_budget(0.1) == 27
    assert share_count(0.1 + 0.2, 10) == 3
    assert share_count(1e-12, 5) == 1


@settings(deadline=None)
@given(percent=st.integers(1, 100), total=st.integers(1, 200_000))
def test_share_count_is_the_exact_ceiling_of_every_percentage(percent: int, total: int):
    exact = -(-Fraction(percent, 100) * total // 1)
    assert share_count(percent / 100, total) == exact
    assert 1 <= share_count(percent / 100, total) <= total


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.0001, 10, float("nan"), float("inf")])
def test_a_share_outside_0_to_1_is_refused_with_advice(ratio: float):
    with pytest.raises(UsageError, match="above 0 and at most 1") as caught:
        _geometry(2, 2, 1).head_budget(ratio)
    assert caught.value.hint is not None
    assert "0.1" in caught.value.hint


@pytest.mark.parametrize(
    ("groups", "expected"),
    [(4, [0, 1, 2, 3]), (2, [0, 0, 1, 1]), (1, [0, 0, 0, 0])],
    ids=["mha", "gqa", "mqa"],
)
def test_heads_read_consecutive_groups(groups: int, expected: list[int]):
    assert [_geometry(1, 4, groups).group_of(head) for head in range(4)] == expected


def test_group_of_refuses_a_head_that_is_not_there():
    for head in (-1, 4):
        with pytest.raises(ValueError, match="not one of the 4 heads"):
            _geometry(1, 4, 2).group_of(head)


@settings(deadline=None)
@given(data=st.data(), layers=st.integers(1, 4), heads=st.integers(1, 9))
def test_groups_of_is_the_union_of_group_of(data: st.DataObject, layers: int, heads: int):
    geometry = _geometry(layers, heads, data.draw(st.integers(1, heads)))
    rows = st.lists(st.booleans(), min_size=heads, max_size=heads)
    selected = np.array(data.draw(st.lists(rows, min_size=layers, max_size=layers)))
    groups = geometry.groups_of(selected)
    assert groups.shape == (layers, geometry.num_groups)
    assert groups.dtype == np.bool_
    expected = {(layer, geometry.group_of(head)) for layer, head in np.argwhere(selected).tolist()}
    assert {(layer, group) for layer, group in np.argwhere(groups).tolist()} == expected


def test_a_selection_of_another_model_is_refused():
    with pytest.raises(ArtifactError, match=r"\[2, 3\] do not fit a model of 2 layers with 4 heads"):
        _geometry(2, 4, 2).groups_of(np.zeros((2, 3), dtype=bool))


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="num_layers must be at least 1"):
        _geometry(0, 4, 2)
    with pytest.raises(ValueError, match="3 key/value groups cannot serve 2 heads"):
        _geometry(1, 2, 3)
