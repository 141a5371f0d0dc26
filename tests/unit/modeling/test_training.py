"""The order of rows, their batches, and how many tokens these hold."""

import math
from dataclasses import replace

import pytest
import torch
from transformers import get_scheduler

from p2d_cli.modeling.completion_trainer import TrainingHooks
from p2d_cli.modeling.ranks import Ranks
from p2d_cli.modeling.training import ResumePoint, TrainingPlan, planned_tokens, rate_share, train
from p2d_cli.modeling.training_batches import LengthGrouped, RankBatches, TrainingRow, collate, collate_or_none, pack

LENGTHS = [(7 * index) % 41 + 1 for index in range(997)]


def batches(order, size):
    return [order[start : start + size] for start in range(0, len(order), size)]


@pytest.mark.parametrize("size", [1, 4, 16, 997, 2000])
def test_every_row_once_and_the_full_batches_first(size):
    order = list(LengthGrouped(LENGTHS, size, seed=0))
    assert sorted(order) == list(range(len(LENGTHS)))
    assert len(LengthGrouped(LENGTHS, size, seed=0)) == len(LENGTHS)


def test_rows_of_a_batch_are_of_similar_length():
    grouped = batches(list(LengthGrouped(LENGTHS, 16, seed=0)), 16)
    padding = sum(
        max(LENGTHS[row] for row in batch) * len(batch) - sum(LENGTHS[row] for row in batch) for batch in grouped
    )
    assert padding < 0.05 * sum(LENGTHS)


def test_an_order_depends_on_seed_and_epoch_and_nothing_else():
    sampler = LengthGrouped(LENGTHS, 16, seed=1)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(LengthGrouped(LENGTHS, 16, seed=2)) != first
    sampler.set_epoch(0)
    assert list(sampler) == first


def test_the_lengths_of_the_batches_follow_no_order():
    means = [sum(LENGTHS[row] for row in batch) for batch in batches(list(LengthGrouped(LENGTHS, 16, seed=0)), 16)]
    assert means != sorted(means, reverse=True)


def test_padding_has_no_labels():
    rows = [TrainingRow("a", (1, 2, 3), (-100, 2, 3)), TrainingRow("b", (4,), (4,))]
    batch = collate(rows, pad_id=9)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [4, -100, -100]]
    assert batch["names"] == ["a", "b"]


def rows_of_tokens(*lengths):
    rng = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 64, (length,), generator=rng).tolist() for length in lengths]
    return [TrainingRow(str(index), tuple(row), (-100, -100, *row[2:])) for index, row in enumerate(ids)]


def test_packed_rows_start_anew():
    batch = pack([TrainingRow("a", (1, 2, 3), (1, 2, 3)), TrainingRow("b", (4, 5), (-100, 5))])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5]]
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, 5]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]


def test_packed_rows_learn_what_padded_rows_learn(tiny_model, family):
    """Longer rows than the sliding windows of Mistral and Gemma."""
    rows = rows_of_tokens(9, 3, 14)
    gradients = []
    for batch in (pack(rows), collate(rows, pad_id=0)):
        model = tiny_model(family)
        logits_BTV = model(batch["input_ids"], position_ids=batch.get("position_ids"), use_cache=False).logits
        targets_n = batch["labels"][:, 1:].flatten()
        torch.nn.functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), targets_n, ignore_index=-100).backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("accumulation", "size"), [(1, 2), (2, 2), (4, 1), (1, 4), (2, 3)])
