"""What a model answers to held-out rows, and how likely it finds given answers.

All of it runs batch by batch through the journal, so that an evaluation that was interrupted goes on where it stopped.

Legend: N rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2d_cli.artifacts.journal import pack_texts, unpack_texts
from p2d_cli.config import EvalConfig
from p2d_cli.data.records import Record
from p2d_cli.errors import NOT_FINITE_HINT, DataError, NonFiniteError
from p2d_cli.modeling.choices import can_pack, score_pack_batch, split_into_packs
from p2d_cli.modeling.generation import generate_greedy, score_completions
from p2d_cli.stages.batch_reading import Arrays
from p2d_cli.stages.execution import StageRun
from p2d_cli.stages.workbench import Workbench, finish_batches

PHASE = "evaluate"
Example = tuple[Sequence[int], int]
"""Token ids of prompt and completion, and how many of them stand before the answer."""


def generate_turns(job: StageRun[EvalConfig], bench: Workbench, records: Sequence[Record]) -> list[str]:
    """Let the model write its turn to every row, greedily."""
    config, template = job.config, bench.template
    frames = [template.frame(bench.tokenizer, record) for record in records]
    room = max(1, bench.max_length - config.max_new_tokens)
    prompts = bench.encode_prompts(records, room)

    def answer(group: list[int]) -> dict[str, NDArray[Any]]:
        asked = [prompts[index] for index in group]
        texts, new_tokens = generate_greedy(
            bench.model,
            bench.tokenizer,
            asked,
            max_new_tokens=config.max_new_tokens,
            stop=config.stop,
            names=[records[index].where for index in group],
            frames=[frames[index] for index in group],
        )
        bench.tokens += new_tokens + sum(map(len, asked))
        return {"answers": pack_texts(texts)}

    answers = [""] * len(records)
    batches = bench.batches([len(prompt) + config.max_new_tokens for prompt in prompts])
    for group, reading in finish_batches(
        job, bench, "answer rows", batches, answer, phase=PHASE, join=_both_answers, name=lambda row: records[row].where
    ):
        for index, text in zip(group, unpack_texts(reading["answers"]), strict=True):
            answers[index] = text
    return answers


def _both_answers(first: Arrays, second: Arrays) -> Arrays:
    return {"answers": pack_texts([*unpack_texts(first["answers"]), *unpack_texts(second["answers"])])}


def weigh_completions(
    job: StageRun[EvalConfig], bench: Workbench, label: str, records: Sequence[Record]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the log-likelihood of each row's completion given its prompt, in nats, and its number of tokens."""
    return _weigh_examples(job, bench, label, _encode(job, bench, records), records)


def weigh_choices(
    job: StageRun[EvalConfig], bench: Workbench, records: Sequence[Record], offered: Sequence[Sequence[str]]
) -> list[NDArray[np.float64]]:
    """Return the log-likelihood of each answer that each row offers, in nats.

    A prompt is read once for all its answers where the model allows it, otherwise once for each.
    """
    variants = [
        # The reference's own reasoning, or calls, would tell which choice is right.
        replace(record, completion=text, answer_parts={})
        for record, texts in zip(records, offered, strict=True)
        for text in texts
    ]
    examples = _encode(job, bench, variants)
    if can_pack(bench.model, max(len(ids) for ids, _ in examples)):
        log_likelihood = _weigh_packs(job, bench, examples, variants)
    else:
        log_likelihood, _ = _weigh_examples(job, bench, "weigh choices", examples, variants)
    return np.split(log_likelihood, np.cumsum([len(texts) for texts in offered])[:-1])


def _encode(job: StageRun[EvalConfig], bench: Workbench, records: Sequence[Record]) -> list[Example]:
    """Tokenize rows.

    Raises:
        DataError: no answer is left to weigh, since all were cut away.
    """
    examples = bench.encode_examples(records)
    lost = [record for record, one in zip(records, examples, strict=True) if one.answer_start == len(one.input_ids)]
    if len(lost) == len(records):
        raise DataError(
            f"--max-length {bench.max_length} cuts off the answers of all rows: there is nothing to weigh",
            hint="raise --max-length",
        )
    if lost:
        job.progress.note(
            f"--max-length {bench.max_length} cuts off {len(lost)} whole answers, first {lost[0].where}: raise it"
        )
    return [(example.input_ids, example.answer_start) for example in examples]


def _weigh_packs(
    job: StageRun[EvalConfig], bench: Workbench, examples: Sequence[Example], records: Sequence[Record]
) -> NDArray[np.float64]:
    packs = split_into_packs(examples, token_budget=bench.token_budget)
    pack_from = {places.start: pack for pack, places in packs}

    def weigh(group: list[int]) -> dict[str, NDArray[Any]]:
        chosen = [pack_from[place] for place in group if place in pack_from]
        bench.tokens += len(chosen) * max(pack.length for pack in chosen)
        return _numbers(score_pack_batch(bench.model, chosen, bench.tokenizer.pad_token_id), group, records)

    def between_packs(group: list[int]) -> tuple[list[int], list[int]] | None:
        starts = [position for position, place in enumerate(group) if place in pack_from]
        middle = starts[len(starts) // 2]
        return (group[:middle], group[middle:]) if middle else None

    log_likelihood = np.zeros(len(examples))
    # The journal's plan names examples, not packs: which examples a pack holds depends on the budget.
    batches = [
        [place for index in batch for place in packs[index][1]]
        for batch in bench.batches([pack.length for pack, _ in packs])
    ]
    for group, reading in finish_batches(
        job, bench, "weigh choices", batches, weigh, phase=PHASE, halve=between_packs, **_naming(records)
    ):
        log_likelihood[group] = reading["log_likelihood"]
    return log_likelihood


def _weigh_examples(
    job: StageRun[EvalConfig],
    bench: Workbench,
    label: str,
    examples: Sequence[Example],
    records: Sequence[Record],
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    def weigh(group: list[int]) -> dict[str, NDArray[Any]]:
        chosen = [examples[index] for index in group]
        sums, counts = score_completions(bench.model, chosen, bench.tokenizer.pad_token_id)
        bench.tokens += len(chosen) * max(len(ids) for ids, _ in chosen)
        return _numbers(sums, group, records) | {"tokens": np.array(counts)}

    log_likelihood_N, tokens_N = np.zeros(len(examples)), np.zeros(len(examples), np.int64)
    batches = bench.batches([len(ids) for ids, _ in examples])
    for group, reading in finish_batches(job, bench, label, batches, weigh, phase=PHASE, **_naming(records)):
        log_likelihood_N[group], tokens_N[group] = reading["log_likelihood"], reading["tokens"]
    return log_likelihood_N, tokens_N


def _naming(records: Sequence[Record]) -> dict[str, Any]:
    """Let messages name rows by their place in their file, and leave the check of log-likelihoods to `_numbers`."""
    return {"name": lambda row: records[row].where, "unchecked": ("log_likelihood",)}


def _numbers(
    log_likelihood: Sequence[float], group: Sequence[int], records: Sequence[Record]
) -> dict[str, NDArray[Any]]:
    """Return log-likelihoods as a batch's reading; an answer that cannot be has one of minus infinity."""
    values = np.array(log_likelihood, dtype=np.float64)
    if (wrong := np.flatnonzero(np.isnan(values))).size:
        raise NonFiniteError(
            f"expected finite log-likelihoods, found nan for {records[group[wrong[0]]].where}; nothing was written",
            hint=NOT_FINITE_HINT,
        )
    return {"log_likelihood": values}
