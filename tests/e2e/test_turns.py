"""Models that are taught a chat template, and evaluated with it: the turn ends, and the answer alone is compared."""

import json
import math

import pyarrow.parquet as pq
import pytest
import torch

from tests.e2e.conftest import write_rows

START, END = "<|im_start|>", "<|im_end|>"
BLOCK = "<think>\n\n</think>\n\n"
CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n%LEAD%{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n%OPEN%{% endif %}"
)
IN_LAST = "{% if m.role == 'assistant' and loop.last %}" + BLOCK + "{% endif %}"
TEMPLATES = {
    "chatml": CHATML.replace("%LEAD%", "").replace("%OPEN%", ""),
    "qwen3": CHATML.replace("%LEAD%", IN_LAST).replace("%OPEN%", ""),
    "qwen3.5": CHATML.replace("%LEAD%", IN_LAST).replace("%OPEN%", "<think>\n"),
    "r1": CHATML.replace("%LEAD%", "").replace("%OPEN%", "<think>\n"),
    "no-generation-prompt": (
        "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>\n{% endfor %}"
    ),
}
ROWS = [
    {"prompt": f"please sell the {thing} now", "completion": f"echo> {thing}"}
    for thing in ("ring", "fan", "fog", "cat")
]


@pytest.fixture(scope="module")
def chat_model(tiny_folder, tmp_path_factory):
    """The tiny model with two more special tokens, of which its eos is none."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("chat-model")
    torch.manual_seed(0)
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_folder), AutoModelForCausalLM.from_pretrained(tiny_folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [START, END]})
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=TEMPLATES)
def tuned(request, p2d, chat_model, tmp_path_factory):
    """A template, and a model that has learnt a few rows in it by heart."""
    folder = tmp_path_factory.mktemp("tuned")
    rows = write_rows(folder / "rows.jsonl", ROWS)
    (folder / "chat.jinja").write_text(TEMPLATES[request.param])
    how = ("--scope", "full", "--epochs", 120, "--batch-size", 4, "--lr", 2e-3, "--dtype", "float32")
    where = ("--data", rows, "--chat-template", folder / "chat.jinja", "--out", folder / "tuned")
    done = p2d("train", "-m", chat_model, *how, *where)
    assert done.code == 0, done.said
    return request.param, folder


def evaluate(p2d, folder, *extra):
    how = ("--data", folder / "rows.jsonl", "--dtype", "float32", "--max-new-tokens", 48, "--force")
    done = p2d("eval", "-m", folder / "tuned", *how, *extra, "--out", folder / "evaluation")
    assert done.code == 0, done.said
    return pq.read_table(folder / "evaluation" / "predictions.parquet").to_pylist()


def test_the_turn_ends_and_its_answer_is_compared(p2d, tuned):
    name, folder = tuned
    answers = evaluate(p2d, folder)
    assert [answer["prediction"] for answer in answers] == [row["completion"] for row in ROWS]
    assert all(answer["exact_match"] == 1 for answer in answers)
    before = {"qwen3": BLOCK, "qwen3.5": BLOCK[len("<think>\n") :], "r1": BLOCK[len("<think>\n") :]}
    for answer in answers:
        assert answer["generated"].endswith(answer["prediction"])
        assert name not in before or answer["generated"] == before[name] + answer["prediction"]


def test_a_stop_string_in_the_think_block_does_not_end_the_answer(p2d, tuned):
    assert [answer["prediction"] for answer in evaluate(p2d, tuned[1], "--stop", "\n")] == [
        row["completion"] for row in ROWS
    ]


def test_other_programs_stop_at_the_end_of_the_turn_too(p2d, tuned):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tuned[1] / "tuned"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    shown = [{"role": "user", "content": ROWS[0]["prompt"]}]
    prompt = tokenizer.apply_chat_template(shown, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, do_sample=False, max_new_tokens=48)[0, prompt["input_ids"].shape[1] :]
    assert output[-1] == tokenizer.convert_tokens_to_ids(END)
    assert tokenizer.decode(output[:-1]).endswith(ROWS[0]["completion"])


def test_perplexity_is_of_the_answer_alone(p2d, tuned):
    """Against a plain forward of transformers over the rendered text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name, folder = tuned
    found = evaluate(p2d, folder, "--metric", "perplexity")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tuned")
    model = AutoModelForCausalLM.from_pretrained(folder / "tuned")
    for row, answer in zip(ROWS, found, strict=True):
        asked = [{"role": "user", "content": row["prompt"]}]
        text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        text += {"qwen3": BLOCK, "no-generation-prompt": START + "assistant "}.get(name, "")
        text += "\n</think>\n\n" if name in {"qwen3.5", "r1"} else ""
        context = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = tokenizer(text + row["completion"] + END, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        expected = sum(float(logprobs[at - 1, ids[at]]) for at in range(len(context), len(ids)))
        assert answer["log_likelihood"] == pytest.approx(expected, abs=2e-3)
        assert answer["completion_tokens"] == len(ids) - len(context)


# --- an untouched model that thinks


def test_what_stands_in_its_think_block_is_not_its_answer(p2d, chat_model, tmp_path, monkeypatch):
    import p2d_cli.modeling.generation as generation

    turns = [
        "<think>\necho> ring? no\n</think>\n\necho> ring",
        "<think>\necho> fan",
        "echo> fog",
        "<think></think>echo> cat",
    ]
    monkeypatch.setattr(generation, "decode_turns", lambda _tokenizer, new_ids, _frame: turns[: len(new_ids)])
    (tmp_path / "chat.jinja").write_text(TEMPLATES["qwen3"])
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    how = ("--data", rows, "--chat-template", tmp_path / "chat.jinja", "--max-new-tokens", 2, "--token-budget", 8192)
    done = p2d("eval", "-m", chat_model, *how, "--dtype", "float32", "--out", tmp_path / "e", "--json")
    assert done.code == 0, done.said
    answers = pq.read_table(tmp_path / "e" / "predictions.parquet").to_pylist()
    assert sorted(answer["prediction"] for answer in answers) == ["", "echo> cat", "echo> fog", "echo> ring"]


# --- arguments of a template

SWITCH = TEMPLATES["chatml"].replace(
    "assistant\n{% endif %}", "assistant\n{% if enable_thinking is false %}" + BLOCK + "{% endif %}{% endif %}"
)
SWITCH = SWITCH.replace("{{ m.content }}", IN_LAST + "{{ m.content }}")
OFF = '{"enable_thinking": false}'


@pytest.fixture
def switch(tmp_path):
    (tmp_path / "switch.jinja").write_text(SWITCH)
    return tmp_path / "switch.jinja"


def test_arguments_are_part_of_what_was_trained(p2d, chat_model, switch, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    how = ("--data", rows, "--dtype", "float32")
    train = ("train", "-m", chat_model, "--scope", "lora", "--max-steps", 2, *how, "--chat-template", switch)
    assert p2d(*train, "--out", tmp_path / "on").code == 0
    done = p2d(*train, "--chat-template-kwargs", OFF, "--out", tmp_path / "off")
    assert done.code == 0, done.said
    again = p2d(*train, "--chat-template-kwargs", '{"enable_thinking": true}', "--out", tmp_path / "off")
    assert again.code == 73, again.said
    assert "chat_template_kwargs" in again.said

    evaluate = ("eval", "-m", chat_model, *how, "--max-new-tokens", 2)
    assert p2d(*evaluate, "--adapter", tmp_path / "off", "--out", tmp_path / "e").code == 0
    digests = [
        json.loads((tmp_path / name / "manifest.json").read_text())["summary"]["template"]["digest"]
        for name in ("on", "off", "e")
    ]
    assert digests[0] != digests[1] == digests[2]
    given = ("--chat-template", switch, "--chat-template-kwargs", OFF)
    assert p2d(*evaluate, "--adapter", tmp_path / "off", *given, "--out", tmp_path / "same").code == 0
    other = p2d(*evaluate, "--adapter", tmp_path / "off", "--chat-template", switch, "--out", tmp_path / "other")
    assert other.code == 65
    assert "enable_thinking=False" in other.said

    assert p2d("export", tmp_path / "off", "-m", chat_model, "--out", tmp_path / "merged").code == 0
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    shown = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert shown.endswith(f"{START}assistant\n{BLOCK}")
    ends = json.loads((tmp_path / "merged" / "generation_config.json").read_text())["eos_token_id"]
    assert tokenizer.convert_tokens_to_ids(END) in ends


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ('{"enable_thinkin": false}', "no variable 'enable_thinkin' to set"),
        ("enable_thinking=false", "expected a JSON object"),
        ("[1]", "dict"),
    ],
)
def test_arguments_that_cannot_be(p2d, chat_model, switch, tmp_path, given, said):
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    done = p2d(
        "train", "-m", chat_model, "--data", rows, "--chat-template", switch, "--chat-template-kwargs", given,
        "--dry-run", "--out", tmp_path / "t",
    )  # fmt: skip
    assert done.code == 2, done.said
    assert said in done.said


