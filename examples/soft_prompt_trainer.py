# SPDX-License-Identifier: Apache-2.0
"""Train a soft prompt with the Trainer of transformers.

    python examples/soft_prompt_trainer.py                                      a tiny random model, in seconds
    python examples/soft_prompt_trainer.py --model HuggingFaceTB/SmolLM2-135M   a real one, from the Hub or a folder

With a real model, ``SoftPrompt.from_text(model, tokenizer, "an instruction", length)`` is the better start. Needs
``pip install accelerate``.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

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


def make_rows(count: int) -> list[dict[str, torch.Tensor]]:
    """Random sequences of different lengths, padded on the right to 32 tokens."""
    rows = []
    for _ in range(count):
        length = int(torch.randint(8, 33, ()))
        input_ids = torch.randint(1, 256, (32,))
        attention_mask = (torch.arange(32) < length).long()
        labels = input_ids.masked_fill(attention_mask == 0, -100)
        rows.append({"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels})
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Train the prompt, then save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hub name or a folder; default a tiny random model")
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    model = load_model(options.model)
    rows = make_rows(32)
    with tempfile.TemporaryDirectory() as folder:
        # start of the example
        prompt = peftkern.SoftPrompt(model, 16, init="vocab")
        peftkern.patch(model, prompt, freeze=True)  # before the Trainer, whose optimizer then gets the prompt

        settings = TrainingArguments(
            folder, max_steps=options.steps, per_device_train_batch_size=8, learning_rate=1e-2, logging_steps=5,
            report_to=[], save_strategy="no",
        )  # fmt: skip
        Trainer(model=model, args=settings, train_dataset=rows).train()

        peftkern.save_prefix(prompt, folder)
        # end of the example
        print("saved:", peftkern.load_prefix(folder))


if __name__ == "__main__":
    main()
