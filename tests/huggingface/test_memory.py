# SPDX-License-Identifier: Apache-2.0
"""A prefix adds only log-sum-exp and the prefix itself, per layer, to the memory that autograd keeps."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import PrefixTuningConfig, get_peft_model

import peftkern

B, S, P = 2, 96, 16
HEADS, HEAD_DIM = 4, 16


def _model(layers: int, kv_heads: int, dtype: torch.dtype):
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=HEADS * HEAD_DIM, intermediate_size=96, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=kv_heads,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(dtype).train()


def _saved_bytes(model) -> int:
    """Bytes of all distinct storages kept for backward, without parameters."""
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


def _saved_bytes_per_layer(make) -> int:
    """Bytes per layer of the models that ``make(layers)`` returns, without embeddings and output layers."""
    return (_saved_bytes(make(4)) - _saved_bytes(make(2))) // 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_a_prefix_keeps_no_more_than_lse_and_itself(kv_heads, dtype):
    """Per layer, compared with the frozen model without a prefix, with SDPA and a gradient at the embeddings."""

    def bare(layers):
        model = _model(layers, kv_heads, dtype).requires_grad_(False)
        model.enable_input_require_grads()
        return model

    def stock(layers):
        config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
        return get_peft_model(_model(layers, kv_heads, dtype), config)

    without = _saved_bytes_per_layer(bare)
    extra = _saved_bytes_per_layer(lambda layers: peftkern.patch(stock(layers))) - without
    allowed = 4 * (B * HEADS * S + 2 * kv_heads * P * HEAD_DIM)
    assert extra <= allowed, f"{extra} bytes more per layer than without a prefix; lse and prefix are {allowed}"
    assert _saved_bytes_per_layer(stock) - without > allowed, "stock PEFT keeps as little: the test measures nothing"
