from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional

from p2d_cli.errors import ModelError
from p2d_cli.modeling.attention_capture import (
    CAPTURE_ATTENTION,
    capture_segments,
    register_capture,
    require_capturable,
    run_captured,
)
from p2d_cli.modeling.likelihood import forward_inputs

ModelFactory = Callable[..., Any]
LENGTH = 14
NUM_SEGMENTS = 3
LENGTHS = {"none": (14, 14, 14), "left": (14, 9, 11), "right": (14, 9, 11)}
HEADS = {0: (1, 3), 1: (0, 2, 3)}


_SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
_WINDOW = {"head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
_RELATIVE = {
    "head_dim": 8,
    "swa_head_dim": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "sliding_window_size": 6,
    "layer_types": ["hybrid_sliding", "hybrid"],
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
    "rel_extent": 16,
    "d_rel": 4,
}
# What adds more to its scores than a mask: sinks, on all layers or some, a learned bias, a mask for each head.
SCORED: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_oss-mha": ("GptOss", _WINDOW | _EXPERTS | {"num_key_value_heads": 4}),
    "gpt_oss-gqa": ("GptOss", _WINDOW | _EXPERTS),
    "gpt_oss-mqa": ("GptOss", _WINDOW | _EXPERTS | {"num_key_value_heads": 1}),
    "mimo_v2_flash": (
        "MiMoV2Flash",
        _WINDOW | _EXPERTS | {"v_head_dim": 4, "n_routed_experts": 2, "n_group": 1, "topk_group": 1},
    ),
    "flint": ("Flint", _WINDOW),
    "granite_swa": ("GraniteSWA", _WINDOW),
    "inkling": ("Inkling", _RELATIVE | {"n_shared_experts": 1, "mlp_layer_types": ["dense", "dense"]}),
    "inkling2": ("Inkling2", _RELATIVE | {"unpadded_vocab_size": 64}),
    "doge": ("Doge", {"keep_window_size": 6}),
}


