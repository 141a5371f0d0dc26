"""What lies below the lowest trained layer is computed once a row, and nothing else changes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from p2d_cli.modeling.completion_trainer import TrainingHooks
from p2d_cli.modeling.frozen_layers import FrozenLayers, frozen_depth, frozen_layers
from p2d_cli.modeling.head_adapter import attach_heads, attach_lora, prepare_full
from p2d_cli.modeling.hidden_store import HiddenStates, KeptWhere, place_for
from p2d_cli.modeling.layouts import decoder_blocks, plain_model
from p2d_cli.modeling.likelihood import padded
from p2d_cli.modeling.training import ResumePoint, TrainingPlan, train
from p2d_cli.modeling.training_batches import TrainingRow

FAMILY = "llama-gqa"
PLAN = TrainingPlan(
    epochs=3.0, max_steps=None, learning_rate=1e-2, batch_size=4, accumulation=1, schedule="cosine",
    warmup_ratio=0.1, weight_decay=0.0, max_grad_norm=1.0, autocast="float32", device="cpu", seed=3,
    checkpointing=False, trackers=(),
)  # fmt: skip


def rows_of(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    ids = [tuple(rng.integers(3, 64, length).tolist()) for length in lengths]
    return [TrainingRow(str(place), row, (*(-100,) * (len(row) - 2), *row[-2:])) for place, row in enumerate(ids)]


ROWS = rows_of(*(3 + 7 * place % 19 for place in range(14)))


@pytest.fixture
def deep(tiny_model):
    """A model of four layers whose last two have a trained head each."""

    def make(family=FAMILY, **settings):
        model = tiny_model(family, num_hidden_layers=4, **settings)
        heads_LH = np.zeros((4, 4), dtype=np.bool_)
        heads_LH[2:, 1] = True
        return attach_heads(model, heads_LH, ("q", "k", "v", "o"))

    return make


def trained(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}


def learn(model, folder, plan=PLAN, rows=ROWS, **more):
    return trained(model), train(model, rows, plan, pad_id=0, scratch=folder, **more), trained(model)


def alike(first, second):
    return first.keys() == second.keys() and all(torch.equal(weight, second[name]) for name, weight in first.items())


def count_calls(model):
    """Count how many tokens each layer is given."""
    counts = [0] * len(decoder_blocks(plain_model(model)))

    def hook(layer):
        def note(_module, arguments, named):
            states = arguments[0] if arguments else named["hidden_states"]
            counts[layer] += states.shape[0] * states.shape[1]

        return note

    for layer, block in enumerate(decoder_blocks(plain_model(model))):
        inner = block.self_attn
        inner.register_forward_pre_hook(hook(layer), with_kwargs=True)
    return counts


def test_layers_below_the_lowest_trained_one_are_frozen(tiny_model, deep):
    assert frozen_depth(deep()) == 2
    assert frozen_depth(attach_lora(tiny_model(FAMILY), 2, 2, ("q",), 0.0)) == 0
    full = tiny_model(FAMILY)
    prepare_full(full)
    assert frozen_depth(full) == 0
    embedded = deep()
    plain_model(embedded).get_input_embeddings().weight.requires_grad_(True)
    assert frozen_depth(embedded) == 0


def test_a_model_that_begins_above_computes_the_same(tiny_model, family):
    """Logits and gradients, of padded and of packed rows longer than the sliding windows of Mistral and Gemma."""
    model = tiny_model(family)
    model.requires_grad_(False)
    top = decoder_blocks(model)[-1]
    top.requires_grad_(True)
    layers = frozen_layers(model.train(), pad_id=0, autocast=torch.float32)
    if model.config.model_type == "gpt2" and layers is None:
        assert model.config.resid_pdrop > 0
        return
    rows = [row.input_ids for row in rows_of(9, 3, 14)]
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    flat = torch.tensor([[token for row in rows for token in row]])
    for packing in (False, True):
        inputs = {"input_ids": flat, "position_ids": positions} if packing else {"input_ids": padded(rows, 0)}
        there_BT = torch.ones_like(flat) if packing else padded([(1,) * len(row) for row in rows], 0)
        found = []
        for is_whole in (True, False):
            model.zero_grad()
            if is_whole:
                logits_BTV = model(**inputs, use_cache=False).logits
            else:
                with layers.skipped(rows, packing=packing):
                    logits_BTV = model(**inputs, use_cache=False).logits
            logits_BTV[there_BT.bool()].logsumexp(dim=-1).sum().backward()
            found.append([logits_BTV[there_BT.bool()].detach(), *(weight.grad for weight in top.parameters())])
        for whole, above in zip(*found, strict=True):
            torch.testing.assert_close(above, whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "settings", [{}, {"packing": True}, {"batch_size": 6, "accumulation": 3}, {"checkpointing": True}, {"epochs": 1.5}]
)
def test_weights_are_the_same_to_the_bit_whether_outputs_are_kept_or_not(deep, tmp_path, settings):
    plan = replace(PLAN, **settings)
    before, kept, with_cache = learn(deep(), tmp_path / "a", plan)
    _, anew, without = learn(deep(), tmp_path / "b", replace(plan, cache_frozen=False))
    assert kept.frozen_layers == anew.frozen_layers == 2
    assert kept.kept.place == "memory"
    assert anew.kept is None
    assert not alike(before, with_cache)
    assert alike(with_cache, without)


@pytest.mark.parametrize("settings", [{}, {"packing": True}])
def test_weights_are_those_of_a_training_that_reads_all_layers(deep, tmp_path, monkeypatch, settings):
    plan = replace(PLAN, **settings)
    _, record, cached = learn(deep(), tmp_path / "a", plan)
    monkeypatch.setattr("p2d_cli.modeling.training.frozen_layers", lambda *_, **__: None)
    _, whole, plain = learn(deep(), tmp_path / "b", plan)
    assert whole.frozen_layers == 0
    assert record.tokens == whole.tokens
    for name, weight in cached.items():
        torch.testing.assert_close(weight, plain[name], atol=1e-5, rtol=1e-4)
    for one, other in zip(record.log, whole.log, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)


def test_frozen_layers_read_each_row_once(deep, tmp_path):
    model = deep()
    counts = count_calls(model)
    record = train(model, [*ROWS, *ROWS[:5]], PLAN, pad_id=0, scratch=tmp_path, eval_rows=ROWS[:2])
    # The two short rows that show that it works are read as a whole, and three times alone.
    probed, alone = 2 * 8, 3 * (8 + 5)
    first = len(ROWS[0].input_ids)
    assert counts[0] == counts[1]
    assert counts[0] == sum(len(row.input_ids) for row in ROWS) + first + probed + alone
    assert counts[2] > record.tokens


def test_held_out_rows_are_kept_as_well(deep, tmp_path):
    held_out = rows_of(5, 11, 7, seed=1)
    plans = PLAN, replace(PLAN, cache_frozen=False)
    found = [learn(deep(), tmp_path / str(plan.cache_frozen), plan, eval_rows=held_out) for plan in plans]
    assert alike(found[0][2], found[1][2])
    assert [entry for entry in found[0][1].log if "eval_loss" in entry] == [
        entry for entry in found[1][1].log if "eval_loss" in entry
    ]


def test_an_interrupted_training_ends_with_the_same_bits(deep, tmp_path):
    """Though what was kept is gone, and the rows of the epoch are read anew."""
    _, _, whole = learn(deep(), tmp_path / "whole")
    steps, saved = [], []
    hooks = TrainingHooks(
        on_step=steps.append,
        on_checkpoint=lambda folder, tokens: saved.append((folder, tokens)),
        should_stop=lambda: "SIGTERM" if len(steps) == 6 else None,
    )
    with pytest.raises(Exception, match="stopped after update 6"):
        train(deep(), ROWS, PLAN, pad_id=0, scratch=tmp_path / "cut", hooks=hooks)
    resume = ResumePoint(*saved[-1])
    _, record, resumed = learn(deep(), tmp_path / "cut", resume=resume)
    assert record.frozen_layers == 2
    assert alike(whole, resumed)


def test_one_epoch_keeps_nothing(deep, tmp_path):
    for settings in ({"epochs": 1.0}, {"max_steps": 4}):
        record = train(deep(), ROWS, replace(PLAN, **settings), pad_id=0, scratch=tmp_path)
        assert (record.frozen_layers, record.kept) == (0, None)


@pytest.mark.parametrize("family", ["gpt2"])
def test_a_model_with_dropout_is_read_as_a_whole(tiny_model, tmp_path, family):
    model = tiny_model(family, resid_pdrop=0.1, n_layer=3)
    model.requires_grad_(False)
    decoder_blocks(model)[-1].requires_grad_(True)
    assert frozen_depth(model) == 2
    assert frozen_layers(model.train(), pad_id=0, autocast=torch.float32) is None
    assert frozen_layers(model.eval(), pad_id=0, autocast=torch.float32) is not None


def test_a_model_whose_later_layers_need_the_first_is_read_as_a_whole(deep):
    """Such as one that reuses keys and values, or adds up what all layers put out."""
    model = deep()
    blocks = decoder_blocks(plain_model(model))
    seen = []
    blocks[0].self_attn.register_forward_hook(lambda _m, _a, output: seen.append(output[0]))
    blocks[3].register_forward_hook(lambda _m, _a, output: output + seen.pop())
    assert frozen_layers(model.train(), pad_id=0, autocast=torch.float32) is None


def test_layers_that_hand_on_other_tensors_are_not_skipped(deep):
    model = deep()
    decoder_blocks(plain_model(model))[0].register_forward_hook(lambda _m, _a, output: (output, output))
    layers = FrozenLayers(model, 2, pad_id=0, autocast=torch.float32)
    assert not layers.can_be_skipped()


def test_a_layer_computes_again_once_it_is_not_skipped_any_more(deep):
    model = deep()
    layers = frozen_layers(model.train(), pad_id=0, autocast=torch.float32)
    ids_BT = torch.tensor([ROWS[3].input_ids])
    before = model(input_ids=ids_BT).logits
    with pytest.raises(ValueError, match="on purpose"), layers.skipped([ROWS[0].input_ids], packing=False):
        raise ValueError("on purpose")
    assert torch.equal(model(input_ids=ids_BT).logits, before)


# --- where they are kept


def test_a_store_gives_back_what_it_was_given(tmp_path):
    rows = [(1, 2, 3), (4, 5), (1, 2, 3), (6,)]
    for file in (None, tmp_path / "states"):
        store = HiddenStates(rows, 4, torch.bfloat16, file)
        assert store.get((1, 2, 3)) is None
        states = {row: torch.randn(len(row), 4).bfloat16() for row in rows}
        for row in rows[:2]:
            store.put(row, states[row])
        store.put((9, 9), torch.zeros(2, 4))
        store.hide()
        assert torch.equal(store.get((1, 2, 3)), states[1, 2, 3])
        assert torch.equal(store.get((4, 5)), states[4, 5])
        assert store.get((6,)) is None
        assert store.get((9, 9)) is None
    assert list(tmp_path.iterdir()) == []


def test_two_processes_see_each_others_rows(tmp_path):
    """Two maps of one file stand for them."""
    one, other = (HiddenStates([(1, 2), (3,)], 3, torch.float32, tmp_path / "states") for _ in range(2))
    one.put((3,), torch.ones(1, 3))
    assert torch.equal(other.get((3,)), torch.ones(1, 3))
    assert other.get((1, 2)) is None
    one.hide(), other.hide()
    one.put((1, 2), torch.ones(2, 3))
    assert torch.equal(other.get((1, 2)), torch.ones(2, 3))


def test_they_go_into_memory_then_onto_the_disk_then_nowhere(tmp_path, monkeypatch):
    rows = [(1,) * 10, (2,) * 30, (1,) * 10]
    needed = 40 * 8 * 2

    def place(*, memory, disk, shared=False):
        usage = type("Usage", (), {"free": disk})
        monkeypatch.setattr("p2d_cli.modeling.hidden_store.shutil.disk_usage", lambda _: usage)
        return place_for(rows, 8, 2, memory=memory, folder=tmp_path, shared=shared)

    assert place(memory=needed, disk=0) == KeptWhere("memory", needed)
    assert place(memory=needed - 1, disk=2 * needed) == KeptWhere("disk", needed)
    assert place(memory=needed, disk=2 * needed, shared=True) == KeptWhere("disk", needed)
    assert place(memory=0, disk=2 * needed - 2) == KeptWhere("nowhere", needed)
    assert str(place(memory=needed, disk=0)) == "kept after the first epoch: 640 B in memory"
    assert "anew" in str(place(memory=0, disk=0))


def test_a_training_with_little_memory_keeps_them_on_disk_or_not_at_all(deep, tmp_path, monkeypatch):
    plan, told = replace(PLAN, frozen_memory=0), []
    hooks = TrainingHooks(tell=told.append)
    _, on_disk, first = learn(deep(), tmp_path / "a", plan, hooks=hooks)
    assert on_disk.kept.place == "disk"
    assert "on disk" in told[-1]
    assert not [path for path in Path(tmp_path / "a").rglob("*") if "hidden" in path.name]
    monkeypatch.setattr("p2d_cli.modeling.hidden_store._DISK_SHARE", 0.0)
    _, nowhere, second = learn(deep(), tmp_path / "b", plan, hooks=hooks)
    assert nowhere.kept.place == "nowhere"
    assert "anew" in told[-1]
    assert alike(first, second)


def test_a_disk_that_fills_up_meanwhile_is_no_failure(deep, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("p2d_cli.modeling.hidden_store.os.posix_fallocate", full)
    told = []
    plan, hooks = replace(PLAN, frozen_memory=0), TrainingHooks(tell=told.append)
    record = train(deep(), ROWS, plan, pad_id=0, scratch=tmp_path, hooks=hooks)
    assert record.kept.place == "nowhere"
    assert not [path for path in tmp_path.rglob("*") if "hidden" in path.name]
