"""Chat templates in the places where people keep them, and with the arguments that they give."""

import json

import pytest

from p2d_cli.data.chat_templates import find_chat_template, read_chat_template, resolve_template, with_arguments
from p2d_cli.errors import UsageError

THINKING = (
    "\n{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% macro block() %}{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endmacro %}{% if add_generation_prompt %}<|im_start|>assistant\n{{ block() }}{{ note or '' }}{% endif %}"
)


@pytest.mark.parametrize(
    "arguments",
    [
        {"enable_thinking": False},
        {"enable_thinking": True},
        {"note": 'a "quoted" text,\nU+1F600 \U0001f600 and \\'},
        {"note": ["a", 1, 2.5, None, {"b": [True]}]},
        {"enable_thinking": False, "note": None},
    ],
)
def test_filled_in_arguments_render_as_given_ones(tokenizer_of, record_of, tmp_path, arguments):
    tokenizer, path = tokenizer_of(), tmp_path / "t.jinja"
    path.write_text(THINKING)
    messages = [{"role": "user", "content": "hi"}]
    expected = tokenizer.apply_chat_template(
        messages, chat_template=THINKING, tokenize=False, add_generation_prompt=True, **arguments
    )
    template = resolve_template(tokenizer, chat_file=path, arguments=arguments)
    assert template.render_prompt(tokenizer, record_of("hi")) == expected
    assert template.digest != resolve_template(tokenizer, chat_file=path).digest


def test_arguments_take_the_place_of_earlier_ones():
    once = with_arguments(THINKING, {"enable_thinking": True})
    assert with_arguments(once, {"enable_thinking": False}) == with_arguments(THINKING, {"enable_thinking": False})
    assert with_arguments(once, {"enable_thinking": True}) == once


def test_a_templates_own_first_lines_stay():
    own = "{%- set lang = lang | upper %}\n{%- set fixed = 1 %}\n{{ lang }}{{ messages }}"
    filled = with_arguments(own, {"lang": "en"})
    assert filled.endswith(own)
    with pytest.raises(UsageError, match="no variable 'fixed' to set"):
        with_arguments(filled, {"fixed": 2})


@pytest.mark.parametrize("name", ["enable_thinkng", "messages", "strftime_now", "range"])
def test_a_variable_that_the_template_does_not_have(name):
    with pytest.raises(UsageError, match=f"no variable '{name}' to set") as caught:
        with_arguments(THINKING, {name: 1})
    assert caught.value.hint == "it has: enable_thinking, note"


def test_arguments_need_a_chat_template(tokenizer_of):
    with pytest.raises(UsageError, match="shown as plain text"):
        resolve_template(tokenizer_of(), arguments={"enable_thinking": False})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.jinja", "T{{ messages }}"),
        ("chat_template.json", json.dumps({"chat_template": "T{{ messages }}"})),
        ("tokenizer_config.json", json.dumps({"eos_token": "x", "chat_template": "T{{ messages }}"})),
        (
            "tokenizer_config.json",
            json.dumps(
                {
                    "chat_template": [
                        {"name": "rag", "template": "R"},
                        {"name": "default", "template": "T{{ messages }}"},
                    ]
                }
            ),
        ),
    ],
)
def test_templates_are_found_where_transformers_has_kept_them(tmp_path, name, content):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / name).write_text(content)
    assert find_chat_template(tmp_path) == tmp_path / name
    assert read_chat_template(tmp_path / name) == "T{{ messages }}"


@pytest.mark.parametrize("content", ["{}", "[]", "not JSON", '{"chat_template": ""}', '{"chat_template": 3}'])
def test_a_tokenizer_without_template_has_none(tmp_path, content):
    (tmp_path / "tokenizer_config.json").write_text(content)
    assert find_chat_template(tmp_path) is None
