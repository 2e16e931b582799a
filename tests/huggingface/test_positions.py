# SPDX-License-Identifier: Apache-2.0
"""Position tables: which embeddings are position tables, and which sequences with a prefix exceed them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import peftkern
from peftkern.huggingface.call_arguments import count_prefix
from tests.huggingface import models
from tests.huggingface.models import FAMILIES, PREFIX

TABLES = {"gpt2": 64, "gpt-bigcode (MQA)": 64, "opt": 64, "bart": 64, "bert": 64, "roberta": 62}


def patch(name, model=None):
    family = FAMILIES[name]
    prefix = models.native_prefix(models.peft_model(family, patched=False))
    return peftkern.patch(models.base_model(family) if model is None else model, prefix).eval()


def tables_of(model):
    return [table.num_positions for table in models.patch_of(model).tables]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_position_table_is_found_and_nothing_else(name):
    assert tables_of(patch(name)) == ([TABLES[name]] if name in TABLES else [])


def test_names_do_not_matter():
    model = models.base_model(FAMILIES["llama (GQA)"])
    model.model.compose_tokens = nn.Embedding(4, 8)
    assert tables_of(patch("llama (GQA)", model)) == []


@pytest.mark.parametrize("name", ["opt", "roberta"])
def test_padding_takes_no_positions_where_the_model_counts_tokens(name):
    """As many columns as the table has rows, with a prefix, but no more tokens than fit."""
    model, length = patch(name), TABLES[name]
    padding = model.config.pad_token_id
    for hidden in (PREFIX, PREFIX - 1):
        ids = torch.full((2, length), 7)
        ids[:, :hidden] = padding
        mask = (ids != padding).long()
        if hidden == PREFIX:
            assert torch.isfinite(model(input_ids=ids, attention_mask=mask).logits).all()
        else:
            with pytest.raises(ValueError, match=rf"at most {length} positions.*got {length + 1}"):
                model(input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize("name", ["gpt2", "opt", "roberta"])
def test_explicit_positions_beyond_the_table_are_refused(name):
    model, length = patch(name), TABLES[name]
    first = 2 if name == "roberta" else 0
    last = torch.tensor([[first + length - PREFIX - 2, first + length - PREFIX - 1]])
    ids = torch.full((1, 2), 7)
    assert torch.isfinite(model(input_ids=ids, position_ids=last).logits).all()
    with pytest.raises(ValueError, match=rf"at most {length} positions.*got {length + 1}"):
        model(input_ids=ids, position_ids=last + 1)


def test_positions_from_the_first_token_on_are_counted_behind_the_prefix():
    """Of a call of two tokens that follow two others, of which the first row has one of padding."""
    cache = SimpleNamespace(prefix_positions=5, is_static=False, num_tokens=2, from_first=True)
    kwargs = {"input_ids": torch.tensor([[7, 8], [7, 8]]), "attention_mask": torch.tensor([[0, 1, 1, 1], [1] * 4])}
    count_prefix(cache, kwargs)
    assert kwargs["position_ids"].tolist() == [[6, 7], [7, 8]]
    assert kwargs["attention_mask"].tolist() == [[1] * 5 + [0, 1, 1, 1], [1] * 9]
