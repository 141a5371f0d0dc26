"""Every model family from scoring to export; `P2D_FAMILIES=all` runs all of the table.

A new family is a line in family_table.py. tests/benchmarks/families.py takes the seldom steps
too, and prints how each ends.
"""

import os

import pytest
import torch
from family_maps import all_heads, attentions, owned_by, rows_of
from family_path import Case, disagreements, examine, no_extras, usual_steps
from family_table import families

ALL = os.environ.get("P2D_FAMILIES") == "all"
CHOSEN = [family for family in families() if family.often or ALL]


@pytest.fixture(scope="module", autouse=True)
def _no_extras():
    with no_extras():
        yield


@pytest.mark.parametrize("family", CHOSEN, ids=[family.name for family in CHOSEN])
def test_a_family_does_what_the_table_says(family, p2d, tmp_path):
    outcomes = examine(Case(family, tmp_path, p2d), usual_steps(family))
    unexpected = disagreements(family, outcomes)
    assert not unexpected, "\n".join(unexpected.values())


@pytest.mark.parametrize(
    "family", [family for family in CHOSEN if family.refused is None], ids=lambda family: family.name
)
def test_the_heads_of_the_map_own_all_of_q_k_v_and_o_and_share_no_queries(family):
    """The map is right about sizes and names, and about which layers have attention."""
    config = family.config()
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in family.bare_model().named_parameters()}
    owned = owned_by(config, all_heads(config))
    assert attentions(config)
    for weight, indices in owned.items():
        for dim, found in indices.items():
            assert found == set(range(shapes[weight][dim])), weight
    # The output projection's columns are one head's each.
    columns = [
        (rows_of(config, *head)["o"].weight, index)
        for head in all_heads(config)
        for index in rows_of(config, *head)["o"].indices
    ]
    assert len(columns) == len(set(columns))
