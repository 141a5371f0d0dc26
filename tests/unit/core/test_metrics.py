from __future__ import annotations

import math
import re
import string
from decimal import Decimal
from itertools import combinations

import numpy as np
import pytest
import scipy.stats
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from p2d_cli.core import metrics
from p2d_cli.core.metrics import (
    bootstrap_interval,
    compare_means,
    compare_perplexities,
    corpus_perplexity,
    exact_match,
    mean_interval,
    number_match,
    paired_shares_interval,
    parse_number,
    perplexity_interval,
    rouge_l,
    token_f1,
    wilson_interval,
)
from p2d_cli.errors import DataError

_words = st.lists(st.sampled_from(["ab", "cd", "ef"]), max_size=6).map(" ".join)


def test_exact_match_forgives_white_space_only():
    assert exact_match("  card  arrival\n", "card arrival")
    assert exact_match("", " \n")
    assert not exact_match("Card arrival", "card arrival")
    assert not exact_match("cardarrival", "card arrival")
    assert not exact_match("card arrival.", "card arrival")


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("The cat, sat!", "cat sat", 1.0),
        ("a cat", "the dog", 0.0),
        ("cat cat dog", "cat dog dog", 2 / 3),
        ("cat", "cat sat on mat", 2 * 1 * 0.25 / 1.25),
        ("the", "a", 1.0),
        ("the", "cat", 0.0),
        ("", "cat", 0.0),
        ("", "", 1.0),
        ("theatre", "atre", 0.0),
        ("don't", "dont", 1.0),
    ],
)
def test_token_f1_scores_like_squad(prediction: str, reference: str, expected: float):
    assert token_f1(prediction, reference) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        # Lin 2004, section 3.1: "police killed the gunman", both sentences share "police ... the gunman".
        ("police kill the gunman", "police killed the gunman", 0.75),
        ("the gunman kill police", "police killed the gunman", 0.5),
        ("A-b, C", "a b c", 1.0),
        ("x", "", 0.0),
        ("", "", 0.0),
    ],
)
def test_rouge_l_of_known_pairs(prediction: str, reference: str, expected: float):
    assert rouge_l(prediction, reference) == pytest.approx(expected)


def _is_subsequence(part: tuple[str, ...], whole: list[str]) -> bool:
    rest = iter(whole)
    return all(word in rest for word in part)


@settings(deadline=None, max_examples=60)
@given(a=_words, b=_words)
def test_rouge_l_finds_the_longest_common_subsequence(a: str, b: str):
    x, y = a.split(), b.split()
    lengths = [n for n in range(len(x) + 1) for part in combinations(x, n) if _is_subsequence(part, y)]
    expected = 2 * max(lengths) / (len(x) + len(y)) if x and y else 0.0
    assert rouge_l(a, b) == pytest.approx(expected)


@settings(deadline=None)
@given(a=_words, b=_words)
@pytest.mark.parametrize("metric", [token_f1, rouge_l])
def test_overlap_metrics_are_symmetric_bounded_and_one_for_equal_text(metric, a: str, b: str):
    assert metric(a, b) == pytest.approx(metric(b, a))
    assert 0.0 <= metric(a, b) <= 1.0
    if a:
        assert metric(a, a) == 1.0


# Words, articles, punctuation, letters beyond ASCII, and other white space.
_texts = st.lists(
    st.sampled_from(
        ["the", "A", "an", "cat", "Cat's", "dog", "dog-dog", "x1", "é", "ÉCOLE", "naïve", "«7»", "...", "_", "\n"]
    )
    | st.text(max_size=3),
    max_size=8,
).map(" ".join)


@settings(deadline=None, max_examples=200)
@given(a=_texts, b=_texts)
def test_rouge_l_is_that_of_the_package_rouge_score(a: str, b: str):
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    expected = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False).score(target=b, prediction=a)
    assert rouge_l(a, b) == pytest.approx(expected["rougeL"].fmeasure)


@settings(deadline=None, max_examples=200)
@given(a=_texts, b=_texts)
def test_exact_match_is_that_of_lm_eval_but_for_white_space(a: str, b: str):
    lm_eval_metrics = pytest.importorskip("lm_eval.api.metrics")
    a_plain, b_plain = (" ".join(text.split()) for text in (a, b))
    # numpy, which lm-eval compares with, drops NULs at the end of a text.
    assume("\0" not in a + b)
    expected = lm_eval_metrics.exact_match_hf_evaluate(predictions=[a_plain], references=[b_plain])["exact_match"]
    assert exact_match(a, b) == exact_match(b, a) == bool(expected)


