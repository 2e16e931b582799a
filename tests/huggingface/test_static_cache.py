# SPDX-License-Identifier: Apache-2.0
"""Decoding with a prefix and a static cache, whose tensors keep their shapes and addresses.

Tokens are those of a dynamic cache. A decoding step does not wait for the device and takes no data from the host, so
that it can be captured in a CUDA graph, and it compiles to one graph.
"""

from __future__ import annotations

import pytest
import torch
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from tests.huggingface import kinds, models
from tests.huggingface.models import FAMILIES, IDS, MASKS
from tests.huggingface.test_synchronisations import CountWaits

LENGTH = 24
STEPS = 5
WITH_PREFIX = kinds.KINDS
#: With rotary positions, and with learned ones in two forms.
NAMES = ("llama (GQA)", "gpt2", "opt")


def generate(model, mask, **options):
    inputs = {"input_ids": IDS, "max_new_tokens": STEPS, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(**inputs, attention_mask=models.ONES if mask is None else mask, **options)


@pytest.mark.parametrize("mask", ["ones", "left"])
@pytest.mark.parametrize("kind", WITH_PREFIX)
@pytest.mark.parametrize("name", NAMES)
def test_generate_returns_the_tokens_of_a_dynamic_cache(name, kind, mask):
    model = kinds.patched_model(kind, FAMILIES[name]).eval()
    want = generate(model, MASKS[mask])
    for _ in range(2):
        got = generate(model, MASKS[mask], cache_implementation="static", disable_compile=True)
        assert got.tolist() == want.tolist()


def prefilled(kind, mask):
    """(the base model, the output of a call that has filled a static cache, the tokens that follow)."""
    model = kinds.patched_model(kind, FAMILIES["llama (GQA)"]).eval()
    base = getattr(model, "get_base_model", lambda: model)()
    cache = StaticCache(base.config, max_cache_len=LENGTH)
    inputs = model.prepare_inputs_for_generation(IDS, past_key_values=cache, attention_mask=mask, use_cache=True)
    inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    want = generate(model, mask)[:, IDS.shape[1] :]
    return base, base(**inputs), want


class NoDataOfTheHost(CountWaits):
    """Also count tensors that are made from data of the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("lift_fresh", "lift_fresh_copy"):
            self.found["data of the host"] += 1
        return super().__torch_dispatch__(func, types, args, kwargs)


def decode(run, output, steps):
    tokens = [output.logits[:, -1].argmax(-1, keepdim=True)]
    for _ in range(steps - 1):
        tokens.append(run(tokens[-1], output.past_key_values))
    return torch.cat(tokens, 1)


@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", WITH_PREFIX)
def test_a_decoding_step_can_be_captured(kind, compiled):
    """Eager, it does not wait for the device. Compiled, it is one graph for all steps."""
    base, output, want = prefilled(kind, models.ONES)
    layers = output.past_key_values.layers
    assert all(type(layer) is StaticLayer for layer in layers)
    addresses = [layer.keys.data_ptr() for layer in layers]

    def step(token, cache):
        logits = base(input_ids=token, past_key_values=cache, use_cache=True).logits
        return logits[:, -1].argmax(-1, keepdim=True)

    if compiled:
        torch._dynamo.reset()
        run = torch.compile(step, fullgraph=True, dynamic=False)
        with torch._dynamo.config.patch(error_on_recompile=True):
            got = decode(run, output, STEPS)
    else:
        with NoDataOfTheHost() as count:
            got = decode(step, output, STEPS)
        assert not count.found, dict(count.found)
    assert got.tolist() == want.tolist()
    assert [layer.keys.data_ptr() for layer in layers] == addresses


@torch.no_grad()
@pytest.mark.parametrize("kind", WITH_PREFIX)
def test_a_mask_of_the_caller(kind):
    """[B, max_cache_len], of which columns without a token are ignored."""
    base, output, want = prefilled(kind, MASKS["left"])
    mask = torch.nn.functional.pad(MASKS["left"], (0, LENGTH - IDS.shape[1]), value=1)

    def step(token, cache):
        position = mask[:, : int(cache.get_seq_length()) + 1].sum(1, keepdim=True) - 1
        inputs = {"input_ids": token, "attention_mask": mask, "position_ids": position}
        return base(**inputs, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)

    assert decode(step, output, STEPS).tolist() == want.tolist()


@torch.no_grad()
def test_a_filled_static_cache_is_refused():
    model = kinds.patched_model("native prefix", FAMILIES["llama (GQA)"]).eval()
    cache = StaticCache(model.config, max_cache_len=LENGTH)
    model(input_ids=IDS, past_key_values=cache)
    with pytest.raises(ValueError, match="tokens that have not attended to the prefix"):
        model(input_ids=IDS[:, :1], past_key_values=cache)


def test_static_caches_that_a_prefix_cannot_use_are_refused():
    model = kinds.patched_model("native prefix", FAMILIES["gemma3"])
    cache = StaticCache(model.config.get_text_config(), max_cache_len=LENGTH)
    with pytest.raises(ValueError, match="a StaticCache without sliding windows or a DynamicCache"):
        model.eval()(input_ids=IDS, past_key_values=cache)
    model = kinds.patched_model("native prefix", FAMILIES["llama (GQA)"]).train()
    with pytest.raises(ValueError, match="expected None or a DynamicCache"):
        model(input_ids=IDS, past_key_values=StaticCache(model.config, max_cache_len=LENGTH))
