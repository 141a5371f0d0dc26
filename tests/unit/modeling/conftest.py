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

_LINEAR = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
_GEMMA4 = _GROUPED | {
    "num_hidden_layers": 4, "head_dim": 8, "global_head_dim": 16, "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 0,
    "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8,
}  # fmt: skip
# Layers that differ from each other, or of which some have no attention.
_UNEVEN: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma4": ("Gemma4TextConfig", _GEMMA4),
    "gemma4-shared": ("Gemma4TextConfig", _GEMMA4 | {"num_kv_shared_layers": 2}),
    "gemma4-keys-as-values": (
        "Gemma4TextConfig", _GEMMA4 | {"attention_k_eq_v": True, "num_global_key_value_heads": 1},
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        _GROUPED
        | _LINEAR
        | {"head_dim": 16, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16,
           "shared_expert_intermediate_size": 16, "layer_types": ["linear_attention", "full_attention"]},
    ),
    "lfm2": (
        "Lfm2Config", _GROUPED | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    ),
    "jamba": (
        "JambaConfig",
        _GROUPED | {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "num_experts_per_tok": 1,
                    "mamba_d_state": 8},
    ),
    "falcon_h1": (
        "FalconH1Config",
        _GROUPED | {"head_dim": 8, "mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8,
                    "mamba_n_groups": 1, "key_multiplier": 0.5},
    ),
    "mimo_v2_flash": (
        "MiMoV2FlashConfig",
        _GROUPED | {"head_dim": 16, "v_head_dim": 8, "n_routed_experts": 2, "num_experts_per_tok": 1,
                    "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1, "sliding_window": 6,
                    "layer_types": ["full_attention", "sliding_attention"]},
    ),
}  # fmt: skip
_UNEVEN["minimax"] = (
    "MiniMaxConfig",
    _GROUPED
    | {
        "head_dim": 8,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "layer_types": ["full_attention", "linear_attention"],
    },
)
_UNEVEN["recurrent_gemma"] = (
    "RecurrentGemmaConfig",
    _GROUPED | {"num_hidden_layers": 3, "head_dim": 8, "lru_width": 32, "attention_window_size": 6},
)
UNEVEN = tuple(name for name, (config, _) in _UNEVEN.items() if hasattr(transformers, config))
_CONFIGS |= _UNEVEN


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


@pytest.fixture(params=UNEVEN)
def uneven_family(request: pytest.FixtureRequest) -> str:
    """Each family in turn whose layers differ, or do not all have attention."""
    return str(request.param)


@pytest.fixture(params=[*FAMILIES, *UNEVEN])
def any_family(request: pytest.FixtureRequest) -> str:
    """Both kinds of families."""
    return str(request.param)


@pytest.fixture
def token_ids() -> Callable[..., torch.Tensor]:
    """Factory `token_ids(B, T, seed=0)` of random ids `[B, T]` without the special ones."""

    def make(batch: int, length: int, *, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, VOCABULARY, (batch, length), generator=generator)

    return make
