# SPDX-License-Identifier: Apache-2.0
"""How a document and the turns behind it are written."""

from __future__ import annotations

import pytest
from tokenizers import processors

from peftkern.self_study import Chat

from .lab import TEMPLATE, TEXT, new_tokenizer

#: What a tokenizer adds to a text: nothing, a first token, a last one, both.
ADDS = {"nothing": "$A", "first": "[UNK] $A", "last": "$A [END]", "both": "[UNK] $A [END]"}


def tokenizer_that_adds(single, template=TEMPLATE):
    tokenizer = new_tokenizer(template)
    tokens = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("[UNK]", "[END]")]
    added = processors.TemplateProcessing(single=single, special_tokens=tokens)
    tokenizer.backend_tokenizer.post_processor = added
    tokenizer.bos_token = "[UNK]"
    return tokenizer


@pytest.mark.parametrize("adds", ADDS)
@pytest.mark.parametrize("first", ["", "{{ bos_token }} "])
def test_the_turn_behind_the_document_is_what_the_template_writes(adds, first):
    tokenizer = tokenizer_that_adds(ADDS[adds], first + TEMPLATE)
    chat = Chat(tokenizer)
    assert chat.has_template
    messages = [{"role": "system", "content": TEXT}, {"role": "user", "content": "What ?"}]
    whole = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)["input_ids"]
    assert chat.document(TEXT) + chat.turn("What ?") == list(whole)


@pytest.mark.parametrize("adds", ADDS)
@pytest.mark.parametrize(
    "template",
    [
        None,
        "{{ raise_exception('no system message') }}",
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ messages[0]['content'] }}{{ m['content'] }}{% endif %}"
        "{% endfor %}",
    ],
)
def test_without_a_usable_template_the_document_is_plain_text(template, adds):
    tokenizer = tokenizer_that_adds(ADDS[adds], template)
    chat = Chat(tokenizer)
    assert not chat.has_template
    text, first = new_tokenizer()("some text")["input_ids"], [tokenizer.bos_token_id]
    assert chat.document(" some text\n") == (first if adds in ("first", "both") else []) + text
    assert chat.turn("What ?") == new_tokenizer()("Question: What ?\nAnswer:")["input_ids"]