def _scored_model(family: str) -> Any:
    name, values = SCORED[family]
    config_class = getattr(transformers, f"{name}TextConfig", None) or getattr(transformers, f"{name}Config")
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForCausalLM")(config_class(**(_SMALL | values))).eval()
        for parameter in model.parameters():
            if parameter.dim() == 1:  # sinks, and what makes the masks of doge differ from head to head
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def _batch(padding: str, *, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(LENGTHS[padding])
    positions = torch.arange(LENGTH)[None]
    mask = positions >= LENGTH - lengths[:, None] if padding == "left" else positions < lengths[:, None]
    ids = torch.randint(3, 64, (len(lengths), LENGTH), generator=generator)
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def _rows_and_segments(batch: dict[str, Tensor], *, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Ragged, scattered query rows, and scattered segments with tokens in none of them."""
    generator = torch.Generator().manual_seed(seed)
    real = batch["attention_mask"].bool()
    rows = (torch.rand(real.shape, generator=generator) < torch.tensor([[0.6], [0.3], [0.5]])) & real
    segments = torch.randint(-1, NUM_SEGMENTS, real.shape, generator=generator)
    return rows, torch.where(real, segments, -1)


def _slow_reduction(
    attentions: Sequence[Tensor], heads: dict[int, tuple[int, ...]], rows: Tensor, segments: Tensor, num_segments: int
) -> Tensor:
    chosen = [(layer, head) for layer in sorted(heads) for head in sorted(heads[layer])]
    out = torch.zeros(len(rows), len(chosen), num_segments)
    for example in range(len(rows)):
        for slot, (layer, head) in enumerate(chosen):
            for segment in range(num_segments):
                matrix = attentions[layer][example, head].float()
                values = matrix[rows[example]][:, segments[example] == segment]
                out[example, slot, segment] = values.mean() if values.numel() else 0.0
    return out


def _eager(model: Any, batch: dict[str, Tensor]) -> Any:
    previous = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(**forward_inputs(**_renamed(batch)), output_attentions=True)
    model.set_attn_implementation(previous)
    return output


def _renamed(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"input_ids_BT": batch["input_ids"], "attention_mask_BT": batch["attention_mask"]}


def _forward(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**forward_inputs(**_renamed(batch))).logits


@pytest.mark.parametrize("padding", list(LENGTHS))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_capture_is_the_reduction_of_eager_attention(
    tiny_model: ModelFactory, family: str, padding: str, dtype: torch.dtype, tolerance: float
) -> None:
    # A cap of 50 would not show on scores as small as a random model's, nor the usual scaling where it is the default.
    overrides = {
        "gemma2": {"attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 3},
        "gemma3_text": {"query_pre_attn_scalar": 3},
    }.get(family, {})
    model, batch = tiny_model(family, **overrides).to(dtype), _batch(padding)
    rows, segments = _rows_and_segments(batch)
    captured = run_captured(model, batch, HEADS, rows, segments, NUM_SEGMENTS)
    expected = _slow_reduction(_eager(model, batch).attentions, HEADS, rows, segments, NUM_SEGMENTS)
    # Compared as attention mass on a segment, which is larger than the mean and so the stricter of the two.
    sizes = torch.stack([(segments == segment).sum(1) for segment in range(NUM_SEGMENTS)], dim=1)[:, None]
    assert captured.dtype == torch.float32
    assert captured.shape == (3, 5, NUM_SEGMENTS)
    assert (expected > 0).any()
    torch.testing.assert_close(captured * sizes, expected * sizes, atol=tolerance, rtol=0.0)


@pytest.mark.parametrize("padding", list(LENGTHS))
def test_outputs_are_those_of_the_model_without_capture(tiny_model: ModelFactory, family: str, padding: str) -> None:
    model, batch = tiny_model(family), _batch(padding)
    rows, segments = _rows_and_segments(batch)
    implementation = model.config._attn_implementation
    assert implementation == ("eager" if family == "gemma2" else "sdpa")
    bare = _forward(model, batch)
    with capture_segments(model, {0: range(4), 1: range(4)}, rows, segments, NUM_SEGMENTS):
        assert model.config._attn_implementation == CAPTURE_ATTENTION
        captured = _forward(model, batch)
    real = batch["attention_mask"].bool()
    assert torch.equal(captured[real], bare[real])
    assert model.config._attn_implementation == implementation
    assert torch.equal(_forward(model, batch)[real], bare[real])


@pytest.mark.parametrize("padding", list(LENGTHS))
@pytest.mark.parametrize("family", list(SCORED))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_scores_of_more_than_a_mask_are_captured_as_eager_has_them(
    family: str, padding: str, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sink takes its share of the attention, which belongs to no segment; the model's outputs stay what they are."""
    if (family, dtype) == ("inkling2", torch.bfloat16):
        pytest.skip("transformers 5.24 does not run it in bfloat16")
    model, batch = _scored_model(family).to(dtype), _batch(padding)
    rows, segments = _rows_and_segments(batch)
    bare, real = _forward(model, batch), batch["attention_mask"].bool()
    with capture_segments(model, HEADS, rows, segments, NUM_SEGMENTS) as attention:
        assert torch.equal(_forward(model, batch)[real], bare[real])
    if family == "granite_swa":
        # It scales its outputs by what the sink leaves, and shows the attention as it is before.
        of_gpt_oss = sys.modules["transformers.models.gpt_oss.modeling_gpt_oss"].eager_attention_forward
        monkeypatch.setattr(sys.modules[type(model).__module__], "eager_attention_forward", of_gpt_oss)
    expected = _slow_reduction(_eager(model, batch).attentions, HEADS, rows, segments, NUM_SEGMENTS)
    sizes = torch.stack([(segments == segment).sum(1) for segment in range(NUM_SEGMENTS)], dim=1)[:, None]
    torch.testing.assert_close(attention.attention_BKS * sizes, expected * sizes, atol=tolerance, rtol=0.0)


def test_a_sink_takes_what_is_missing_from_one() -> None:
    """All tokens in one segment: their attention and the sink's share add up to one, whatever the head."""
    model, batch = _scored_model("gpt_oss-gqa"), _batch("none")
    rows, one = torch.ones_like(batch["input_ids"], dtype=torch.bool), torch.zeros_like(batch["input_ids"])
    captured = run_captured(model, batch, {0: range(4)}, rows, one, 1) * LENGTH
    assert (captured < 0.99).all()
    with torch.no_grad():
        model.model.layers[0].self_attn.sinks[1] = -1e4
    without = run_captured(model, batch, {0: range(4)}, rows, one, 1) * LENGTH
    torch.testing.assert_close(without[:, 1], torch.ones(3, 1))
    torch.testing.assert_close(without[:, [0, 2, 3]], captured[:, [0, 2, 3]])


def test_models_with_sinks_generate_under_the_capture_attention() -> None:
    model, ids = _scored_model("gpt_oss-gqa"), _batch("none")["input_ids"]
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False}
    expected = model.generate(ids, **settings)
    register_capture()
    model.set_attn_implementation(CAPTURE_ATTENTION)
    assert torch.equal(model.generate(ids, **settings), expected)


def test_soft_capped_model_generates_under_the_capture_attention(tiny_model: ModelFactory) -> None:
    model, ids = tiny_model("gemma2"), _batch("none")["input_ids"]
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False}
    expected = model.generate(ids, **settings)
    register_capture()
    model.set_attn_implementation(CAPTURE_ATTENTION)
    assert torch.equal(model.generate(ids, **settings), expected)


