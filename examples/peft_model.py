# SPDX-License-Identifier: Apache-2.0
"""Speed up the training of an existing PEFT model.

    python examples/peft_model.py                                      a tiny random model, in seconds, offline
    python examples/peft_model.py --model HuggingFaceTB/SmolLM2-135M   a real one, from the Hub or a local folder

Nothing changes for PEFT: the parameters, the checkpoint and the loss are its own.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
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
    """Train a few steps, then load the checkpoint with PEFT."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hub name or a folder; default a tiny random model")
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    base_model = load_model(options.model)
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=16)
    model = get_peft_model(base_model, config)
    input_ids = torch.randint(0, 256, (4, 32))
    batch = {"input_ids": input_ids, "labels": input_ids}

    with torch.no_grad():
        peft_loss = model.eval()(**batch).loss.item()

    peftkern.patch(model)  # the only line that differs from a script for PEFT

    with torch.no_grad():
        loss = model(**batch).loss.item()
    print(f"loss with PEFT {peft_loss:.6f}, with peftkern {loss:.6f}")
    print(peftkern.explain(model))

    model.gradient_checkpointing_enable({"use_reentrant": False})  # PEFT alone raises an error with a prefix
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(options.steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.4f}")

    peftkern.unpatch(model)
    model.gradient_checkpointing_disable()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        reloaded = PeftModel.from_pretrained(base_model, folder)  # PEFT alone
    with torch.no_grad():
        print(f"loss of the checkpoint in PEFT: {reloaded.eval()(**batch).loss.item():.4f}")


if __name__ == "__main__":
    main()
