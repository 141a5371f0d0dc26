"""The passes that methods and stages share: answers behind prompts, likelihoods of completions, outputs of heads.

Legend: B rows of a batch, K heads in (layer, head) order, P places (answer and prompt), d head_dim.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2d_cli.artifacts.digests import digest_json
from p2d_cli.artifacts.journal import pack_texts, unpack_texts
from p2d_cli.artifacts.readings import PLACES, Digests
from p2d_cli.core.geometry import depth_of
from p2d_cli.core.turns import TurnFrame
from p2d_cli.data.prompts import EncodedExample
from p2d_cli.data.records import Record
from p2d_cli.engine.cost import FLOAT32
from p2d_cli.engine.passes import AnswerPass, Arrays, Pass
from p2d_cli.engine.reader import Completion, ModelReader, Reader


def answer_pass(
    prompts: Sequence[Sequence[int]],
    answers: list[str],
    *,
    longest: int,
    frames: Sequence[TurnFrame],
    stop: tuple[str, ...],
    names: Sequence[str] = (),
    cut_N: NDArray[np.bool_] | None = None,
    **options: Any,
) -> AnswerPass:
    """Return a pass that lets the model write greedily behind prompts.

    Args:
        prompts: token ids of each.
        answers: is given the text behind each prompt.
        longest: tokens of the longest answer.
        frames: what stands around each answer.
        stop: strings that end an answer.
        names: what an error calls each prompt.
        cut_N: is told which answers ended at `longest`.
        options: see `AnswerPass`.
    """

    def generate(reader: ModelReader, batch: list[int], most: int) -> Arrays:
        from p2d_cli.modeling.generation import generate_greedy

        found = generate_greedy(
            reader.model,
            reader.tokenizer,
            [prompts[row] for row in batch],
            max_new_tokens=most,
            stop=stop,
            names=[names[row] for row in batch] if names else (),
            frames=[frames[row] for row in batch],
        )
        return {"answers": pack_texts(found.texts), "new_tokens": np.array([found.tokens]), "cut": np.array(found.cut)}

    def join(first: Arrays, second: Arrays) -> Arrays:
        texts = [*unpack_texts(first["answers"]), *unpack_texts(second["answers"])]
        joined = {name: np.concatenate([first[name], second[name]]) for name in ("new_tokens", "cut")}
        return {"answers": pack_texts(texts), **joined}

    def take(batch: list[int], arrays: Arrays) -> None:
        for row, text in zip(batch, unpack_texts(arrays["answers"]), strict=True):
            answers[row] = text
        # A journal that an earlier version left does not say.
        if cut_N is not None and "cut" in arrays:
            cut_N[batch] = arrays["cut"]

    return AnswerPass(
        lengths=[len(prompt) for prompt in prompts],
        longest=longest,
        generate=generate,
        read=lambda reader, batch: generate(reader, batch, longest),
        join=join,
        take=take,
        name=names.__getitem__ if names else "row {}".format,
        **options,
    )


def completion_pass(
    completions: Sequence[Completion],
    weigh: Callable[[list[int], NDArray[np.float64], NDArray[np.int64]], Arrays],
    **options: Any,
) -> Pass:
    """Return a pass that reads how likely the model finds completions behind their prompts.

    Args:
        completions: one a row.
        weigh: turns a batch, the log-likelihood of each of its completions, in nats, and the tokens that these are of,
            into what is kept of it.
        options: see `Pass`.
    """

    def read(reader: ModelReader, batch: list[int]) -> Arrays:
        sums, counts = reader.completion_losses([completions[row] for row in batch])
        return weigh(batch, np.array(sums, dtype=np.float64), np.array(counts))

    return Pass(
        lengths=[len(ids) for ids, _ in completions],
        logits=[len(ids) - start for ids, start in completions],
        read=read,
        **options,
    )


def head_outputs_pass(
    reader: Reader,
    examples: Sequence[EncodedExample],
    heads_LH: NDArray[np.bool_],
    *,
    keep: Callable[[Arrays], Arrays] | None = None,
    **options: Any,
) -> Pass:
    """Return a pass that gives the mean output of the heads on each row's answer and prompt, as `outputs`.

    They are float32 `[B, K, 2, d]`.

    Args:
        reader: knows how large a head is.
        examples: the rows.
        heads_LH: the heads, bool; the pass ends at the deepest layer that has one of them.
        keep: what is kept of a batch in place of the outputs, which then need no room.
        options: see `Pass`.
    """
    each = int(heads_LH.sum()) * PLACES * int(reader.shape.dims(heads_LH).max()) * FLOAT32

    def read(model: ModelReader, batch: list[int]) -> Arrays:
        return {"outputs": model.head_outputs([examples[row] for row in batch], heads_LH)}

    return Pass(
        lengths=[len(example.input_ids) for example in examples],
        layers=depth_of(heads_LH),
        content=_content_of(examples, heads_LH, is_whole=keep is None),
        read=read,
        keep=keep,
        kept_bytes=each if keep is None else 8,
        memory={"captured head outputs": each * len(examples)} if keep is None else {},
        **options,
    )


MEAN, LATE_MEAN = 0, 1
"""Places of the two means of a row's hidden states."""


