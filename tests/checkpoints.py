# SPDX-License-Identifier: Apache-2.0
"""Models, adapters and prefixes that the tests of checkpoints share."""

from __future__ import annotations

import os

import peft
import torch
import transformers

from peftkern import PrefixKV, SoftPrompt

GEOMETRY = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 8}
IDS = torch.tensor([[5, 9, 3, 7], [2, 8, 8, 1]])


def llama(**changes):
    torch.manual_seed(7)
    config = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
              "intermediate_size": 32, "vocab_size": 60, "name_or_path": "somebody/llama"}  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**config, **changes})).eval()


def t5(num_layers):
    torch.manual_seed(7)
    config = transformers.T5Config(
        d_model=32, num_layers=num_layers, num_heads=4, d_kv=8, d_ff=32, vocab_size=60, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def prefix_config(**changes):
    return peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, **changes)


CONFIGS = {
    "prefix": prefix_config,
    "projection": lambda: prefix_config(prefix_projection=True, encoder_hidden_size=12),
    "cartridge": lambda: peft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, num_frozen_tokens=2),
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "p-tuning": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=12),
}

OURS = {
    "prefix": lambda: PrefixKV(llama(), 5, std=0.5),
    "projection": lambda: PrefixKV(llama(), 5, projection=6),
    "cartridge": lambda: PrefixKV(llama(), 5, std=0.5, num_frozen_tokens=2),
    "cartridge, all frozen": lambda: PrefixKV(llama(), 5, std=0.5, num_frozen_tokens=5),
    "cartridge, projection": lambda: PrefixKV(llama(), 5, num_frozen_tokens=1, projection=6),
    "prompt": lambda: SoftPrompt(llama(), 5, std=0.5),
}
ONLY_OURS = {
    "length per layer": lambda: PrefixKV(llama(), [3, 5]),
    "layer left out, frozen": lambda: PrefixKV(llama(num_hidden_layers=3), [3, 0, 1], num_frozen_tokens=2),
    "seq2seq, natural order": lambda: PrefixKV(t5(2), 5),
    "bank": lambda: SoftPrompt(llama(), 5, num_prompts=3),
}


def files(folder):
    return {name: (folder / name).read_bytes() for name in os.listdir(folder)}


def assert_same(actual, expected):
    assert type(actual) is type(expected)
    assert repr(actual) == repr(expected)
    assert actual.origin == expected.origin
    ours, theirs = actual.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        torch.testing.assert_close(ours[name], x, rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")
    trainable = [{n for n, p in x.named_parameters() if p.requires_grad} for x in (actual, expected)]
    assert trainable[0] == trainable[1]


def logits_with(model, prefix):
    """The model's logits with a prefix passed to it by transformers alone."""
    if isinstance(prefix, SoftPrompt):
        embeds = prefix(IDS, model.get_input_embeddings().weight)
        return model(inputs_embeds=embeds).logits
    kv = [tuple(x.detach()[None].expand(2, -1, -1, -1) for x in pair) for pair in prefix.layer_kv()]
    return model(IDS, past_key_values=transformers.DynamicCache(kv)).logits
