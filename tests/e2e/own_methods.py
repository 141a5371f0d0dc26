"""A head method and a row method that p2d does not have: each is a class, and nothing else knows it."""

import numpy as np

from p2d_cli.engine.passes import scatter
from p2d_cli.engine.readings import completion_pass, head_outputs_pass
from p2d_cli.methods.head_method import HeadMethod, RepeatScores
from p2d_cli.methods.row_method import RowMethod


class Loud(HeadMethod):
    """Score a head by the length of its mean output on target rows."""

    name = "loud"

    def passes(self):
        """Read the target rows."""
        rows, reader = self.task.sample(), self.task.reader
        examples, everyone = reader.examples(rows), reader.shape.exists_LH
        self.lengths = np.zeros((len(rows), everyone.sum()))
        yield head_outputs_pass(
            reader,
            examples,
            everyone,
            work="listen to rows",
            part=self.task.part,
            keep=lambda arrays: {"length": np.linalg.norm(arrays["outputs"][:, :, 0].astype(float), axis=-1)},
            take=lambda batch, arrays: self.lengths.__setitem__(batch, arrays["length"]),
        )

    def score(self):
        """Return the mean length over rows."""
        return RepeatScores(
            self.task.reader.shape.table(self.lengths.mean(axis=0)), {"loudest": float(self.lengths.max())}
        )

    @classmethod
    def describe(cls, summary):
        """Say how loud the loudest is."""
        return [f"the loudest output has length {summary['loudest']:.3f}"] if "loudest" in summary else []


class Quiet(HeadMethod):
    """Score a head by how short its mean output on pool rows is; a method without a target."""

    name = "quiet"
    takes_pool = True

    @classmethod
    def takes_target(cls, config):
        """Say that it needs none."""
        return False

    def passes(self):
        """Read some rows of the pool."""
        rows = self.task.others.take(range(6))
        reader = self.task.reader
        examples, everyone = reader.examples(rows), reader.shape.exists_LH
        self.outputs = np.zeros((len(rows), everyone.sum(), 2, reader.shape.head_dim), dtype=np.float32)
        yield head_outputs_pass(
            reader, examples, everyone, work="listen to rows", take=scatter(self.outputs, "outputs")
        )

    def score(self):
        """Return minus the mean length."""
        length = np.linalg.norm(self.outputs, axis=-1).mean(axis=(0, 2))
        return RepeatScores(self.task.reader.shape.table(-length))


class Twice(RowMethod):
    """Reads each row in two passes of one name, which nothing could tell apart."""

    name = "twice"

    def passes(self):
        """Read every row, and again."""
        for _ in range(2):
            for chunk in self.task.chunks():
                yield completion_pass(
                    self.task.reader.completions(chunk.records),
                    lambda batch, sums, counts: {"likelihood": sums},
                    work="weigh rows",
                    part=chunk.part,
                    take=scatter(self.scores_M, "likelihood", chunk.start),
                )


class Easy(RowMethod):
    """Score a row by how likely the model finds its completion, a token at a time."""

    name = "easy"

    def passes(self):
        """Read every row once."""
        for chunk in self.task.chunks():
            yield completion_pass(
                self.task.reader.completions(chunk.records),
                lambda batch, sums, counts: {"likelihood": sums / np.maximum(counts, 1)},
                work="weigh rows",
                part=chunk.part,
                take=scatter(self.scores_M, "likelihood", chunk.start),
                name=chunk.name_of,
            )
