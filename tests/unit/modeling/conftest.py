"""Tiny random models, one of each supported family, made from configs alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

VOCABULARY = 64

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_GROUPED = _COMMON | {"num_key_value_heads": 2}
# head_dim differs from hidden_size / num_attention_heads where the real family's does as well.
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-mha": ("LlamaConfig", _COMMON | {"num_key_value_heads": 4}),
    "llama-gqa": ("LlamaConfig", _GROUPED),
    "llama-mqa": ("LlamaConfig", _COMMON | {"num_key_value_heads": 1}),
    "mistral": ("MistralConfig", _GROUPED | {"sliding_window": 6}),
    "qwen2": ("Qwen2Config", _GROUPED),
    "qwen3": ("Qwen3Config", _GROUPED | {"head_dim": 16}),
    "gemma2": (
        "Gemma2Config",
        _GROUPED | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 6, "tie_word_embeddings": True},
    ),
    "gemma3_text": (
        "Gemma3TextConfig",
        _GROUPED
        | {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 6,
            "tie_word_embeddings": True,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "phi3": ("Phi3Config", _GROUPED),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 128,
            "initializer_range": 0.15,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", _COMMON | {"rotary_pct": 0.5}),
    "olmo2": ("Olmo2Config", _GROUPED),
}
FAMILIES = tuple(_CONFIGS)


def build_config(family: str, **overrides: Any) -> Any:
    """The config of a family, with some of its values replaced (`llama` alone is the grouped one)."""
    class_name, values = _CONFIGS["llama-gqa" if family == "llama" else family]
    config_class = getattr(transformers, class_name)
    return config_class(**(values | overrides))


def build_model(family: str, *, seed: int = 0, **overrides: Any) -> Any:
    """An fp32 model in eval mode whose biases and norm weights are random as well, so that none hides a mistake."""
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(build_config(family, **overrides))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.to(torch.float32).eval()


@pytest.fixture
def tiny_model() -> Callable[..., Any]:
    """Factory `tiny_model(family, seed=0, **config_overrides)`; each call gives a fresh, equal model."""
    return build_model


@pytest.fixture
def tiny_config() -> Callable[..., Any]:
    """Factory `tiny_config(family, **config_overrides)`."""
    return build_config


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each supported family in turn."""
    return str(request.param)


@pytest.fixture
def token_ids() -> Callable[..., torch.Tensor]:
    """Factory `token_ids(B, T, seed=0)` of random ids `[B, T]` without the special ones."""

    def make(batch: int, length: int, *, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, VOCABULARY, (batch, length), generator=generator)

    return make
