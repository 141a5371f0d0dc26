"""The digest by which a row is known: of all that a template may show of it, and of nothing else."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from p2d_cli.data.records import Message, Record

TOOLS = ({"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}},)
CALL = {"tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}]}
ROW = Record(
    id="r1",
    messages=(
        Message("system", "Be brief."),
        Message("user", "Rome?"),
        Message("assistant", "Ah."),
        Message("user", "?"),
    ),
    completion="Sunny.",
    choices=None,
    fields={"prompt": "Rome?"},
    where="a.jsonl:1",
)


def with_message(place, message):
    """The row with another message at a place, or without it."""
    rest = ROW.messages[:place], ROW.messages[place + 1 :]
    return replace(ROW, messages=(*rest[0], *([] if message is None else [message]), *rest[1]))


SHOWN = {
    "role": with_message(2, Message("user", "Ah.")),
    "content": with_message(1, Message("user", "Rome? ")),
    "case": with_message(1, Message("user", "rome?")),
    "call": with_message(2, Message("assistant", "Ah.", CALL)),
    "system": with_message(0, Message("system", "Be long.")),
    "no system": with_message(0, None),
    "order": replace(ROW, messages=(ROW.messages[0], ROW.messages[3], ROW.messages[2], ROW.messages[1])),
    "border": with_message(1, Message("user", "Rome?Ah.")),
    "completion": replace(ROW, completion="Rain."),
    "answer's call": replace(ROW, answer_parts=CALL),
    "tools": replace(ROW, tools=TOOLS),
}
NOT_SHOWN = {
    "id": replace(ROW, id="r2"),
    "where": replace(ROW, where="b.jsonl:7"),
    "fields": replace(ROW, fields={}),
    "choices": replace(ROW, choices=("Sunny.", "Rain.")),
}


@pytest.mark.parametrize("name", SHOWN)
def test_what_may_be_shown_changes_it(name):
    assert SHOWN[name].digest != ROW.digest


def test_all_of_them_differ():
    assert len({row.digest for row in SHOWN.values()}) == len(SHOWN)


@pytest.mark.parametrize("name", NOT_SHOWN)
def test_what_is_not_shown_changes_nothing(name):
    assert NOT_SHOWN[name].digest == ROW.digest


def test_the_order_of_keys_changes_nothing():
    turned = tuple(dict(reversed(tool.items())) for tool in TOOLS)
    assert replace(ROW, tools=turned).digest == replace(ROW, tools=TOOLS).digest


def test_both_halves_are_numbers_of_64_bits_and_vary():
    for half in (0, 1):
        values = [row.digest[half] for row in SHOWN.values()]
        assert all(0 <= value < 2**64 for value in values)
        assert len(set(values)) == len(values)


def test_half_a_surrogate_pair_has_a_digest():
    assert with_message(1, Message("user", "\ud83d")).digest != ROW.digest


def test_it_is_the_same_in_every_process():
    code = (
        "from p2d_cli.data.records import Message, Record\n"
        "print(*Record('r', (Message('user', 'a'),), 'b', None, {}, 'f:1').digest)"
    )
    here = Record("r", (Message("user", "a"),), "b", None, {}, "f:1").digest
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PYTHONHASHSEED": seed},
        )
        assert tuple(map(int, done.stdout.split())) == here
