"""Which class of transformers builds a model whole, and whether it is a language model."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

_NOT_CAUSAL = {"diffusion_gemma": "it writes blocks of text by diffusion"}
"""Decoders by their configs that do not predict one token after the other."""


class ModelClass(NamedTuple):
    """A class of transformers, by its auto class."""

    auto: Any
    """`AutoModelForCausalLM` or one of its like, which finds the class by the config."""
    built: Any
    """The class itself."""


def model_class(config: Any) -> ModelClass | None:
    """Return the class that builds the whole model of a config; None if transformers has none that says text.

    For some checkpoints of text and images `AutoModelForCausalLM` builds the text part alone (Llama 4, Qwen3.5), for
    others nothing (Mistral 3, Qwen3-VL). So the architecture that the config names goes first, and then a class that
    takes this config and not that of its text part.
    """
    import transformers

    found = []
    for task, name in (
        ("CAUSAL_LM", "CausalLM"),
        ("IMAGE_TEXT_TO_TEXT", "ImageTextToText"),
        ("MULTIMODAL_LM", "MultimodalLM"),
    ):
        mapping = getattr(transformers, f"MODEL_FOR_{task}_MAPPING")
        if type(config) in mapping:
            found.append(ModelClass(getattr(transformers, f"AutoModelFor{name}"), mapping[type(config)]))
    named = getattr(config, "architectures", None) or ()
    return max(
        found,
        key=lambda one: (one.built.__name__ in named, one.built.config_class is type(config)),
        default=None,
    )


def why_not_causal(config: Any) -> str | None:
    """Say why a model does not predict each token from those before it alone; None if it does."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
    from transformers import MODEL_FOR_MASKED_LM_MAPPING as MASKED

    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder model"
    if (reason := _NOT_CAUSAL.get(config.model_type)) is not None:
        return reason
    if (found := model_class(config)) is None:
        return "transformers has no language-modelling class for it"
    # BERT and its like have a class for it, but look both ways unless their config says otherwise.
    if type(config) in MASKED and getattr(config, "is_decoder", None) is False:
        return "it is an encoder, whose tokens see those behind them (is_decoder is false)"
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    text = config.get_text_config()
    if config.sub_configs and text is not getattr(config, "text_config", None):
        return "transformers has it only as a model of several inputs, without a text model of its own"
    if getattr(text, "is_encoder_decoder", False):
        return "its text part is an encoder-decoder model"
    if needed := sorted(_required_inputs(found.built) - {"input_ids"}):
        return f"it reads no text without {', '.join(needed)}"
    return None


def _required_inputs(built: Any) -> set[str]:
    """Return the arguments that a class's forward cannot do without."""
    parameters = inspect.signature(built.forward).parameters.values()
    return {
        one.name
        for one in parameters
        if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD and one.name != "self"
    }
