"""Every text that users write may begin with the mark (BOM) that editors on Windows put there."""

from types import SimpleNamespace

import pytest

from p2d_cli.data.chat_templates import read_chat_template
from p2d_cli.recipes.recipe import read_recipe, read_recipe_text
from p2d_cli.stages.evaluate import open_choices
from p2d_cli.stages.mining_inputs import open_relevance

TEXTS = {
    "recipe": ('name = "ä"\n', lambda path, job: read_recipe(path).name, "ä"),
    "recipe of a report": ('name = "ä"\n', lambda path, job: read_recipe_text(path), 'name = "ä"\n'),
    "choices": ('["ä", "b"]', lambda path, job: open_choices(job, str(path)), ("ä", "b")),
    "relevance": ('{"relevant": ["ä"]}', lambda path, job: open_relevance(job), {"ä"}),
    "chat template": ("{{ 'ä' }}", lambda path, job: read_chat_template(path), "{{ 'ä' }}"),
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize(("text", "read", "expected"), TEXTS.values(), ids=TEXTS)
def test_a_mark_at_the_beginning_is_no_text(tmp_path, encoding, text, read, expected):
    path = tmp_path / "file"
    path.write_bytes(text.encode(encoding))
    job = SimpleNamespace(config=SimpleNamespace(relevance=str(path)), inputs=SimpleNamespace(entries={}))
    assert read(path, job) == expected
