"""Attention that was asked for by name is taken, or refused in words that help; it computes what torch's own does."""

from contextlib import nullcontext, suppress
from types import SimpleNamespace

import plain_flash
import pytest
import torch
from transformers import modeling_flash_attention_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from p2d_cli.errors import UnavailableError
from p2d_cli.modeling import attention_kernels
from p2d_cli.modeling.attention_kernels import SHORT_TOKENS, require_installed, short_rows_in_float32
from p2d_cli.modeling.checkpoints import require_attention
from p2d_cli.modeling.loading import attention_that_runs, load_model
from p2d_cli.modeling.model_files import locate_model
from p2d_cli.modeling.training_batches import keeps_rows_apart

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BF16 = torch.bfloat16


@pytest.fixture
def saved(tiny_model, tmp_path):
    """Save a model of a family."""

    def save(family, **settings):
        tiny_model(family, **settings).save_pretrained(tmp_path)
        return tmp_path

    return save


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_what_torch_has_runs_everywhere(name):
    for device in (CPU, CUDA, torch.device("mps")):
        require_installed(name, device, torch.float32)


@pytest.mark.parametrize(
    ("name", "device", "dtype", "words", "hint"),
    [
        ("flash_attention_2", CPU, BF16, "runs on cuda, and this run is on cpu", "sdpa"),
        (
            "flash_attention_2",
            CUDA,
            torch.float32,
            "computes in 16 bits, and the precision of this run is float32",
            "bf",
        ),
        ("flash_attention_2", CUDA, BF16, "needs the package flash-attn, which is not installed", "pip install flash-"),
        ("flash_attention_3", CUDA, BF16, "needs the package flash-attn-3, which is not", "pip install flash-attn-3"),
        ("kernels-community/flash-attn2@main", CPU, BF16, "runs on cuda or xpu, and this run is on cpu", "sdpa"),
        ("kernels-community/aiter-flash-attn", CPU, BF16, "runs on cuda, and this run is on cpu", "sdpa"),
        ("kernels-community/flash-attn2", CUDA, torch.float32, "computes in 16 bits", "--dtype bfloat16"),
        ("kernels-community/flash-attn2", CUDA, BF16, "needs the package kernels", "pip install 'kernels>="),
        ("someone/attention", CPU, torch.float32, "needs the package kernels", "pip install 'kernels>="),
    ],
)
def test_what_is_not_there_is_refused_by_name(monkeypatch, name, device, dtype, words, hint):
    monkeypatch.setattr(attention_kernels, "is_kernels_available", lambda: False)
    with pytest.raises(UnavailableError, match=words) as caught:
        require_installed(name, device, dtype)
    assert name in caught.value.message
    assert hint in caught.value.hint


def test_a_package_of_no_use_is_told_from_one_that_is_missing(monkeypatch):
    known = attention_kernels.FLASH_ATTENTION_COMPATIBILITY_MATRIX[2]
    monkeypatch.setitem(known, "pkg_availability_check", lambda: True)
    with pytest.raises(UnavailableError, match="is installed, but of no use to transformers"):
        require_installed("flash_attention_2", CUDA, BF16)
    monkeypatch.setitem(known, "general_availability_check", lambda: True)
    require_installed("flash_attention_2", CUDA, BF16)


def test_a_model_that_lacks_it_is_refused_without_its_weights(saved):
    folder = saved("gemma2")
    (folder / "model.safetensors").write_bytes(b"")
    require_attention(locate_model(str(folder)), "eager")
    with pytest.raises(UnavailableError, match="--attn-implementation sdpa cannot be used for gemma2: Gemma2"):
        require_attention(locate_model(str(folder)), "sdpa")


def test_a_kernel_that_cannot_be_had_is_refused(saved, flash_kernel, monkeypatch):
    def offline(*_, **__):
        raise OSError("the hub cannot be reached")

    monkeypatch.setattr("transformers.integrations.hub_kernels.get_kernel", offline)
    with pytest.raises(UnavailableError, match=r"cannot be used for llama: .*the hub cannot be reached"):
        require_attention(locate_model(str(saved("llama"))), flash_kernel)


