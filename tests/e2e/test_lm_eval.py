"""eval --lm-eval: the tasks of lm-eval on p2d's model and adapter, kept as an evaluation."""

import importlib.metadata
import json
import shutil

import pyarrow.parquet as pq
import pytest

from p2d_cli.core.metrics import wilson_interval

CHOICES = ["alpha", "bravo charlie", "delta"]
CHOICE_TASK = """\
task: p2d_choices
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}\\n"
doc_to_target: "{{choices.index(completion)}}"
doc_to_choice: choices
target_delimiter: ""
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
ANSWER_TASK = """\
task: p2d_answers
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}\\n"
doc_to_target: completion
generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
GROUP = """\
group: p2d_group
task: [p2d_choices, p2d_likelihoods]
aggregate_metric_list:
  - {metric: acc, aggregation: mean, weight_by_size: true}
"""


def harness():
    return pytest.importorskip("lm_eval")


INDEXED = {}


@pytest.fixture(autouse=True)
def _indexed_once(monkeypatch):
    """Looking through the tasks that lm-eval brings takes a quarter of a minute; they stay the same."""
    index = pytest.importorskip("lm_eval.tasks._index").TaskIndex
    build = index.build

    def known(folders):
        own = [folder for folder in folders if folder.name != "tasks" or folder.parent.name != "lm_eval"]
        for folder in set(folders) - set(own) - INDEXED.keys():
            INDEXED[folder] = build([folder])
        return {name: entry for found in (*INDEXED.values(), build(own)) for name, entry in found.items()}

    monkeypatch.setattr(index, "build", staticmethod(known))


@pytest.fixture
def tasks(few, tmp_path, monkeypatch):
    """A folder with two tasks over the fixture's rows."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [json.loads(line) for line in few["test"].read_text().splitlines()]
    rows = [
        {"prompt": row["prompt"], "completion": CHOICES[number % 3], "choices": CHOICES}
        for number, row in enumerate(rows)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("choices", CHOICE_TASK), ("answers", ANSWER_TASK)):
        (folder / f"{name}.yaml").write_text(text.replace("DATA", json.dumps(str(data))))
    return folder, data


@pytest.fixture
def evaluate(p2d, tiny_folder, tmp_path, tasks):
    def run(*words, out="e", names="p2d_choices,p2d_answers"):
        return p2d(
            *("eval", "--model", tiny_folder, "--dtype", "float32", "--lm-eval", names, "--lm-eval-tasks", tasks[0]),
            *(*words, "--out", tmp_path / out, "--json"),
        )

    return run


def test_figures_and_samples_become_an_evaluation(evaluate, tmp_path):
    harness()
    done = evaluate()
    assert done.code == 0, done.said
    metrics = json.loads((tmp_path / "e" / "metrics.json").read_text())
    table = pq.read_table(tmp_path / "e" / "predictions.parquet").to_pylist()
    assert set(metrics) == {"p2d_choices/acc", "p2d_answers/exact_match"}
    assert done.json["summary"]["metrics"] == metrics
    assert done.json["summary"]["lm_eval"] == importlib.metadata.version("lm-eval")
    assert [row["id"] for row in table] == [f"p2d_{task}:{n}" for task in ("choices", "answers") for n in range(10)]
    for name, metric in metrics.items():
        scores = [row[name] for row in table if row["task"] == name.split("/")[0]]
        assert metric["value"] == pytest.approx(sum(scores) / 10)
        assert metric["count"] == 10
        assert set(scores) <= {0, 1}
        assert (metric["low"], metric["high"]) == wilson_interval(round(sum(scores)), 10)
    for row in table:
        assert row["prompt"].endswith("\n")
        assert row["reference"] in CHOICES
        if row["task"] == "p2d_choices":
            assert row["prediction"] in CHOICES
            assert row["p2d_choices/acc"] == (row["prediction"] == row["reference"])
            assert row["p2d_answers/exact_match"] is None
    manifest = json.loads((tmp_path / "e" / "manifest.json").read_text())
    assert manifest["tokens"] > 0
    assert manifest["inputs"]["lm_eval"]["source"] == "p2d_choices,p2d_answers"
    assert "data" not in manifest["inputs"]


def test_accuracy_is_that_of_lm_eval(p2d, evaluate, tasks, tiny_folder, tmp_path):
    """lm-eval weighs `prompt + choice`, without the end token that p2d's template adds to it."""
    harness()
    assert evaluate(names="p2d_choices").code == 0
    theirs = pq.read_table(tmp_path / "e" / "predictions.parquet").to_pydict()
    own = ("eval", "--model", tiny_folder, "--dtype", "float32", "--data", tasks[1], "--metric", "accuracy")
    with pytest.MonkeyPatch.context() as patch:
        from p2d_cli.data.prompts import PromptTemplate

        def without_end(self, tokenizer, record):
            return self.render_prompt(tokenizer, record), record.completion

        patch.setattr(PromptTemplate, "render_example", without_end)
        assert p2d(*own, "--out", tmp_path / "own").code == 0
    ours = pq.read_table(tmp_path / "own" / "predictions.parquet").to_pydict()
    assert ours["choice"] == theirs["prediction"]
    assert ours["accuracy"] == theirs["p2d_choices/acc"]


