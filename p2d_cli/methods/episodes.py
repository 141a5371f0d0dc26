"""Few-shot episodes: the heads' attention to each demo, and how well the queries are answered.

`score_i = mean over episodes of q(e) * w_i` (Data Whisperer, arXiv:2505.12212, eq. 3-5): a row's mean share of the
attention among the demos it met, weighed by how well its episodes were answered. Rows meet others of their chunk.

Legend: M rows to choose from, E episodes, B batch, K heads in (layer, head) order, S demos.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2d_cli.config import MineDataConfig
from p2d_cli.core.geometry import depth_of
from p2d_cli.core.metrics import ANSWER_METRICS
from p2d_cli.core.sample_affinity import AffinityTally, demo_shares
from p2d_cli.core.turns import TurnFrame
from p2d_cli.data.episodes import EncodedEpisode, Episode, duplicate_groups, plan_mining, plan_self_mining
from p2d_cli.data.pool import Chunk
from p2d_cli.data.records import Record
from p2d_cli.engine.cost import FLOAT64
from p2d_cli.engine.passes import Arrays, Pass
from p2d_cli.engine.reader import ModelReader, heads_by_layer
from p2d_cli.engine.readings import answer_pass
from p2d_cli.errors import NonFiniteError
from p2d_cli.methods.method import Read
from p2d_cli.methods.row_method import PoolTask, RowMethod, RowScores
from p2d_cli.runtime.seeding import generator

Quality = Callable[[], NDArray[np.float64]]
"""Returns how well each episode was answered, `[E]`."""


class EpisodeMethod(RowMethod):
    """Weigh each demo by the heads' attention and by how well its episode is answered."""

    def __init__(self, task: PoolTask) -> None:
        super().__init__(task)
        self._heads_LH: NDArray[np.bool_] = np.zeros((0, 0), dtype=np.bool_)
        self._tally = AffinityTally(task.pool.size)
        self._counts = Counter({"episodes": 0, "truncated_demos": 0, "unparsed_answers": 0})

    @classmethod
    def reads(cls, config: MineDataConfig) -> frozenset[Read]:
        """Return what reading episodes takes of a model."""
        return frozenset({"attention"} if config.answer_weight == "none" else {"attention", "logits"})

    def heads(self) -> NDArray[np.bool_]:
        """Return the heads whose attention counts, bool `[L, H]`.

        They are asked for once the first episodes are planned, so that what speaks against these is said before a model
        is loaded.
        """
        assert self.task.heads_LH is not None, "mine-data refuses to run this method without heads"
        return self.task.heads_LH

    def passes(self) -> Iterator[Pass]:
        """Read the episodes of one chunk after the other; with `--answer-weight generate`, first answer them."""
        task, config = self.task, self.task.config
        rng = generator(config.seed, "mine-data", "episodes")
        for chunk in task.chunks():
            with task.job.timer.phase("prepare"):
                plan = self._plan(chunk, rng)
            asked = task.target or chunk.records
            shown = [
                ([chunk.records[row] for row in episode.demos], [asked[row] for row in episode.queries])
                for episode in plan
            ]
            episodes = task.reader.episodes(shown)
            self._counts["episodes"] += len(plan)
            self._counts["truncated_demos"] += sum(episode.truncated_demos for episode in episodes)
            self._heads_LH = self.heads()
            quality: Quality = partial(np.ones, len(plan))
            if config.answer_weight == "generate":
                queries = [(number, record) for number, (_, rows) in enumerate(shown) for record in rows]
                answering, answers = self._answers(chunk, queries, episodes)
                yield answering
                quality = cache(partial(self._judge, queries, answers, len(plan)))
            yield self._attention(chunk, plan, episodes, quality)

    def _plan(self, chunk: Chunk, rng: np.random.Generator) -> list[Episode]:
        config, target = self.task.config, self.task.target
        pool_groups, target_groups = duplicate_groups(chunk.records, target)
        dealt: dict[str, Any] = {"demos": config.demos, "queries": config.queries, "draws": config.draws, "rng": rng}
        if not target:
            return plan_self_mining(len(chunk.records), pool_groups=pool_groups, **dealt)
        dealt |= {"pool_groups": pool_groups, "target_groups": target_groups}
        return plan_mining(len(chunk.records), len(target), **dealt)

    def _attention(
        self, chunk: Chunk, plan: Sequence[Episode], episodes: Sequence[EncodedEpisode], quality: Quality
    ) -> Pass:
        """Return the pass that gives the heads' attention to each demo `[B, K, S]`, and the answers' likelihood."""
        config, heads_LH = self.task.config, self._heads_LH
        likely = config.answer_weight == "likelihood"
        demos_ES = chunk.start + np.array([episode.demos for episode in plan], dtype=np.int64)

        def read(reader: ModelReader, batch: list[int]) -> Arrays:
            chosen = [episodes[index] for index in batch]
            if likely:
                return _attention_and_likelihood(reader, chosen, heads_LH, config.demos)
            return {"attention": reader.attention(chosen, heads_LH, config.demos), "quality": np.ones(len(batch))}

        def take(batch: list[int], arrays: Arrays) -> None:
            weights_BS = demo_shares(arrays["attention"], normalise=config.normalise)
            quality_B = arrays["quality"] * quality()[batch]
            answered = np.isfinite(quality_B)
            self._tally.add(demos_ES[batch][answered], (weights_BS * quality_B[:, None])[answered])

        return Pass(
            work="read episodes",
            part=chunk.part,
            lengths=[len(episode.input_ids) for episode in episodes],
            logits=[sum(episode.answer_mask) for episode in episodes] if likely else (),
            layers=None if likely else depth_of(heads_LH),
            read=read,
            take=take,
            name="episode {}".format,
            kept_bytes=int(heads_LH.sum()) * config.demos * FLOAT64,
        )

    def _answers(
        self, chunk: Chunk, queries: Sequence[tuple[int, Record]], episodes: Sequence[EncodedEpisode]
    ) -> tuple[Pass, list[str]]:
        """Return the pass that lets the model answer each query, given with the number of its episode; and the answers.

        These are there once the pass is done.
        """
        reader, config = self.task.reader, self.task.config
        starts = [start for episode in episodes for start in _answer_starts(episode.answer_mask)]
        prompts = [list(episodes[number].input_ids[:start]) for start, (number, _) in zip(starts, queries, strict=True)]
        answers = [""] * len(queries)
        answering = answer_pass(
            prompts,
            answers,
            work="answer episodes",
            part=chunk.part,
            longest=config.max_new_tokens,
            references=[sum(episodes[number].answer_mask) // config.queries or 1 for number, _ in queries],
            frames=[self._frame] * len(prompts),
            stop=("\n\n",) if reader.template.name == "plain" else (),
        )
        return answering, answers

    @cached_property
    def _frame(self) -> TurnFrame:
        """What stands around an answer: prompts end behind what the template writes before it."""
        reader = self.task.reader
        return replace(reader.template.simple_frame(reader.tokenizer), lead="", opened=None)

    def _judge(self, queries: Sequence[tuple[int, Record]], answers: Sequence[str], count: int) -> NDArray[np.float64]:
        """Return the mean metric of each episode's parsed answers; NaN where none could be parsed."""
        reader, name = self.task.reader, self.task.config.answer_metric
        judged: list[list[float]] = [[] for _ in range(count)]
        for (number, query), text in zip(queries, answers, strict=True):
            answer = self._frame.answer(text)
            reference = reader.template.reference(reader.tokenizer, query)
            value = ANSWER_METRICS[name][name](answer, reference) if answer.strip() else None
            if value is not None:
                judged[number].append(value)
        self._counts["unparsed_answers"] += len(queries) - sum(map(len, judged))
        return np.array([np.mean(values) if values else np.nan for values in judged])

    def score(self) -> RowScores:
        """Return each row's mean over its episodes."""
        return RowScores(
            self._tally.means(), self._tally.counts, {"heads_read": int(self._heads_LH.sum()), **self._counts}
        )

    @classmethod
    def describe(cls, summary: dict[str, Any]) -> list[str]:
        """Say how many episodes were read."""
        if "episodes" not in summary:
            return []
        return [f"{summary['episodes']:,} episodes, {summary['heads_read']} heads read"]


def _attention_and_likelihood(
    reader: ModelReader, chosen: Sequence[EncodedEpisode], heads_LH: NDArray[np.bool_], demos: int
) -> Arrays:
    """One forward pass gives both: the attention on its way, the answers' likelihood at its end."""
    import torch

    from p2d_cli.modeling.attention_capture import capture_segments
    from p2d_cli.modeling.likelihood import completion_log_likelihood

    query_mask_BT, segment_BT = reader.episode_masks(chosen)
    answer_mask_BT = reader.pad_flags([episode.answer_mask for episode in chosen], False)
    input_ids_BT = reader.pad([episode.input_ids for episode in chosen])
    with capture_segments(reader.model, heads_by_layer(heads_LH), query_mask_BT, segment_BT, demos) as captured:
        sum_B, count_B = completion_log_likelihood(
            reader.model, input_ids_BT, torch.ones_like(input_ids_BT), answer_mask_BT
        )
    quality_B = torch.exp(sum_B / count_B.clamp(min=1)).double().cpu().numpy()
    if not np.isfinite(quality_B).all():
        raise NonFiniteError(
            "reading episodes: expected finite likelihoods, found nan or infinity", hint="try --dtype float32"
        )
    return {"attention": captured.attention_BKS.double().cpu().numpy(), "quality": quality_B}


def _answer_starts(answer_mask: Sequence[bool]) -> list[int]:
    """Return where each run of answer tokens begins."""
    before = (False, *answer_mask)
    return [index for index, answers in enumerate(answer_mask) if answers and not before[index]]
