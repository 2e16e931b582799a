# SPDX-License-Identifier: Apache-2.0
"""Conversations that the model makes, and their file."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from peftkern.self_study import read_conversations, synthesise

from .lab import OPTIONS, TEMPLATE, TEXT, WORDS, new_tokenizer, other_weights


def test_conversations_depend_on_the_seed_alone(lab, conversations, tmp_path):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert lab.synthesise(tmp_path / "a") == conversations
    assert torch.equal(torch.get_rng_state(), state), "the caller's random state"
    assert lab.synthesise(tmp_path / "b", options=replace(OPTIONS, seed=1)) != conversations
    assert len(conversations) == 10
    assert all(0 < len(c.answer_ids) <= 6 and c.prompt_ids and c.question for c in conversations)
    assert all(1 not in c.answer_ids[:-1] for c in conversations), "an answer ends at its end"
    assert read_conversations(tmp_path / "a") == conversations


@pytest.mark.parametrize("kept", [1, 3, 5, 10, 11])
@pytest.mark.parametrize("torn", [b"", b'{"answer": "tor'])
def test_synthesis_continues_behind_the_last_whole_batch(lab, conversations, kept, torn, tmp_path):
    path, told = tmp_path / "train.jsonl", []
    lab.synthesise(path)
    complete = path.read_bytes()
    path.write_bytes(b"".join(complete.splitlines(keepends=True)[:kept]) + torn)
    assert lab.synthesise(path, progress=lambda done, count: told.append(done)) == conversations
    assert path.read_bytes() == complete
    assert told[0] == (10 if kept == 11 else (kept - 1) // 4 * 4)


def test_a_damaged_or_another_file_is_refused(lab, tmp_path):
    path = tmp_path / "train.jsonl"
    lab.synthesise(path, count=4)
    with pytest.raises(ValueError, match="path: expected a file made with the same count, seed"):
        lab.synthesise(path, count=8, options=replace(OPTIONS, seed=1))
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in ((1, b'{"peftkern_self_study": 99}\n'), (2, b"{}\n"), (3, b"no JSON\n"), (2, b"[1]\n")):
        path.write_bytes(b"".join([*lines[: number - 1], line, *lines[number:]]))
        with pytest.raises(ValueError, match=rf"train.jsonl, line {number}: expected JSON of self-study format"):
            lab.synthesise(path, count=4)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="expected a file of self-study format"):
        lab.synthesise(path, count=4)


def renamed():
    """A tokenizer of as many words, one of which is another, and occurs nowhere."""
    words = list(WORDS)
    words[words.index('"')] = "other"
    return new_tokenizer(words=words)


@pytest.mark.parametrize("name", ["model", "generation", "document", "tokenizer", "tokenizer (template)"])
def test_conversations_made_by_something_else_are_refused(lab, name, tmp_path):
    path = tmp_path / "train.jsonl"
    lab.synthesise(path, count=4)
    given = {"model": lab.model, "tokenizer": lab.tokenizer, "document": lab.document}
    if name == "model":
        given["model"] = other_weights(lab.model)
    elif name == "generation":
        given["model"] = copy.deepcopy(lab.model)
        given["model"].generation_config.repetition_penalty = 1.5
    elif name == "document":
        given["document"] = lab.fresh()
    else:
        others = {"tokenizer": renamed(), "tokenizer (template)": new_tokenizer(TEMPLATE.replace("<| assistant", ""))}
        given["tokenizer"] = others[name]
    with pytest.raises(ValueError, match=rf"path: expected a file made with the same {name.split()[0]}, got"):
        synthesise(text=TEXT, path=path, count=4, options=OPTIONS, **given)
