# SPDX-License-Identifier: Apache-2.0
"""Train a prefix of keys and values in a plain Hugging Face model, without PEFT.

    python examples/prefix_kv.py                                      a tiny random model, in seconds, offline
    python examples/prefix_kv.py --model HuggingFaceTB/SmolLM2-135M   a real one, from the Hub or a local folder

With a real model, ``PrefixKV.from_text(model, tokenizer, "an instruction", length)`` is the better start.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import peftkern


def load_model(name: str | None) -> PreTrainedModel:
    """The model called ``name``, or a tiny random one."""
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def main(arguments: list[str] | None = None) -> None:
    """Train a few steps, save the prefix, load it, and generate with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hub name or a folder; default a tiny random model")
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    model = load_model(options.model)
    input_ids = torch.randint(0, 256, (4, 32))
    batch = {"input_ids": input_ids, "labels": input_ids}

    prefix = peftkern.PrefixKV(model, 16, num_frozen_tokens=1)  # a cartridge: its first token stays fixed
    peftkern.patch(model, prefix, freeze=True)  # the model's own parameters do not train
    optimizer = torch.optim.AdamW((p for p in prefix.parameters() if p.requires_grad), lr=1e-2)
    for step in range(options.steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.4f}")

    with tempfile.TemporaryDirectory() as folder:
        peftkern.save_prefix(prefix, folder)  # PEFT's folder format, safetensors only
        peftkern.unpatch(model)
        prefix = peftkern.load_prefix(folder, trainable=True, model=model)

    peftkern.patch(model, prefix)
    tokens = model.generate(input_ids[:1], min_new_tokens=8, max_new_tokens=8, do_sample=False, pad_token_id=0)
    print("generated with the loaded prefix:", tokens[0, input_ids.shape[1] :].tolist())


if __name__ == "__main__":
    main()
