"""The files of an adapter artifact that PEFT does not write: the training log, the model card, a chat template."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from p2d_cli.artifacts.cards import save_card
from p2d_cli.core.adapter_rank import SERVED_RANKS, common_rank

TRAINING_LOG_NAME = "training_log.jsonl"
ADAPTER_RANK = "adapter_rank"
"""Under which key an adapter's summary says the rank of its modules; the first adapters that p2d wrote do not."""
CHAT_TEMPLATE_NAME = "chat_template.jinja"
"""The chat template that was learnt, where it is not the tokenizer's; transformers looks for it under this name."""

AUTO_MODEL = "AutoModelForCausalLM"
_PLAIN_SCALAR = re.compile(r"[A-Za-z/][\w./-]*[/][\w./-]*", re.ASCII)


def save_training_log(folder: Path, entries: Sequence[Mapping[str, float]]) -> None:
    """Write one JSON object a line: step, epoch, loss, learning rate, gradient norm; null for what is not finite."""
    lines = (json.dumps({name: _or_none(value) for name, value in entry.items()}) + "\n" for entry in entries)
    (folder / TRAINING_LOG_NAME).write_text("".join(lines), encoding="utf-8")


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def save_model_card(
    folder: Path,
    base: str,
    revision: str | None,
    *,
    scope: str,
    figures: Mapping[str, Any],
    rank: int | None = None,
    auto_model: str = AUTO_MODEL,
) -> None:
    """Write the card that model hubs show of what was trained.

    Args:
        folder: the artifact's folder.
        base: the base model's hub id, or its folder.
        revision: that of the base model on its hub, if the user named one.
        scope: heads, attention, lora or full.
        figures: rows of the card's table.
        rank: that of the adapter's modules, for scopes heads and lora.
        auto_model: the class of transformers that loads the base model.
    """
    is_adapter = scope in {"heads", "lora"}
    loading = _load_adapter(base, revision, auto_model) if is_adapter else _load_model(auto_model)
    more = _serving(base, rank) if rank is not None else ""
    more += _GOING_ON if scope == "heads" else ""
    text = (
        f"# Fine-tuned with p2d, scope `{scope}`\n\nBase model: `{_pinned(base, revision)}`\n\n"
        f"{_table(figures)}\n\n```python\n{loading}```{more}"
    )
    _write_card(folder, base, "peft" if is_adapter else "transformers", ["p2d", *["lora"] * is_adapter], text)


def save_merged_card(
    folder: Path,
    base: str,
    revision: str | None,
    adapter: str,
    figures: Mapping[str, Any],
    auto_model: str = AUTO_MODEL,
) -> None:
    """Write the card of a model that an adapter was merged into.

    Args:
        folder: the artifact's folder.
        base: the base model's hub id, or its folder.
        revision: that of the base model on its hub, if it is known.
        adapter: the adapter as the user named it.
        figures: rows of the card's table.
        auto_model: the class of transformers that loads the model.
    """
    text = (
        f"# {Path(adapter).name}, merged with p2d\n\n"
        f"`p2d export` added the adapter `{adapter}` to the weights of its base model `{_pinned(base, revision)}`, in "
        f"float32, and rounded once.\n\n{_table(figures)}\n\n```python\n{_load_model(auto_model)}```"
    )
    _write_card(folder, base, "transformers", ["p2d"], text)


_GOING_ON = """

To train on with PEFT, freeze the 0/1 factors that place the heads' rows again, which PEFT unfreezes:

```python
model = PeftModel.from_pretrained(base, "PATH_OF_THIS_FOLDER", is_trainable=True)
for factor in (p for name, p in model.named_parameters() if "lora_" in name and ((p == 0) | (p == 1)).all()):
    factor.requires_grad_(False)
```"""


def _load_model(auto_model: str) -> str:
    return f'from transformers import {auto_model}\n\nmodel = {auto_model}.from_pretrained("PATH_OF_THIS_FOLDER")\n'


def _load_adapter(base: str, revision: str | None, auto_model: str) -> str:
    pinned = "" if revision is None else f", revision={json.dumps(revision)}"
    return (
        "from peft import PeftModel\n"
        f"from transformers import {auto_model}\n\n"
        f"base = {auto_model}.from_pretrained({json.dumps(base, ensure_ascii=False)}{pinned})\n"
        'model = PeftModel.from_pretrained(base, "PATH_OF_THIS_FOLDER")\n'
    )


def _serving(base: str, rank: int) -> str:
    served = common_rank([rank])
    if served not in SERVED_RANKS:
        return (
            f"\n\nAll modules have rank {rank}, and vLLM serves adapters of up to {SERVED_RANKS[-1]}: merge it with "
            "`p2d export` to serve it there."
        )
    return (
        f"\n\nAll modules have rank {rank}: vLLM needs `--max-lora-rank {served}`.\n\n```sh\n"
        f"vllm serve {shlex.quote(base)} --enable-lora --max-lora-rank {served} --lora-modules NAME=PATH_OF_THIS_FOLDER"
        "\n```"
    )


def _pinned(base: str, revision: str | None) -> str:
    return base if revision is None else f"{base}@{revision}"


def _table(figures: Mapping[str, Any]) -> str:
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in figures.items())


def _write_card(folder: Path, base: str, library: str, tags: Sequence[str], text: str) -> None:
    """Write a card with the YAML header that hubs read."""
    # What YAML could take for something else than a text is quoted as in JSON, which YAML reads too.
    name = base if _PLAIN_SCALAR.fullmatch(base) else json.dumps(base, ensure_ascii=False)
    listed = "".join(f"- {tag}\n" for tag in tags)
    front = f"base_model: {name}\nlibrary_name: {library}\npipeline_tag: text-generation\ntags:\n{listed}"
    save_card(folder, front, text)
