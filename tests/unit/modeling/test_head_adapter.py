from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

from p2d_cli.errors import ArtifactError, NonFiniteError, UsageError
from p2d_cli.modeling import layouts
from p2d_cli.modeling.head_adapter import (
    attach_heads,
    attach_lora,
    enable_checkpointing,
    freeze_placing,
    load_adapter,
    prepare_full,
    rank_stabilized,
    save_adapter,
    trainable_share,
    unfreeze_attention,
)
from p2d_cli.modeling.layouts import model_layout
from p2d_cli.modeling.merging import merge

# Where a test calls PEFT itself, as a user would: PEFT 0.21 asks transformers 5 for a deprecated attribute.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

ALL = ("q", "k", "v", "o")
# One head in the first layer, three in the second: modules with different numbers of rows.
SELECTED = np.array([[False, True, False, False], [True, True, False, True]])
UPPER_ONLY = np.array([[False] * 4, [False, False, True, False]])


def train(model: Any, ids: torch.Tensor, *, steps: int = 4, lr: float = 1e-2, weight_decay: float = 0.1) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=weight_decay)
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def selected_masks(model: Any, selected: np.ndarray, projections: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Which entries of each weight may change, written down head by head without the adapter's code."""
    masks = {name: torch.zeros_like(weight, dtype=torch.bool) for name, weight in model.named_parameters()}
    for layer in model_layout(model):
        for head in np.flatnonzero(selected[layer.layer]):
            for name in projections:
                part = layer.projection(name)
                start, stop = part.rows[
                    head if name in ("q", "o") else head * layer.heads.num_groups // layer.heads.num_heads
                ]
                columns = (name == "o") != part.transposed
                mask = masks[part.weight_name]
                (mask.T if columns else mask)[start:stop] = True
    return masks


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view({4: torch.int32, 2: torch.int16, 8: torch.int64}[tensor.element_size()])


@pytest.mark.parametrize("projections", [("q", "k", "v"), ALL], ids="".join)
def test_trained_adapter_reloads_merges_and_leaves_all_other_weights_alone(
    tiny_model, token_ids, family, projections, tmp_path
):
    ids = token_ids(3, 9)
    base = tiny_model(family)
    model = attach_heads(tiny_model(family), SELECTED, projections)
    torch.testing.assert_close(logits(model, ids), logits(base, ids), atol=1e-6, rtol=0)
    train(model, ids)
    trained = logits(model.eval(), ids)
    assert (trained - logits(base, ids)).abs().max() > 1e-2

    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(tiny_model(family), tmp_path).eval()
    torch.testing.assert_close(logits(reloaded, ids), trained, atol=1e-5, rtol=0)
    merged = reloaded.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits(merged, ids), trained, atol=1e-5, rtol=1e-5)

    masks = selected_masks(base, SELECTED, projections)
    after = dict(merged.named_parameters())
    assert after.keys() == masks.keys()
    for name, before in base.named_parameters():
        assert torch.equal(bits(after[name])[~masks[name]], bits(before)[~masks[name]]), name
        if masks[name].any():
            assert (after[name] != before)[masks[name]].float().mean() > 0.99, name


