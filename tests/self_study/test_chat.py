# SPDX-License-Identifier: Apache-2.0
"""How a document and the turns behind it are written."""

from __future__ import annotations

import pytest

from peftkern.self_study import Chat

from .lab import TEXT, new_tokenizer


def test_the_turn_behind_the_document_is_what_the_template_writes():
    chat, tokenizer = Chat(new_tokenizer()), new_tokenizer()
    assert chat.has_template
    messages = [{"role": "system", "content": TEXT}, {"role": "user", "content": "What ?"}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer(chat.document(TEXT))["input_ids"] + chat.turn("What ?") == tokenizer(whole)["input_ids"]


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{{ raise_exception('no system message') }}",
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ messages[0]['content'] }}{{ m['content'] }}{% endif %}"
        "{% endfor %}",
    ],
)
def test_without_a_usable_template_the_document_is_plain_text(template):
    chat = Chat(new_tokenizer(template))
    assert not chat.has_template
    assert chat.document(" some text\n") == "some text\n\n"
    assert chat.turn("What ?") == new_tokenizer()("Question: What ?\nAnswer:")["input_ids"]
