# SPDX-License-Identifier: Apache-2.0
"""Concurrent and nested calls of one patched model."""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch

import peftkern
from tests.huggingface import models
from tests.huggingface.models import FAMILIES, IDS

LENGTHS = (3, 5, 7)


def build(name, native):
    family = FAMILIES[name]
    if native:
        prefix = models.native_prefix(models.peft_model(family, patched=False))
        return peftkern.patch(models.base_model(family), prefix).eval()
    return models.peft_model(family, patched=True).eval()


def logits(model, task, length):
    labels = {"labels": models.TARGETS[:, :length].contiguous()} if task == "SEQ_2_SEQ_LM" else {}
    with torch.no_grad():
        return model(input_ids=IDS[:, :length], **labels).logits


def tokens(model, task, length):
    return model.generate(
        input_ids=IDS[:, :length], max_new_tokens=length, do_sample=False, pad_token_id=0, eos_token_id=None
    )


@pytest.mark.parametrize("native", [False, True], ids=["peft", "native"])
@pytest.mark.parametrize("name", ["llama (GQA)", "gpt2", "t5", "umt5 (bias per layer)"])
def test_several_threads_call_one_model(name, native):
    """Each call returns its usual result. PEFT's ``generate`` replaces a method of the model and is not tested."""
    model, task = build(name, native), FAMILIES[name].task
    calls = (logits, tokens) if native else (logits,)
    want = {(call, length): call(model, task, length) for call in calls for length in LENGTHS}
    failures = []

    def work(length):
        for call in calls * 4:
            try:
                got = call(model, task, length)
                if not torch.equal(got, want[call, length]):
                    failures.append(f"{call.__name__} of {length} tokens differ from those of one thread")
            except Exception as error:
                failures.append(f"{call.__name__} of {length} tokens: {error}")

    threads = [threading.Thread(target=work, args=(length,)) for length in LENGTHS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


@pytest.mark.parametrize("disabled", [False, True], ids=["enabled", "disabled"])
@pytest.mark.parametrize("name", ["llama (GQA)", "gpt2", "t5"])
def test_a_hook_calls_the_model_again(name, disabled):
    """Also without its prefix, inside an attention module of a call with a prefix."""
    model, task = build(name, native=False), FAMILIES[name].task
    want = logits(model, task, 7)
    attention = next(iter(models.patch_of(model).prefix_layers))
    inner = []

    def call_inside():
        with model.disable_adapter() if disabled else contextlib.nullcontext():
            return logits(model, task, 3)

    def call_again(module, args):
        handle.remove()
        inner.append(call_inside())

    projection = next(module for module in attention.children() if getattr(module, "weight", None) is not None)
    handle = projection.register_forward_pre_hook(call_again)
    outer = logits(model, task, 7)
    assert torch.equal(outer, want), "the outer call"
    assert torch.equal(inner[0], call_inside()), "the inner call"


def test_a_nested_call_leaves_no_cache_in_the_outer_output():
    model = build("llama (GQA)", native=True)

    def call_again(module, args, output):
        handle.remove()
        model(input_ids=IDS[:, :2])

    handle = model.model.layers[0].register_forward_hook(call_again)
    assert list(model(input_ids=IDS, use_cache=False)) == ["logits"]


def test_a_refused_call_does_not_change_the_cache_that_it_was_given():
    model = build("gpt2", native=True)
    cache = model(input_ids=IDS, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="at most 64 positions"):
        model(input_ids=torch.ones(3, 64, dtype=torch.long), past_key_values=cache)
    assert cache.get_seq_length() == IDS.shape[1]
