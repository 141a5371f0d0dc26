"""Scoring a pool by the words that its rows share with the target's or with each other, or shortening it by them.

TF-IDF with `1 + ln tf` and scikit-learn's smoothed `1 + ln((1 + n) / (1 + df))`, as its `TfidfVectorizer` has them, but
a chunk at a time: what is held of the whole pool is 16 bytes for each different word (24 without a target).

Legend: M rows to choose from, n all rows with the target's, B rows of a chunk, V different words of a chunk,
W different words of all rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2d_cli.core.coverage import order_by_coverage
from p2d_cli.core.subset_selection import rank_rows
from p2d_cli.data.pool import Pool, digest64
from p2d_cli.data.records import Record
from p2d_cli.methods.row_method import PoolTask

_WAITING = 2**20
Terms = NDArray[np.uint64]
"""Digests of words."""


def shortlist(task: PoolTask, count: int) -> Pool:
    """Return the pool with only those `count` rows to choose from that share most words with the target's."""
    return task.pool.only(np.flatnonzero(rank_rows(score_by_words(task, phase="shortlist")) < count))


def score_by_words(task: PoolTask, *, phase: str = "score") -> NDArray[np.float64]:
    """Return the cosine of each row's TF-IDF vector to the mean of the target rows', or without these of the pool's."""
    job, pool = task.job, task.pool
    frequencies = count_all(task, phase)
    with job.timer.phase(phase):
        centre_W = _centre(task, frequencies)
    scores_M = np.empty(pool.size)
    with job.timer.phase(phase), job.progress.task("weigh words of rows", pool.size) as advance:
        for chunk in pool.chunks():
            terms_V, rows_BV = frequencies.weigh(*count_words(chunk.records))
            scores_M[chunk.places] = np.asarray(rows_BV @ centre_W[frequencies.find(terms_V)]).ravel()
            advance(len(chunk.records))
    return scores_M


def cover_by_words(task: PoolTask, count: int, *, phase: str = "score") -> NDArray[np.float64]:
    """Return the place of each row, from 1 down to 0, in an order whose first `count` rows are like all the others.

    Rows are covered by rows of their chunk, of which each gives its share of the first.
    """
    job, pool = task.job, task.pool
    frequencies = count_all(task, phase)
    places_M = np.empty(pool.size)
    with job.timer.phase(phase), job.progress.task("cover rows", pool.size) as advance:
        for chunk in pool.chunks():
            _, rows_BV = frequencies.weigh(*count_words(chunk.records))
            size = len(chunk.records)
            kept = min(math.ceil(count / pool.size * size) + 1, size)  # one more: chunks differ by 1
            places_M[chunk.start + order_by_coverage(rows_BV, kept)] = 1 - np.arange(size) / size
            advance(size)
    return places_M


def count_all(task: PoolTask, phase: str) -> Frequencies:
    """Count the words of the pool and of the target."""
    frequencies = Frequencies()
    with task.job.timer.phase(phase), task.job.progress.task("count words of rows", task.pool.size) as advance:
        for chunk in task.pool.chunks():
            frequencies.add(*count_words(chunk.records))
            advance(len(chunk.records))
        if task.target:
            frequencies.add(*count_words(task.target))
    return frequencies


def _centre(task: PoolTask, frequencies: Frequencies) -> NDArray[np.float64]:
    """Return the mean of the target rows' vectors, or without these of the pool's, at length 1."""
    centre_W = np.zeros(frequencies.size)
    if task.target:
        terms_V, rows_BV = frequencies.weigh(*count_words(task.target))
        mean_V = np.asarray(rows_BV.mean(axis=0)).ravel()
        centre_W[frequencies.find(terms_V)] = mean_V / np.linalg.norm(mean_V)
        return centre_W
    for chunk in task.pool.chunks():
        terms_V, rows_BV = frequencies.weigh(*count_words(chunk.records))
        share = len(chunk.records) / task.pool.size
        centre_W[frequencies.find(terms_V)] += share * np.asarray(rows_BV.mean(axis=0)).ravel()
    return centre_W / np.linalg.norm(centre_W)


def count_words(records: Sequence[Record]) -> tuple[Terms, Any]:
    """Return the digests of the rows' different words, in the words' order, and how often each stands in each row.

    The counts are a sparse matrix, float64 `[B, V]`.
    """
    from sklearn.feature_extraction.text import CountVectorizer

    vectorizer = CountVectorizer(token_pattern=r"(?u)\w+|[^\w\s]", dtype=np.float64)
    counts_BV = vectorizer.fit_transform(record.text for record in records)
    words = vectorizer.get_feature_names_out()
    return np.fromiter(map(digest64, words), dtype=np.uint64, count=len(words)), counts_BV


class Frequencies:
    """In how many rows each word stands."""

    def __init__(self) -> None:
        self._rows = 0
        self._terms_W: Terms = np.empty(0, dtype=np.uint64)
        self._counts_W: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._waiting: list[tuple[Terms, NDArray[np.int64]]] = []

    @property
    def size(self) -> int:
        """Number of different words, W."""
        self._merge()
        return len(self._terms_W)

    def add(self, terms_V: Terms, counts_BV: Any) -> None:
        """Count some rows, as `count_words` gives them."""
        self._rows += counts_BV.shape[0]
        self._waiting.append((terms_V, np.bincount(counts_BV.indices, minlength=len(terms_V)).astype(np.int64)))
        if sum(len(terms) for terms, _ in self._waiting) > max(_WAITING, len(self._terms_W)):
            self._merge()

    def find(self, terms_V: Terms) -> NDArray[np.int64]:
        """Return where in the list of all words these stand."""
        self._merge()
        return np.searchsorted(self._terms_W, terms_V)

    def weigh(self, terms_V: Terms, counts_BV: Any) -> tuple[Terms, Any]:
        """Return the terms and the rows' TF-IDF vectors, of length 1, in place of the counts."""
        from sklearn.preprocessing import normalize

        places_V = self.find(terms_V)
        known_V = self._counts_W[places_V]
        weights_V = np.log((self._rows + 1.0) / (known_V + 1.0)) + 1.0
        counts_BV.data = (np.log(counts_BV.data) + 1.0) * weights_V[counts_BV.indices]
        return terms_V, normalize(counts_BV, norm="l2", copy=False)

    def _merge(self) -> None:
        if not self._waiting:
            return
        terms = np.concatenate([self._terms_W, *(terms for terms, _ in self._waiting)])
        counts = np.concatenate([self._counts_W, *(counts for _, counts in self._waiting)])
        self._waiting.clear()
        order = np.argsort(terms)
        terms, counts = terms[order], counts[order]
        first = np.flatnonzero(np.append(True, terms[1:] != terms[:-1]))
        self._terms_W, self._counts_W = terms[first], np.add.reduceat(counts, first)
