"""The whole path on one family's tiny model, from scoring to export, and what must hold along it.

`examine` runs every step of `STEPS` and says how it ended: `ok`, `refused: WHY`, `wrong: WHAT`, `crash: WHAT`, or `-`
where an earlier step has left nothing to go on with. `expected` says how it should end.
"""

from __future__ import annotations

import gc
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow.parquet as pq
import torch
from family_maps import all_heads, attentions, owned_by
from family_table import Family
from safetensors.torch import load_file
from torch import Tensor

FIXTURES = Path(__file__).parents[2] / "fixtures"
ROWS = {"pool": 24, "target": 8, "test": 4}
NEW_TOKENS = 6
ROW_METHODS = ("loss", "ifd", "embedding", "lexical", "random")
PROMPT_LENGTHS = (11, 7, 14)
"""Of the rows whose attention is compared; some families' windows are shorter."""
_ATTENTION = re.compile(r"\.(self_attn|attn|attention|self_attention|mixer|temporal_block)\.")
_TEXT = re.compile(r"^(model\.)?(language_model|text_model)\.|lm_head")


class Refused(Exception):
    """p2d said in words that it cannot."""


class Missing(Exception):
    """An earlier step has left nothing to go on with."""


@dataclass(frozen=True)
class Case:
    """A family's model on disk, and the folder for what is made of it."""

    family: Family
    folder: Path
    p2d: Callable[..., Any]
    """The command line in this process, as `run_p2d` of tests/conftest.py."""

    @cached_property
    def model(self) -> Path:
        return self.family.save(self.folder / "model")

    @cached_property
    def config(self) -> Any:
        return self.family.config()

    @cached_property
    def rows(self) -> dict[str, Path]:
        self.folder.mkdir(parents=True, exist_ok=True)
        paths = {}
        for name, count in ROWS.items():
            lines = (FIXTURES / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
            paths[name] = self.folder / f"{name}.jsonl"
            paths[name].write_text("".join(lines[:count]), encoding="utf-8")
        return paths

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.model)

    def run(self, command: str, out: str, *words: Any) -> Path:
        """Run a command into `out`; what it says where it does not work is raised."""
        done = self.p2d(command, *words, "--dtype", "float32", "--out", self.folder / out)
        if done.code == 65:
            raise Refused(done.said.split(" try: ")[0].removeprefix("error: "))
        if done.code:
            raise RuntimeError(f"{command} ended with {done.code}: {done.said}")
        return self.folder / out

    def artifact(self, name: str) -> Path:
        if not (self.folder / name / "manifest.json").is_file():
            raise Missing(name)
        return self.folder / name

    def plain(self, folder: Path, attention: str = "sdpa") -> Any:
        """The model in a folder as transformers alone reads it, or what of it reads text."""
        return self._reader(self._whole(folder, attention))

    def _reader(self, model: Any) -> Any:
        return model if self.family.reader is None else model.get_submodule(self.family.reader)

    def _whole(self, folder: Path, attention: str = "sdpa") -> Any:
        import transformers

        name = json.loads((folder / "config.json").read_bytes())["architectures"][0]
        if attention == "sdpa" and not getattr(transformers, name)._supports_sdpa:
            attention = "eager"
        return (
            getattr(transformers, name)
            .from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
            .eval()
        )

    def adapted(self, adapter: Path) -> Any:
        """The model with an adapter as PEFT alone reads it."""
        from peft import PeftModel

        return self._reader(PeftModel.from_pretrained(self._whole(self.model), adapter).eval().get_base_model())

    def state(self, folder: Path) -> dict[str, Tensor]:
        """The weights of a folder, by the names that the class of its makers gives them."""
        import transformers

        name = json.loads((folder / "config.json").read_bytes())["architectures"][0]
        return dict(getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).state_dict())

    def changed(self, folder: Path) -> dict[str, Tensor]:
        """Weight -> where it differs from the base model's."""
        before, after = self.state(self.model), self.state(folder)
        assert before.keys() == after.keys(), f"other weights: {sorted(before.keys() ^ after.keys())[:4]}"
        differs = {name: before[name] != after[name] for name in before}
        return {name: where for name, where in differs.items() if where.any()}


# --- the steps