def test_ranks_share_the_micro_batches_of_one_process(accumulation, size):
    """Row by row, in equal numbers of micro-batches; where the epoch ends some may be empty."""
    order = LengthGrouped(LENGTHS, 12, seed=0)
    order.set_epoch(1)
    micro_batches = batches(list(order), 12 // accumulation)
    shares = [RankBatches(order, accumulation, Ranks(rank, size)) for rank in range(size)]
    assert {len(share) for share in shares} == {len(micro_batches)}
    for whole, *parts in zip(micro_batches, *shares, strict=True):
        assert sorted(row for part in parts for row in part) == sorted(whole)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("packing", [False, True])
def test_a_batch_without_rows_is_one_token_that_is_not_learnt(packing):
    batch = collate_or_none([], 7, packing=packing)
    assert batch["input_ids"].tolist() == [[7]]
    assert batch["labels"].tolist() == [[-100]]
    assert batch["names"] == []
    assert ("position_ids" in batch) == packing


@pytest.mark.parametrize(("accumulation", "packing", "epochs"), [(1, False, 1.5), (3, False, 2.0), (2, True, 1.0)])
def test_the_tokens_of_a_training_are_known_before_it(tiny_model, tmp_path, accumulation, packing, epochs):
    rows = rows_of_tokens(*(3 + 7 * place % 11 for place in range(20)))
    plan = TrainingPlan(
        epochs=epochs, max_steps=None, learning_rate=1e-3, batch_size=6, accumulation=accumulation, schedule="constant",
        warmup_ratio=0.0, weight_decay=0.0, max_grad_norm=1.0, autocast="float32", device="cpu", seed=3,
        checkpointing=False, trackers=(), packing=packing,
    )  # fmt: skip
    order = LengthGrouped([len(row.input_ids) for row in rows], plan.batch_size, plan.seed)
    whole = train(tiny_model("llama"), rows, plan, pad_id=0, scratch=tmp_path)
    assert whole.steps_done == whole.steps_planned
    assert whole.tokens == planned_tokens(order, plan)
    short = train(tiny_model("llama"), rows, replace(plan, max_steps=2), pad_id=0, scratch=tmp_path)
    assert short.tokens < short.tokens_planned == whole.tokens


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_pad_their_own_shares(size):
    plan = TrainingPlan(1.0, None, 1e-3, 12, 2, "constant", 0.0, 0.0, 1.0, "float32", "cpu", 0, False, ())
    order = LengthGrouped(list(range(3, 17)), plan.batch_size, plan.seed)
    lengths = [order.lengths[place] for place in order]
    shares = [batch[rank::size] for batch in batches(lengths, plan.micro_batch) for rank in range(size)]
    assert planned_tokens(order, plan, size) == sum(len(share) * max(share) for share in shares if share)


def test_the_tokens_of_many_epochs_are_extrapolated_from_the_first_eight():
    plan = TrainingPlan(8.0, None, 1e-3, 6, 1, "constant", 0.0, 0.0, 1.0, "float32", "cpu", 3, False, ())
    order = LengthGrouped([3 + 7 * place % 11 for place in range(20)], plan.batch_size, plan.seed)
    eight = planned_tokens(order, plan)
    assert planned_tokens(order, replace(plan, epochs=1e12)) == eight * 10**12 // 8
    half_more = planned_tokens(order, replace(plan, epochs=8.5))
    assert half_more == eight * 34 // 32  # 4 updates an epoch


# --- learning rates

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def rates_of_transformers(schedule, warmup, updates):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(SCHEDULES[schedule], optimizer, num_warmup_steps=warmup, num_training_steps=updates)
    rates = []
    for _ in range(updates):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("warmup", "updates"), [(0, 1), (0, 7), (1, 1), (1, 2), (2, 39), (3, 4), (30, 1), (5, 5)])
def test_every_update_has_a_rate_and_behind_the_warmup_that_of_transformers(schedule, warmup, updates):
    rates = [rate_share(schedule, done, warmup, updates) for done in range(updates)]
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[warmup:] == rates_of_transformers(schedule, warmup, updates)[warmup:]
    assert rates[:warmup] == [(done + 1) / (warmup + 1) for done in range(min(warmup, updates))]


def test_the_longest_decay_ends_above_zero():
    for schedule in SCHEDULES:
        assert rate_share(schedule, 999_999, 30_000, 1_000_000) > 0


