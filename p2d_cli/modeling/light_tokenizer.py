"""A model's tokenizer without torch, which `AutoTokenizer` imports: for counting tokens before anything is loaded."""

from __future__ import annotations

from typing import Any

from p2d_cli.errors import DataError, first_line
from p2d_cli.modeling.model_files import ModelFiles, require_tokenizer


def load_light_tokenizer(files: ModelFiles) -> Any:
    """Load `tokenizer.json` as it is; where a model has another vocabulary, as the stage itself does, with torch.

    The tokens are those of the stage itself, unless the model's own class in transformers changes what the file says.

    Raises:
        UnavailableError, DataError: see `require_tokenizer` and `read_tokenizer`.
    """
    from transformers import PreTrainedTokenizerFast

    require_tokenizer(files)
    if not (files.folder / "tokenizer.json").is_file():
        from p2d_cli.modeling.loading import load_tokenizer

        return load_tokenizer(files.folder)
    return read_tokenizer(PreTrainedTokenizerFast, files)


def read_tokenizer(loader: Any, files: ModelFiles, **options: Any) -> Any:
    """Read a tokenizer with a class of transformers, or raise DataError."""
    try:
        return loader.from_pretrained(str(files.folder), local_files_only=True, **options)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as problem:
        raise DataError(
            f"loading the tokenizer of {files.spec} failed: {first_line(problem)}",
            hint="the model folder needs tokenizer.json and tokenizer_config.json beside the weights",
        ) from problem


def ensure_pad_token(tokenizer: Any) -> None:
    """Pad with the end-of-text token if the tokenizer has no padding; raise DataError if it has neither."""
    if tokenizer.pad_token_id is not None:
        return
    if tokenizer.eos_token is None:
        raise DataError(
            "the tokenizer has neither a padding nor an end-of-text token",
            hint="set eos_token in the model's tokenizer_config.json",
        )
    tokenizer.pad_token = tokenizer.eos_token
