"""lexical: rows that share most words with the target's (TF-IDF)."""

from __future__ import annotations

from p2d_cli.methods.row_method import RowMethod, RowScores
from p2d_cli.methods.words import score_by_words


class Lexical(RowMethod):
    """Cosine of a row's TF-IDF vector to the mean of the target rows' (of the pool's without a target)."""

    name = "lexical"
    takes_target = True
    reads_model = False

    def score(self) -> RowScores:
        """Return the cosines."""
        return RowScores.measured(score_by_words(self.task))
