"""In float32, what eval says of a row does not depend on the rows that it is batched with."""

import json
import shutil

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

BUDGETS = (1, 70, 300, 8192)


def random_model(tiny_folder, folder):
    """A model with grouped queries and random weights, whose answers are as long as they may be."""
    tokenizer = json.loads((tiny_folder / "config.json").read_text())
    config = Qwen3Config(
        **{name: tokenizer[name] for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")},
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.15,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).to(torch.float32).save_pretrained(folder)
    for path in tiny_folder.glob("*"):
        if not (folder / path.name).exists():
            shutil.copy(path, folder)
    return folder


@pytest.mark.parametrize("kind", ["fixture", "random"])
def test_predictions_do_not_depend_on_the_batch(p2d, tiny_folder, few, tmp_path, kind):
    model = tiny_folder if kind == "fixture" else random_model(tiny_folder, tmp_path / "model")
    (tmp_path / "choices.json").write_text('["alpha", "bravo charlie delta echo", "7", "a b c d e f g"]')
    tables, metrics = [], []
    for budget in BUDGETS:
        done = p2d(
            *("eval", "--model", model, "--data", few["test"], "--dtype", "float32", "--token-budget", budget),
            *("--metric", "exact_match,rougeL,accuracy,perplexity", "--choices", tmp_path / "choices.json"),
            *("--max-new-tokens", 12, "--out", tmp_path / f"budget-{budget}", "--json"),
        )
        assert done.code == 0, done.said
        tables.append(pq.read_table(tmp_path / f"budget-{budget}" / "predictions.parquet").to_pydict())
        metrics.append(done.json["summary"]["metrics"])
    assert any(tables[0]["prediction"])
    likelihoods = [table.pop("log_likelihood") for table in tables]
    perplexities = [list(metric.pop("perplexity").values()) for metric in metrics]
    for table, metric, likelihood, perplexity in zip(tables, metrics, likelihoods, perplexities, strict=True):
        assert table == tables[0]
        assert metric == metrics[0]
        assert likelihood == pytest.approx(likelihoods[0], abs=1e-4, rel=1e-6)
        assert perplexity == pytest.approx(perplexities[0], rel=1e-5)


def test_choices_are_the_same_where_each_is_read_with_its_own_prompt(p2d, tiny_folder, few, tmp_path, monkeypatch):
    """Models whose attention cannot be masked by pairs of tokens take the plain way."""
    completions = [json.loads(line)["completion"] for line in few["test"].read_text().splitlines()]
    (tmp_path / "choices.json").write_text(json.dumps(sorted({*completions, "alpha", "bravo charlie delta echo"})))
    evaluate = (
        *("eval", "--model", tiny_folder, "--data", few["test"], "--dtype", "float32", "--metric", "accuracy"),
        *("--choices", tmp_path / "choices.json", "--token-budget", 300),
    )
    assert p2d(*evaluate, "--out", tmp_path / "packed").code == 0
    monkeypatch.setattr("p2d_cli.modeling.choices.can_pack", lambda *_: False)
    assert p2d(*evaluate, "--out", tmp_path / "plain").code == 0
    packed, plain = (pq.read_table(tmp_path / name / "predictions.parquet").to_pydict() for name in ("packed", "plain"))
    assert packed == plain
    tokens = [json.loads((tmp_path / name / "manifest.json").read_text())["tokens"] for name in ("packed", "plain")]
    assert tokens[0] < tokens[1] / 1.5