@settings(deadline=None, max_examples=200)
@given(a=_texts, b=_texts)
def test_token_f1_is_the_harmonic_mean_of_precision_and_recall(a: str, b: str):
    """Words are crossed off one by one, as SQuAD's definition has it."""
    articles = {"a", "an", "the"}
    bare = ["".join(c for c in text.lower() if c not in string.punctuation).split() for text in (a, b)]
    assume(not any(articles & set(re.split(r"\W", word)) for words in bare for word in words if word not in articles))
    predicted, expected = ([word for word in words if word not in articles] for words in bare)
    left, common = list(expected), 0
    for word in predicted:
        if word in left:
            left.remove(word)
            common += 1
    if not predicted or not expected:
        assert token_f1(a, b) == float(predicted == expected)
    elif common == 0:
        assert token_f1(a, b) == 0.0
    else:
        precision, recall = common / len(predicted), common / len(expected)
        assert token_f1(a, b) == pytest.approx(2 * precision * recall / (precision + recall))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1,234", "1234"),
        ("12,345,678.5 in all", "12345678.5"),
        ("-3", "-3"),
        ("−3", "-3"),
        ("+2", "2"),
        ("$5", "5"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("€1,000.50.", "1000.50"),
        ("7.0", "7"),
        ("so 7.", "7"),
        (".5", "0.5"),
        ("-.5", "-0.5"),
        ("1e3", "1000"),
        ("2.5E-2", "0.025"),
        ("1e3x", "3"),
        ("50%", "50"),
        ("10-3", "3"),
        ("(10)-3", "3"),
        ("x = -3", "-3"),
        ("(-3)", "-3"),
        ("10 - 3", "3"),
        ("1,23", "23"),
        ("1,2345", "2345"),
        ("3/4", "4"),
        ("fig.5", "5"),
        ("so...5", "5"),
        ("5 then 6 apples", "6"),
        ("-0", "0"),
        ("12345678901234567890123456789012345", "12345678901234567890123456789012345"),
        ("-12345678901234567890123456789012345", "-12345678901234567890123456789012345"),
    ],
)
def test_flexible_parsing_takes_the_last_number(text: str, expected: str):
    assert parse_number(text, "flexible") == Decimal(expected)
    assert parse_number(f"8 {text} apples", "flexible") == Decimal(expected)


@pytest.mark.parametrize("text", ["", "none", "-", "$", ".", "..", "٣"])
def test_text_without_a_number_has_none(text: str):
    assert parse_number(text, "flexible") is None
    assert parse_number("#### " + text, "strict") is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("48 + 24 = 72\n#### 72", 72),
        ("####72 and then 5", 72),
        ("#### 1 \n#### $1,234.00", 1234),
        ("#### -7", -7),
        ("##### 8", 8),
        ("the answer is 72", None),
        ("#### about 72", None),
        ("72 ####", None),
        ("#### 5 #### ", None),
    ],
)
def test_strict_parsing_takes_the_number_after_the_last_mark(text: str, expected: int | None):
    assert parse_number(text, "strict") == expected


@settings(deadline=None)
@given(value=st.decimals(-(10**12), 10**12, places=2, allow_nan=False))
def test_parsing_reads_back_what_formatting_wrote(value: Decimal):
    for text in (f"{value:,}", f"{value}", f"so it is {value:,} %."):
        assert parse_number(text, "flexible") == value


@pytest.mark.parametrize(
    ("prediction", "reference"),
    [
        ("1,234", "1234"),
        ("-3", "−3"),
        ("$5", "5.00"),
        ("$1,234.50", "1234.5"),
        ("7.0", "7"),
        ("it costs 70", "#### 70"),
        ("#### -$5", "#### -5"),
    ],
)
def test_numbers_match_however_they_are_written(prediction: str, reference: str):
    assert number_match(prediction, reference, "flexible") is True
    assert number_match(f"8\n#### {prediction.removeprefix('#### ')}", reference, "flexible") is True
    assert number_match(f"{prediction}1", reference, "flexible") is False


