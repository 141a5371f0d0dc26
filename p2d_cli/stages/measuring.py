"""p2d's own metrics of held-out rows: what a model answers, and how likely it finds given answers.

Legend: N rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from p2d_cli.config import EvalConfig
from p2d_cli.core.aer import MetricValue
from p2d_cli.core.batches import split_into_packs
from p2d_cli.core.metrics import ANSWER_METRICS, corpus_perplexity, mean_interval, perplexity_interval
from p2d_cli.data.records import Record, require_number
from p2d_cli.engine.passes import Arrays, Pass
from p2d_cli.engine.reader import Completion, ModelReader, Reader
from p2d_cli.engine.readings import answer_pass, completion_pass
from p2d_cli.errors import NOT_FINITE_HINT, DataError, NonFiniteError
from p2d_cli.runtime.seeding import generator


@dataclass(frozen=True)
class Measured:
    """What an evaluation says."""

    metrics: dict[str, MetricValue]
    rows: list[dict[str, Any]]
    notes: dict[str, Any]
    """Further figures for the summary."""


class Measuring:
    """The metrics of some rows, each where the rows are read for it.

    Rows that bring no `choices` of their own choose from those given.
    """

    def __init__(
        self, config: EvalConfig, reader: Reader, records: Sequence[Record], choices: tuple[str, ...] | None
    ) -> None:
        self._config, self._reader, self._records = config, reader, records
        self._offered = [record.choices or choices or () for record in records]
        """The answers that each row chooses from, one row's behind the other's in `_weights`."""
        self._turns = [""] * len(records)
        self._cut_N = np.zeros(len(records), np.bool_)
        """Which answers ended at the limit of new tokens."""
        self._weights = np.zeros(sum(map(len, self._offered)))
        self._log_likelihood_N = np.zeros(len(records))
        self._tokens_N = np.zeros(len(records), np.int64)
        self._notes: dict[str, Any] = {}

    def passes(self) -> Iterator[Pass]:
        """Yield what the model is to read or to write."""
        config, reader, records = self._config, self._reader, self._records
        if ANSWER_METRICS.keys() & set(config.metric):
            yield answer_pass(
                reader.prompts(records, max(1, reader.max_length - config.max_new_tokens)),
                self._turns,
                work="answer rows",
                longest=config.max_new_tokens,
                references=reader.reference_lengths(records),
                frames=reader.frames(records),
                stop=config.stop,
                names=[record.where for record in records],
                cut_N=self._cut_N,
            )
        if "accuracy" in config.metric:
            self._note_missing()
            yield self._weigh_choices()
        if "perplexity" in config.metric:
            yield _weigh(
                "weigh references", self._encode(records), records, self._log_likelihood_N, tokens_N=self._tokens_N
            )

    def _weigh_choices(self) -> Pass:
        """Return the pass that weighs each answer that each row offers.

        A prompt is read once for all its answers where the model allows it, otherwise once for each.
        """
        variants = [
            # The reference's own reasoning, or calls, would tell which choice is right.
            replace(record, completion=text, answer_parts={})
            for record, texts in zip(self._records, self._offered, strict=True)
            for text in texts
        ]
        completions = self._encode(variants)
        if not self._reader.can_pack(max(len(ids) for ids, _ in completions)):
            return _weigh("weigh choices", completions, variants, self._weights)
        packs = split_into_packs(completions, token_budget=self._reader.token_budget)

        def answers_of(batch: list[int]) -> list[int]:
            return [place for index in batch for place in packs[index][1]]

        def weigh(model: ModelReader, batch: list[int]) -> Arrays:
            from p2d_cli.modeling.choices import score_pack_batch

            found = score_pack_batch(model.model, [packs[index][0] for index in batch], model.tokenizer.pad_token_id)
            return _numbers(found, [variants[place] for place in answers_of(batch)])

        def take(batch: list[int], arrays: Arrays) -> None:
            self._weights[answers_of(batch)] = arrays["log_likelihood"]

        return Pass(
            work="weigh choices",
            lengths=[pack.length for pack, _ in packs],
            logits=[pack.scored for pack, _ in packs],
            read=weigh,
            take=take,
            name=lambda index: variants[packs[index][1].start].where,
            unchecked=("log_likelihood",),
        )

    def _encode(self, records: Sequence[Record]) -> list[Completion]:
        """Tokenize rows.

        Raises:
            DataError: no answer is left to weigh, since all were cut away.
        """
        reader = self._reader
        completions = reader.completions(records)
        lost = [record for record, (ids, start) in zip(records, completions, strict=True) if start == len(ids)]
        if len(lost) == len(records):
            raise DataError(
                f"--max-length {reader.max_length} cuts off the answers of all rows: there is nothing to weigh",
                hint="raise --max-length",
            )
        if lost:
            reader.job.progress.note(
                f"--max-length {reader.max_length} cuts off {len(lost)} whole answers, first {lost[0].where}: raise it"
            )
        return completions

    def _note_missing(self) -> None:
        """Say how many rows do not offer their own answer."""
        missing = [
            reference.strip() not in {option.strip() for option in options}
            for reference, options in zip(self._references, self._offered, strict=True)
        ]
        if any(missing):
            self._notes["answers_not_offered"] = sum(missing)
            first = self._records[missing.index(True)]
            self._reader.job.progress.note(
                f"{sum(missing)} rows offer other choices than their answer, as {first.where}; they count as wrong"
            )

    # --- once all passes are done

    def result(self) -> Measured:
        """Return the metrics, in the order asked for, and the rows with what was found of each."""
        reader, records, metrics = self._reader, self._records, dict[str, MetricValue]()
        columns: dict[str, Any] = {
            "id": [record.id for record in records],
            "prompt": [record.prompt for record in records],
            "reference": self._references,
        }
        if generated := [name for name in self._config.metric if name in ANSWER_METRICS]:
            columns["generated"] = self._turns
            columns["answer_cut"] = self._cut_N.tolist()
            columns["prediction"] = [
                reader.template.frame(reader.tokenizer, record).answer(turn)
                for record, turn in zip(records, self._turns, strict=True)
            ]
            self._judge(generated, columns, metrics)
        if "accuracy" in self._config.metric:
            self._choose(columns, metrics)
        if "perplexity" in self._config.metric:
            self._perplexity(columns, metrics)
        position = self._config.metric.index
        names = sorted(metrics, key=lambda name: (position(name.removesuffix("_strict")), name))
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        notes = self._notes | ({"answers_cut": int(self._cut_N.sum())} if generated else {})
        return Measured({name: metrics[name] for name in names}, rows, notes)

    @cached_property
    def _references(self) -> list[str]:
        reader = self._reader
        return [reader.template.reference(reader.tokenizer, record) for record in self._records]

    def _judge(self, wanted: Sequence[str], columns: dict[str, Any], metrics: dict[str, MetricValue]) -> None:
        """Add each metric of the generated answers, by row and on average; an unparseable answer counts as wrong."""
        for name in wanted:
            for figure, judge in ANSWER_METRICS[name].items():
                judged = [
                    judge(answer, reference)
                    for answer, reference in zip(columns["prediction"], columns["reference"], strict=True)
                ]
                if unparsed := sum(value is None for value in judged):
                    self._notes[f"{figure}_unparsed"] = unparsed
                columns[figure] = [0.0 if value is None else float(value) for value in judged]
                metrics[figure] = self._mean(figure, columns[figure])

    def _choose(self, columns: dict[str, Any], metrics: dict[str, MetricValue]) -> None:
        """Pick each row's likeliest choice by the log-likelihood of the whole choice, and add the accuracy."""
        weights = np.split(self._weights, np.cumsum([len(options) for options in self._offered])[:-1])
        chosen = [options[int(np.argmax(weight))] for options, weight in zip(self._offered, weights, strict=True)]
        columns["choice"] = chosen
        columns["accuracy"] = [
            float(choice.strip() == reference.strip())
            for choice, reference in zip(chosen, columns["reference"], strict=True)
        ]
        metrics["accuracy"] = self._mean("accuracy", columns["accuracy"])

    def _perplexity(self, columns: dict[str, Any], metrics: dict[str, MetricValue]) -> None:
        """Perplexity of the reference completions, over all their tokens; the interval resamples rows."""
        sums_N, counts_N = self._log_likelihood_N, self._tokens_N
        columns["log_likelihood"] = sums_N.tolist()
        columns["completion_tokens"] = counts_N.tolist()
        rng = generator(self._config.seed, "eval", "bootstrap", "perplexity")
        low, high = perplexity_interval(sums_N, counts_N, confidence=self._config.confidence, rng=rng)
        value = corpus_perplexity(float(sums_N.sum()), int(counts_N.sum()))
        metrics["perplexity"] = MetricValue(value=value, low=low, high=high, count=len(self._records))

    def _mean(self, name: str, scores: Sequence[float]) -> MetricValue:
        values = np.array(scores)
        rng = generator(self._config.seed, "eval", "bootstrap", name)
        low, high = mean_interval(values, confidence=self._config.confidence, rng=rng)
        return MetricValue(value=float(values.mean()), low=low, high=high, count=len(values))


