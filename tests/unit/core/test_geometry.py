from __future__ import annotations

import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2d_cli.core.geometry import HeadGeometry, LayerHeads, share_count
from p2d_cli.errors import ArtifactError, UsageError


def _geometry(layers: int, heads: int, groups: int) -> HeadGeometry:
    return HeadGeometry.even(layers, num_heads=heads, num_groups=groups, head_dim=4, hidden_size=8)


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
    assert [_geometry(1, 4, groups).layers[0].group_of(head) for head in range(4)] == expected


def test_group_of_refuses_a_head_that_is_not_there():
    for head in (-1, 4):
        with pytest.raises(ValueError, match="not one of the 4 heads"):
            _geometry(1, 4, 2).layers[0].group_of(head)


@settings(deadline=None)
@given(data=st.data(), layers=st.integers(1, 4), heads=st.integers(1, 9))
def test_groups_of_is_the_union_of_group_of(data: st.DataObject, layers: int, heads: int):
    geometry = _geometry(layers, heads, data.draw(st.integers(1, heads)))
    rows = st.lists(st.booleans(), min_size=heads, max_size=heads)
    selected = np.array(data.draw(st.lists(rows, min_size=layers, max_size=layers)))
    expected = {(layer, geometry.layers[layer].group_of(head)) for layer, head in np.argwhere(selected).tolist()}
    assert geometry.groups_of(selected) == expected
    assert len(geometry.groups_of(np.ones_like(selected))) == geometry.total_groups


def test_a_selection_of_another_model_is_refused():
    with pytest.raises(ArtifactError, match=r"\[2, 3\], this model has \[2, 4\]"):
        _geometry(2, 4, 2).groups_of(np.zeros((2, 3), dtype=bool))
    selected = np.zeros((3, 4), dtype=bool)
    selected[1, 2] = True
    with pytest.raises(ArtifactError, match="head 2 of layer 1 is selected; that layer of this model has no heads"):
        UNEVEN.require_fits(selected)


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="found 0 layers without any"):
        _geometry(0, 4, 2)
    with pytest.raises(ValueError, match="3 key/value groups cannot serve 2 heads"):
        _geometry(1, 2, 3)
    with pytest.raises(ValueError, match=r"at least 1, or all 0, found \(4, 0, 8\)"):
        LayerHeads(4, 0, 8)


UNEVEN = HeadGeometry((LayerHeads(4, 2, 8), LayerHeads(), LayerHeads(2, 1, 16)), hidden_size=32)


def test_only_heads_that_there_are_count():
    assert (UNEVEN.num_layers, UNEVEN.num_heads, UNEVEN.total_heads, UNEVEN.total_groups) == (3, 4, 6, 3)
    assert UNEVEN.exists_LH.tolist() == [[True] * 4, [False] * 4, [True, True, False, False]]
    assert UNEVEN.head_budget(0.5) == 3
    assert UNEVEN.dims(UNEVEN.exists_LH).tolist() == [8] * 4 + [16] * 2
    table = UNEVEN.table(range(6))
    np.testing.assert_array_equal(np.isfinite(table), UNEVEN.exists_LH)
    assert table[UNEVEN.exists_LH].tolist() == list(range(6))


@pytest.mark.parametrize("geometry", [UNEVEN, _geometry(3, 4, 2)], ids=["uneven", "even"])
def test_a_geometry_survives_json(geometry: HeadGeometry):
    assert HeadGeometry.from_dict(json.loads(json.dumps(geometry.to_dict()))) == geometry


def test_an_even_geometry_is_written_as_it_always_was():
    sizes = {"num_layers": 3, "num_heads": 4, "num_groups": 2, "head_dim": 4, "hidden_size": 8}
    assert _geometry(3, 4, 2).to_dict() == sizes


def test_sizes_of_too_few_layers_are_refused():
    described = UNEVEN.to_dict()
    with pytest.raises(ValueError, match=r"argument 2 is shorter"):
        HeadGeometry.from_dict(described | {"num_groups": [2, 0]})
    with pytest.raises(ValueError, match="expected those of 4"):
        HeadGeometry.from_dict(described | {"num_layers": 4})