def test_what_transformers_would_take_in_its_place_is_named(saved, flash_kernel, monkeypatch):
    """gpt-oss names the kernels that know its sinks, and transformers takes one of them whatever was asked for."""
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "_compatible_flash_implementations", ["someone/flash"], raising=False)
    with pytest.raises(UnavailableError, match="does not run with it, and transformers would take someone/flash"):
        require_attention(locate_model(str(saved("llama"))), flash_kernel)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_rows_are_read_alike_padded_and_packed(saved, flash_kernel, family):
    folder = saved(family, **({"sliding_window": 5} if family == "mistral" else {}))
    model = load_model(folder, dtype=BF16, device=CPU, attention=flash_kernel)
    assert model.config._attn_implementation == flash_kernel
    usual = load_model(folder, dtype=BF16, device=CPU)
    ids_BT = torch.arange(3, 27).reshape(2, 12)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, 9:] = 0
    for mask in (None, mask_BT):
        found, expected = (one(input_ids=ids_BT, attention_mask=mask).logits for one in (model, usual))
        real = mask_BT.bool() if mask is not None else ...
        assert (found[real] - expected[real]).norm() < 0.02 * expected[real].norm()
    plain_flash.ROWS_AT_ONCE.clear()
    assert keeps_rows_apart(model)
    assert set(plain_flash.ROWS_AT_ONCE) == {2}


def test_a_kernel_that_computes_something_else_is_refused(saved, flash_kernel, monkeypatch):
    def flat(query_BTHd, *_, **__):
        return torch.zeros_like(query_BTHd)

    monkeypatch.setattr(plain_flash, "flash_attn_func", flat)
    with pytest.raises(UnavailableError, match=r"computes something else than sdpa for llama.* differ by") as caught:
        load_model(saved("llama"), dtype=BF16, device=CPU, attention=flash_kernel)
    assert "leave out --attn-implementation" in caught.value.hint


def test_a_kernel_that_fails_is_refused(saved, flash_kernel, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("FlashAttention only supports head dimensions up to 256")

    monkeypatch.setattr(plain_flash, "flash_attn_func", fail)
    with pytest.raises(UnavailableError, match=r"cannot be used for llama: .*head dimensions up to 256"):
        load_model(saved("llama"), dtype=BF16, device=CPU, attention=flash_kernel)


def test_a_kernel_that_runs_out_of_memory_says_so(saved, flash_kernel, monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(plain_flash, "flash_attn_func", fail)
    with pytest.raises(MemoryError):
        load_model(saved("llama"), dtype=BF16, device=CPU, attention=flash_kernel)


def test_a_model_that_waits_to_be_sharded_is_tried_out_with_torchs_kernel(saved, flash_kernel, monkeypatch):
    """Its kernel does not run on the CPU, where it waits."""
    monkeypatch.setitem(attention_kernels.FLASH_ATTN_KERNEL_DEVICES, flash_kernel, ("cuda",))
    model = load_model(saved("llama"), dtype=BF16, device=CPU, attention=flash_kernel)
    with attention_that_runs(model):
        assert model.config._attn_implementation == "sdpa"
    assert keeps_rows_apart(model)
    assert model.config._attn_implementation == flash_kernel
    assert not plain_flash.ROWS_AT_ONCE


def test_the_plain_flash_attention_is_loaded_by_transformers(flash_kernel):
    """What the other tests stand on."""
    functions, _ = modeling_flash_attention_utils.lazy_import_flash_attention(flash_kernel)
    assert functions[1] is plain_flash.flash_attn_varlen_func
    assert SimpleNamespace(**vars(plain_flash)).flash_attn_func is functions[0]


def gradients(model, ids, context):
    """Loss and gradients of all weights, one after the other, under autocast to bfloat16."""
    model.zero_grad()
    with context, torch.autocast("cpu", BF16):
        model(input_ids=ids, labels=ids).loss.backward()
    return torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("family", ["llama-gqa", "llama-mqa", "gpt2", "qwen3"])
def test_short_rows_learn_in_float32_what_they_learn_in_16_bits(tiny_model, family):
    model = tiny_model(family)
    model.set_attn_implementation("sdpa")
    ids = torch.randint(3, 60, (3, 24), generator=torch.Generator().manual_seed(0))
    narrow = gradients(model, ids, nullcontext())
    short = gradients(model, ids, short_rows_in_float32())
    with torch.autocast("cpu", enabled=False):
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
    exact = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert not torch.equal(narrow, short)
    assert (short - exact).norm() < 1.05 * (narrow - exact).norm() < 0.05 * exact.norm()


def test_rows_that_are_long_or_in_float32_are_left_alone(tiny_model):
    model = tiny_model("llama-gqa")
    model.set_attn_implementation("sdpa")
    ids = torch.randint(3, 60, (2, SHORT_TOKENS + 1), generator=torch.Generator().manual_seed(0))
    assert torch.equal(gradients(model, ids, nullcontext()), gradients(model, ids, short_rows_in_float32()))
    short = ids[:, :9]
    plain = model(input_ids=short).logits
    with short_rows_in_float32():
        assert torch.equal(model(input_ids=short).logits, plain)


def test_attention_is_as_before_behind_the_block():
    usual = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with short_rows_in_float32():
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not usual
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is usual
    with suppress(ZeroDivisionError), short_rows_in_float32():
        _ = 1 / 0
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is usual
