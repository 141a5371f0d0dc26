"""Writing a plain Hugging Face model folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from p2d_cli.modeling.loading import quiet_transformers, require_finite_weights
from p2d_cli.modeling.model_files import TOKENIZER_FILES

GENERATION_CONFIG_NAME = "generation_config.json"


def save_plain_model(model: Any, base: Path, folder: Path, state: dict[str, Any] | None = None) -> None:
    """Write weights and config of a model without adapter, and the other files of the base folder that it came from.

    Args:
        model: what is saved.
        base: its tokenizer, chat template and generation config are copied as they are.
        folder: where to; loads with transformers alone.
        state: the weights, if the model itself holds only a part of them.

    Raises:
        NonFiniteError: a weight is NaN or infinite; nothing was written.
    """
    weights = model.named_parameters() if state is None else state.items()
    require_finite_weights(weights, "saving the model", hint="lower --lr, or try --dtype float32")
    with quiet_transformers():
        model.save_pretrained(folder, state_dict=state)
    copy_tokenizer(base, folder)
    if (base / GENERATION_CONFIG_NAME).is_file():
        shutil.copyfile(base / GENERATION_CONFIG_NAME, folder / GENERATION_CONFIG_NAME)


def add_ends_of_turns(folder: Path, tokens: Sequence[int]) -> None:
    """Add to the generation config of a saved model the ids of the tokens with which its chat template ends a turn."""
    path = folder / GENERATION_CONFIG_NAME
    settings = json.loads(path.read_bytes()) if path.is_file() else {}
    if (known := settings.get("eos_token_id")) is None:
        known = json.loads((folder / "config.json").read_bytes()).get("eos_token_id")
    ends = known if isinstance(known, list) else [known] if known is not None else []
    if set(tokens) - set(ends):
        settings["eos_token_id"] = list(dict.fromkeys([*ends, *tokens]))
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the files of a tokenizer, its chat template among them, as they are."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
