"""Which model families there are, each as a tiny random model, and what p2d is expected to do with it.

A new family is one line of `FAMILIES`. What a line does not say is as in `_TEXT`; `text=` makes it a model of text and
images, whose other values belong to the whole config. Lines marked `often` run whenever the tests run, the others with
P2D_FAMILIES=all; those that the installed transformers does not know are left out.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 384  # more than the fixture's tokenizer has, so that the ids of images are in no text
TOKENIZER = Path(__file__).parents[2] / "fixtures" / "tiny-model"

_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_TEXT: dict[str, Any] = _IDS | {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
_IMAGE_IDS = {
    "image_token_id": 376,
    "image_token_index": 376,
    "video_token_id": 377,
    "vision_start_token_id": 378,
    "vision_end_token_id": 379,
    "audio_token_id": 380,
}
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_ROUTED = _EXPERTS | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
_DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "num_hidden_layers": 4,  # the last of four has attention
    "head_dim": 24,
}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "num_hidden_layers": 4}
_LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
_SLIDING = {"head_dim": 24, "sliding_window": 8}
_ALTERNATING = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8}
_GEMMA = _SLIDING | {"query_pre_attn_scalar": 20}
_GEMMA_3N = _ALTERNATING | {
    "head_dim": 24,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 16,
    "num_kv_shared_layers": 0,
    "intermediate_size": [96] * 4,
    "activation_sparsity_pattern": [0.0] * 4,
    "laurel_rank": 8,
}
_GEMMA_4 = _ALTERNATING | {
    "head_dim": 16,
    "global_head_dim": 32,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 16,
    "num_kv_shared_layers": 0,
}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
_SIGLIP = _VISION | {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14}
_PIXTRAL = _VISION | {"model_type": "pixtral", "image_size": 28, "patch_size": 14, "head_dim": 16}
_QWEN_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "embed_dim": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 4,
    "deepstack_visual_indexes": [0],
    "num_position_embeddings": 16,
}

OWN_ATTENTION = "interface"
LATENT = "latent"
NO_ATTENTION = "none of its"


@dataclass(frozen=True)
class Family:
    """A line of the table."""

    name: str
    model_type: str
    values: dict[str, Any]
    """Of the config, or of its text part where `whole` is not None."""
    whole: dict[str, Any] | None
    """Values of the config of a model of text and images."""
    refused: str | None
    """A part of the reason why its heads cannot be told apart; None: they can."""
    captured: str | None
    """A part of the reason why attention cannot be captured; None: it can."""
    adaptable: bool
    """Whether there is any attention for LoRA and scope attention to adapt."""
    merges: bool
    """Whether a LoRA on it can be merged: not into weights that layers share."""
    reads_padding: bool
    """Whether transformers lets padding on the left change what the model makes of a row."""
    often: bool
    reader: str | None
    """The module that reads text, where the whole model cannot do so without an image."""

    def config(self) -> Any:
        from transformers import CONFIG_MAPPING

        if self.whole is None:
            return CONFIG_MAPPING[self.model_type](**self.values)
        return CONFIG_MAPPING[self.model_type](text_config=self.values, **_IDS, **_IMAGE_IDS, **self.whole)

    def bare_model(self) -> Any:
        """The model as transformers makes it."""
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

        config = self.config()
        classes = MODEL_FOR_CAUSAL_LM_MAPPING if self.whole is None else MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        return classes[type(config)](config)

    def model(self, seed: int = 0) -> Any:
        """A float32 model in eval mode, no weight of which is at a value that hides a mistake, as norms at 1 are."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self.bare_model().float().eval()
            for name, parameter in model.named_parameters():
                _enliven(name, parameter.data)
        return model

    def save(self, folder: Path) -> Path:
        """Write the model with the fixture's tokenizer, as its makers would publish it."""
        model = self.model()
        model.generation_config.update(do_sample=False, **_IDS)
        model.save_pretrained(folder)
        for path in TOKENIZER.glob("tokenizer*"):
            shutil.copy(path, folder)
        return folder


def _enliven(name: str, weight: torch.Tensor) -> None:
    if any(part in name for part in ("A_log", "dt_bias", "conv")) or name.endswith(".D"):
        return  # state-space models go astray with other time constants
    if weight.dim() == 1:
        weight.add_(0.2 * torch.randn_like(weight))
    else:
        weight.add_(0.08 * torch.randn_like(weight))


