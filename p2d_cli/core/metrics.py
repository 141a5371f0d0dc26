"""Scores of predicted answers against reference answers, and intervals for their means."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from p2d_cli.errors import DataError

NumberMode = Literal["strict", "flexible"]
ANSWER_MARKER = "####"
"""What stands before the final number in GSM8K."""

ZERO_ONE_METRICS = frozenset({"exact_match", "accuracy", "number_match", "number_match_strict"})
"""p2d's own metrics that score each row 0 or 1."""
LOWER_IS_BETTER = frozenset({"perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "brier_score", "ter"})

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_WORDS = re.compile(r"[a-z0-9]+")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
# A sign counts only where no word, number or bracket ends: "10-3" holds 10 and 3. Grouping commas need three digits.
_NUMBER = re.compile(
    r"""(?:(?<![\w.)\]])(?P<outer>[-+−]))? [$€£]? (?:(?<![\w.)\]])(?P<inner>[-+−]))?
        (?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+)
        (?P<exponent>[eE][-+]?[0-9]{1,3}(?!\w))?""",
    re.VERBOSE,
)
_BOOTSTRAP_ENTRIES = 1 << 20  # drawn at once: 8 MiB of indices


def lower_is_better(metric: str) -> bool:
    """Say which way a metric improves; those of lm-eval are named `task/metric,filter`."""
    return metric.rpartition("/")[2].partition(",")[0] in LOWER_IS_BETTER


def exact_match(prediction: str, reference: str) -> bool:
    """Say whether two answers are the same text, up to white space around and the amount of it within."""
    return prediction.split() == reference.split()


def token_f1(prediction: str, reference: str) -> float:
    """Return the F1 of the two answers' bags of words, in [0, 1], as SQuAD scores it (arXiv:1606.05250).

    Lower case, without punctuation and English articles. If either answer is empty after that, the score is 1 if
    both are and 0 otherwise.
    """
    predicted, expected = _squad_tokens(prediction), _squad_tokens(reference)
    if not predicted or not expected:
        return float(predicted == expected)
    common = sum((Counter(predicted) & Counter(expected)).values())
    return 2.0 * common / (len(predicted) + len(expected))


def rouge_l(prediction: str, reference: str) -> float:
    """Return ROUGE-L (Lin 2004): the F-measure of the longest common subsequence of words, in [0, 1].

    Words are runs of ASCII letters and digits in lower case, not stemmed, as in the package rouge-score; like
    there, text without any such word scores 0, two empty answers included.
    """
    predicted, expected = _WORDS.findall(prediction.lower()), _WORDS.findall(reference.lower())
    if not predicted or not expected:
        return 0.0
    return 2.0 * _longest_common_subsequence(predicted, expected) / (len(predicted) + len(expected))


def parse_number(text: str, mode: NumberMode) -> Decimal | None:
    """Return the number that an answer states, exactly, or None if there is none.

    Understands signs, grouping commas (1,234), a currency sign, a leading or trailing point, and exponents; a
    percent sign is dropped, and a fraction counts as two numbers.

    Args:
        text: The whole answer.
        mode: `strict`: the number that directly follows the last `####`. `flexible`: the last number anywhere.
    """
    if mode == "strict":
        _, marker, rest = text.rpartition(ANSWER_MARKER)
        match = _NUMBER.match(rest.lstrip()) if marker else None
    else:
        match = None
        for match in _NUMBER.finditer(text):  # noqa: B007 -- only the last one is wanted
            pass
    return _to_decimal(match) if match else None


def number_match(prediction: str, reference: str, mode: NumberMode) -> bool | None:
    """Say whether an answer states the reference's number; None if it states none that can be read.

    The reference's number is the one after its `####` if it has that mark, otherwise its last one, in both modes.

    Raises:
        DataError: the reference holds no number.
    """
    expected = parse_number(reference, "strict" if ANSWER_MARKER in reference else "flexible")
    if expected is None:
        raise DataError(
            f"number_match: expected a number in the reference answer, found {_shorten(reference)!r}",
            hint="choose another metric for this data set",
        )
    found = parse_number(prediction, mode)
    return None if found is None else found == expected


def _number(prediction: str, reference: str, mode: NumberMode) -> float | None:
    matched = number_match(prediction, reference, mode)
    return None if matched is None else float(matched)


ANSWER_METRICS: dict[str, dict[str, Callable[[str, str], float | None]]] = {
    "exact_match": {"exact_match": lambda answer, reference: float(exact_match(answer, reference))},
    "token_f1": {"token_f1": token_f1},
    "rougeL": {"rougeL": rouge_l},
    "number_match": {
        "number_match": lambda answer, reference: _number(answer, reference, "flexible"),
        "number_match_strict": lambda answer, reference: _number(answer, reference, "strict"),
    },
}
"""For each metric of a generated answer, the figures it gives; None marks an answer that cannot be parsed."""


def mean_interval(scores: ArrayLike, *, confidence: float = 0.95, rng: np.random.Generator) -> tuple[float, float]:
    """Return an interval of a mean: Wilson's where every score is 0 or 1, else the percentile bootstrap's.

    Rows that all score the same have a bootstrap interval without any width, however few they are.

    Args:
        scores: One score for each row, [n].
        confidence: Level of the interval, in (0, 1).
        rng: Source of the bootstrap's resamples.

    Returns:
        (low, high); (nan, nan) if there are no scores or one is nan.
    """
    score_n = np.asarray(scores, dtype=np.float64).ravel()
    if _are_zero_or_one(score_n):
        return wilson_interval(int(score_n.sum()), score_n.size, confidence=confidence)
    return bootstrap_interval(score_n, confidence=confidence, rng=rng)


def wilson_interval(hits: int, count: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Return the score interval of a share (Wilson, JASA 22, 1927), which has a width at 0 and at 1 too.

    Args:
        hits: Rows that score 1.
        count: All rows, which score 0 or 1.
        confidence: Level of the interval, in (0, 1).

    Returns:
        (low, high), both in [0, 1]; (nan, nan) without rows.
    """
    if count == 0:
        return math.nan, math.nan
    z = NormalDist().inv_cdf((1.0 + confidence) / 2.0)
    share, shrink = hits / count, 1.0 + z * z / count
    middle = (share + z * z / (2 * count)) / shrink
    reach = z * math.sqrt(share * (1.0 - share) / count + (z / (2 * count)) ** 2) / shrink
    # At the ends rounding would leave a trace of the wrong side.
    return (0.0 if hits == 0 else middle - reach), (1.0 if hits == count else middle + reach)


def paired_shares_interval(first: ArrayLike, second: ArrayLike, *, confidence: float = 0.95) -> tuple[float, float]:
    """Return an interval of `second - first`, two shares of the same rows (Newcombe, Stat. Med. 17, 1998, method 10).

    It is put together from the Wilson intervals of both, less the more the two agree row by row, with Newcombe's
    continuity correction of that agreement.

    Args:
        first: Scores of one run, 0 or 1, [n].
        second: Scores of the other on the same rows, [n].
        confidence: Level of the interval, in (0, 1).

    Returns:
        (low, high); (nan, nan) without rows.
    """
    scores_2n = _as_pairs(first, second)
    count = scores_2n.shape[1]
    if count == 0:
        return math.nan, math.nan
    before, after = scores_2n.mean(axis=1).tolist()
    (low_before, high_before), (low_after, high_after) = (
        wilson_interval(int(score_n.sum()), count, confidence=confidence) for score_n in scores_2n
    )
    agreement = _agreement(scores_2n)
    below = _joined(after - low_after, high_before - before, agreement)
    above = _joined(high_after - after, before - low_before, agreement)
    return after - before - below, after - before + above


def _are_zero_or_one(score_n: NDArray[np.float64]) -> bool:
    return bool(score_n.size) and bool(((score_n == 0) | (score_n == 1)).all())


def _agreement(scores_2n: NDArray[np.float64]) -> float:
    """Return Newcombe's phi of two runs' scores, 0 or 1; 0 where one of them scores all rows alike."""
    count = scores_2n.shape[1]
    both, neither = scores_2n.all(axis=0).sum(), (scores_2n == 0).all(axis=0).sum()
    one_n, other_n = scores_2n
    only_one, only_other = (one_n > other_n).sum(), (other_n > one_n).sum()
    margins = [float(score_n.sum()) for score_n in scores_2n]
    scale = math.prod(hits * (count - hits) for hits in margins)
    if scale == 0:
        return 0.0
    surplus = float(both * neither - only_one * only_other)
    return (max(surplus - count / 2, 0.0) if surplus > 0 else surplus) / math.sqrt(scale)


def _joined(first: float, second: float, agreement: float) -> float:
    return math.sqrt(max(first * first - 2 * agreement * first * second + second * second, 0.0))


def bootstrap_interval(
    values: ArrayLike, *, confidence: float = 0.95, resamples: int = 2000, rng: np.random.Generator
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of a mean (Efron 1979).

    Args:
        values: One score for each row, [n].
        confidence: Level of the interval, in (0, 1).
        resamples: Resamples of n rows with replacement.
        rng: Source of the resamples.

    Returns:
        (low, high); (nan, nan) if there are no values or one is nan.
    """
    score_n = np.asarray(values, dtype=np.float64).ravel()
    return _interval(lambda drawn_Rn: score_n[drawn_Rn].mean(axis=1), score_n.size, confidence, resamples, rng)


def perplexity_interval(
    logprobs: ArrayLike,
    tokens: ArrayLike,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    rng: np.random.Generator,
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of a corpus perplexity, whose rows are resampled.

    Args:
        logprobs: Log-likelihood of each row, in nats, [n].
        tokens: Number of tokens that each is the sum of, [n].
        confidence: Level of the interval, in (0, 1).
        resamples: Resamples of n rows with replacement.
        rng: Source of the resamples.

    Returns:
        (low, high); (nan, nan) if there are no rows or one is nan.
    """
    logprob_n, tokens_n = _as_pairs(logprobs, tokens)
    return _interval(
        lambda drawn_Rn: _perplexities(logprob_n, tokens_n, drawn_Rn), logprob_n.size, confidence, resamples, rng
    )


@dataclass(frozen=True)
class PairedComparison:
    """One metric of two runs on the same rows."""

    first: float
    second: float
    difference: float
    """`second - first`."""
    low: float
    """The interval of the difference; both bounds are nan without rows."""
    high: float
    won: int
    """Rows on which the second run is better."""
    lost: int
    count: int
    """Rows that both runs were scored on."""


def compare_means(
    first: ArrayLike,
    second: ArrayLike,
    *,
    lower_is_better: bool = False,
    confidence: float = 0.95,
    resamples: int = 2000,
    rng: np.random.Generator,
) -> PairedComparison:
    """Compare two runs by the means of their scores, with an interval of the difference.

    It is the percentile bootstrap's, whose rows are resampled jointly: what makes a row hard for both runs cancels out
    of their difference. Where every score is 0 or 1, it is Newcombe's (`paired_shares_interval`).

    Args:
        first: Scores of one run, [n].
        second: Scores of the other on the same rows, [n].
        lower_is_better: Whether a lower score wins a row.
        confidence: Level of the interval, in (0, 1).
        resamples: Resamples of n rows with replacement.
        rng: Source of the resamples.

    Raises:
        DataError: the two runs were scored on different numbers of rows.
    """
    scores_2n = _as_pairs(first, second)
    difference_n = scores_2n[1] - scores_2n[0]
    if _are_zero_or_one(scores_2n.ravel()):
        interval = paired_shares_interval(*scores_2n, confidence=confidence)
    else:
        interval = bootstrap_interval(difference_n, confidence=confidence, resamples=resamples, rng=rng)
    values = (*scores_2n.mean(axis=1), difference_n.mean()) if difference_n.size else (math.nan,) * 3
    return _comparison(values, interval, -difference_n if lower_is_better else difference_n)


def compare_perplexities(
    first: ArrayLike,
    second: ArrayLike,
    *,
    first_tokens: ArrayLike,
    second_tokens: ArrayLike,
    confidence: float = 0.95,
    resamples: int = 2000,
    rng: np.random.Generator,
) -> PairedComparison:
    """Compare two runs by their corpus perplexities, which are no means over rows.

    Each resample draws rows for both runs and takes the perplexity of all their tokens. A row is won by the higher
    log-likelihood.

    Args:
        first: Log-likelihood of each row's reference in one run, in nats, [n].
        second: The same in the other, [n].
        first_tokens: Numbers of tokens that were scored, [n].
        second_tokens: The same in the other run; two tokenizers may differ in them.
        confidence: Level of the interval, in (0, 1).
        resamples: Resamples of n rows with replacement.
        rng: Source of the resamples.

    Raises:
        DataError: the runs were scored on different numbers of rows.
    """
    logprob_2n, tokens_2n = _as_pairs(first, second), _as_pairs(first_tokens, second_tokens)
    runs = list(zip(logprob_2n, tokens_2n, strict=True))

    def differences(drawn_Rn: NDArray[np.int64]) -> NDArray[np.float64]:
        before_R, after_R = (_perplexities(*run, drawn_Rn) for run in runs)
        return after_R - before_R

    interval = _interval(differences, logprob_2n.shape[1], confidence, resamples, rng)
    before, after = (corpus_perplexity(float(logprob_n.sum()), int(tokens_n.sum())) for logprob_n, tokens_n in runs)
    return _comparison((before, after, after - before), interval, logprob_2n[1] - logprob_2n[0])


def _comparison(
    values: Sequence[float], interval: tuple[float, float], gain_n: NDArray[np.float64]
) -> PairedComparison:
    """Put together both runs' values and their difference, its interval, and what the second run gains by row."""
    first, second, difference = map(float, values)
    return PairedComparison(
        first, second, difference, *interval, int((gain_n > 0).sum()), int((gain_n < 0).sum()), gain_n.size
    )


def corpus_perplexity(sum_logprob: float, num_tokens: int) -> float:
    """Return `exp(-sum_logprob / num_tokens)`, each token of the corpus counting the same.

    Args:
        sum_logprob: Summed log-probability of all answer tokens, in nats.
        num_tokens: Number of these tokens.

    Returns:
        The perplexity, inf where it is too large for a float, and nan without tokens.
    """
    if num_tokens == 0:
        return math.nan
    try:
        return math.exp(-sum_logprob / num_tokens)
    except OverflowError:
        return math.inf


def _squad_tokens(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    above = [0] * (len(b) + 1)
    for word in a:
        row = [0]
        for column, other in enumerate(b):
            row.append(above[column] + 1 if word == other else max(above[column + 1], row[column]))
        above = row
    return above[-1]


def _to_decimal(match: re.Match[str]) -> Decimal:
    negative = (match["outer"] or match["inner"] or "+") in "-−"
    value = Decimal(match["digits"].replace(",", "") + (match["exponent"] or ""))
    # Not `-value`: that would round to the context's 28 digits.
    return value.copy_negate() if negative else value


def _shorten(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _interval(
    statistic: Callable[[NDArray[np.int64]], NDArray[np.float64]],
    count: int,
    confidence: float,
    resamples: int,
    rng: np.random.Generator,
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of what `statistic` makes of resampled rows, `[R, count]` to `[R]`."""
    if not 0.0 < confidence < 1.0 or resamples < 1:
        raise ValueError(f"a bootstrap of {resamples} resamples at level {confidence} is not possible")
    at_once = max(1, _BOOTSTRAP_ENTRIES // max(count, 1))
    found = [
        statistic(rng.integers(0, count, size=(min(at_once, resamples - start), count)))
        for start in range(0, resamples if count else 0, at_once)
    ]
    if not found or np.isnan(values_R := np.concatenate(found)).any():
        return math.nan, math.nan
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(values_R, [tail, 1.0 - tail])
    return float(low), float(high)


def _perplexities(
    logprob_n: NDArray[np.float64], tokens_n: NDArray[np.float64], drawn_Rn: NDArray[np.int64]
) -> NDArray[np.float64]:
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        mean_R = logprob_n[drawn_Rn].sum(axis=1) / tokens_n[drawn_Rn].sum(axis=1)
        return np.asarray(np.exp(-mean_R))


def _as_pairs(first: ArrayLike, second: ArrayLike) -> NDArray[np.float64]:
    """Return two runs' values as `[2, n]`."""
    a, b = np.asarray(first, dtype=np.float64).ravel(), np.asarray(second, dtype=np.float64).ravel()
    if a.size != b.size:
        raise DataError(f"comparing two runs row by row: expected the same rows, found {a.size} and {b.size}")
    return np.stack([a, b])
