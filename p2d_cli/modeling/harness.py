"""Tasks of lm-eval, the Language Model Evaluation Harness, run on a model that p2d has loaded.

lm-eval is an optional package, imported only here and only when a task is run. It makes prompts, few-shot examples and
figures in its own ways and with its own seeds, so the figures are those that its own command line would give.
"""

from __future__ import annotations

import importlib.metadata
import io
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from p2d_cli.core.turns import TurnFrame
from p2d_cli.errors import UnavailableError, UsageError, first_line
from p2d_cli.modeling.generation import decode_turns, end_ids, replaced
from p2d_cli.modeling.likelihood import finite_logits, require_finite_logits

PACKAGE = "lm-eval"
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""Shows the work on so many requests under a label, and gives what is called with each few that are done."""


@dataclass(frozen=True)
class TaskFigure:
    """One metric of one task."""

    value: float
    stderr: float
    """Standard error as lm-eval estimates it; nan where it gives none."""
    count: int
    """Rows it was computed on."""


@dataclass(frozen=True)
class HarnessResult:
    """What lm-eval found."""

    figures: dict[str, TaskFigure]
    """By `task/metric`, and `task/metric,filter` where a filter was applied."""
    rows: list[dict[str, Any]]
    """One a task and document: id, task, prompt, reference, prediction, and each figure that is known by row."""
    tokens: int
    """Tokens that the model read, padding included."""


def harness_version() -> str:
    """Return the installed version of lm-eval; raise UnavailableError without one."""
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise UnavailableError(
            "--lm-eval needs the package lm-eval, which is not installed", hint='pip install "p2d-cli[lm-eval]"'
        ) from None


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    folder: Path | None,
    chat_template: str | None,
    frame: TurnFrame,
    system: str | None,
    limit: int | None,
    max_length: int,
    batch_size: int,
    progress: Progress,
) -> HarnessResult:
    """Run tasks and gather their figures and samples.

    Args:
        model: in eval mode, see `p2d_cli.modeling.likelihood`.
        tokenizer: the model's.
        tasks: names of tasks or groups; `*` stands for any letters.
        folder: a folder with task files of one's own, beside those that lm-eval brings.
        chat_template: what prompts go through; None for plain text.
        frame: what a turn has around its answer. Its token ends a generated turn, and tasks see the answer alone.
        system: the system prompt, if any.
        limit: only the first so many documents of each task.
        max_length: longest sequence in tokens.
        batch_size: rows of one forward.
        progress: called once for each kind of request.

    Raises:
        UsageError: lm-eval knows no such task, or refuses to run it.
        UnavailableError: a task's data set is neither on disk nor reachable.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    # The template's end of a turn ends what is generated.
    ended = replaced(model.generation_config, eos_token_id=end_ids(model, tokenizer, [frame]) or None)
    with _quiet(), _counted_tokens(model) as counted, ended:
        if chat_template is not None:
            tokenizer.chat_template = chat_template
        manager = TaskManager(include_path=None if folder is None else str(folder))
        if unknown := [task for task in tasks if not manager.match_tasks([task])]:
            raise UsageError(
                f"--lm-eval {','.join(unknown)}: lm-eval {harness_version()} knows no such task",
                hint="lm-eval ls tasks lists them; --lm-eval-tasks DIR adds a folder of your own",
            )
        harness = _harness_class(progress, frame)(
            pretrained=model, tokenizer=tokenizer, backend="causal", max_length=max_length, batch_size=batch_size
        )
        with _explained(", ".join(tasks)):
            results = simple_evaluate(
                model=harness,
                tasks=list(tasks),
                limit=limit,
                task_manager=manager,
                apply_chat_template=chat_template is not None,
                system_instruction=system,
                log_samples=True,
            )
    figures = _figures(results)
    return HarnessResult(figures=figures, rows=_rows(results["samples"], figures), tokens=counted[0])


@contextmanager
def _explained(tasks: str) -> Iterator[None]:
    """Say in p2d's words what keeps lm-eval from running tasks."""
    try:
        yield
    except OSError as problem:
        raise UnavailableError(
            f"lm-eval cannot load {tasks}: {first_line(problem)}",
            hint="its data set must be on disk or reachable; HF_HUB_OFFLINE forbids to download it",
        ) from problem
    except ValueError as problem:
        raise UsageError(f"lm-eval refuses {tasks}: {first_line(problem)}") from problem