PLAN = TrainingPlan(
    epochs=1.0, max_steps=None, learning_rate=1e-3, batch_size=4, accumulation=1, schedule="cosine",
    warmup_ratio=0.03, weight_decay=0.0, max_grad_norm=1.0, autocast="float32", device="cpu", seed=3,
    checkpointing=False, trackers=(),
)  # fmt: skip


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("rows", "settings"),
    [
        (4, {}),  # a single update, which is all warm-up
        (4, {"accumulation": 2}),
        (40, {"max_steps": 1}),  # the first of ten, cut short
        (12, {"warmup_ratio": 0.99}),
        (12, {}),
    ],
)
def test_every_update_changes_weights(tiny_model, tmp_path, schedule, rows, settings):
    """Each by about its rate, as Adam's do; transformers' own warm-up leaves the first update without any."""
    model = tiny_model("llama")
    weight = model.model.layers[0].self_attn.q_proj.weight
    before, changes = weight.detach().clone(), []

    def note(_):
        changes.append((weight.detach() - before).abs().max().item())
        before.copy_(weight.detach())

    plan = replace(PLAN, schedule=schedule, **settings)
    record = train(
        model, rows_of_tokens(*[6] * rows), plan, pad_id=0, scratch=tmp_path, hooks=TrainingHooks(on_step=note)
    )
    assert record.steps_done == len(changes) == min(rows // plan.batch_size, plan.max_steps or math.inf)
    for entry, change in zip(record.log, changes, strict=True):
        assert entry["learning_rate"] > 0
        assert change > 0.1 * entry["learning_rate"]


# --- what is told


@pytest.mark.parametrize(("accumulation", "resumed"), [(1, False), (2, False), (1, True)])
def test_each_update_is_told_with_what_it_read(tiny_model, tmp_path, accumulation, resumed):
    rows, plan = rows_of_tokens(*(4 + place % 5 for place in range(24))), replace(PLAN, accumulation=accumulation)
    resume, told, looks = None, [], []
    if resumed:
        kept = []
        hooks = TrainingHooks(on_checkpoint=lambda folder, tokens: kept.append(ResumePoint(folder, tokens)))
        train(
            tiny_model("llama"), rows, replace(plan, checkpoint_minutes=0, max_steps=3), pad_id=0, scratch=tmp_path,
            hooks=hooks,
        )  # fmt: skip
        resume = kept[-1]
    record = train(
        tiny_model("llama"), rows, plan, pad_id=0, scratch=tmp_path, resume=resume, eval_rows=rows[:3],
        hooks=TrainingHooks(on_step=told.append, on_look=looks.append),
    )  # fmt: skip
    updates = [entry for entry in record.log if "loss" in entry]
    assert sum(done.count for done in told) == record.steps_done == len(updates)
    assert [done.count for done in told[1:]] == [1] * (len(told) - 1)
    assert [done.loss for done in told] == [entry["loss"] for entry in updates][-len(told) :]
    assert [done.learning_rate for done in told] == [entry["learning_rate"] for entry in updates][-len(told) :]
    assert sum(done.tokens for done in told) + (resume.tokens if resume else 0) == record.tokens
    assert all(done.seconds > 0 for done in told)
    assert looks == [entry["eval_loss"] for entry in record.log if "eval_loss" in entry]
    # The training that it goes on with had no held-out rows, and nobody can look at the untrained model any more.
    assert record.untrained_eval_loss == (None if resumed else looks[0])


def test_a_look_before_the_first_update_changes_no_weights(tiny_model, tmp_path):
    """Not even where dropout draws random numbers, which the batches of a look draw as well."""
    rows, found = rows_of_tokens(*[6] * 16), []
    for eval_rows in ((), rows[:3]):
        torch.manual_seed(0)
        model = tiny_model("llama")
        model.config.attention_dropout = 0.2
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.2
        plan = replace(PLAN, max_steps=2, eval_steps=99)
        record = train(model, rows, plan, pad_id=0, scratch=tmp_path, eval_rows=eval_rows)
        found.append([entry["loss"] for entry in record.log if "loss" in entry])
    assert found[0] == found[1]
    assert len(found[0]) == 2
