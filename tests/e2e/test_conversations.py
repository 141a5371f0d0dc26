"""Conversations, chat templates and system prompts through the command line."""

import json

import pytest

TURNS = [
    {"role": "user", "content": "#O IIIIO"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "#D EEDED"},
    {"role": "assistant", "content": "2"},
]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def train(p2d, tiny_folder, tmp_path):
    def run(rows, *extra, out="adapter"):
        data = write_rows(tmp_path / "rows.jsonl", rows)
        common = ("--model", tiny_folder, "--dtype", "float32", "--scope", "lora", "--max-steps", 1)
        return p2d("train", *common, "--data", data, *extra, "--out", tmp_path / out)

    return run


def test_all_answers_are_learnt_unless_the_last_is_asked_for(train, monkeypatch):
    import p2d_cli.modeling.training as training

    learnt, real = [], training.train

    def watch(model, rows, *rest, **named):
        learnt.append([sum(label >= 0 for label in row.labels) for row in rows])
        return real(model, rows, *rest, **named)

    monkeypatch.setattr(training, "train", watch)
    for number, how in enumerate(([], ["--loss-on", "last"])):
        done = train([{"messages": TURNS}, {"messages": TURNS[:2]}], *how, out=f"adapter-{number}")
        assert done.code == 0, done.said
    [both, last], [one, same] = learnt
    assert both == 2 * one
    assert last == same == one


def test_answers_that_are_cut_are_counted(train):
    done = train([{"messages": TURNS}], "--max-length", 12)
    assert done.code == 0, done.said
    assert "1 earlier answers were cut and are not learnt" in done.said


# --- the template


CHAT = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<eos>{% endfor %}"
CHAT += "{% if add_generation_prompt %}[assistant] {% endif %}"
PAIRS = [{"prompt": "#O IIIIO", "completion": "1"}, {"prompt": "#D EEDED", "completion": "2"}]


@pytest.fixture
def chat(tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text(CHAT)
    return path


@pytest.fixture
def evaluate(p2d, tiny_folder, tmp_path):
    def run(*extra, model=tiny_folder, out="evaluation"):
        data = write_rows(tmp_path / "test.jsonl", PAIRS)
        how = ("--data", data, "--dtype", "float32", "--max-new-tokens", 2)
        return p2d("eval", "--model", model, *how, *extra, "--out", tmp_path / out)

    return run


def summary_of(folder):
    return json.loads((folder / "manifest.json").read_text())["summary"]


def test_a_chat_template_of_ones_own_is_part_of_the_artifacts_identity(train, chat, tmp_path):
    done = train(PAIRS, "--chat-template", chat, "--system", "Be brief.")
    assert done.code == 0, done.said
    manifest = json.loads((tmp_path / "adapter" / "manifest.json").read_text())
    assert manifest["inputs"]["chat_template"]["source"] == str(chat)
    assert manifest["config"]["system"] == {"value": "Be brief.", "origin": "flag"}
    shown = manifest["summary"]["template"]
    assert (shown["name"], shown["origin"], shown["system"]) == ("chat", "chat.jinja", "Be brief.")
    moved = chat.rename(tmp_path / "moved.jinja")
    done = train(PAIRS, "--chat-template", moved, "--system", "Be brief.", "--json")
    assert done.json["status"] == "up-to-date"
    moved.write_text(CHAT + "\n")
    done = train(PAIRS, "--chat-template", moved, "--system", "Be brief.")
    assert (done.code, "it differs in input chat_template" in done.said) == (73, True)


def test_the_rows_are_shown_in_it(train, chat, monkeypatch, tiny_folder):
    import p2d_cli.modeling.training as training
    from p2d_cli.modeling.loading import load_tokenizer

    shown, real = [], training.train

    def watch(model, rows, *rest, **named):
        shown.extend(rows)
        return real(model, rows, *rest, **named)

    monkeypatch.setattr(training, "train", watch)
    row = {"chat": TURNS[:2], "who": "s"}
    columns = ("--messages-column", "chat", "--system-column", "who")
    assert train([row, {"chat": TURNS[:2]}], *columns, "--chat-template", chat, "--system", "z").code == 0
    texts = [load_tokenizer(tiny_folder).decode(row.input_ids) for row in shown]
    assert texts == [f"[system] {who}<eos>[user] #O IIIIO<eos>[assistant] 1<eos>" for who in "sz"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{% for m in messages %}\n{{ m }}\n{% endfr %}", "chat.jinja:3: not a valid chat template"),
        (" \n", "chat.jinja: the chat template is empty"),
        (None, "cannot read the chat template"),
    ],
)
def test_a_file_that_is_no_template_is_refused_before_a_model_loads(train, chat, text, words):
    chat.unlink() if text is None else chat.write_text(text)
    done = train(PAIRS, "--chat-template", chat)
    assert (done.code, words in done.said) == (65, True), done.said