@pytest.mark.parametrize("projections", [("q",), ("k", "v"), ("o",), ALL], ids="".join)
def test_every_adapted_module_has_its_own_rank_and_scaling_one(tiny_model, family, projections):
    plain = tiny_model(family)
    masks = selected_masks(plain, SELECTED, projections)
    expected = {}
    for layer in model_layout(plain):
        for name in projections:
            part = layer.projection(name)
            by_row = (name == "o") == part.transposed
            expected[part.module] = int(masks[part.weight_name].any(dim=1 if by_row else 0).sum())
    model = attach_heads(tiny_model(family), SELECTED, projections)
    found = {name: m for name, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")}
    assert {name: module.r["default"] for name, module in found.items()} == expected
    assert all(module.scaling["default"] == 1.0 for module in found.values())


def test_an_adapted_model_has_the_layout_of_the_plain_one(tiny_model, family):
    model = attach_heads(tiny_model(family), SELECTED, ALL)
    assert model_layout(model) == model_layout(model.get_base_model()) == model_layout(tiny_model(family))


def test_layers_without_a_selected_head_are_not_targeted(tiny_model):
    model = attach_heads(tiny_model("llama"), UPPER_ONLY, ("q", "k", "v"))
    assert not any("layers.0" in name for name, _ in model.named_parameters() if "lora_" in name)


def test_many_layers_keep_their_own_row_counts(tiny_model, token_ids, tmp_path):
    """PEFT shortens long target lists and reads rank patterns as regular expressions: layer 1 is not layer 11."""
    selected = np.ones((12, 4), dtype=bool)
    selected[1] = [True, False, False, False]
    selected[11] = [True, True, True, False]
    selected[5] = False
    model = attach_heads(tiny_model("llama", num_hidden_layers=12), selected, ALL)
    train(model, token_ids(2, 6), steps=1)
    save_adapter(model, tmp_path, None)
    again = load_adapter(tiny_model("llama", num_hidden_layers=12), tmp_path)
    for adapted, ranks in ((model, [32, 8, 24]), (again, [32, 32, 32])):
        layers = adapted.get_base_model().model.layers
        assert [layers[index].self_attn.q_proj.r["default"] for index in (0, 1, 11)] == ranks
        assert not hasattr(layers[5].self_attn.q_proj, "lora_A")
        assert not hasattr(layers[5].self_attn.o_proj, "lora_A")
    ids = token_ids(2, 6)
    torch.testing.assert_close(logits(again, ids), logits(model.eval(), ids), atol=1e-5, rtol=0)


def test_trained_slices_follow_masked_full_weight_adamw(tiny_model, token_ids, family):
    """Step by step, in float64: the base weights plus the adapter's change are the weights of the oracle."""
    ids = token_ids(3, 9)
    start, plain = (tiny_model(family).double() for _ in range(2))
    model = attach_heads(tiny_model(family).double(), SELECTED, ALL)
    masks = selected_masks(plain, SELECTED, ALL)
    weights = dict(plain.named_parameters())
    oracle = torch.optim.AdamW(weights.values(), lr=1e-2, weight_decay=0.0)
    ours = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    adapted = {name: m for name, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")}
    for _ in range(5):
        plain(input_ids=ids, labels=ids).loss.backward()
        for name, weight in weights.items():
            weight.grad[~masks[name]] = 0
        model(input_ids=ids, labels=ids).loss.backward()
        for optimizer in (oracle, ours):
            optimizer.step()
            optimizer.zero_grad()
        for name, weight in weights.items():
            before = start.get_parameter(name)
            if not masks[name].any():
                assert torch.equal(weight, before)
                continue
            change = adapted[name.removesuffix(".weight")].get_delta_weight("default")
            torch.testing.assert_close(before + change, weight, atol=1e-9, rtol=0)
            assert change.abs().max() > 1e-3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_gradient_is_computed_below_the_lowest_trained_layer(tiny_model, token_ids, family, checkpointing):
    ids = token_ids(2, 6)
    model = attach_heads(tiny_model(family), UPPER_ONLY, ("q", "k", "v")).train()
    if checkpointing:
        enable_checkpointing(model)
    needs_gradient = {}

    def note(name):
        def hook(_module, _inputs, output):
            tensor = output[0] if isinstance(output, tuple) else output
            needs_gradient[name] = tensor.requires_grad

        return hook

    base = model.get_base_model()
    layers = next(m for m in base.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 2)
    base.get_input_embeddings().register_forward_hook(note("embedding"))
    layers[0].register_forward_hook(note("below"))
    layers[1].register_forward_hook(note("trained"))
    model(input_ids=ids, labels=ids).loss.backward()
    assert needs_gradient == {"embedding": False, "below": False, "trained": True}
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_checkpointing_keeps_the_gradients_and_recomputes(tiny_model, token_ids):
    ids = token_ids(2, 6)
    gradients, forwards = [], []
    for checkpointing in (False, True):
        model = attach_heads(tiny_model("llama"), SELECTED, ALL).train()
        if checkpointing:
            enable_checkpointing(model)
        norm = model.get_base_model().model.layers[1].input_layernorm
        norm.register_forward_hook(lambda *_, mark=checkpointing: forwards.append(mark))
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert forwards == [False, True, True]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize("projections", [("q", "k", "v"), ALL], ids="".join)
def test_placing_factors_freeze_again_after_loading_to_train(tiny_model, token_ids, family, projections, tmp_path):
    model = attach_heads(tiny_model(family), SELECTED, projections)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    train(model, token_ids(2, 6), steps=1)
    save_adapter(model, tmp_path, None)
    again = PeftModel.from_pretrained(tiny_model(family), tmp_path, is_trainable=True)
    assert {name for name, parameter in again.named_parameters() if parameter.requires_grad} > trained
    freeze_placing(again)
    assert {name for name, parameter in again.named_parameters() if parameter.requires_grad} == trained


def test_an_ordinary_lora_is_not_taken_for_a_head_adapter(tiny_model):
    with pytest.raises(ArtifactError, match="not a head adapter"):
        freeze_placing(attach_lora(tiny_model("llama"), 4, 8, ("q",), 0.0))


def test_trained_factors_are_fp32_beside_a_bf16_base(tiny_model, token_ids):
    model = attach_heads(tiny_model("llama").to(torch.bfloat16), SELECTED, ("q", "k", "v"))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    train(model, token_ids(2, 6), lr=1e-3)
    assert all(p.abs().max() > 1e-3 for p in model.parameters() if p.requires_grad)
    assert logits(model, token_ids(2, 6)).dtype == torch.bfloat16


def test_share_counts_trained_rows_against_the_base_model(tiny_model):
    plain = tiny_model("llama")
    total = sum(parameter.numel() for parameter in plain.parameters())
    assert trainable_share(plain).share == 1.0
    share = trainable_share(attach_heads(plain, SELECTED, ("q", "k", "v")))
    # q: 1 + 3 heads; k and v: 1 + 2 groups, each of 8 rows of 32.
    assert (share.trained, share.total) == ((4 + 3 + 3) * 8 * 32, total)
    assert share.share == pytest.approx(share.trained / total)


def test_tied_weights_count_once(tiny_model):
    tied, untied = tiny_model("llama", tie_word_embeddings=True), tiny_model("llama")
    assert trainable_share(untied).total - trainable_share(tied).total == 64 * 32


@pytest.mark.parametrize(
    ("selected", "projections", "error", "message"),
    [
        (np.zeros((2, 4), dtype=bool), ("q",), UsageError, "no head is selected"),
        (np.ones((2, 8), dtype=bool), ("q",), ArtifactError, r"\[2, 8\].*\[2, 4\]"),
        (SELECTED, (), UsageError, "found none"),
        (SELECTED, ("q", "gate"), UsageError, "found gate"),
    ],
)
def test_a_selection_that_cannot_be_trained_is_refused(tiny_model, selected, projections, error, message):
    with pytest.raises(error, match=message):
        attach_heads(tiny_model("llama"), selected, projections)


def test_saved_folder_holds_two_files_with_the_same_bytes_each_time(tiny_model, tmp_path):
    contents = []
    for name in ("one", "two"):
        plain = tiny_model("llama")
        plain.name_or_path = plain.config.name_or_path = str(tmp_path)
        save_adapter(attach_heads(plain, SELECTED, ALL), tmp_path / name, "owner/model")
        contents.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert contents[0] == contents[1]
    assert contents[0].keys() == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads(contents[0]["adapter_config.json"])
    assert config["base_model_name_or_path"] == "owner/model"
    assert config["target_modules"] == sorted(config["target_modules"])
    assert str(tmp_path).encode() not in b"".join(contents[0].values())


def test_peft_saves_no_path_of_this_machine(tiny_model, tmp_path):
    plain = tiny_model("llama")
    plain.save_pretrained(tmp_path / "base")
    from p2d_cli.modeling.loading import load_model

    model = load_model(tmp_path / "base", dtype=torch.float32, device="cpu")
    attach_heads(model, SELECTED, ("q",)).save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None
    assert not any(str(tmp_path).encode() in path.read_bytes() for path in (tmp_path / "adapter").iterdir())


@pytest.fixture
def adapter(tiny_model, tmp_path):
    save_adapter(attach_heads(tiny_model("llama"), SELECTED, ("q", "k", "v")), tmp_path / "adapter", None)
    return tmp_path / "adapter"


def test_loading_for_inference_trains_nothing(tiny_model, adapter):
    model = load_adapter(tiny_model("llama"), adapter)
    assert not model.training
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "lora_" in name)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_incomplete_folder_is_refused(tiny_model, adapter, name):
    (adapter / name).unlink()
    with pytest.raises(ArtifactError, match=name):
        load_adapter(tiny_model("llama"), adapter)


def test_an_adapter_of_another_model_is_refused(tiny_model, adapter):
    for other in (tiny_model("llama", hidden_size=64), tiny_model("gpt2")):
        with pytest.raises(ArtifactError, match="does not fit"):
            load_adapter(other, adapter)


def test_an_adapter_that_lacks_factors_is_refused(tiny_model, adapter):
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors.popitem()
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(ArtifactError, match="missing adapter keys"):
        load_adapter(tiny_model("llama"), adapter)


def test_a_damaged_adapter_is_refused(tiny_model, adapter):
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-20])
    with pytest.raises(ArtifactError):
        load_adapter(tiny_model("llama"), adapter)