def score(case: Case, method: str, *words: Any) -> None:
    rows = case.rows
    chosen = ("--target", rows["target"], "--pool", rows["pool"], "--ratio", 0.25)
    out = case.run("score-heads", f"heads-{method}", "--model", case.model, "--method", method, *chosen, *words)
    tensors = load_file(out / "head_scores.safetensors")
    scores_LH = tensors["scores"]
    exists_LH = torch.zeros(scores_LH.shape, dtype=torch.bool)
    for layer, head in all_heads(case.config):
        exists_LH[layer, head] = True
    assert torch.equal(tensors.get("exists", torch.ones_like(exists_LH)).bool(), exists_LH), "other heads exist"
    assert scores_LH[exists_LH].isfinite().all(), "a score is not finite"
    assert scores_LH[~exists_LH].isnan().all(), "heads that do not exist have scores"
    assert not (tensors["selected"].bool() & ~exists_LH).any(), "heads that do not exist are selected"
    # A window as short as the table's hides all demos that contrast looks at.
    assert method == "contrast" or len(set(scores_LH[exists_LH].tolist())) > 2, "all heads score the same"


def mine(case: Case, affinity: str, *words: Any) -> None:
    heads = ("--heads", case.artifact("heads-readout"), "--affinity", affinity, "--ratio", 0.3)
    _mine(case, f"subset-{affinity}", *heads, *words)


def mine_without_heads(case: Case) -> None:
    for method in ROW_METHODS:
        _mine(case, f"subset-{method}", "--method", method, "--count", 5)


def _mine(case: Case, out: str, *words: Any) -> None:
    rows = ("--pool", case.rows["pool"], "--target", case.rows["target"])
    folder = case.run("mine-data", out, "--model", case.model, *rows, *words)
    scores = torch.tensor(pq.read_table(folder / "pool_scores.parquet")["score"].to_pylist())
    assert len(scores) == ROWS["pool"]
    assert scores.isfinite().all(), "a row's score is not finite"
    assert len(scores.unique()) > 5, "rows score the same"


def train(case: Case, scope: str, *words: Any) -> None:
    size = ("--max-steps", 3, "--batch-size", 4, "--warmup-ratio", 0, "--schedule", "constant")
    heads = ("--heads", case.artifact("heads-readout")) if scope == "heads" else ()
    parts = ("--projections", "q,k,v,o") if scope in {"heads", "lora"} else ()
    data = ("--model", case.model, "--data", case.rows["target"], "--scope", scope)
    out = case.run("train", scope, *data, *heads, *parts, *size, *words)
    if scope in {"heads", "lora"}:
        assert not _close(_logits(case.adapted(out)), _logits(case.plain(case.model))), "the adapter changes nothing"
    else:
        _check_trained_weights(case, scope, case.changed(out))


def _check_trained_weights(case: Case, scope: str, changed: dict[str, Tensor]) -> None:
    assert changed, "no weight has changed"
    if scope == "full":
        strange = [name for name in changed if case.family.whole is not None and not _TEXT.search(name)]
        assert not strange, f"changed outside of the text part: {strange[0]}"
    elif case.family.refused is None:
        strange = sorted(changed.keys() - owned_by(case.config, all_heads(case.config)).keys())
        assert not strange, f"changed outside of q, k, v and o: {strange[0]}"
    else:
        strange = [name for name in changed if not _ATTENTION.search(name)]
        assert not strange, f"changed outside of attention: {strange[0]}"


def export(case: Case) -> None:
    base = ("--model", case.model)
    case.run("export", "exported", _adapter(case), *base)


def peft_equals_export(case: Case) -> None:
    alone, exported = _logits(case.adapted(_adapter(case))), _logits(case.plain(case.artifact("exported")))
    assert _close(alone, exported), f"logits differ by {(alone - exported).abs().max():.2g}"


def only_chosen_rows(case: Case) -> None:
    selected = load_file(case.artifact("heads-readout") / "head_scores.safetensors")["selected"]
    owned = owned_by(case.config, [(int(layer), int(head)) for layer, head in selected.nonzero()])
    if not (case.folder / "heads").exists():
        raise Missing("heads")
    changed = case.changed(case.artifact("exported"))
    assert changed, "no weight has changed"
    strange = sorted(changed.keys() - owned.keys())
    assert not strange, f"changed, but is none of the chosen heads': {strange[0]}"
    for name, dims in owned.items():
        assert name in changed, f"{name} has not changed, but is the chosen heads'"
        differs, allowed = changed[name], torch.zeros_like(changed[name])
        for dim, indices in dims.items():
            allowed.index_fill_(dim, torch.tensor(sorted(indices)), True)
        assert not (differs & ~allowed).any(), f"{name} has changed outside of the chosen heads"
        assert (differs.any(1) == allowed.any(1)).all(), f"{name} has rows of the chosen heads that have not changed"
        assert (differs.any(0) == allowed.any(0)).all(), f"{name} has columns of the chosen heads that have not changed"


