# SPDX-License-Identifier: Apache-2.0
"""A model's cache is found under every name that transformers, PEFT or the caller uses for it."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch
from transformers.cache_utils import DynamicCache

import peftkern
from peftkern.model_info import CACHE_NAMES, cache_argument, cache_name, given_cache, rename_cache
from tests.huggingface import models
from tests.huggingface.models import FAMILIES, IDS, ONES, PREFIX, VOCAB

LLAMA = FAMILIES["llama (GQA)"]
TOLERANCE = 1e-5


def test_a_cache_gets_the_name_that_is_asked_for():
    for given in CACHE_NAMES:
        for wanted in CACHE_NAMES:
            arguments = {given: "the cache", "use_cache": True}
            rename_cache(arguments, wanted)
            assert arguments == {wanted: "the cache", "use_cache": True}
            assert cache_name(arguments) == wanted
            assert given_cache(arguments) == "the cache"


def test_no_cache_is_none():
    arguments = {"use_cache": True}
    rename_cache(arguments, "cache")
    assert arguments == {"use_cache": True}
    assert cache_name(arguments) is given_cache(arguments) is None
    arguments = {"past_key_values": None, "cache": "the cache"}
    rename_cache(arguments, "cache")
    assert arguments == {"cache": "the cache"}
    with pytest.raises(ValueError, match="model: Linear takes no cache"):
        cache_argument(torch.nn.Linear(2, 2))


def prefixed_model():
    prefix = peftkern.PrefixKV(None, PREFIX, num_layers=2, num_kv_heads=2, head_dim=16)
    return peftkern.patch(models.base_model(LLAMA), prefix).eval()


@torch.no_grad()
@pytest.mark.parametrize("level", ["base model", "backbone"])
@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_cache_can_be_continued_by_either_name(name, level):
    model = prefixed_model()
    module = model if level == "base model" else model.model
    want = module(input_ids=IDS)[0][:, -2:]
    cache = given_cache(module(input_ids=IDS[:, :-2], use_cache=True, **{name: DynamicCache()}))
    got = module(input_ids=IDS[:, -2:], attention_mask=ONES, **{name: cache})[0]
    assert models.difference(got, want) <= TOLERANCE


def test_two_caches_are_refused():
    given = dict.fromkeys(CACHE_NAMES)
    for name in given:
        given[name] = DynamicCache()
    with pytest.raises(ValueError, match="past_key_values, cache: expected one cache"):
        prefixed_model()(input_ids=IDS, **given)


def step_by_step(model, steps, **inputs):
    """Greedy tokens without a cache, from PEFT's forward alone."""
    ids = IDS
    for _ in range(steps):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids


PEFT_MODELS = {
    "prefix": lambda **options: models.peft_model(LLAMA, **options),
    "cartridge": lambda **options: models.peft_model(LLAMA, num_frozen_tokens=2, **options),
    "prompt": lambda **options: models.prompt_model(LLAMA, **options),
    "prompt, put before every sample": lambda **options: models.prompt_model(FAMILIES["llama4 (chunks)"], **options),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", PEFT_MODELS)
def test_generation_sees_the_prefix_in_every_step(kind):
    """Not compared with PEFT, which may look for the cache under another name than the model's."""
    model = PEFT_MODELS[kind](patched=True).eval()
    want = step_by_step(model, 6)
    got = models.generate(model, LLAMA.task, attention_mask=ONES, do_sample=False)
    assert got.tolist() == want.tolist()
    assert int(want.max()) < VOCAB


@pytest.mark.parametrize("kind", ["prefix", "cartridge", "prompt"])
def test_no_call_is_warned_of_its_cache(kind):
    model = PEFT_MODELS[kind](patched=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.train()(input_ids=IDS, attention_mask=ONES, labels=IDS).loss.backward()
        models.generate(model.eval(), LLAMA.task, attention_mask=ONES, do_sample=False)
    assert [str(w.message) for w in caught if any(name in str(w.message) for name in CACHE_NAMES)] == []


@torch.no_grad()
@pytest.mark.parametrize("kind", PEFT_MODELS)
def test_unpatched_models_have_peft_s_inputs_again(kind):
    """PEFT's generate leaves the function that it has used on the base model."""
    model = PEFT_MODELS[kind](patched=True).eval()
    models.generate(model, LLAMA.task, attention_mask=ONES, do_sample=False)
    peftkern.unpatch(model)
    own = type(model.get_base_model()).prepare_inputs_for_generation
    for prepare in (model.base_model_prepare_inputs_for_generation, model.base_model.prepare_inputs_for_generation):
        assert inspect.unwrap(prepare.__func__) is inspect.unwrap(own)