def test_every_token_as_a_query_row_and_all_heads(tiny_model: ModelFactory) -> None:
    model, batch = tiny_model("llama-gqa"), _batch("none")
    rows = torch.ones(3, LENGTH, dtype=torch.bool)
    segments = torch.arange(LENGTH).expand(3, -1) % NUM_SEGMENTS
    heads = {0: (0, 1, 2, 3), 1: (0, 1, 2, 3)}
    captured = run_captured(model, batch, heads, rows, segments, NUM_SEGMENTS)
    expected = _slow_reduction(_eager(model, batch).attentions, heads, rows, segments, NUM_SEGMENTS)
    torch.testing.assert_close(captured, expected, atol=1e-5, rtol=0.0)
    sizes = torch.stack([(segments == segment).sum(1) for segment in range(NUM_SEGMENTS)], dim=1)[:, None]
    torch.testing.assert_close((captured * sizes).sum(-1), torch.ones(3, 8))


@pytest.mark.parametrize("family", ["llama-gqa", "gemma2"])
def test_more_segments_than_head_dim(tiny_model: ModelFactory, family: str) -> None:
    model, batch = tiny_model(family, head_dim=4), _batch("left")
    rows, _ = _rows_and_segments(batch)
    segments = torch.where(batch["attention_mask"].bool(), torch.arange(LENGTH), -1)
    captured = run_captured(model, batch, HEADS, rows, segments, LENGTH)
    expected = _slow_reduction(_eager(model, batch).attentions, HEADS, rows, segments, LENGTH)
    torch.testing.assert_close(captured, expected, atol=1e-5, rtol=0.0)


@pytest.mark.parametrize("family", ["llama-gqa", "gemma2"])
def test_examples_without_rows_and_segments_without_tokens_are_zero(tiny_model: ModelFactory, family: str) -> None:
    model, batch = tiny_model(family), _batch("right")
    rows, segments = _rows_and_segments(batch)
    rows[1] = False
    segments[2] = torch.where(segments[2] == 1, -1, segments[2])
    captured = run_captured(model, batch, HEADS, rows, segments, NUM_SEGMENTS)
    assert torch.equal(captured[1], torch.zeros(5, NUM_SEGMENTS))
    assert torch.equal(captured[2, :, 1], torch.zeros(5))
    assert (captured[2, :, 0] > 0).all()
    none = run_captured(model, batch, HEADS, torch.zeros_like(rows), segments, NUM_SEGMENTS)
    assert torch.equal(none, torch.zeros(3, 5, NUM_SEGMENTS))