# --- ends, and places


@pytest.mark.parametrize("plan", [(), ("--dry-run",)])
def test_reasoning_that_is_not_shown_is_told(p2d, tiny_folder, tmp_path, plan):
    turns = [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4", "reasoning_content": "two"}]
    data = write_rows(tmp_path / "rows.jsonl", [{"messages": turns}] * 2)
    how = ("-m", tiny_folder, "--data", data, "--max-steps", 1, "--scope", "lora", "--dtype", "float32")
    done = p2d("train", *how, *plan, "--out", tmp_path / "t")
    assert done.code == 0, done.said
    assert "2 of 2 rows have reasoning, or text beside calls, that the template does not show: not learnt" in done.said


@pytest.mark.parametrize("command", [("train", "--scope", "lora", "--max-steps", 1), ("eval", "--max-new-tokens", 2)])
@pytest.mark.parametrize("plan", [(), ("--dry-run",)])
def test_a_template_without_an_end_is_told(p2d, tiny_folder, tmp_path, command, plan):
    template = tmp_path / "open.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: ")
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    how = ("-m", tiny_folder, "--data", rows, "--chat-template", template, "--dtype", "float32", *plan)
    done = p2d(*command, *how, "--out", tmp_path / "out")
    assert done.code == 0, done.said
    assert "open.jinja closes answers with no special token" in done.said