def capture_equals_eager(case: Case) -> None:
    """All heads, every key token a segment of its own, some query rows; against each row alone, without padding."""
    from p2d_cli.modeling.attention_capture import run_captured

    generator = torch.Generator().manual_seed(0)
    examples = [torch.randint(3, 300, (length,), generator=generator) for length in PROMPT_LENGTHS]
    eager = [_eager_attention(case, example) for example in examples]
    heads = {attention.layer: range(attention.heads) for attention in attentions(case.config)}
    model, worst = case.plain(case.model), 0.0
    for padding in ("none", "right") if case.family.reads_padding else ("none", "left", "right"):
        group = range(1) if padding == "none" else range(len(examples))
        ids_BT, mask_BT = _padded([examples[index] for index in group], padding)
        rows_BT = mask_BT.bool() & (torch.rand(mask_BT.shape, generator=generator) < 0.5)
        segment_BT = torch.where(mask_BT.bool(), mask_BT.cumsum(1) - 1, -1)
        batch, size = {"input_ids": ids_BT, "attention_mask": mask_BT}, ids_BT.shape[1]
        captured_BKS = run_captured(model, batch, heads, rows_BT, segment_BT, size)
        for place, index in enumerate(group):
            chosen = rows_BT[place][mask_BT[place].bool()]
            expected_KS = eager[index][:, chosen].mean(1) if chosen.any() else 0 * eager[index][:, 0]
            found_KS = captured_BKS[place, :, : expected_KS.shape[1]]
            worst = max(worst, float((found_KS - expected_KS).abs().max()))
    assert worst < 1e-5, f"attention differs by {worst:.2g}"


def evaluate(case: Case) -> None:
    adapter = () if (path := _any_adapter(case)) is None else ("--adapter", path)
    rows = ("--data", case.rows["test"], "--max-new-tokens", NEW_TOKENS)
    case.run("eval", "evaluation", "--model", case.model, *adapter, *rows)


def eval_equals_generate(case: Case) -> None:
    folder, path = case.artifact("evaluation"), _any_adapter(case)
    model = case.plain(case.model) if path is None else case.adapted(path)
    predictions = pq.read_table(folder / "predictions.parquet")["prediction"].to_pylist()
    rows = [json.loads(line) for line in case.rows["test"].read_text(encoding="utf-8").splitlines()]
    for row, prediction in zip(rows, predictions, strict=True):
        ids = case.tokenizer(row["prompt"] + "\n", return_tensors="pt").input_ids
        with torch.no_grad():
            output = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False
            )
        answer = case.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        assert prediction.strip() == answer.strip(), f"{prediction!r} where transformers says {answer!r}"


def _any_adapter(case: Case) -> Path | None:
    made = (case.folder / scope for scope in ("heads", "lora"))
    return next((path for path in made if (path / "manifest.json").is_file()), None)


def _adapter(case: Case) -> Path:
    if (path := _any_adapter(case)) is None:
        raise Missing("adapter")
    return path


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 29)[None]).logits


def _close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-4 * expected.abs().max())


def _padded(examples: list[Tensor], padding: str) -> tuple[Tensor, Tensor]:
    longest = max(map(len, examples))
    ids_BT, mask_BT = torch.zeros(2, len(examples), longest, dtype=torch.long)
    for place, example in enumerate(examples):
        where = slice(longest - len(example), None) if padding == "left" else slice(len(example))
        ids_BT[place, where], mask_BT[place, where] = example, 1
    return ids_BT, mask_BT


def _eager_attention(case: Case, ids_T: Tensor) -> Tensor:
    """What the family's eager attention makes of each token, `[K, T, T]`, all heads of all layers one after the other.

    It is asked for that with one-hot values: the weights that it returns may lack what it does behind them (Granite's
    sinks).
    """
    model, seen = case.plain(case.model, "eager"), []
    first = model.get_submodule(attentions(case.config)[0].module.removeprefix(f"{case.family.reader}."))
    modeling = sys.modules[type(first).__module__]
    eager = modeling.eager_attention_forward

    def watched(module: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any) -> Any:
        one_hot_BGTT = torch.eye(key.shape[2]).expand(*key.shape[:2], -1, -1)
        seen.append(eager(module, query, key, one_hot_BGTT, *rest, **named)[0][0].transpose(0, 1))
        return eager(module, query, key, value, *rest, **named)

    with torch.no_grad(), patch.object(modeling, "eager_attention_forward", watched):
        model(input_ids=ids_T[None], attention_mask=torch.ones_like(ids_T)[None])
    return torch.cat(seen)