def require_references(config: EvalConfig, records: Sequence[Record], choices: tuple[str, ...] | None) -> None:
    """Refuse a row whose reference cannot be judged, before the model is asked.

    Raises:
        DataError: naming the row.
    """
    for record in records if "number_match" in config.metric else ():
        require_number(record)
    for record in records if "accuracy" in config.metric else ():
        if not (record.choices or choices):
            raise DataError(
                f"{record.where}: the metric accuracy needs choices, and the row has none",
                hint="add a column 'choices', or give --choices FILE with a JSON list",
            )


def _weigh(
    work: str,
    completions: Sequence[Completion],
    records: Sequence[Record],
    log_likelihood: NDArray[np.float64],
    *,
    tokens_N: NDArray[np.int64] | None = None,
) -> Pass:
    """Return the pass that gives the log-likelihood of each completion, in nats, and the tokens that it is of."""

    def weigh(batch: list[int], sums_B: NDArray[np.float64], counts_B: NDArray[np.int64]) -> Arrays:
        return _numbers(sums_B, [records[row] for row in batch]) | {"tokens": counts_B}

    def take(batch: list[int], arrays: Arrays) -> None:
        log_likelihood[batch] = arrays["log_likelihood"]
        if tokens_N is not None:
            tokens_N[batch] = arrays["tokens"]

    return completion_pass(
        completions, weigh, work=work, take=take, name=lambda row: records[row].where, unchecked=("log_likelihood",)
    )


def _numbers(log_likelihood: ArrayLike, records: Sequence[Record]) -> dict[str, NDArray[Any]]:
    """Return log-likelihoods as a batch's reading; an answer that cannot be has one of minus infinity."""
    values = np.array(log_likelihood, dtype=np.float64)
    if (wrong := np.flatnonzero(np.isnan(values))).size:
        raise NonFiniteError(
            f"expected finite log-likelihoods, found nan for {records[wrong[0]].where}; nothing was written",
            hint=NOT_FINITE_HINT,
        )
    return {"log_likelihood": values}