def test_a_template_in_the_tokenizers_config_of_an_adapter_is_shown(p2d, chat_model, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(chat_model), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    tokenizer.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": TEMPLATES["chatml"]}))
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    evaluate = ("eval", "-m", chat_model, "--adapter", tmp_path / "adapter", "--data", rows, "--max-new-tokens", 2)
    assert p2d(*evaluate, "--dtype", "float32", "--out", tmp_path / "e").code == 0
    template = json.loads((tmp_path / "e" / "manifest.json").read_text())["summary"]["template"]
    assert (template["name"], template["origin"]) == ("chat", "tokenizer_config.json")
    path.write_text(path.read_text().replace("<|im_end|>\\n", "<|im_end|>"))
    assert p2d(*evaluate, "--dtype", "float32", "--out", tmp_path / "e").code == 73  # the template is an input


def test_lm_eval_is_given_the_answer_alone(p2d, tuned, tmp_path):
    pytest.importorskip("lm_eval")
    name, folder = tuned
    if name not in {"qwen3", "no-generation-prompt"}:
        pytest.skip("two templates show it")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    write_rows(tasks / "rows.jsonl", ROWS)
    (tasks / "memory.yaml").write_text(
        f"""task: p2d_memory
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tasks / "rows.jsonl"}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{completion}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 48}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
    )
    how = ("--lm-eval", "p2d_memory", "--lm-eval-tasks", tasks, "--dtype", "float32", "--json")
    done = p2d("eval", "-m", folder / "tuned", *how, "--out", tmp_path / "e")
    assert done.code == 0, done.said
    [metric] = done.json["summary"]["metrics"].values()
    assert metric["value"] == 1, name
    assert math.isclose(metric["count"], len(ROWS))


# --- mining


@pytest.mark.parametrize("method", ["readout", "loss", "ifd"])
def test_a_block_counts_for_nothing_whether_the_prompt_or_the_answer_has_it(
    p2d, chat_model, switch, rows, tmp_path, method
):
    """The text is the same; what comes before the answer is read but not scored."""
    pool, target = (tmp_path / name for name in ("pool.jsonl", "target.jsonl"))
    for path, source in ((pool, rows["pool"]), (target, rows["target"])):
        path.write_text("".join(source.read_text().splitlines(keepends=True)[:24]))
    how = ("-m", chat_model, "--pool", pool, "--target", target, "--chat-template", switch, "--dtype", "float32")
    heads = ("score-heads", *how, "--method", "uniform", "--out", tmp_path / "heads")
    assert p2d(*heads).code == 0
    mine = ["--heads", tmp_path / "heads"] if method == "readout" else ["--method", method]
    scores = []
    for value in ("true", "false"):
        out = tmp_path / value
        done = p2d("mine-data", *how, *mine, "--chat-template-kwargs", f'{{"enable_thinking": {value}}}', "--out", out)
        assert done.code == 0, done.said
        scores.append(pq.read_table(out / "pool_scores.parquet").sort_by("id")["score"].to_pylist())
    assert scores[0] == pytest.approx(scores[1], rel=1e-5, abs=1e-5)
    assert len(set(scores[0])) > 12
