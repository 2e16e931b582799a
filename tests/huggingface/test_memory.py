# SPDX-License-Identifier: Apache-2.0
"""What a prefix adds to the memory that autograd keeps: log-sum-exp and the prefix itself, in every layer."""

from __future__ import annotations

import torch
import transformers
from peft import PrefixTuningConfig, get_peft_model

import peftkern

B, S, P, LAYERS = 2, 96, 16, 3


def _model():
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).train()  # fmt: skip


def _saved_bytes(model) -> int:
    """Of all distinct storages kept for backward, parameters aside."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def note(x):
        if x.untyped_storage().data_ptr() not in parameters:
            saved[x.untyped_storage().data_ptr()] = x  # held, so that its address is not used again
        return x

    ids = torch.randint(0, 64, (B, S))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        model(input_ids=ids, labels=ids).loss.backward()
    return sum(x.untyped_storage().nbytes() for x in saved.values())


def test_a_prefix_keeps_no_more_than_lse_and_itself():
    """Beside the frozen model without a prefix, whose embeddings have a gradient and whose kernel is stock SDPA."""
    bare = _model().requires_grad_(False)
    bare.enable_input_require_grads()
    model = get_peft_model(_model(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P))
    heads, kv_heads, head_dim = 4, 2, 16
    allowed = LAYERS * 4 * (B * heads * S + 2 * kv_heads * P * head_dim)
    with peftkern.patched(model):
        extra = _saved_bytes(model) - _saved_bytes(bare)
    assert extra <= allowed, f"{extra} bytes more than without a prefix; lse and prefix are {allowed}"
    assert _saved_bytes(model) - _saved_bytes(bare) > allowed, "stock PEFT keeps as little: the test measures nothing"