def test_merging_values_that_are_not_finite_is_refused(tiny_model):
    model = attach_heads(tiny_model("llama"), SELECTED, ("q",))
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))
    with pytest.raises(NonFiniteError):
        merge(model)


@pytest.mark.parametrize("targets", [("q", "v"), ALL], ids="".join)
def test_lora_adapts_whole_projections_and_merges(tiny_model, token_ids, family, targets):
    ids = token_ids(2, 6)
    plain = tiny_model(family)
    expected = {layer.projection(name).module for layer in model_layout(plain) for name in targets}
    model = attach_lora(plain, 4, 8, targets, 0.0)
    adapted = {name: m for name, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")}
    assert adapted.keys() == expected
    assert {module.scaling["default"] for module in adapted.values()} == {2.0}
    train(model, ids)
    trained = logits(model.eval(), ids)
    torch.testing.assert_close(logits(merge(model), ids), trained, atol=1e-4, rtol=1e-4)


def test_lora_dropout_is_passed_on(tiny_model):
    model = attach_lora(tiny_model("llama"), 4, 8, ("q",), 0.25)
    dropouts = [m.p for name, m in model.named_modules() if name.endswith("lora_dropout.default")]
    assert dropouts == [0.25, 0.25]


def test_rank_stabilised_scaling_is_peft_s_own(tiny_model):
    """By a plain config that every tool reads the same."""
    from peft import LoraConfig, get_peft_model

    for rank, alpha in ((16, 8), (8, 8), (3, 5)):
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["q_proj"], use_rslora=True)
        theirs = get_peft_model(tiny_model("llama"), config)
        ours = attach_lora(tiny_model("llama"), rank, rank_stabilized(alpha, rank), ("q",))
        scalings = [
            {name: module.scaling["default"] for name, module in model.named_modules() if hasattr(module, "lora_A")}
            for model in (theirs, ours)
        ]
        assert scalings[0].keys() == scalings[1].keys()
        assert list(scalings[1].values()) == pytest.approx(list(scalings[0].values()))
    assert isinstance(rank_stabilized(8, 16), int)