def test_number_match_says_when_a_prediction_cannot_be_read():
    reference = "3 * 24 = 72\n#### 72"
    assert number_match("... so #### 72.00", reference, "strict") is True
    assert number_match("#### 71", reference, "strict") is False
    assert number_match("it is 72", reference, "strict") is None
    assert number_match("it is 72", reference, "flexible") is True
    assert number_match("no idea", reference, "flexible") is None
    assert number_match("#### 1,000", "1000", "strict") is True
    for broken in ("no number", "12 #### none"):
        with pytest.raises(DataError, match="expected a number in the reference"):
            number_match("72", broken, "flexible")


def test_the_bootstrap_is_the_brute_force_one():
    values = np.random.default_rng(0).normal(size=37)
    low, high = bootstrap_interval(values, confidence=0.9, resamples=501, rng=np.random.default_rng(1))
    rng = np.random.default_rng(1)
    means = sorted(float(np.mean([values[i] for i in rng.integers(0, 37, size=37)])) for _ in range(501))
    assert (low, high) == pytest.approx((means[25], means[475]))


def test_the_bootstrap_does_not_depend_on_how_it_is_cut(monkeypatch: pytest.MonkeyPatch):
    values = np.random.default_rng(0).normal(size=37)
    whole = bootstrap_interval(values, resamples=100, rng=np.random.default_rng(1))
    monkeypatch.setattr(metrics, "_BOOTSTRAP_ENTRIES", 64)
    assert bootstrap_interval(values, resamples=100, rng=np.random.default_rng(1)) == whole


def test_the_interval_has_about_the_width_of_the_normal_one():
    values = np.random.default_rng(0).random(400) < 0.3
    low, high = bootstrap_interval(values, rng=np.random.default_rng(1))
    mean, error = values.mean(), values.std() / 20
    assert low == pytest.approx(mean - 1.96 * error, abs=0.25 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.25 * error)


def test_intervals_of_nothing_one_value_and_nan():
    rng = np.random.default_rng(0)
    assert all(math.isnan(bound) for bound in bootstrap_interval([], rng=rng))
    assert all(math.isnan(bound) for bound in bootstrap_interval([1.0, math.nan], rng=rng))
    assert bootstrap_interval([0.25], rng=rng) == (0.25, 0.25)
    assert bootstrap_interval([1, 1, 1], rng=rng) == (1.0, 1.0)
    for wrong in ({"confidence": 1.0}, {"confidence": 0.0}, {"resamples": 0}):
        with pytest.raises(ValueError, match="not possible"):
            bootstrap_interval([1.0], rng=rng, **wrong)


@given(st.integers(1, 400).flatmap(lambda count: st.tuples(st.integers(0, count), st.just(count))))
def test_shares_have_the_interval_of_scipy(hits_of: tuple[int, int]):
    hits, count = hits_of
    for confidence in (0.5, 0.95, 0.999):
        expected = scipy.stats.binomtest(hits, count).proportion_ci(confidence, method="wilson")
        low, high = wilson_interval(hits, count, confidence=confidence)
        assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)
        assert 0 <= low <= hits / count <= high <= 1
        assert low < high


def test_rows_that_all_score_the_same_leave_room():
    """The bootstrap of 12 rows without a hit says 0, and nothing else is possible."""
    rng = np.random.default_rng(0)
    assert mean_interval([0] * 12, rng=rng) == wilson_interval(0, 12) == (0.0, pytest.approx(0.2425, abs=1e-4))
    assert mean_interval([1] * 12, rng=rng) == (pytest.approx(0.7575, abs=1e-4), 1.0)
    scores = np.random.default_rng(1).random(40)
    assert mean_interval(scores, rng=np.random.default_rng(2)) == bootstrap_interval(
        scores, rng=np.random.default_rng(2)
    )
    assert all(math.isnan(bound) for bound in (*mean_interval([], rng=rng), *wilson_interval(0, 0)))
    assert all(math.isnan(bound) for bound in mean_interval([1.0, math.nan], rng=rng))


PAIRS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=80).map(
    lambda pairs: np.array(pairs, dtype=float).T
)


@given(PAIRS)
def test_the_interval_of_a_paired_difference_turns_with_it(pairs):
    low, high = paired_shares_interval(*pairs)
    assert -1 <= low <= pairs[1].mean() - pairs[0].mean() <= high <= 1
    assert low < high
    assert paired_shares_interval(*pairs[::-1]) == pytest.approx((-high, -low))
    assert paired_shares_interval(1 - pairs[1], 1 - pairs[0]) == pytest.approx((low, high))