def test_an_adapter_is_heard_and_evaluations_compare(p2d, evaluate, pipeline, tmp_path):
    harness()
    assert evaluate(out="base").code == 0
    adapted = evaluate("--adapter", pipeline / "adapter", out="adapted")
    assert adapted.code == 0, adapted.said
    found = p2d("compare", tmp_path / "base", tmp_path / "adapted", "--json").json
    assert set(found["metrics"]) == {"p2d_choices/acc", "p2d_answers/exact_match"}
    assert found["metrics"]["p2d_choices/acc"]["count"] == 10
    assert found["rows"] == 20
    answers = [
        pq.read_table(tmp_path / name / "predictions.parquet")["prediction"].to_pylist() for name in ("base", "adapted")
    ]
    assert answers[0] != answers[1]
    report = ("report-aer", tmp_path / "adapted", "--reference", pipeline / "full-evaluation", "--out", tmp_path / "r")
    assert p2d(*report).code == 0


def test_groups_filters_and_figures_that_are_no_means(p2d, evaluate, tasks, tmp_path):
    harness()
    likelihoods = CHOICE_TASK.replace("p2d_choices", "p2d_likelihoods").replace("multiple_choice", "loglikelihood")
    likelihoods = likelihoods.replace('"{{choices.index(completion)}}"', "completion").replace(
        "doc_to_choice: choices\n", ""
    )
    likelihoods += "  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}\n"
    filters = ANSWER_TASK.replace("p2d_answers", "p2d_filtered") + (
        "filter_list:\n"
        "  - {name: first, filter: [{function: regex, regex_pattern: '(\\\\w+)'}, {function: take_first}]}\n"
        "  - {name: whole, filter: [{function: take_first}]}\n"
    )
    for name, text in (("likelihoods", likelihoods), ("filters", filters), ("group", GROUP)):
        (tasks[0] / f"{name}.yaml").write_text(text.replace("DATA", json.dumps(str(tasks[1]))))
    done = evaluate(names="p2d_group,p2d_filtered")
    assert done.code == 0, done.said
    metrics = done.json["summary"]["metrics"]
    assert metrics["p2d_group/acc"]["count"] == 20
    assert metrics["p2d_group/acc"]["value"] == pytest.approx(
        (metrics["p2d_choices/acc"]["value"] + metrics["p2d_likelihoods/acc"]["value"]) / 2
    )
    table = pq.read_table(tmp_path / "e" / "predictions.parquet").to_pydict()
    assert len(table["id"]) == 30
    assert {"p2d_filtered/exact_match,first", "p2d_filtered/exact_match,whole"} <= set(metrics) & set(table)
    assert "p2d_likelihoods/perplexity" in metrics
    assert "p2d_likelihoods/perplexity" not in table, "its rows hold log-likelihoods"
    assert max(value for value in table["p2d_likelihoods/perplexity:row"] if value is not None) < 0
    found = p2d("compare", tmp_path / "e", tmp_path / "e", "--json").json
    assert found["left_out"] == ["p2d_likelihoods/perplexity", "p2d_group/acc"]


