"""The files of an adapter artifact that PEFT does not write: the training log, the model card, a chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from p2d_cli.artifacts.cards import CARD_NAME

TRAINING_LOG_NAME = "training_log.jsonl"
CHAT_TEMPLATE_NAME = "chat_template.jinja"
"""The chat template that was learnt, where it is not the tokenizer's; transformers looks for it under this name."""


def save_training_log(folder: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """Write one JSON object a line: step, epoch, loss, learning rate, gradient norm."""
    lines = (json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    (folder / TRAINING_LOG_NAME).write_text("".join(lines), encoding="utf-8")


def save_model_card(folder: Path, base: str, revision: str | None, *, scope: str, figures: Mapping[str, Any]) -> None:
    """Write the card that model hubs show.

    Args:
        folder: the artifact's folder.
        base: the base model as the user named it.
        revision: that of the base model on its hub, if the user named one.
        scope: heads, attention, lora or full.
        figures: rows of the card's table.
    """
    adapter = scope in {"heads", "lora"}
    library = "peft" if adapter else "transformers"
    table = "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    pinned = "" if revision is None else f', revision="{revision}"'
    use = (
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n\n"
        f'base = AutoModelForCausalLM.from_pretrained("{base}"{pinned})\n'
        'model = PeftModel.from_pretrained(base, "PATH_OF_THIS_FOLDER")\n'
        if adapter
        else "from transformers import AutoModelForCausalLM\n\n"
        'model = AutoModelForCausalLM.from_pretrained("PATH_OF_THIS_FOLDER")\n'
    )
    (folder / CARD_NAME).write_text(
        f"---\nlibrary_name: {library}\ntags:\n- p2d\n---\n\n"
        f"# Fine-tuned with p2d, scope `{scope}`\n\n"
        f"Base model: `{base if revision is None else f'{base}@{revision}'}`\n\n"
        f"| | |\n|---|---|\n{table}\n\n```python\n{use}```\n\n"
        "`manifest.json` records the inputs with their digests, every setting with its origin, and the cost.\n",
        encoding="utf-8",
    )
