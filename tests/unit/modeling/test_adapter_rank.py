"""A saved head adapter has one rank: what every tool computes from it, and what PEFT does with two of them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file

from p2d_cli.core.adapter_rank import SERVED_RANKS, common_rank
from p2d_cli.errors import ArtifactError
from p2d_cli.modeling.head_adapter import (
    attach_heads,
    freeze_placing,
    load_adapter,
    save_adapter,
    saved_rank,
    trainable_share,
)
from p2d_cli.modeling.layouts import model_layout
from p2d_cli.modeling.merging import merge

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

ALL = ("q", "k", "v", "o")
# One head in the first layer, three in the second: q and o have 8 and 24 rows, k and v of two groups 8 and 16.
UNEVEN = np.array([[False, True, False, False], [True, True, False, True]])
OTHERS = np.array([[True, True, True, True], [False, False, True, False]])
LOWER = np.array([[True, False, False, True], [False, False, False, False]])


def train(model: Any, ids: torch.Tensor, *, steps: int = 4, weight_decay: float = 0.1) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=weight_decay)
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits.float()
    return found


def weights_by_own_rank(model: Any, folder: Any) -> Any:
    """`W + lora_alpha / own_rank * B A`, the own rank being the rows of A, as llama.cpp does it; nothing of PEFT."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    for name in {key.rsplit(".lora_", 1)[0] for key in tensors}:
        a, b = (tensors[f"{name}.lora_{letter}.weight"] for letter in "AB")
        change = config["lora_alpha"] / len(a) * (b @ a)
        weight = model.get_parameter(name.removeprefix("base_model.model.") + ".weight")
        weight.data += (change.T if config["fan_in_fan_out"] else change).to(weight.dtype)
    return model


@pytest.fixture
def saved(tiny_model, token_ids, tmp_path):
    """Factory of trained and saved head adapters; returns the folder and the logits before saving."""

    def make(name, selected=UNEVEN, *, family="llama", dtype=torch.float32, projections=ALL, layers=2):
        model = attach_heads(tiny_model(family, num_hidden_layers=layers).to(dtype), selected, projections)
        train(model, token_ids(3, 9, seed=len(name)))
        save_adapter(model, tmp_path / name, None)
        return tmp_path / name, logits(model.eval(), token_ids(3, 9))

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama-mha", "llama-gqa", "llama-mqa", "phi3", "gpt_neox"])
def test_all_who_read_it_compute_the_same(tiny_model, token_ids, saved, family, dtype):
    ids = token_ids(3, 9)
    folder, trained = saved("adapter", family=family, dtype=dtype)
    plain = logits(tiny_model(family).to(dtype), ids)
    found = {
        "PEFT": logits(PeftModel.from_pretrained(tiny_model(family).to(dtype), folder).eval(), ids),
        "by own rank": logits(weights_by_own_rank(tiny_model(family).to(dtype), folder), ids),
        "merged": logits(merge(load_adapter(tiny_model(family).to(dtype), folder)), ids),
    }
    tolerance = (1e-5 if dtype == torch.float32 else 0.03) * trained.abs().max()
    assert (trained - plain).abs().max() > 4 * tolerance
    for reader, other in found.items():
        assert (other - trained).abs().max() <= tolerance, reader


def test_transposed_modules_too(tiny_model, token_ids, saved):
    folder, trained = saved("adapter", family="gpt2")
    other = logits(weights_by_own_rank(tiny_model("gpt2"), folder), token_ids(3, 9))
    torch.testing.assert_close(other, trained, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("projections", "rank"), [(("q",), 32), (("k", "v"), 16), (ALL, 32)])
def test_one_rank_that_vllm_serves_and_no_patterns(saved, projections, rank):
    folder, _ = saved("adapter", projections=projections)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (rank, rank, {}, {})
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {tensor.shape[0 if "lora_A" in name else 1] for name, tensor in tensors.items()} == {rank}


@pytest.mark.parametrize(
    ("counts", "rank"),
    [([1], 1), ([2], 8), ([8, 3], 8), ([65], 128), ([192, 64], 256), ([257], 320), ([512], 512), ([513], 513)],
)
def test_the_next_rank_that_is_served(counts, rank):
    assert common_rank(counts) == rank
    assert rank in SERVED_RANKS or rank == max(counts)


def test_the_padding_is_neither_trained_nor_counted(tiny_model):
    model = attach_heads(tiny_model("llama"), UNEVEN, ALL)
    share = trainable_share(model)
    assert saved_rank(model) == 32
    # q and o: 1 + 3 heads; k and v: 1 + 2 groups, each of 8 rows of 32.
    assert share.trained == (4 + 3 + 3 + 4) * 8 * 32
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == share.trained