def newcombe(both, first, second, neither, z=1.959963984540054):
    """Method 10 as Newcombe writes it down, of the four counts."""
    n = both + first + second + neither
    shares = [(both + second) / n, (both + first) / n]
    limits = [
        tuple(scipy.stats.binomtest(hits, n).proportion_ci(method="wilson")) for hits in (both + second, both + first)
    ]
    product = (both + first) * (second + neither) * (both + second) * (first + neither)
    cross = both * neither - first * second
    cross = cross - n / 2 if cross > n / 2 else 0 if cross >= 0 else cross
    phi = cross / math.sqrt(product) if product else 0
    (p1, p2), ((l1, u1), (l2, u2)) = shares, limits
    below = math.sqrt((p1 - l1) ** 2 - 2 * phi * (p1 - l1) * (u2 - p2) + (u2 - p2) ** 2)
    above = math.sqrt((u1 - p1) ** 2 - 2 * phi * (u1 - p1) * (p2 - l2) + (p2 - l2) ** 2)
    return p1 - p2 - below, p1 - p2 + above


@pytest.mark.parametrize(
    "counts", [(14, 5, 0, 22), (1, 1, 7, 12), (59, 6, 16, 80), (0, 0, 0, 50), (30, 0, 0, 0), (3, 9, 8, 1)]
)
def test_a_paired_difference_has_the_interval_of_newcombe(counts):
    both, first, second, neither = counts
    one = [1] * (both + first) + [0] * (second + neither)
    other = [1] * both + [0] * first + [1] * second + [0] * neither
    assert paired_shares_interval(one, other) == pytest.approx(newcombe(*counts), abs=1e-9)
    found = compare_means(one, other, rng=np.random.default_rng(0))
    assert (found.low, found.high) == paired_shares_interval(one, other)


@pytest.mark.parametrize(("share", "change"), [(0.0, 0.0), (0.02, 0.0), (0.4, 0.1), (0.9, 0.05)])
def test_paired_intervals_hold_what_they_promise(share, change):
    """In at least 93 of 100 samples of 60 rows."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        first = rng.random(60) < share
        second = np.where(rng.random(60) < change, ~first, first)
        low, high = paired_shares_interval(first, second)
        held += low <= change * (1 - 2 * share) <= high
    assert held >= 0.93 * 400


def test_the_paired_bootstrap_sees_a_difference_that_separate_intervals_hide():
    rng = np.random.default_rng(0)
    first = rng.normal(size=200)
    second = first + 0.1 + 0.01 * rng.normal(size=200)
    found = compare_means(first, second, rng=np.random.default_rng(1))
    assert (found.first, found.second) == pytest.approx((first.mean(), second.mean()))
    assert found.difference == pytest.approx(0.1, abs=0.01)
    assert 0.09 < found.low < found.difference < found.high < 0.11
    assert (found.low, found.high) == bootstrap_interval(second - first, rng=np.random.default_rng(1))
    assert (found.won, found.lost, found.count) == (200, 0, 200)
    backwards = compare_means(second, first, rng=np.random.default_rng(1))
    assert (backwards.difference, backwards.low, backwards.high) == pytest.approx(
        (-found.difference, -found.high, -found.low)
    )
    assert (backwards.won, backwards.lost) == (0, 200)
    lower = compare_means(first, second, lower_is_better=True, rng=np.random.default_rng(1))
    assert (lower.won, lower.lost) == (0, 200)


def test_a_comparison_by_hand():
    """Of two rows, of which one is won, a quarter of the resamples hold it twice, and a quarter not at all."""
    found = compare_means([0, 2], [2, 2], confidence=0.4, resamples=4000, rng=np.random.default_rng(0))
    assert (found.first, found.second, found.difference) == (1.0, 2.0, 1.0)
    assert (found.low, found.high) == (1.0, 1.0)
    wider = compare_means([0, 2], [2, 2], confidence=0.6, resamples=4000, rng=np.random.default_rng(0))
    assert (wider.low, wider.high) == (0.0, 2.0)
    assert (found.won, found.lost, found.count) == (1, 0, 2)


def _corpus_perplexity(logprobs, tokens, axis=-1):
    return np.exp(-np.sum(logprobs, axis=axis) / np.sum(tokens, axis=axis))


@pytest.fixture
def two_runs():
    """Log-likelihoods of one corpus in two runs, and its tokens under two tokenizers."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(1, 30, size=(2, 60))
    logprobs = -tokens * rng.uniform(0.5, 2.5, size=60)
    logprobs[1] += rng.normal(size=60)
    return logprobs, tokens


