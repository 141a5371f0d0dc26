"""Scores of predicted answers against reference answers, and bootstrap intervals for their means."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from p2d_cli.errors import DataError

NumberMode = Literal["strict", "flexible"]
ANSWER_MARKER = "####"
"""What stands before the final number in GSM8K."""

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
    scores = np.asarray(values, dtype=np.float64).ravel()
    if not 0.0 < confidence < 1.0 or resamples < 1:
        raise ValueError(f"a bootstrap of {resamples} resamples at level {confidence} is not possible")
    if scores.size == 0 or np.isnan(scores).any():
        return math.nan, math.nan
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(_resampled_means(scores, resamples, rng), [tail, 1.0 - tail])
    return float(low), float(high)


def paired_bootstrap(
    a: ArrayLike, b: ArrayLike, *, confidence: float = 0.95, resamples: int = 2000, rng: np.random.Generator
) -> tuple[float, float, float]:
    """Return the mean of `a - b` over the same rows, with its percentile bootstrap interval.

    Args:
        a: Scores of one run, [n].
        b: Scores of the other on the same rows, [n].
        confidence: Level of the interval, in (0, 1).
        resamples: Resamples of n rows with replacement.
        rng: Source of the resamples.

    Returns:
        (difference, low, high); all nan if there are no rows.

    Raises:
        DataError: the two runs were scored on different numbers of rows.
    """
    first, second = np.asarray(a, dtype=np.float64).ravel(), np.asarray(b, dtype=np.float64).ravel()
    if first.size != second.size:
        raise DataError(f"comparing two runs row by row: expected the same rows, found {first.size} and {second.size}")
    differences = first - second
    low, high = bootstrap_interval(differences, confidence=confidence, resamples=resamples, rng=rng)
    return (float(differences.mean()) if differences.size else math.nan), low, high


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


def _resampled_means(scores: NDArray[np.float64], resamples: int, rng: np.random.Generator) -> NDArray[np.float64]:
    rows_at_once = max(1, _BOOTSTRAP_ENTRIES // scores.size)
    means = np.empty(resamples, dtype=np.float64)
    for start in range(0, resamples, rows_at_once):
        stop = min(start + rows_at_once, resamples)
        drawn = rng.integers(0, scores.size, size=(stop - start, scores.size))
        means[start:stop] = scores[drawn].mean(axis=1)
    return means
