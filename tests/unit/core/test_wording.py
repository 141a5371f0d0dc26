import pytest

from p2d_cli.core.wording import an, bytes_text, count_text, ratio_text


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (12_000, "12 KiB"), (3 * 2**20, "3 MiB"), (1.5 * 2**30, "1.5 GiB")]
)
def test_bytes_have_the_unit_that_suits_them(size, text):
    assert bytes_text(size) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0 rows"), (1, "1 row"), (2, "2 rows"), (1200, "1,200 rows")])
def test_one_thing_is_singular(count, text):
    assert count_text(count, "row") == text


@pytest.mark.parametrize(
    ("ratio", "text"), [(10.3, "10"), (999.4, "999"), (999.6, "1.0e+03"), (21_000, "2.1e+04"), (3.7e38, "3.7e+38")]
)
def test_a_large_ratio_is_written_with_a_power_of_ten(ratio, text):
    assert ratio_text(ratio) == text


def test_an_article_goes_by_the_first_letter():
    assert [an(word) for word in ("adapter", "subset", "evaluation")] == ["an adapter", "a subset", "an evaluation"]
