"""What a model answers to held-out rows, and how likely it finds given answers.

All of it runs batch by batch through the journal, so that an evaluation that was interrupted goes on where it stopped.

Legend: N rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2d_cli.artifacts.journal import pack_texts, unpack_texts
from p2d_cli.config import EvalConfig
from p2d_cli.data.records import Record
from p2d_cli.modeling.generation import generate_greedy, score_completions
from p2d_cli.stages.execution import StageRun
from p2d_cli.stages.workbench import Workbench, finish_batches

PHASE = "evaluate"


def generate_answers(job: StageRun[EvalConfig], bench: Workbench, records: Sequence[Record]) -> list[str]:
    """Answer every row greedily."""
    config = job.config
    room = max(1, bench.max_length - config.max_new_tokens)
    prompts = [bench.template.encode_prompt(bench.tokenizer, record, room) for record in records]

    def answer(group: list[int]) -> dict[str, NDArray[Any]]:
        [(_, texts, new_tokens)] = generate_greedy(
            bench.model, bench.tokenizer, prompts, [group], max_new_tokens=config.max_new_tokens, stop=config.stop
        )
        bench.tokens += new_tokens + sum(len(prompts[index]) for index in group)
        return {"answers": pack_texts(texts)}

    answers = [""] * len(records)
    batches = bench.batches([len(prompt) + config.max_new_tokens for prompt in prompts])
    for group, reading in finish_batches(job, bench, "answer rows", batches, answer, phase=PHASE):
        for index, text in zip(group, unpack_texts(reading["answers"]), strict=True):
            answers[index] = text
    return answers


def weigh_completions(
    job: StageRun[EvalConfig], bench: Workbench, label: str, records: Sequence[Record]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the log-likelihood of each row's completion given its prompt, in nats, and its number of tokens."""
    examples = [(example.input_ids, example.prompt_length) for example in bench.encode_examples(records)]

    def weigh(group: list[int]) -> dict[str, NDArray[Any]]:
        [(_, sums, counts)] = score_completions(bench.model, examples, [group], bench.tokenizer.pad_token_id)
        bench.tokens += len(group) * max(len(examples[index][0]) for index in group)
        return {"log_likelihood": np.array(sums), "tokens": np.array(counts)}

    log_likelihood_N, tokens_N = np.zeros(len(records)), np.zeros(len(records), np.int64)
    batches = bench.batches([len(ids) for ids, _ in examples])
    for group, reading in finish_batches(job, bench, label, batches, weigh, phase=PHASE):
        log_likelihood_N[group], tokens_N[group] = reading["log_likelihood"], reading["tokens"]
    return log_likelihood_N, tokens_N