@pytest.mark.parametrize("family", ["llama-gqa", "phi3", "gpt2"])
def test_a_saved_adapter_trains_on_with_its_placing_frozen(tiny_model, token_ids, saved, family):
    """PEFT unfreezes the placing factor; frozen again, the weights follow those of an adapter that was never saved."""
    ids = token_ids(3, 9)
    straight = attach_heads(tiny_model(family), UNEVEN, ALL)
    train(straight, token_ids(3, 9, seed=len("adapter")))
    folder, _ = saved("adapter", family=family)
    again = PeftModel.from_pretrained(tiny_model(family), folder, is_trainable=True)
    freeze_placing(again)
    placing = {name: factor.clone() for name, factor in again.named_parameters() if _is_placing(factor)}
    for model in (straight, again):
        train(model, ids)
    torch.testing.assert_close(logits(again.eval(), ids), logits(straight.eval(), ids), atol=1e-4, rtol=1e-4)
    assert all(torch.equal(again.get_parameter(name), factor) for name, factor in placing.items())


def _is_placing(factor: torch.Tensor) -> bool:
    return bool(((factor == 0) | (factor == 1)).all()) and factor.ndim == 2


def test_the_two_lines_of_the_readme_freeze_the_placing(tiny_model, saved):
    folder, _ = saved("adapter")
    model, reference = (PeftModel.from_pretrained(tiny_model("llama"), folder, is_trainable=True) for _ in range(2))
    for factor in (p for name, p in model.named_parameters() if "lora_" in name and ((p == 0) | (p == 1)).all()):
        factor.requires_grad_(False)
    freeze_placing(reference)
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in reference.parameters()]


def test_padding_alone_places_nothing(tiny_model, saved):
    folder, _ = saved("adapter")
    model = PeftModel.from_pretrained(tiny_model("llama"), folder, is_trainable=True)
    model.get_base_model().model.layers[0].self_attn.q_proj.lora_B["default"].weight.data.zero_()
    with pytest.raises(ArtifactError, match="not a head adapter"):
        freeze_placing(model)


# --- two adapters on one model


@pytest.mark.parametrize("heads", [OTHERS, LOWER], ids=["as many modules", "fewer modules"])
def test_another_adapter_is_swapped_in(tiny_model, token_ids, saved, heads):
    """Modules that only the first one changes are zeroed; PEFT refuses those that only the second one has."""
    ids = token_ids(3, 9)
    first, before = saved("first")
    second, after = saved("second", heads)
    model = PeftModel.from_pretrained(tiny_model("llama"), first).eval()
    torch.testing.assert_close(logits(model, ids), before, atol=1e-5, rtol=1e-5)
    hotswap_adapter(model, second, adapter_name="default", torch_device="cpu")
    torch.testing.assert_close(logits(model, ids), after, atol=1e-5, rtol=1e-5)


def test_equal_ranks_swap_without_a_new_shape(tiny_model, saved):
    """What torch.compile needs: 1 and 3 heads of a module against 4 and 1."""
    first, second = saved("first")[0], saved("second", OTHERS)[0]
    model = PeftModel.from_pretrained(tiny_model("llama"), first)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    hotswap_adapter(model, second, adapter_name="default", torch_device="cpu")
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == shapes


def test_modules_that_the_first_lacks_cannot_be_swapped_in(tiny_model, saved):
    model = PeftModel.from_pretrained(tiny_model("llama"), saved("second", LOWER)[0])
    with pytest.raises(RuntimeError, match="unexpected keys"):
        hotswap_adapter(model, saved("first")[0], adapter_name="default", torch_device="cpu")


@pytest.mark.parametrize("heads", [OTHERS, LOWER], ids=["as many modules", "fewer modules"])
@pytest.mark.parametrize(("combination", "options"), [("cat", {}), ("svd", {"svd_rank": 32})])
def test_two_adapters_are_added(tiny_model, token_ids, saved, heads, combination, options):
    """A decomposition of rank 32 holds all rows of q and o, and is exact as well; PEFT takes none above a module's."""
    projections = ("q", "o") if combination == "svd" else ALL
    first, second = (saved(name, of, projections=projections)[0] for name, of in (("first", UNEVEN), ("second", heads)))
    model = PeftModel.from_pretrained(tiny_model("llama"), first, adapter_name="one")
    model.load_adapter(second, adapter_name="other")
    model.add_weighted_adapter(["one", "other"], [0.75, 0.5], "both", combination_type=combination, **options)
    model.set_adapter("both")
    expected = tiny_model("llama")
    for folder, weight in ((first, 0.75), (second, 0.5)):
        changed = dict(weights_by_own_rank(tiny_model("llama"), folder).named_parameters())
        for name, parameter in tiny_model("llama").named_parameters():
            expected.get_parameter(name).data += weight * (changed[name] - parameter).detach()
    ids = token_ids(3, 9)
    torch.testing.assert_close(logits(model.eval(), ids), logits(expected, ids), atol=1e-3, rtol=1e-3)


def test_a_linear_combination_needs_equal_ranks_and_has_them(tiny_model, saved):
    """It adds the factors, not the changes, as of any LoRA: of two adapters of the same heads, sums of square roots."""
    model = PeftModel.from_pretrained(tiny_model("llama"), saved("first")[0], adapter_name="one")
    model.load_adapter(saved("second", OTHERS)[0], adapter_name="other")
    model.add_weighted_adapter(["one", "other"], [1.0, 0.0], "both", combination_type="linear")
    for layer in model_layout(model):
        module = model.get_base_model().get_submodule(layer.q.module)
        torch.testing.assert_close(module.get_delta_weight("both"), module.get_delta_weight("one"))