def hidden_states_pass(
    reader: Reader,
    examples: Sequence[EncodedExample],
    *,
    keep: Callable[[Arrays], Arrays] | None = None,
    kept_bytes: int = 0,
    **options: Any,
) -> Pass:
    """Return a pass that gives the means of each row's last hidden states as `states`, float32 `[B, 2, D]`.

    Args:
        reader: knows the hidden size.
        examples: the rows.
        keep: what is kept of a batch in place of the states, `kept_bytes` a row.
        kept_bytes: likewise.
        options: see `Pass`.
    """
    ids = [example.input_ids for example in examples]

    def read(model: ModelReader, batch: list[int]) -> Arrays:
        from p2d_cli.modeling.generation import mean_hidden_states

        padding = model.tokenizer.pad_token_id
        return {"states": mean_hidden_states(model.model, [ids[row] for row in batch], padding).numpy()}

    return Pass(
        lengths=[len(row) for row in ids],
        content=_content_of(examples, np.ones((1, 1), dtype=np.bool_), is_whole=keep is None),
        read=read,
        keep=keep,
        kept_bytes=PLACES * FLOAT32 * reader.hidden_size if keep is None else kept_bytes,
        **options,
    )


def _content_of(examples: Sequence[EncodedExample], heads_LH: NDArray[np.bool_], *, is_whole: bool) -> int:
    """Return a digest of what is read: an index, or the lack of one, changes which rows, and what is kept of them."""
    digest = hashlib.blake2b(heads_LH.tobytes() + bytes([is_whole]), digest_size=8)
    for example in examples:
        digest.update(np.array([example.answer_start, *example.input_ids], dtype=np.int64).tobytes())
    return int.from_bytes(digest.digest(), "little")


def context_of(reader: Reader) -> str:
    """Return a digest of what decides how heads read a row, beside the row; see `describe_context`."""
    return digest_json(describe_context(reader))


def describe_context(reader: Reader) -> dict[str, Any]:
    """Return what decides how heads read a row, beside the row, in plain JSON types."""
    job = reader.job
    model = job.scorer or job.inputs.base_model
    assert model is not None, "a stage that reads rows has a model"
    return {
        "model": model.digest,
        "tokenizer": model.tokenizer_digest,
        "template": reader.template.digest,
        "longest": reader.max_length,
        "precision": reader.precision,
    }


def distinct(records: Sequence[Record]) -> tuple[Record, ...]:
    """Return the rows without those that say what an earlier one says: a fit without one would know its twin."""
    found: dict[str, Record] = {}
    for record in records:
        found.setdefault(record.plain_text, record)
    return tuple(found.values())


def digests_of(records: Sequence[Record]) -> Digests:
    """Return the digests by which readings of rows are found again, `[n, 2]`."""
    return np.array([record.digest for record in records], dtype=np.uint64).reshape(-1, 2)
