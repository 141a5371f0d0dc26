"""Tiny tokenizers, trained here, and records made by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from p2d_cli.data.records import Message, Record

SPECIALS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "How many apples does Anna have? She had 12 and ate 3, so 12 - 3 = 9.\n#### 9",
    "user\nadd this song to my playlist\nassistant\nAddToPlaylist(music_item=song)\n\n",
    "The capital of France is Paris. The capital of Spain is Madrid.\n\n\nsystem\n",
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRIMMING = CHATML.replace("m['content']", "m['content'] | trim")
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
DEFAULT_SYSTEM = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + CHATML
# The system message stands in the last user's turn, as in some templates of Mistral.
SYSTEM_LAST = (
    "<s>{% if messages[0]['role'] == 'system' %}{% set sys = messages[0]['content'] + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set sys = '' %}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ sys if loop.last else '' }}{{ m['content'] }}"
    " [/INST]{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
# Reasoning is shown in the last answer only, and an empty one is put where there is none, as in Qwen3.
REASONING = (
    "{% for m in messages %}{% set c = m['content'] %}"
    "{% if m['role'] == 'assistant' %}{% set c = c.split('</think>')[-1].lstrip('\n') %}"
    "{% if loop.last %}{% set c = '<think>\n\n</think>\n\n' + c %}{% endif %}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ c }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The answers are marked for masks, which p2d has no need of.
MARKED = CHATML.replace(
    "{{ m['content'] }}<|im_end|>",
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}",
)
# The first turn holds the system message, and each answer closes its exchange, as in Llama 2.
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set head = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set head = '' %}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "<s>[INST] {{ head if loop.first else '' }}{{ m['content'] | trim }} [/INST]"
    "{% else %} {{ m['content'] | trim }} </s>{% endif %}{% endfor %}"
)
# What is said depends on what was asked: no way to tell the turns apart.
MANGLING = "{% for m in messages %}{{ m['content'] | upper }}|{% endfor %}"
TEMPLATES = {
    "chatml": CHATML,
    "trimming": TRIMMING,
    "no-system": NO_SYSTEM,
    "default-system": DEFAULT_SYSTEM,
    "system-last": SYSTEM_LAST,
    "reasoning": REASONING,
    "llama-2": LLAMA_2,
    "marked": MARKED,
    "mangling": MANGLING,
}
ADDED = {"none": None, "bos": "<s> $A", "bos-eos": "<s> $A </s>"}


def _train(added: str | None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    if added is not None:
        special_ids = [(token, tokenizer.token_to_id(token)) for token in SPECIALS[:2]]
        tokenizer.post_processor = processors.TemplateProcessing(single=added, special_tokens=special_ids)
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer_of() -> Callable[..., Any]:
    """Byte-level BPE tokenizers: `tokenizer_of(template, added)`; byte-level, so that decoding gives text back."""
    made: dict[tuple[str | None, str], Any] = {}

    def make(template: str | None = None, added: str = "none") -> Any:
        if (template, added) not in made:
            tokenizer = PreTrainedTokenizerFast(
                tokenizer_object=_train(ADDED[added]),
                bos_token="<s>",
                eos_token="</s>",
                additional_special_tokens=SPECIALS[2:],
                clean_up_tokenization_spaces=False,
            )
            tokenizer.chat_template = None if template is None else TEMPLATES[template]
            made[template, added] = tokenizer
        return made[template, added]

    return make


@pytest.fixture(scope="session")
def record_of() -> Callable[..., Record]:
    def make(prompt: str, completion: str = "yes", *, system: str | None = None, name: str = "r") -> Record:
        context = [Message("user", prompt)] if system is None else [Message("system", system), Message("user", prompt)]
        return Record(name, tuple(context), completion, None, {}, f"{name}:1")

    return make