def _harness_class(progress: Progress, frame: TurnFrame) -> Any:
    """Return lm-eval's wrapper of Hugging Face models, with p2d's ways of showing progress and of reading a turn."""
    from lm_eval.models.huggingface import HFLM

    class WatchedModel(HFLM):  # type: ignore[misc]  # lm-eval is optional, and untyped where it is missing
        _advance: Callable[[int], None] = staticmethod(lambda _: None)

        def loglikelihood(self, requests: Any, *args: Any, **options: Any) -> Any:
            with self._watched("weigh answers", requests):
                return super().loglikelihood(requests, *args, **options)

        def loglikelihood_rolling(self, requests: Any, *args: Any, **options: Any) -> Any:
            with self._watched("weigh texts", requests):
                return super().loglikelihood_rolling(requests, *args, **options)

        def generate_until(self, requests: Any, *args: Any, **options: Any) -> Any:
            with self._watched("answer rows", requests):
                return super().generate_until(requests, *args, **options)

        def _model_call(self, inps: Any, *args: Any, **options: Any) -> Any:
            logits = super()._model_call(inps, *args, **options)
            require_finite_logits(logits)
            self._advance(len(inps))
            return logits

        def _model_generate(self, context: Any, *args: Any, stop: list[str], **options: Any) -> Any:
            # A stop string ends an answer; in a think block before it, it would leave none. lm-eval cuts afterwards.
            stop = [] if frame.lead.strip() or frame.opened else stop
            with finite_logits(self.model, ()):
                output = super()._model_generate(context, *args, stop=stop, **options)
            self._advance(len(context))
            return output

        def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> Any:
            if not (skip_special_tokens and isinstance(tokens, list)):
                return super().tok_decode(tokens, skip_special_tokens=skip_special_tokens)
            return frame.answer(decode_turns(self.tokenizer, [tokens], [frame])[0])

        @contextmanager
        def _watched(self, label: str, requests: Sequence[Any]) -> Iterator[None]:
            left = len(requests)

            def advance(rows: int) -> None:
                # Long texts are read in several windows, and equal prompts once for several requests.
                nonlocal left
                done = min(rows, left)
                left -= done
                show(done)

            with progress(f"lm-eval, {label}", left) as show:
                self._advance = advance
                yield
                advance(left)

    return WatchedModel


# --- results


def _figures(results: dict[str, Any]) -> dict[str, TaskFigure]:
    figures = {}
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = values.get(f"{metric}_stderr,{filtered}")
            figures[_figure_name(task, metric, filtered)] = TaskFigure(
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, int | float) else math.nan,
                count=_count(results, task),
            )
    return figures


def _figure_name(task: str, metric: str, filtered: str) -> str:
    return f"{task}/{metric}" if filtered == "none" else f"{task}/{metric},{filtered}"


def _count(results: dict[str, Any], name: str) -> int:
    """Return the documents of a task, or of all tasks of a group."""
    if name in results["n-samples"]:
        return int(results["n-samples"][name]["effective"])
    return sum(_count(results, part) for part in results.get("group_subtasks", {}).get(name, ()))


def _rows(samples_by_task: dict[str, list[dict[str, Any]]], figures: dict[str, TaskFigure]) -> list[dict[str, Any]]:
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for task, samples in samples_by_task.items():
        for sample in samples:
            # A document is judged once a filter; its answer is what the first one made of it.
            row = rows.setdefault((task, sample["doc_id"]), _row(task, sample))
            for metric in sample["metrics"]:
                if isinstance(value := sample[metric], bool | int | float):
                    row[_figure_name(task, metric, sample["filter"])] = float(value)
    names = {name: _column_name(name, rows.values(), figures) for row in rows.values() for name in row}
    columns = dict.fromkeys(names.values())
    return [columns | {names[name]: value for name, value in row.items()} for row in rows.values()]


def _column_name(name: str, rows: Iterable[dict[str, Any]], figures: dict[str, TaskFigure]) -> str:
    """Call a row's part of a figure by the figure's name only if the figure is the mean over rows.

    A row's part of lm-eval's perplexity, for one, is a log-likelihood.
    """
    if name not in figures:
        return name
    values = [row[name] for row in rows if name in row]
    is_mean = math.isclose(math.fsum(values) / len(values), figures[name].value, rel_tol=1e-6, abs_tol=1e-9)
    return name if is_mean else f"{name}:row"


def _row(task: str, sample: dict[str, Any]) -> dict[str, Any]:
    asked = sample["arguments"]
    prompts = [str(prompt) for prompt, *_ in asked]
    # The answer that was weighed; a generated one has settings in its place.
    continuations = [str(rest[0]) if rest and isinstance(rest[0], str) else "" for _, *rest in asked]
    answers, target = sample["filtered_resps"], sample["target"]
    if len(answers) > 1 and all(_is_likelihood(answer) for answer in answers):
        # Mostly the answers differ, in a few tasks the prompts before one answer.
        choices = continuations if len(set(continuations)) > 1 else prompts
        prediction: str | None = choices[max(range(len(answers)), key=lambda index: answers[index][0])].strip()
        is_place = isinstance(target, int) and 0 <= target < len(choices)
        reference = choices[target].strip() if is_place else str(target)
    else:
        prediction = None if _is_likelihood(answers[0]) or isinstance(answers[0], float) else str(answers[0])
        reference = str(target)
    return {
        "id": f"{task}:{sample['doc_id']}",
        "task": task,
        "prompt": prompts[0],
        "reference": reference,
        "prediction": prediction,
    }


def _is_likelihood(answer: Any) -> bool:
    """Whether an answer is `(log-likelihood, is greedy)`."""
    return isinstance(answer, list | tuple) and len(answer) == 2 and isinstance(answer[0], float)


# --- keeping to p2d's manners


@contextmanager
def _counted_tokens(model: Any) -> Iterator[list[int]]:
    """Count the tokens that pass the input embedding while the block runs."""
    counted = [0]

    def count(_module: Any, inputs: tuple[Any, ...]) -> None:
        counted[0] += inputs[0].numel()

    with model.get_input_embeddings().register_forward_pre_hook(count):
        yield counted


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the logs, bars and prints of lm-eval and of what it uses; errors still come as exceptions."""
    from tqdm import tqdm

    start = tqdm.__init__

    def start_hidden(self: Any, *args: Any, **options: Any) -> None:
        start(self, *args, **options | {"disable": True})

    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with replaced(tqdm, __init__=start_hidden), redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