def test_settings_that_exclude_each_other(train, chat):
    done = train(PAIRS, "--chat-template", chat, "--template", "plain")
    assert (done.code, "exclude each other" in done.said) == (2, True)
    done = train(PAIRS, "--messages-column", "a", "--prompt-column", "b")
    assert (done.code, "--messages-column excludes" in done.said) == (2, True)


def test_columns_beside_the_prompt_can_be_named(evaluate, p2d, tmp_path, tiny_folder):
    import pyarrow.parquet as pq

    rows = [{"prompt": "#O II", "completion": "1", "key": "k", "options": ["1", "2"]}]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    columns = ("--id-column", "key", "--choices-column", "options")
    common = ("--model", tiny_folder, "--data", data, "--metric", "accuracy", "--out", tmp_path / "e")
    assert p2d("eval", *common, *columns).code == 0
    assert pq.read_table(tmp_path / "e" / "predictions.parquet").to_pylist()[0]["id"] == "k"


# --- the prompt of training is the one of evaluation


def test_an_evaluation_shows_what_was_trained(train, evaluate, chat, tmp_path):
    assert train(PAIRS, "--system", "Be brief.").code == 0
    done = evaluate("--adapter", tmp_path / "adapter")
    assert done.code == 0, done.said
    assert summary_of(tmp_path / "evaluation")["template"] == summary_of(tmp_path / "adapter")["template"]


def test_a_whole_model_carries_the_template_that_it_learnt(train, evaluate, chat, tmp_path):
    from transformers import AutoTokenizer

    assert train(PAIRS, "--scope", "full", "--chat-template", chat, out="full").code == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "full").chat_template == CHAT
    assert evaluate(model=tmp_path / "full").code == 0
    shown, learnt = (summary_of(tmp_path / name)["template"]["digest"] for name in ("evaluation", "full"))
    assert shown == learnt


def test_other_prompts_are_refused_and_both_are_shown(train, evaluate, chat, tmp_path):
    assert train(PAIRS, "--system", "Be brief.").code == 0
    adapter = ("--adapter", tmp_path / "adapter")
    done = evaluate(*adapter, "--chat-template", chat, "--system", "")
    assert done.code == 65
    for words in (
        "trained with: plain text, system prompt 'Be brief.'",
        "eval shows: chat template",
        "(chat.jinja), no system prompt",
        "give --template plain and --system 'Be brief.'; or --allow-template-mismatch",
    ):
        assert words in done.said
    done = evaluate(*adapter, "--chat-template", chat, "--system", "", "--allow-template-mismatch")
    assert done.code == 0, done.said
    shown = summary_of(tmp_path / "evaluation")["template"]
    assert (shown["name"], shown["system"]) == ("chat", None)


def test_an_adapter_carries_the_template_that_it_learnt(train, evaluate, p2d, chat, tmp_path):
    from transformers import AutoTokenizer

    assert train(PAIRS, "--chat-template", chat).code == 0
    adapter = ("--adapter", tmp_path / "adapter")
    done = evaluate(*adapter)
    assert done.code == 0, done.said
    shown, learnt = (summary_of(tmp_path / name)["template"] for name in ("evaluation", "adapter"))
    assert (shown["digest"], shown["name"]) == (learnt["digest"], "chat")
    done = evaluate(*adapter, "--template", "plain", out="other")
    assert (done.code, "give --chat-template with the file chat.jinja" in done.said) == (65, True), done.said
    assert evaluate(*adapter, "--chat-template", chat, out="named").code == 0
    assert p2d("export", tmp_path / "adapter", "--out", tmp_path / "merged").code == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == CHAT


def test_a_whole_model_and_an_exported_one_keep_their_prompt(train, evaluate, p2d, tmp_path):
    assert train(PAIRS, "--scope", "full", "--system", "Be brief.", out="full").code == 0
    done = evaluate("--system", "Be long.", model=tmp_path / "full")
    assert (done.code, "give --system 'Be brief.'" in done.said) == (65, True), done.said
    assert evaluate(model=tmp_path / "full").code == 0
    assert train(PAIRS, "--system", "Be brief.").code == 0
    assert p2d("export", tmp_path / "adapter", "--out", tmp_path / "merged").code == 0
    assert evaluate("--system", "", model=tmp_path / "merged", out="other").code == 65
    assert "system prompt 'Be brief.'" in p2d("inspect", tmp_path / "merged").said


def test_a_model_without_a_record_is_shown_what_the_flags_say(evaluate, chat):
    done = evaluate("--chat-template", chat, "--system", "x")
    assert done.code == 0, done.said


def test_prompts_that_differ_between_stages_are_told(p2d, pipeline, tiny_folder, tmp_path):
    common = ("--model", tiny_folder, "--dtype", "float32", "--max-steps", 1, "--heads", pipeline / "heads")
    done = p2d("train", *common, "--data", pipeline / "subset", "--system", "x", "--out", tmp_path / "a")
    assert done.code == 0, done.said
    assert (
        "--heads was made with plain text, no system prompt; this stage shows plain text, system prompt 'x'"
        in done.said
    )