def test_settings_that_do_not_matter_and_those_that_do(evaluate, tasks):
    harness()
    assert evaluate("--limit", 2, names="p2d_choices").json["summary"]["rows"] == 2
    assert evaluate("--limit", 2, "--max-new-tokens", 3, names="p2d_choices").json["status"] == "up-to-date"
    assert evaluate("--limit", 3, names="p2d_choices").code == 73
    (tasks[0] / "choices.yaml").write_text((tasks[0] / "choices.yaml").read_text() + "metadata: {version: 2}\n")
    refused = evaluate("--limit", 2, names="p2d_choices")
    assert refused.code == 73
    assert "input lm_eval_tasks" in refused.said


def test_nothing_but_the_result_is_said(p2d, evaluate):
    harness()
    done = evaluate("--quiet", names="p2d_choices")
    assert done.err == ""
    assert evaluate(names="p2d_choices").json["status"] == "up-to-date"


def test_an_unknown_task(evaluate):
    harness()
    done = evaluate(names="p2d_choises")
    assert done.code == 2
    assert "p2d_choises" in done.said
    assert "knows no such task" in done.said


def test_a_missing_data_set(evaluate, tasks):
    harness()
    (tasks[0] / "lost.yaml").write_text(
        CHOICE_TASK.replace("DATA", '"nowhere.jsonl"').replace("p2d_choices", "p2d_lost")
    )
    done = evaluate(names="p2d_lost")
    assert done.code == 69
    assert "p2d_lost" in done.said


def test_without_the_package(evaluate, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("p2d_cli.modeling.harness.importlib.metadata.version", missing)
    done = evaluate()
    assert done.code == 69
    assert "not installed" in done.said
    assert "p2d-cli[lm-eval]" in done.said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "--data is required (or --lm-eval TASKS"),
        (("--data", "rows.jsonl", "--lm-eval", "some"), "--data and --lm-eval exclude each other"),
        (("--data", "rows.jsonl", "--lm-eval-tasks", "tasks"), "--lm-eval-tasks needs --lm-eval"),
    ],
)
def test_flags_that_do_not_go_together(p2d, tiny_folder, tmp_path, words, said):
    done = p2d("eval", "--model", tiny_folder, *words, "--out", tmp_path / "e")
    assert done.code == 2
    assert said in done.said


@pytest.mark.parametrize("task", ["p2d_choices", "p2d_answers"])
def test_logits_that_are_no_numbers(evaluate, tmp_path, task):
    """lm-eval itself would take the first of them as the likeliest."""
    import torch
    from torch.nn.modules.module import register_module_forward_hook

    harness()

    def hook(module, inputs, output):
        return torch.full_like(output, torch.nan) if type(module).__name__ == "Embedding" else None

    handle = register_module_forward_hook(hook)
    try:
        done = evaluate(names=task)
    finally:
        handle.remove()
    assert done.code == 70, done.said
    assert "the logits of row 1 of" in done.said
    assert not (tmp_path / "e").exists()


def test_the_chat_template_that_was_asked_for_is_shown(evaluate, tmp_path):
    harness()
    template = tmp_path / "shouting.jinja"
    template.write_text("{% for m in messages %}<{{ m.role }}>{{ m.content | upper }}{% endfor %}<answer>")
    options = ("--chat-template", template, "--system", "be brief")
    assert evaluate(*options, names="p2d_answers").code == 0
    manifest = json.loads((tmp_path / "e" / "manifest.json").read_text())
    assert manifest["inputs"]["chat_template"]["source"] == str(template)
    prompts = pq.read_table(tmp_path / "e" / "predictions.parquet")["prompt"].to_pylist()
    assert all(prompt.startswith("<system>BE BRIEF<user>") and prompt.endswith("<answer>") for prompt in prompts)


def test_tokens_beyond_the_embeddings_are_refused(p2d, tasks, tiny_folder, tmp_path):
    """lm-eval encodes its rows itself; what reaches the model is checked on the way."""
    harness()
    import transformers

    model = shutil.copytree(tiny_folder, tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([json.loads(tasks[1].read_text().splitlines()[0])["prompt"][:9]])
    tokenizer.save_pretrained(model)
    done = p2d(
        *("eval", "--model", model, "--dtype", "float32", "--lm-eval", "p2d_choices", "--lm-eval-tasks", tasks[0]),
        *("--out", tmp_path / "e"),
    )
    assert done.code == 65, done.said
    assert "a row of lm-eval: the token" in done.said
    assert "ids up to 370, the model has 370 embeddings" in done.said