def test_order_of_heads_is_by_layer_then_head(tiny_model: ModelFactory) -> None:
    model, batch = tiny_model("llama"), _batch("left")
    rows, segments = _rows_and_segments(batch)
    shuffled = {1: [3, 0, 2], 0: [3, 1]}
    assert torch.equal(
        run_captured(model, batch, shuffled, rows, segments, NUM_SEGMENTS),
        run_captured(model, batch, HEADS, rows, segments, NUM_SEGMENTS),
    )


def test_only_chosen_rows_of_chosen_heads_are_computed(
    tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = tiny_model("llama-gqa", num_hidden_layers=3), _batch("left")
    rows, segments = _rows_and_segments(batch)
    seen, kernel = [], functional.scaled_dot_product_attention

    def record(query: Tensor, *arguments: Any, **settings: Any) -> Tensor:
        seen.append(tuple(query.shape))
        return kernel(query, *arguments, **settings)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", record)
    with capture_segments(model, {0: (1,), 2: (0, 2)}, rows, segments, NUM_SEGMENTS):
        _forward(model, batch)
    own, longest = (3, 4, LENGTH, 8), int(rows.sum(1).max())
    assert longest < LENGTH
    assert seen == [(3, 1, longest, 8), own, own, (3, 2, longest, 8), own]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_stopping_runs_no_deeper_layer_and_leaves_the_model_usable(tiny_model: ModelFactory, family: str) -> None:
    deeper = {"n_layer": 4} if family == "gpt2" else {"num_hidden_layers": 4}
    model, batch = tiny_model(family, **deeper), _batch("left")
    rows, segments = _rows_and_segments(batch)
    bare = _forward(model, batch)
    with capture_segments(model, HEADS, rows, segments, NUM_SEGMENTS) as whole:
        _forward(model, batch)
    entered = []
    layers = model.transformer.h if family == "gpt2" else model.model.layers
    watched = {"head": model.get_output_embeddings()} | {f"mlp{i}": layer.mlp for i, layer in enumerate(layers)}
    watched |= {f"layer{i}": layer for i, layer in enumerate(layers)}
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: entered.append(name)) for name, module in watched.items()
    ]
    stopped = run_captured(model, batch, HEADS, rows, segments, NUM_SEGMENTS)
    # Not even the rest of the deepest captured layer runs.
    assert entered == ["layer0", "mlp0", "layer1"]
    for handle in handles:
        handle.remove()
    assert torch.equal(stopped, whole.attention_BKS)
    real = batch["attention_mask"].bool()
    assert torch.equal(_forward(model, batch)[real], bare[real])
    assert _eager(model, batch).attentions[3].shape == (3, 4, LENGTH, LENGTH)


def test_stopping_ends_the_block(tiny_model: ModelFactory) -> None:
    model, batch = tiny_model("llama"), _batch("none")
    rows, segments = _rows_and_segments(batch)
    with capture_segments(model, {0: (0,)}, rows, segments, NUM_SEGMENTS, stop_after_last=True) as attention:
        _forward(model, batch)
        pytest.fail("the forward should have ended the block")
    assert attention.attention_BKS.shape == (3, 1, NUM_SEGMENTS)


