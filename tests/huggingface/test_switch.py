# SPDX-License-Identifier: Apache-2.0
"""One patched model reads several prefixes in turn; documents become prefixes in chunks."""

from __future__ import annotations

import copy

import pytest
import torch

import peftkern
from peftkern import PrefixKV, model_info
from peftkern.huggingface.switch import switched
from tests.huggingface import models
from tests.huggingface.models import FAMILIES, IDS, RIGHT


def base(name="llama (GQA)"):
    torch.manual_seed(0)
    return models.base_model(FAMILIES[name]).eval().requires_grad_(False)


def logits(model, **arguments):
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=RIGHT, use_cache=False, **arguments).logits


def test_a_switched_model_computes_what_one_patched_with_that_prefix_does():
    model = base()
    short, long = PrefixKV(model, 3, std=0.5), PrefixKV(model, 9, std=0.5)
    with peftkern.patched(model, long):
        want = logits(model)
    with peftkern.patched(model, short):
        own = logits(model)
        with switched(model, long):
            assert torch.equal(logits(model), want)
            assert model.peftkern_prefix is long
            with switched(model, short):
                assert torch.equal(logits(model), own), "switches nest"
        assert torch.equal(logits(model), own)
        assert not torch.equal(want, own)


def test_gradients_reach_the_prefix_that_is_read():
    model = base()
    document, cartridge = PrefixKV(model, 9, std=0.5).requires_grad_(False), PrefixKV(model, 3, std=0.5)
    peftkern.patch(model, document, freeze=True)
    model.train()
    with switched(model, cartridge):
        model(input_ids=IDS, attention_mask=RIGHT, labels=IDS).loss.backward()
    assert cartridge.trainable[0].grad.abs().sum() > 0
    assert document.trainable[0].grad is None


def test_an_error_in_the_block_restores_the_prefix():
    model = base()
    first, second = PrefixKV(model, 3), PrefixKV(model, 4)
    peftkern.patch(model, first)
    with pytest.raises(KeyboardInterrupt), switched(model, second):
        raise KeyboardInterrupt
    assert model.peftkern_prefix is first
    peftkern.unpatch(model)
    assert not hasattr(model, "peftkern_prefix")


@pytest.mark.parametrize("again", [False, True])
def test_a_patch_that_is_removed_in_the_block_stays_removed(again):
    """As in a cell that runs again, or a callback that ends training."""
    model = base()
    first, second, third = (PrefixKV(model, length, std=0.5) for length in (3, 4, 5))
    stock = logits(model)
    peftkern.patch(model, first)
    with switched(model, second), switched(model, first):
        peftkern.unpatch(model)
        if again:
            peftkern.patch(model, third)
    if again:
        assert model.peftkern_prefix is third
        peftkern.unpatch(model)
    assert not hasattr(model, "peftkern_prefix")
    assert not any("peftkern" in name for name in model.state_dict())
    assert torch.equal(logits(model), stock)


def test_a_bank_with_the_document_and_the_cartridge():
    """Teacher and student are two rows of one ragged bank, in one batch."""
    model = base()
    document, cartridge = PrefixKV(model, 9, std=0.5), PrefixKV(model, 3, std=0.5)
    peftkern.patch(model, PrefixKV.stack([document, cartridge]))
    teacher, student = (logits(model, prefix_ids=torch.full((3,), row)) for row in (0, 1))
    for prefix, from_bank in ((document, teacher), (cartridge, student)):
        with switched(model, prefix):
            torch.testing.assert_close(logits(model)[RIGHT == 1], from_bank[RIGHT == 1])


def test_what_a_patched_model_was_not_tried_with_is_refused():
    model = base()
    prefix = PrefixKV(model, 3)
    with pytest.raises(ValueError, match=r"model: expected one that was given to patch.*not patched"):
        switched(model, prefix).__enter__()
    peftkern.patch(model, prefix)
    unfit = {
        "a bank": PrefixKV.stack([PrefixKV(model, 3)]),
        "other gates": PrefixKV(model, 3, learn_length=True),
        r"LayerShape|layer": PrefixKV(None, 3, num_layers=1, num_kv_heads=2, head_dim=8),
        "got Linear": torch.nn.Linear(2, 2),
    }
    for words, other in unfit.items():
        with pytest.raises(ValueError, match=f"prefix: expected.*{words}"):
            switched(model, other).__enter__()
        assert model.peftkern_prefix is prefix


def test_a_copy_of_a_patched_model_switches_on_its_own():
    model = base()
    first, second = PrefixKV(model, 3, std=0.5), PrefixKV(model, 4, std=0.5)
    peftkern.patch(model, first)
    twin, own = copy.deepcopy(model), logits(model)
    with switched(twin, second):
        assert torch.equal(logits(model), own)
        assert not torch.equal(logits(twin), own)


# Documents


class Letters:
    """A tokenizer with one token per letter."""

    def __call__(self, text):
        return {"input_ids": [1 + ord(letter) % 30 for letter in text]}


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_chunks_change_nothing(name, monkeypatch):
    model, text = base(name), "a document of a few tokens"
    try:
        want = PrefixKV.from_text(model, Letters(), text)
    except ValueError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(model_info, "CHUNK", 5)
    found = PrefixKV.from_text(model, Letters(), text)
    assert max(found.lengths) == len(text), "all tokens"
    for ours, whole in zip(found.layer_kv(), want.layer_kv(), strict=True):
        if whole is not None:
            torch.testing.assert_close(ours, whole, rtol=1e-3, atol=1e-4)


def test_no_call_has_more_queries_than_a_chunk(monkeypatch):
    monkeypatch.setattr(model_info, "CHUNK", 5)
    model, rows = base(), []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[1]))
    PrefixKV.from_text(model, Letters(), "a document of a few tokens")
    assert max(rows) <= 8
    assert rows[-6:] == [5, 5, 5, 5, 5, 1]


def test_a_document_longer_than_the_positions_is_refused():
    with pytest.raises(ValueError, match="length: expected at most the model's"):
        PrefixKV.from_text(base(), Letters(), "x" * 5000)
    with pytest.raises(ValueError, match="text, length: expected at least one token"):
        PrefixKV.from_text(base(), Letters(), "")
