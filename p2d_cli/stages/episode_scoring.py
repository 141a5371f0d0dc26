"""Reading few-shot episodes: the chosen heads' attention to each demo, and how well the queries are answered.

Legend: M rows to choose from, E episodes, B batch, T tokens, K chosen heads in (layer, head) order, S demos.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from p2d_cli.config import MineDataConfig
from p2d_cli.core.metrics import ANSWER_METRICS
from p2d_cli.core.sample_affinity import AffinityTally, demo_shares
from p2d_cli.data.batching import pad_mask
from p2d_cli.data.episodes import EncodedEpisode, Episode
from p2d_cli.data.pool import Chunk
from p2d_cli.data.records import Record
from p2d_cli.errors import NonFiniteError
from p2d_cli.modeling.attention_capture import capture_segments
from p2d_cli.modeling.generation import generate_greedy
from p2d_cli.modeling.likelihood import completion_log_likelihood
from p2d_cli.stages.pool_task import PoolTask
from p2d_cli.stages.workbench import Workbench, finish_batches, heads_by_layer


def score_chunk(
    task: PoolTask,
    bench: Workbench,
    heads_LH: NDArray[np.bool_],
    chunk: Chunk,
    plan: Sequence[Episode],
    tally: AffinityTally,
) -> dict[str, int]:
    """Read the episodes of a chunk of the pool and credit its rows.

    Args:
        task: the pool to be scored.
        bench: the model.
        heads_LH: the heads whose attention counts.
        chunk: the rows.
        plan: which of them meet; their positions count from the chunk's start.
        tally: collects the values of all rows to choose from.

    Returns:
        Counts: `episodes`, `truncated_demos` and `unparsed_answers`.
    """
    job, config = task.job, task.job.config
    reader = EpisodeReader(bench, heads_LH, config, queries_from=task.target or chunk.records)
    with job.timer.phase("prepare"):
        episodes = reader.encode(plan, chunk.records)
    demos_ES = chunk.start + np.array([episode.demos for episode in plan], dtype=np.int64)
    unparsed = 0
    for group, reading in finish_batches(
        job,
        bench,
        chunk.label("read episodes"),
        reader.batches(episodes),
        lambda group: reader.read(plan, episodes, group),
        unchecked=("perf",),
        name="episode {}".format,
    ):
        weights_BS = demo_shares(reading["attention"], normalise=config.normalise)
        perf_B = reading["perf"]
        answered = np.isfinite(perf_B)
        tally.add(demos_ES[group][answered], (weights_BS * perf_B[:, None])[answered])
        unparsed += int(reading["unparsed"].sum())
    return {
        "episodes": len(plan),
        "truncated_demos": sum(episode.truncated_demos for episode in episodes),
        "unparsed_answers": unparsed,
    }


class EpisodeReader:
    """Read episodes with one forward pass each, and with a generated answer where that is asked for.

    Args:
        bench: the model.
        heads_LH: the heads whose attention counts, `[L, H]` bool.
        config: how episodes are judged (`perf`, `perf_metric`, `max_new_tokens`, `demos`).
        queries_from: the rows that the episodes' queries index.
    """

    def __init__(
        self,
        bench: Workbench,
        heads_LH: NDArray[np.bool_],
        config: MineDataConfig,
        *,
        queries_from: Sequence[Record],
    ) -> None:
        self._bench = bench
        self._heads_LH = heads_LH
        self._config = config
        self._queries = queries_from

    def encode(self, plan: Sequence[Episode], pool: Sequence[Record]) -> list[EncodedEpisode]:
        """Tokenize the planned episodes."""
        return [
            self._bench.encode_episode(
                [pool[index] for index in episode.demos], [self._queries[index] for index in episode.queries]
            )
            for episode in plan
        ]

    def batches(self, episodes: Sequence[EncodedEpisode]) -> list[list[int]]:
        """Group episodes of similar length under the token budget."""
        return self._bench.batches([len(episode.input_ids) for episode in episodes])

    def read(
        self, plan: Sequence[Episode], episodes: Sequence[EncodedEpisode], group: Sequence[int]
    ) -> dict[str, NDArray[Any]]:
        """Read a batch of episodes.

        Returns:
            `attention` float64 `[B, K, S]`, `perf` float64 `[B]` in [0, 1], NaN where no generated answer could be
            judged, and `unparsed` int64 `[1]`, the generated answers that could not be.
        """
        chosen = [episodes[index] for index in group]
        if self._config.perf == "likelihood":
            return self._read_with_likelihood(chosen)
        attention_BKS = self._bench.watch(chosen, self._heads_LH, num_segments=self._config.demos)
        if self._config.perf == "none":
            return _reading(attention_BKS, np.ones(len(chosen)))
        perf_B, unparsed = self._judge([plan[index] for index in group], chosen)
        return _reading(attention_BKS, perf_B, unparsed)

    def _read_with_likelihood(self, chosen: Sequence[EncodedEpisode]) -> dict[str, NDArray[Any]]:
        """One forward pass gives both: the attention on its way, the answers' likelihood at its end."""
        bench = self._bench
        query_mask_BT, segment_BT = bench.episode_masks(chosen)
        answer_mask_BT = pad_mask([episode.answer_mask for episode in chosen], False).to(bench.device)
        input_ids_BT = bench.pad([episode.input_ids for episode in chosen])
        heads = heads_by_layer(self._heads_LH)
        with capture_segments(bench.model, heads, query_mask_BT, segment_BT, self._config.demos) as captured:
            sum_B, count_B = completion_log_likelihood(
                bench.model, input_ids_BT, torch.ones_like(input_ids_BT), answer_mask_BT
            )
        perf_B = torch.exp(sum_B / count_B.clamp(min=1)).double().cpu().numpy()
        if not np.isfinite(perf_B).all():
            raise NonFiniteError(
                "reading episodes: expected finite likelihoods, found nan or infinity", hint="try --dtype float32"
            )
        return _reading(captured.attention_BKS.double().cpu().numpy(), perf_B)

    def _judge(self, plan: Sequence[Episode], chosen: Sequence[EncodedEpisode]) -> tuple[NDArray[np.float64], int]:
        """Let the model answer each query; the mean metric of each episode's parsed answers, and how many were not."""
        prompts, references, owners = [], [], []
        template, tokenizer = self._bench.template, self._bench.tokenizer
        for position, (episode, encoded) in enumerate(zip(plan, chosen, strict=True)):
            for start, query in zip(_answer_starts(encoded.answer_mask), episode.queries, strict=True):
                prompts.append(list(encoded.input_ids[:start]))
                references.append(template.reference(tokenizer, self._queries[query]))
                owners.append(position)
        judged: list[list[float]] = [[] for _ in chosen]
        for owner, answer, reference in zip(owners, self._generate(prompts), references, strict=True):
            value = self._metric(answer, reference)
            if value is not None:
                judged[owner].append(value)
        unparsed = len(prompts) - sum(map(len, judged))
        return np.array([np.mean(values) if values else np.nan for values in judged]), unparsed

    def _generate(self, prompts: list[list[int]]) -> list[str]:
        bench, config = self._bench, self._config
        # The prompts end where answers begin, behind what the template writes before them.
        frame = replace(bench.template.simple_frame(bench.tokenizer), lead="", opened=None)
        answers = [""] * len(prompts)
        batches = bench.batches([len(prompt) + config.max_new_tokens for prompt in prompts])
        stop = ("\n\n",) if bench.template.name == "plain" else ()
        for batch in batches:
            asked = [prompts[index] for index in batch]
            texts, new_tokens = generate_greedy(
                bench.model,
                bench.tokenizer,
                asked,
                max_new_tokens=config.max_new_tokens,
                stop=stop,
                frames=[frame] * len(asked),
            )
            bench.tokens += new_tokens + sum(map(len, asked))
            for index, text in zip(batch, texts, strict=True):
                answers[index] = frame.answer(text)
        return answers

    def _metric(self, answer: str, reference: str) -> float | None:
        if not answer.strip():
            return None
        name = self._config.perf_metric
        return ANSWER_METRICS[name][name](answer, reference)


def _reading(
    attention_BKS: NDArray[np.float64], perf_B: NDArray[np.float64], unparsed: int = 0
) -> dict[str, NDArray[Any]]:
    return {"attention": attention_BKS, "perf": perf_B, "unparsed": np.array([unparsed])}


def _answer_starts(answer_mask: Sequence[bool]) -> list[int]:
    """Return where each run of answer tokens begins."""
    return [
        index for index, answers in enumerate(answer_mask) if answers and (index == 0 or not answer_mask[index - 1])
    ]