def _family(
    name: str,
    *parts: dict[str, Any],
    kind: str | None = None,
    text: dict[str, Any] | None = None,
    bare: bool = False,
    refused: str | None = None,
    captured: str | None = None,
    adaptable: bool = True,
    merges: bool = True,
    reads_padding: bool = False,
    often: bool = False,
    reader: str | None = None,
    **values: Any,
) -> Family:
    """A line: `kind` is its model type if not its name; `bare` takes nothing of `_TEXT` but the ids."""
    merged: dict[str, Any] = {}
    for part in (*parts, values):
        merged |= part
    own = (_IDS if bare else _TEXT) | (merged if text is None else text)
    whole = None if text is None else merged
    return Family(name, kind or name, own, whole, refused, captured, adaptable, merges, reads_padding, often, reader)


_GPT = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 1024, "vocab_size": VOCABULARY}

# fmt: off
_ALL = (
    # One attention a layer, with q, k, v and o of its own
    _family("llama"),
    _family("llama_tied", kind="llama", tie_word_embeddings=True),
    _family("llama_mha", kind="llama", num_key_value_heads=4, attention_bias=True),
    _family("llama_mqa", kind="llama", num_key_value_heads=1),
    _family("smollm2", kind="llama", num_attention_heads=9, num_key_value_heads=3, hidden_size=72, head_dim=8),
    _family("mistral", _SLIDING),
    _family("ministral", _SLIDING),
    _family("ministral3", head_dim=24),
    _family("mixtral", _EXPERTS),
    _family("qwen2"),
    _family("qwen2_sliding", kind="qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1),
    _family("qwen2_moe", _EXPERTS, shared_expert_intermediate_size=32),
    _family("qwen3", head_dim=24),
    _family("qwen3_moe", _EXPERTS, head_dim=24),
    _family("gemma", head_dim=24),
    _family("gemma2", _GEMMA),
    _family("gemma3_text", _GEMMA),
    _family("vaultgemma", _SLIDING),
    _family("phi"),
    _family("phimoe", _EXPERTS),
    _family("smollm3", num_hidden_layers=4, no_rope_layer_interval=2),
    _family("olmo"),
    _family("olmo2"),
    _family("olmo3", _ALTERNATING),
    _family("olmoe", _EXPERTS),
    _family("flex_olmo", _EXPERTS),
    _family("granite", attention_multiplier=0.11, embedding_multiplier=2.0, logits_scaling=3.0,
            residual_multiplier=0.7),
    _family("granitemoe", _EXPERTS, attention_multiplier=0.11),
    _family("granitemoeshared", _EXPERTS, attention_multiplier=0.11, shared_intermediate_size=32),
    _family("cohere", logit_scale=0.5),
    _family("cohere2", _ALTERNATING, head_dim=24),
    _family("cohere2_moe", _ALTERNATING, _EXPERTS, head_dim=24),
    _family("glm", head_dim=16, partial_rotary_factor=0.5),
    _family("glm4", head_dim=24, partial_rotary_factor=0.5),
    _family("glm4_moe", _ROUTED, head_dim=24, partial_rotary_factor=0.5, use_qk_norm=True),
    _family("ernie4_5", head_dim=24),
    _family("ernie4_5_moe", moe_num_experts=4, moe_k=2, moe_intermediate_size=32, moe_layer_end_index=2),
    _family("exaone4", num_hidden_layers=4, sliding_window=8, sliding_window_pattern=4),
    _family("exaone_moe", _EXPERTS, num_hidden_layers=4, sliding_window=8),
    _family("hunyuan_v1_dense", head_dim=24),
    _family("hunyuan_v1_moe", head_dim=24, num_experts=4, moe_topk=2, moe_intermediate_size=32),
    _family("hy_v3", _EXPERTS, head_dim=24),
    _family("minimax_m2", _EXPERTS, head_dim=24),
    _family("nemotron", head_dim=24),
    _family("starcoder2", sliding_window=8),
    _family("stablelm", partial_rotary_factor=0.5),
    _family("stablelm_norm", kind="stablelm", partial_rotary_factor=0.5, qk_layernorm=True, use_qkv_bias=True),
    _family("opt", ffn_dim=96, word_embed_proj_dim=64),
    _family("biogpt"),
    _family("apertus"),
    _family("seed_oss", head_dim=24),
    _family("bitnet"),
    _family("arcee", head_dim=24),
    _family("helium", head_dim=16),
    _family("dots1", _ROUTED, head_dim=24, n_shared_experts=1, layer_types=["full_attention"] * 3),
    _family("solar_open", _ROUTED, head_dim=24),
    _family("sarvam_moe", _ROUTED, head_dim=24),
    _family("nanochat"),
    _family("cwm", _SLIDING),
    _family("jais2"),
    _family("hyperclovax", head_dim=24),
    _family("mellum", _EXPERTS, head_dim=24),
    _family("llama4_text", _ALTERNATING, _EXPERTS, head_dim=16, intermediate_size_mlp=96, attention_chunk_size=8,
            layer_types=["chunked_attention", "full_attention"] * 2),
    _family("apertus1p5_text", output_vocab_size=VOCABULARY),
    _family("gemma4_unified_text", _GEMMA_4),
    _family("kolibri1", _EXPERTS, _SLIDING, shared_expert_intermediate_size=32),
    _family("iquestcoder", head_dim=24),
    _family("aria_text", moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1, intermediate_size=32),
    # A gate of its own beside q, k, v and o
    _family("afmoe", _EXPERTS, _SLIDING, num_hidden_layers=4, num_dense_layers=1),
    # Masks that differ from head to head, and sinks
    _family("doge", often=True),
    _family("gpt_oss", head_dim=24, num_local_experts=4, num_experts_per_tok=2, sliding_window=8,
            intermediate_size=32, often=True),
    _family("granite_swa", sliding_window=8),
    _family("granitemoe_swa", _EXPERTS, sliding_window=8),
    _family("flint", _EXPERTS, _SLIDING, shared_expert_intermediate_size=32),
    # Fused projections
    _family("phi3", sliding_window=None),
    _family("gpt2", _GPT, bare=True),
    _family("gpt_neox", rotary_pct=0.5),
    # Layers that differ in heads, groups or head size; values of another size than keys; a gate inside of q
    _family("gemma4_text", _GEMMA_4),
    _family("gemma4_shared", _GEMMA_4, kind="gemma4_text", num_kv_shared_layers=2, often=True),
    _family("gemma4_same", _GEMMA_4, kind="gemma4_text", global_head_dim=16),
    _family("gemma4_keys", _GEMMA_4, kind="gemma4_text", attention_k_eq_v=True, num_global_key_value_heads=1,
            often=True),
    _family("gemma3n_text", _GEMMA_3N),
    _family("gemma3n_shared", _GEMMA_3N, kind="gemma3n_text", num_kv_shared_layers=2),
    _family("laguna", _EXPERTS, head_dim=16, num_attention_heads_per_layer=[4, 6, 4], often=True),
    _family("mimo_v2_flash", _ROUTED, head_dim=24, v_head_dim=16, num_hidden_layers=4, sliding_window=8,
            layer_types=["full_attention", "sliding_attention"] * 2, often=True),
    _family("qwen3_next", _DELTA, _EXPERTS, shared_expert_intermediate_size=32),
    _family("qwen3_5_text", _DELTA, often=True),
    _family("qwen3_5_moe_text", _DELTA, _EXPERTS, shared_expert_intermediate_size=32),
    # Layers without attention
    _family("granitemoehybrid", _MAMBA, _EXPERTS, attention_multiplier=0.11, shared_intermediate_size=32,
            layer_types=["mamba", "attention", "mamba", "attention"], mamba_expand=2),
    _family("granitemoehybrid_dense", _MAMBA, kind="granitemoehybrid", attention_multiplier=0.11,
            num_local_experts=0, num_experts_per_tok=0, shared_intermediate_size=96, layer_types=["attention"] * 4),
    _family("lfm2", num_hidden_layers=4, layer_types=["conv", "full_attention"] * 2, block_auto_adjust_ff_dim=False),
    _family("lfm2_moe", _EXPERTS, num_hidden_layers=4, layer_types=["conv", "full_attention"] * 2, num_dense_layers=1),
    _family("lfm3", num_hidden_layers=4),
    _family("nemotron_h", head_dim=16, mamba_num_heads=8, mamba_head_dim=16, ssm_state_size=16, n_groups=1,
            num_hidden_layers=4, layers_block_type=["mamba", "attention", "mlp", "attention"], often=True),
    _family("jamba", num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1, num_experts=2, mamba_d_state=8,
            num_experts_per_tok=1, use_mamba_kernels=False),
    _family("bamba", _MAMBA, attn_layer_indices=[1, 3]),
    _family("falcon_h1", head_dim=16, mamba_d_ssm=128, mamba_n_heads=8, mamba_d_head=16, mamba_d_state=16,
            mamba_n_groups=1, key_multiplier=0.5),
    _family("olmo_hybrid", num_hidden_layers=4),
    _family("minimax", _EXPERTS, head_dim=24, num_hidden_layers=4),
    _family("lara_mini", _DELTA, _EXPERTS, shared_expert_intermediate_size=32, sliding_window=8),
    _family("recurrent_gemma", head_dim=16, lru_width=64, attention_window_size=8, reads_padding=True),
    # Text parts of models of text and images
    _family("qwen2_vl", text=_TEXT | _MROPE, vision_config=_QWEN_VISION | {"hidden_size": 64}),
    _family("qwen2_5_vl", text=_TEXT | _MROPE, vision_config=_QWEN_VISION, often=True),
    _family("qwen3_vl", text=_TEXT | _MROPE | {"head_dim": 16}, vision_config=_QWEN_VISION),
    _family("qwen3_vl_moe", text=_TEXT | _MROPE | _EXPERTS | {"head_dim": 16}, vision_config=_QWEN_VISION),
    _family("qwen3_5", text=_DELTA, vision_config=_QWEN_VISION),
    _family("qwen3_5_moe", text=_DELTA | _EXPERTS | {"shared_expert_intermediate_size": 32},
            vision_config=_QWEN_VISION),
    _family("gemma3", text=_GEMMA, vision_config=_SIGLIP, mm_tokens_per_image=4),
    _family("gemma4", text=_GEMMA_4, audio_config=None, vision_config=_VISION | {"num_key_value_heads": 2,
            "head_dim": 16, "position_embedding_size": 64}),
    _family("mistral3", text={"model_type": "mistral", "head_dim": 24}, vision_config=_PIXTRAL),
    # transformers 5.24 fails where it is not shown an image; its text part reads alone.
    _family("llama4", reader="language_model", text={"head_dim": 16,
            "intermediate_size_mlp": 96, "num_local_experts": 2}, vision_config=_VISION | {"image_size": 28,
            "patch_size": 14, "vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64}),
    _family("llava", text={"model_type": "llama"}, vision_config=_SIGLIP),
    _family("llava_onevision", text={"model_type": "qwen2"}, vision_config=_SIGLIP),
    _family("internvl", text={"model_type": "qwen2"}, vision_config=_VISION | {"image_size": [28, 28], "patch_size":
            [14, 14]}),
    _family("idefics3", text={"model_type": "llama"}, vision_config=_VISION | {"image_size": 28, "patch_size": 14}),
    _family("smolvlm", text={"model_type": "llama"}, vision_config=_VISION | {"image_size": 28, "patch_size": 14}),
    _family("aya_vision", text={"model_type": "cohere2", "sliding_window": 8}, vision_config=_SIGLIP),
    _family("lfm2_vl", text={"model_type": "lfm2", "num_hidden_layers": 4, "block_auto_adjust_ff_dim": False,
            "layer_types": ["conv", "full_attention"] * 2}, vision_config=_VISION | {"model_type":
            "siglip2_vision_model", "num_patches": 4}),
    _family("glm4v", text={"rope_parameters": _MROPE["rope_parameters"]},
            vision_config=_QWEN_VISION | {"image_size": 28}),
    _family("glm4v_moe", text=_ROUTED | {"rope_parameters": _MROPE["rope_parameters"] | {"mrope_section": [1, 1, 2]}},
            vision_config=_QWEN_VISION | {"image_size": 28}),
    _family("llava_next", text={"model_type": "mistral", "head_dim": 24}, vision_config=_SIGLIP),
    _family("cohere2_vision", text={"model_type": "cohere2", "sliding_window": 8}, vision_config=_SIGLIP,
            alignment_intermediate_size=64),
    _family("mllama", text={"num_hidden_layers": 4, "cross_attention_layers": [1], "head_dim": None,
                            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            vision_config=_VISION | {"attention_heads": 2, "num_global_layers": 1, "image_size": 28, "patch_size": 14,
                                     "vision_output_dim": 64, "intermediate_layers_indices": [0],
                                     "supported_aspect_ratios": [[1, 1]]}),
    # Heads that own no rows of plain projections
    _family("deepseek_v2", _LATENT, _ROUTED, refused=LATENT),
    _family("deepseek_v3", _LATENT, _ROUTED, refused=LATENT, often=True),
    _family("glm4_moe_lite", _LATENT, _ROUTED, refused=LATENT),
    _family("kimi_linear", _LATENT, _EXPERTS, num_hidden_layers=4, linear_head_dim=16, linear_num_heads=4,
            layer_types=["linear_attention", "full_attention"] * 2, refused=LATENT),
    _family("longcat_flash", _LATENT, num_layers=2, n_routed_experts=4, zero_expert_num=2, moe_topk=2,
            ffn_hidden_size=96, expert_ffn_hidden_size=32, head_dim=8, qk_head_dim=24, refused=LATENT),
    _family("youtu", _LATENT, refused=LATENT),
    _family("minicpm3", _LATENT, head_dim=8, refused=LATENT),
    _family("sarvam_mla", _LATENT, _ROUTED, refused=LATENT),
    _family("axk1", _LATENT, _ROUTED, refused=LATENT),
    _family("deepseek_v32", _LATENT, _ROUTED, index_head_dim=16, index_n_heads=2, index_topk=64, refused=LATENT),
    _family("glm_moe_dsa", _LATENT, _ROUTED, index_head_dim=16, index_n_heads=2, index_topk=64, refused=LATENT),
    _family("falcon", new_decoder_architecture=True, num_kv_heads=2, refused=OWN_ATTENTION),
    _family("bloom", n_layer=3, n_head=4, refused=OWN_ATTENTION),
    _family("mpt", bare=True, d_model=64, n_heads=4, n_layers=3, vocab_size=VOCABULARY, max_seq_len=1024,
            refused=OWN_ATTENTION),
    _family("gptj", _GPT, bare=True, rotary_dim=8, refused=""),
    _family("codegen", _GPT, bare=True, rotary_dim=8, refused=""),
    _family("gpt_bigcode", _GPT, bare=True, refused="fused projection"),
    _family("openai-gpt", _GPT, bare=True, refused=""),
    _family("gpt_neo", bare=True, vocab_size=VOCABULARY, hidden_size=64, num_layers=2, num_heads=4,
            attention_types=[[["global", "local"], 1]], max_position_embeddings=1024, refused=OWN_ATTENTION),
    _family("xglm", d_model=64, num_layers=2, attention_heads=4, ffn_dim=96, refused=OWN_ATTENTION),
    _family("diffllama", refused="differences of two attentions"),
    _family("persimmon", num_key_value_heads=4, refused="fused projection"),
    _family("dbrx", bare=True, d_model=64, n_heads=4, n_layers=2, vocab_size=VOCABULARY, max_seq_len=1024,
            attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}, ffn_config={"ffn_hidden_size": 96,
            "moe_num_experts": 4, "moe_top_k": 2}, refused=""),
    _family("jetmoe", _EXPERTS, kv_channels=16, intermediate_size=32, refused=""),
    _family("modernbert-decoder", refused="which p2d does not know"),
    _family("zaya", _EXPERTS, head_dim=16, num_experts_per_tok=1, refused=""),
    _family("zamba2", num_hidden_layers=4, mamba_d_state=8, n_mamba_heads=8, mamba_ngroups=1, hybrid_layer_ids=[1,
            3], layers_block_type=["mamba", "hybrid"] * 2, refused="shared by several layers", merges=False),
    # No attention at all
    _family("mamba", bare=True, vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, state_size=8,
            refused=NO_ATTENTION, adaptable=False, often=True),
    _family("mamba2", bare=True, vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_heads=8,
            head_dim=16, state_size=16, n_groups=1, refused=NO_ATTENTION, adaptable=False),
    _family("falcon_mamba", bare=True, vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, state_size=8,
            refused=NO_ATTENTION, adaptable=False),
)
# fmt: on


def families() -> tuple[Family, ...]:
    """The lines whose model type the installed transformers knows."""
    from transformers import CONFIG_MAPPING

    return tuple(family for family in _ALL if family.model_type in CONFIG_MAPPING)
