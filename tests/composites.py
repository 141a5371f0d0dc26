"""Tiny random models of text and images or sound, one of each family, made from configs alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

VOCABULARY = 370
"""That of the fixture's tokenizer."""
IMAGE_TOKEN = 300
_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_local_experts": 4}
_LINEAR = {
    "num_hidden_layers": 4,  # the last one has attention
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_GEMMA4 = {
    "global_head_dim": 16,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 16,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_kv_shared_layers": 0,
}
_LLAMA4 = {"intermediate_size_mlp": 96, "num_local_experts": 2, "attention_chunk_size": 512}
_TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
_IMAGES = _TOWER | {"image_size": 28, "patch_size": 14}
_QWEN = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
_CLIP, _SIGLIP = ({"model_type": f"{name}_vision_model"} | _IMAGES for name in ("clip", "siglip"))
_MLLAMA = {
    "num_global_layers": 1,
    "attention_heads": 2,
    "vision_output_dim": 64,
    "intermediate_layers_indices": [0],
    "supported_aspect_ratios": [[1, 1]],
    "max_num_tiles": 1,
}
_SOUND = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_mel_bins": 16,
    "max_source_positions": 20,
}
_FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # what the text part has of its own, and the other part
    "mistral3": ({"model_type": "mistral"}, {"model_type": "pixtral", "head_dim": 16} | _IMAGES),
    "qwen2_vl": (_MROPE, {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2}),
    "qwen2_5_vl": (_MROPE, _QWEN),
    "qwen3_vl": (_MROPE, _QWEN | {"deepstack_visual_indexes": [0]}),
    "qwen3_vl_moe": (_MROPE | _EXPERTS, _QWEN | {"deepstack_visual_indexes": [0]}),
    "qwen3_5": (_LINEAR, _QWEN),
    "qwen3_5_moe": (_LINEAR | _EXPERTS | {"shared_expert_intermediate_size": 32}, _QWEN),
    "gemma3": ({"query_pre_attn_scalar": 20, "sliding_window": 8}, _IMAGES),
    "gemma4": (_GEMMA4, _TOWER | {"num_key_value_heads": 2, "head_dim": 16}),
    "llama4": (_LLAMA4, _IMAGES | {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}),
    "mllama": ({"cross_attention_layers": [1]}, _IMAGES | _MLLAMA),
    "glm4v": (
        {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}},
        _QWEN,
    ),
    "internvl": ({"model_type": "qwen2"}, _IMAGES | {"image_size": [28, 28], "patch_size": [14, 14]}),
    "llava": ({"model_type": "llama"}, _CLIP),
    "llava_onevision": ({"model_type": "qwen2"}, _SIGLIP),
    "paligemma": ({"model_type": "gemma2", "sliding_window": 8}, _SIGLIP),
    "idefics3": ({"model_type": "llama"}, _IMAGES),
    "aya_vision": ({"model_type": "cohere2"}, _SIGLIP),
    "lfm2_vl": (
        {"model_type": "lfm2", "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
        {"model_type": "siglip2_vision_model", "patch_size": 14} | _TOWER,
    ),
    "voxtral": ({"model_type": "llama"}, _SOUND),
}
FAMILIES = tuple(_FAMILIES)


def build(family: str, dtype: torch.dtype = torch.float32, **text: Any) -> Any:
    """A random model, lively in all of its weights; `text` replaces settings of the text part."""
    own, other = _FAMILIES[family]
    tokens = {"image_token_id": IMAGE_TOKEN, "image_token_index": IMAGE_TOKEN, "video_token_id": 301}
    values = {
        "text_config": _TEXT | own | text,
        ("audio_config" if other is _SOUND else "vision_config"): other,
        **({"mm_tokens_per_image": 4} if family == "gemma3" else {}),
        **({"audio_config": None} if family == "gemma4" else {}),
    }
    config = transformers.CONFIG_MAPPING[family](bos_token_id=1, eos_token_id=2, pad_token_id=0, **tokens, **values)
    built = transformers.MODEL_FOR_MULTIMODAL_LM_MAPPING[type(config)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = built(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "A_log" not in name and "dt_bias" not in name:
                    parameter.add_(0.08 * torch.randn(parameter.shape))
    if family == "llama4":  # transformers 5.24 fails on text without images
        model.language_model.register_forward_hook(add_no_images)
    for tensor in (*model.parameters(), *model.buffers()):
        # Llama 4 has complex numbers, which `model.to` would make real.
        tensor.data = tensor.data.to(dtype) if tensor.is_floating_point() else tensor.data
    return model


def add_no_images(_module: Any, _inputs: Any, output: Any) -> None:
    """Add the field that Llama 4 looks for."""
    if not hasattr(output, "image_outputs"):
        output.image_outputs = None


def save(family: str, folder: Path, dtype: torch.dtype, tokenizer: Path, **text: Any) -> Path:
    """Save such a model with a tokenizer, and a processor's config that says nothing."""
    model = build(family, dtype, **text)
    model.generation_config = transformers.GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, folder / name)
    (folder / "preprocessor_config.json").write_text("{}", encoding="utf-8")
    return folder