STEPS: dict[str, Callable[[Case], None]] = {
    "score readout": lambda case: score(case, "readout"),
    "score contrast": lambda case: score(case, "contrast", "--episodes", 4, "--demos", 2),
    "score taylor": lambda case: score(case, "taylor", "--proxy-samples", 6),
    "score pad": lambda case: score(case, "pad", "--proxy-samples", 6),
    "mine readout": lambda case: mine(case, "readout"),
    "mine attention": lambda case: mine(case, "attention", "--draws", 1, "--demos", 3),
    "mine without heads": mine_without_heads,
    "train heads": lambda case: train(case, "heads"),
    "train lora": lambda case: train(case, "lora", "--lora-rank", 2),
    "train attention": lambda case: train(case, "attention"),
    "train full": lambda case: train(case, "full"),
    "export": export,
    "PEFT equals export": peft_equals_export,
    "only chosen rows": only_chosen_rows,
    "eval": evaluate,
    "eval equals generate": eval_equals_generate,
    "capture equals eager": capture_equals_eager,
}
NEEDS_HEADS = ("score readout", "score contrast", "score taylor", "score pad", "mine readout", "mine attention",
               "train heads", "only chosen rows", "capture equals eager")  # fmt: skip
NEEDS_CAPTURE = ("score contrast", "mine attention", "capture equals eager")
NEEDS_ATTENTION = ("train lora", "train attention", "export", "PEFT equals export")
SELDOM = ("score taylor", "score pad", "mine without heads", "train attention", "train full")
"""Left out of an ordinary run of the tests, but where heads are refused or a vision part is to be kept."""


def usual_steps(family: Family) -> tuple[str, ...]:
    """The steps of an ordinary run of the tests."""
    seldom = SELDOM if family.refused is None and family.whole is None else SELDOM[:2]
    return tuple(step for step in STEPS if step not in seldom)


def expected(family: Family) -> dict[str, str]:
    """Step -> `ok`, or a part of what p2d says where it refuses, or `-`."""
    found = dict.fromkeys(STEPS, "ok")
    if family.captured is not None:
        found |= dict.fromkeys(NEEDS_CAPTURE, family.captured)
    if family.refused is not None:
        scores = [step for step in NEEDS_HEADS if step.startswith("score")]
        found |= dict.fromkeys(NEEDS_HEADS, "-") | dict.fromkeys(scores, family.refused)
    if not family.merges:
        found |= {"export": "share a weight", "PEFT equals export": "-"}
    if not family.adaptable:
        found |= {step: (family.refused or "") if step.startswith("train") else "-" for step in NEEDS_ATTENTION}
    return found


@contextmanager
def no_extras() -> Iterator[None]:
    """Leave out what takes half of the time and is tested elsewhere: pictures, bars, searches for cycles in modules."""
    import transformers
    from transformers.utils.logging import is_progress_bar_enabled

    with_bars, pictures = is_progress_bar_enabled(), sys.modules.get("matplotlib")
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    sys.modules["matplotlib"] = None  # type: ignore[assignment]  # which is how Python marks what is not installed
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        transformers.logging.set_verbosity(verbosity)
        sys.modules.pop("matplotlib")
        if pictures is not None:
            sys.modules["matplotlib"] = pictures
        if with_bars:
            transformers.logging.enable_progress_bar()


def examine(case: Case, steps: Iterable[str] = tuple(STEPS)) -> dict[str, str]:
    """Step -> how it ended."""
    outcomes = {}
    for step in steps:
        if case.family.refused is not None and step in NEEDS_HEADS and not step.startswith("score"):
            outcomes[step] = "-"
            continue
        outcomes[step] = _outcome(case, step)
    return outcomes


def _outcome(case: Case, step: str) -> str:
    from p2d_cli.errors import P2DError

    try:
        STEPS[step](case)
    except Missing:
        return "-"
    except (Refused, P2DError) as problem:
        return f"refused: {_short(problem)}"
    except AssertionError as problem:
        return f"wrong: {_short(problem)}"
    except Exception as problem:  # noqa: BLE001  # whatever it is, it is what is measured
        return f"crash: {type(problem).__name__}: {_short(problem)}"
    return "ok"


def _short(problem: Exception) -> str:
    return " ".join(str(problem).split())[:240]


def disagreements(family: Family, outcomes: dict[str, str]) -> dict[str, str]:
    """Step -> in words what was expected and what was found, where an outcome is not the expected one."""
    wanted = expected(family)
    return {
        step: f"{family.name}: {step}: expected {_wanted(wanted[step])}, found {outcome}"
        for step, outcome in outcomes.items()
        if not _agrees(wanted[step], outcome)
    }


def _agrees(wanted: str, outcome: str) -> bool:
    if wanted in {"ok", "-"}:
        return outcome == wanted
    return outcome.startswith("refused") and wanted in outcome


def _wanted(wanted: str) -> str:
    return wanted if wanted in {"ok", "-"} else f"a refusal with {wanted!r}"