# Raised by peft 0.21 about transformers 5.23.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_capture_of_a_peft_model_sees_its_adapter(tiny_model: ModelFactory) -> None:
    model, batch = tiny_model("llama"), _batch("left")
    rows, segments = _rows_and_segments(batch)
    before = run_captured(model, batch, HEADS, rows, segments, NUM_SEGMENTS)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapted = peft.get_peft_model(model, config).eval()
    captured = run_captured(adapted, batch, HEADS, rows, segments, NUM_SEGMENTS)
    expected = _slow_reduction(_eager(adapted, batch).attentions, HEADS, rows, segments, NUM_SEGMENTS)
    torch.testing.assert_close(captured, expected, atol=1e-5, rtol=0.0)
    assert not torch.allclose(captured, before, atol=1e-3)


def test_no_gradient_flows_through_the_capture_but_the_outputs_keep_theirs(tiny_model: ModelFactory) -> None:
    model, batch = tiny_model("llama"), _batch("left")
    rows, segments = _rows_and_segments(batch)
    with capture_segments(model, HEADS, rows, segments, NUM_SEGMENTS) as attention:
        logits = model(**forward_inputs(**_renamed(batch))).logits
    assert not attention.attention_BKS.requires_grad
    logits[batch["attention_mask"].bool()].sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_unread_second_and_foreign_forwards_are_errors(tiny_model: ModelFactory) -> None:
    model, batch = tiny_model("llama"), _batch("none")
    rows, segments = _rows_and_segments(batch)
    with capture_segments(model, {0: (0,), 7: (0,)}, rows, segments, NUM_SEGMENTS) as attention:
        with pytest.raises(RuntimeError, match=r"captured layers \[0, 7\]"):
            _ = attention.attention_BKS
        _forward(model, batch)
        with pytest.raises(RuntimeError, match=r"captured layers \[7\]"):
            _ = attention.attention_BKS
        with pytest.raises(RuntimeError, match="a second one has begun"):
            _forward(model, batch)
    shorter = {name: values[:, :9] for name, values in batch.items()}
    with pytest.raises(ValueError, match=r"shape \(3, 14\).* 3 x 9 queries and 9 keys"):
        run_captured(model, shorter, HEADS, rows, segments, NUM_SEGMENTS)
    with pytest.raises(ValueError, match="layer 1 has 4 heads, but head 4"):
        run_captured(model, batch, {1: (0, 4)}, rows, segments, NUM_SEGMENTS)
    # Whatever ended a block, the model is as before and no capture is left over.
    assert model.config._attn_implementation == "sdpa"
    assert _forward(model, shorter).shape == (3, 9, 64)


def test_attention_outside_of_the_interface_is_refused() -> None:
    config = transformers.FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    model, batch = transformers.FalconForCausalLM(config).eval(), _batch("none")
    rows, segments = _rows_and_segments(batch)
    with pytest.raises(ModelError, match="attention of falcon cannot be captured"):
        run_captured(model, batch, {0: (0,)}, rows, segments, NUM_SEGMENTS)


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("DiffLlama", {}, "attention of diffllama cannot be captured: its heads are differences of two attentions"),
        ("Dory", {}, "attention of dory cannot be captured: its layers run several times in one forward"),
        (
            "GlmMoeDsa",
            {},
            r"GlmMoeDsaAttention cannot be captured: it chooses the tokens that a query sees \(indexer\)",
        ),
    ],
)
def test_attention_that_is_not_one_softmax_a_head_is_refused(name: str, settings: Any, reason: str) -> None:
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"this transformers has no {name}")
    with torch.device("meta"):
        model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**_SMALL))
    implementation = model.config._attn_implementation
    with pytest.raises(ModelError, match=reason):
        require_capturable(model)
    assert model.config._attn_implementation == implementation


def test_scores_that_depend_on_an_unknown_tensor_are_refused(tiny_model: ModelFactory) -> None:
    model, batch = tiny_model("llama"), _batch("none")
    rows, segments = _rows_and_segments(batch)
    with (
        pytest.raises(ModelError, match="LlamaAttention cannot be captured: its scores depend on novelty"),
        capture_segments(model, HEADS, rows, segments, NUM_SEGMENTS),
    ):
        model(**forward_inputs(**_renamed(batch)), novelty=torch.ones(1))
