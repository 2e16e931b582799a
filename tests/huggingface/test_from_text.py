# SPDX-License-Identifier: Apache-2.0
"""A prefix from text, or from random tokens, acts as those tokens do before the sequence, in every family."""

from __future__ import annotations

import pytest
import torch

import peftkern
from peftkern import PrefixKV
from peftkern.model_info import cache_argument, given_cache
from tests.huggingface import models
from tests.huggingface.families import tiny
from tests.huggingface.families.trials import relative
from tests.huggingface.models import BATCH, IDS, VOCAB

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

TEXT = torch.randint(3, VOCAB, (6,), generator=torch.Generator().manual_seed(11)).tolist()
LENGTH = len(TEXT)
TOLERANCE = 2e-5
#: Families with grouped heads, learned positions, windows, compressed keys, recurrent layers, and shared keys.
QUICK = ("llama", "opt", "mistral", "deepseek_v3", "bamba", "gemma4_text")


def tokenizer(text):
    return {"input_ids": TEXT}


def built(family):
    """A tiny model that takes a ``PrefixKV``."""
    model = tiny.tiny_model(family).eval()
    try:
        with peftkern.patched(model, PrefixKV(model, LENGTH)):
            pass
    except ValueError as refusal:
        pytest.skip(f"takes no PrefixKV: {refusal}")
    tiny.forget(model)
    return model


@torch.no_grad()
def logits_behind_text(model, text):
    """The stock model's logits where it continues from its own cache of the text."""
    cache = given_cache(model(input_ids=torch.tensor([text]).expand(BATCH, -1), use_cache=True))
    logits = model(input_ids=IDS, **{cache_argument(model): cache}).logits
    tiny.forget(model)
    return logits


def assert_equals_stock_cache(prefix, model, text):
    """The keys and values are those of the model's own cache, in which layers with a window keep the last ones."""
    with torch.no_grad():
        cache = given_cache(model(input_ids=torch.tensor([text]), use_cache=True))
    compared = 0
    for layer, pair in zip(cache.layers, prefix.layer_kv(), strict=True):
        if pair is None or getattr(layer, "keys", None) is None:
            continue
        for got, want in zip(pair, (layer.keys[0], layer.values[0]), strict=True):
            last = want.shape[1]
            assert 0 < last <= LENGTH
            assert relative(got[:, -last:].detach(), want) <= TOLERANCE
            compared += 1
    assert compared


@torch.no_grad()
def logits_of_text_and_sequence(model, text):
    """The stock model's logits of the sequence where it reads the text before it in the same call."""
    ids = torch.cat([torch.tensor([text]).expand(BATCH, -1), IDS], 1)
    logits = model(input_ids=ids).logits[:, len(text) :]
    tiny.forget(model)
    return logits


def from_text(model):
    """A prefix of the text, with the states of recurrent layers if they continue from states."""
    try:
        prefix = PrefixKV.from_text(model, tokenizer, "", LENGTH, state=True)
        with peftkern.patched(model, prefix):
            return prefix
    except ValueError as error:
        if not str(error).startswith("state: expected False"):
            raise
        return PrefixKV.from_text(model, tokenizer, "", LENGTH)


def check(family):
    model = built(family)
    prefix = from_text(model)
    tiny.forget(model)
    if prefix.state is None and None in prefix.shapes:  # recurrent layers do not see the text
        assert_equals_stock_cache(prefix, model, TEXT)
        return
    want = (logits_behind_text if prefix.state is None else logits_of_text_and_sequence)(model, TEXT)
    with torch.no_grad(), peftkern.patched(model, prefix):
        assert relative(model(input_ids=IDS).logits, want) <= TOLERANCE


@pytest.mark.parametrize("family", QUICK)
def test_common_kinds(family):
    check(family)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(tiny.FAMILIES.keys() - tiny.CANNOT.keys() - set(QUICK)))
def test_every_causal_family(family):
    check(family)


@pytest.mark.parametrize("name", ["bert", "t5", "bart"])
def test_encoders_and_encoder_decoders(name):
    model = models.base_model(models.FAMILIES[name]).eval()
    prefix = PrefixKV.from_text(model, tokenizer, "", LENGTH)
    ids = torch.tensor([TEXT])
    inputs = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        cache = given_cache(model(input_ids=ids, **inputs, use_cache=True)) if inputs else None
    if cache is None:  # a prefix in an encoder sees the text alone, as its cache has it
        assert prefix.lengths[0] == LENGTH
        return
    for layer, (key, value) in zip(cache.self_attention_cache.layers, prefix.layer_kv(), strict=True):
        assert torch.equal(key.detach(), layer.keys[0])
        assert torch.equal(value.detach(), layer.values[0])


def test_random_tokens_of_the_vocabulary():
    model = models.base_model(models.FAMILIES["llama (GQA)"]).eval()
    made = [PrefixKV.from_vocabulary(model, LENGTH, generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    text = torch.randint(VOCAB, (LENGTH,), generator=torch.Generator().manual_seed(5)).tolist()
    assert torch.equal(made[0].trainable[0], made[1].trainable[0])
    want = logits_behind_text(model, text)
    with torch.no_grad(), peftkern.patched(model, made[0]):
        assert relative(model(input_ids=IDS).logits, want) <= TOLERANCE


def test_random_tokens_take_the_options_of_a_prefix():
    model = models.base_model(models.FAMILIES["llama (GQA)"])
    torch.manual_seed(3)
    prefix = PrefixKV.from_vocabulary(model, [2, 5], num_frozen_tokens=1)
    assert prefix.lengths == (2, 5)
    assert prefix.num_frozen_tokens == 1
    with pytest.raises(ValueError, match="length: expected at least one token, got 0"):
        PrefixKV.from_vocabulary(model, 0)
    with pytest.raises(ValueError, match="length: expected at most the model's"):
        PrefixKV.from_vocabulary(model, 100_000)


def test_the_ids_of_a_text_need_no_tokenizer():
    model = tiny.tiny_model("llama").eval()
    want = PrefixKV.from_text(model, tokenizer, "text", 9)
    assert torch.equal(PrefixKV.from_text(model, None, TEXT, 9).flat_values(), want.flat_values())
    assert PrefixKV.from_text(model, None, TEXT).lengths == (LENGTH, LENGTH)
    prompt = peftkern.SoftPrompt.from_text(model, None, TEXT, 9)
    want = peftkern.SoftPrompt.from_text(model, tokenizer, "text", 9)
    assert torch.equal(prompt.weight, want.weight)


@pytest.mark.parametrize(
    "make",
    [lambda model: PrefixKV.from_text(model, tokenizer, "text"), lambda model: PrefixKV.from_vocabulary(model, 3)],
)
def test_a_patched_model_is_refused(make):
    model = tiny.tiny_model("llama").eval()
    peftkern.patch(model, PrefixKV(model, 3))
    with pytest.raises(
        ValueError, match=r"model: expected a model that is not patched.* call unpatch\(model\) first"
    ):
        make(model)
    peftkern.unpatch(model)
    make(model)