def test_of_a_family_with_experts_attention_alone_is_adapted(tmp_path):
    """PEFT would take the dense layer's names for the experts' fused weights."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 4}
    latent = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    more = {"moe_intermediate_size": 16, "first_k_dense_replace": 1, "num_hidden_layers": 2, "vocab_size": 64}
    config = transformers.DeepseekV3Config(**sizes, **latent, **experts, **more)
    plain = transformers.DeepseekV3ForCausalLM(config).eval()
    ids_BT = torch.arange(12)[None]
    model = attach_lora(plain, 2, 4, ("all-linear",))
    adapted = {name.split(".lora_")[0].rsplit(".", 2)[-2] for name, _ in model.named_parameters() if ".lora_" in name}
    assert adapted == {"self_attn"}
    for name, weight in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(weight)
    save_adapter(model, tmp_path, None)
    fresh = transformers.DeepseekV3ForCausalLM(config)
    weights = {name.replace(".base_layer", ""): weight for name, weight in plain.state_dict().items()}
    fresh.load_state_dict({name: weight for name, weight in weights.items() if ".lora_" not in name})
    loaded = load_adapter(fresh, tmp_path)
    torch.testing.assert_close(loaded(ids_BT).logits, model(ids_BT).logits)


_SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_EXPERTS = _SIZES | {
    "num_hidden_layers": 2, "num_experts": 2, "num_local_experts": 2, "num_experts_per_tok": 1,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
}  # fmt: skip
# Families of whose linear layers some are left out, with a pattern of these.
LEFT_OUT = {
    "NemotronH": (
        _SIZES | {"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1,
                  "layers_block_type": ["mamba", "attention", "mlp", "attention"]},
        r"mixer\.out_proj",
    ),
    "Mamba": ({"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}, r"mixer\.out_proj"),
    "PhiMoE": (_EXPERTS, r"router"),
    "Laguna": (_EXPERTS, r"shared_experts"),
    "Gemma3nText": (
        _SIZES | {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0,
                  "layer_types": ["sliding_attention", "full_attention"] * 2, "intermediate_size": [48] * 4,
                  "activation_sparsity_pattern": [0.0] * 4, "laurel_rank": 8},
        r"altup\.(modality_router|correction_coefs|prediction_coefs)",
    ),
}  # fmt: skip


def adapted_as_plain_peft_has_it(build, folder, ids_BT):
    """Adapt all linear layers, learn once, and compare with what plain PEFT loads; return the layers' names."""
    model = attach_lora(build(), 2, 4, ("all-linear",))
    model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss.backward()
    for name, weight in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(weight, std=0.1)
    save_adapter(model, folder, None)
    plain = PeftModel.from_pretrained(build(), folder)
    logits = [one(input_ids=ids_BT, use_cache=False).logits for one in (model.eval(), plain.eval())]
    torch.testing.assert_close(*logits)
    return {name.split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}