def test_perplexities_are_compared_like_the_plain_way(two_runs):
    logprobs, tokens = two_runs
    found = compare_perplexities(
        *logprobs, first_tokens=tokens[0], second_tokens=tokens[1], resamples=301, rng=np.random.default_rng(1)
    )
    rng, differences = np.random.default_rng(1), []
    for _ in range(301):
        rows = rng.integers(0, 60, size=60)
        first, second = (math.exp(-sum(logprobs[run][rows]) / sum(tokens[run][rows])) for run in (0, 1))
        differences.append(second - first)
    assert (found.low, found.high) == pytest.approx(np.quantile(differences, [0.025, 0.975]))
    assert (found.first, found.second) == pytest.approx(_corpus_perplexity(logprobs, tokens))
    assert found.difference == pytest.approx(found.second - found.first)
    assert found.won == sum(logprobs[1] > logprobs[0])
    assert found.won + found.lost == found.count == 60


def test_paired_intervals_are_those_of_scipy(two_runs):
    """With 20,000 resamples each, two estimates of a bound differ by 0.03 standard errors, give or take as much."""
    logprobs, tokens = two_runs
    settings = {"paired": True, "method": "percentile", "n_resamples": 20000, "rng": np.random.default_rng(5)}
    expected = scipy.stats.bootstrap(
        (*logprobs, *tokens),
        lambda a, b, s, t, axis=-1: _corpus_perplexity(b, t, axis) - _corpus_perplexity(a, s, axis),
        vectorized=True,
        **settings,
    )
    found = compare_perplexities(
        *logprobs, first_tokens=tokens[0], second_tokens=tokens[1], resamples=20000, rng=np.random.default_rng(1)
    )
    error = expected.standard_error
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval), abs=0.1 * error)
    alone = scipy.stats.bootstrap((logprobs[0], tokens[0]), _corpus_perplexity, vectorized=True, **settings)
    interval = perplexity_interval(logprobs[0], tokens[0], resamples=20000, rng=np.random.default_rng(1))
    assert interval == pytest.approx(tuple(alone.confidence_interval), abs=0.1 * alone.standard_error)
    mean = scipy.stats.bootstrap(
        tuple(logprobs), lambda a, b, axis=-1: (b - a).mean(axis=axis), vectorized=True, **settings
    )
    of_means = compare_means(*logprobs, resamples=20000, rng=np.random.default_rng(1))
    assert (of_means.low, of_means.high) == pytest.approx(
        tuple(mean.confidence_interval), abs=0.1 * mean.standard_error
    )


def test_equal_runs_differ_by_nothing(two_runs):
    logprobs, tokens = two_runs
    rng = np.random.default_rng(0)
    for found in (
        compare_means(logprobs[0], logprobs[0], rng=rng),
        compare_perplexities(logprobs[0], logprobs[0], first_tokens=tokens[0], second_tokens=tokens[0], rng=rng),
    ):
        assert (found.difference, found.low, found.high, found.won, found.lost) == (0.0, 0.0, 0.0, 0, 0)


def test_a_comparison_needs_the_same_rows():
    with pytest.raises(DataError, match="found 2 and 1"):
        compare_means([1, 2], [1], rng=np.random.default_rng(0))
    nothing = [
        compare_means([], [], rng=np.random.default_rng(0)),
        compare_perplexities([], [], first_tokens=[], second_tokens=[], rng=np.random.default_rng(0)),
    ]
    for found in nothing:
        assert all(math.isnan(value) for value in (found.first, found.second, found.difference, found.low, found.high))
        assert found.count == 0


def test_perplexity_of_a_uniform_guess_is_the_number_of_choices():
    assert corpus_perplexity(12 * math.log(1 / 50), 12) == pytest.approx(50.0)
    assert corpus_perplexity(0.0, 3) == 1.0
    assert math.isnan(corpus_perplexity(0.0, 0))
    assert corpus_perplexity(-1e9, 1) == math.inf
