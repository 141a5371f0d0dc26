"""A model's tokenizer without torch, which `AutoTokenizer` imports: for counting tokens before anything is loaded."""

from __future__ import annotations

from typing import Any

from p2d_cli.errors import DataError, first_line
from p2d_cli.modeling.model_files import ModelFiles


def load_light_tokenizer(files: ModelFiles) -> Any:
    """Load `tokenizer.json` as it is.

    The tokens are those of the stage itself, unless the model's own class in transformers changes what the file says.

    Raises:
        DataError: the folder has no usable `tokenizer.json`.
    """
    from transformers import PreTrainedTokenizerFast

    try:
        return PreTrainedTokenizerFast.from_pretrained(str(files.folder), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise DataError(
            f"loading the tokenizer of {files.spec} failed: {first_line(problem)}",
            hint="the model folder needs tokenizer.json and tokenizer_config.json beside the weights",
        ) from problem