def test_a_lora_on_all_linear_layers_is_learnt_and_loaded_by_plain_peft(tiny_model, token_ids, any_family, tmp_path):
    assert adapted_as_plain_peft_has_it(lambda: tiny_model(any_family), tmp_path, token_ids(2, 8))


@pytest.mark.parametrize("family", [name for name in LEFT_OUT if hasattr(transformers, f"{name}Config")])
def test_routers_and_what_peft_does_not_take_are_left_out(token_ids, tmp_path, family):
    values, pattern = LEFT_OUT[family]
    config = getattr(transformers, f"{family}Config")(**values)

    def build():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config).eval()

    assert any(re.search(pattern, name) for name, _ in build().named_modules())
    names = adapted_as_plain_peft_has_it(build, tmp_path, token_ids(2, 8))
    assert names
    assert not [name for name in names if re.search(pattern, name)]


def test_a_model_without_a_layer_to_adapt_is_refused(tiny_model, monkeypatch):
    monkeypatch.setattr(layouts, "_ROUTERS", re.compile(""))
    with pytest.raises(UsageError, match="llama has no linear layer that a LoRA could adapt"):
        attach_lora(tiny_model("llama"), 2, 4, ("all-linear",))


def test_all_linear_layers_are_those_that_peft_finds(tiny_model, family):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", fan_in_fan_out=family == "gpt2")
    theirs = get_peft_model(tiny_model(family), config)
    ours = attach_lora(tiny_model(family), 2, 2, ("all-linear",))

    def adapted(model):
        return {name for name, _ in model.named_parameters() if "lora_" in name}

    assert adapted(ours) == adapted(theirs)
    assert trainable_share(ours).trained == trainable_share(theirs).trained


def test_attention_scope_trains_the_projections_in_fp32_and_nothing_else(tiny_model, token_ids, family):
    model = tiny_model(family).to(torch.bfloat16)
    layout = model_layout(model)
    unfreeze_attention(model)
    names = {layer.projection(name).weight_name for layer in layout for name in ALL}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == names
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name in names else torch.bfloat16)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.autocast("cpu", torch.bfloat16):
        train(model, token_ids(2, 6), steps=2)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in names), name


def test_full_scope_trains_everything_in_fp32(tiny_model, token_ids):
    model = tiny_model("gemma2").to(torch.bfloat16).requires_grad_(False)
    prepare_full(model)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    train(model, token_ids(2, 6), steps=1)


ZAMBA2 = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 4, "mamba_d_state": 8, "n_mamba_heads": 8, "mamba_ngroups": 1, "hybrid_layer_ids": [1, 3],
    "layers_block_type": ["mamba", "hybrid"] * 2,
}  # fmt: skip


def shared_weights():
    """A model whose layers 1 and 3 have one attention between them."""
    return transformers.Zamba2ForCausalLM(transformers.Zamba2Config(**ZAMBA2)).eval()


def test_a_weight_that_layers_share_is_trained_once_and_stays_shared():
    model = shared_weights()
    first, second = (
        model.get_submodule(f"model.layers.{layer}.shared_transformer.self_attn.q_proj") for layer in (1, 3)
    )
    assert first.weight is second.weight
    unfreeze_attention(model.to(torch.bfloat16))
    assert first.weight is second.weight
    # q, k and v read the hidden state beside the embedding, twice as wide.
    assert trainable_share(model).trained == 3 * 64 * 64 + 64 * 32


def test_a_lora_on_weights_that_layers_share_is_not_merged():
    model = attach_lora(shared_weights(), 2, 4, ("q",), 0.0)
    with pytest.raises(ArtifactError, match="share a weight, and the adapter changes it in each of them"):
        merge(model)
