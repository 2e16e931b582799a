# SPDX-License-Identifier: Apache-2.0
"""What the README's Python blocks find already there: a tiny PEFT model, a tiny plain model, a batch."""

from __future__ import annotations

from types import SimpleNamespace

import peft
import torch
import transformers


def _model() -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def _tokenizer(text: str, **kwargs) -> transformers.BatchEncoding:
    return transformers.BatchEncoding({"input_ids": [ord(c) % 97 for c in text]})


def namespace() -> dict:
    """Fresh objects for one block."""
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    ids = torch.randint(0, 97, (2, 9))
    peft_model = peft.get_peft_model(_model(), config)

    def train() -> None:
        peft_model.train()
        peft_model(input_ids=ids, labels=ids).loss.backward()

    return {
        "peft_model": peft_model,
        "model": _model(),
        "tokenizer": _tokenizer,
        "batch": {"input_ids": ids, "labels": ids},
        "trainer": SimpleNamespace(train=train),
    }


def trl_namespace() -> dict:
    """Fresh objects for one block that trains with TRL; rows share prompts of 20 tokens."""
    from tests.huggingface import models, trl_runs

    prompts = [trl_runs.words(i, 20) for i in range(6)]
    pairs = [{"prompt": x, "chosen": " w1 w2 w3", "rejected": " w4 w5"} for x in prompts]
    config = models.FAMILIES["llama (GQA)"].arguments

    def reward(completions: list[str], **_: object) -> list[float]:
        return [float(len(set(text))) for text in completions]

    return {
        "model": transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)),
        "classifier": transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**config, num_labels=1)),
        "tokenizer": trl_runs.tokenizer(),
        "prompts": trl_runs.datasets.Dataset.from_list([{"prompt": x} for x in prompts]),
        "preferences": trl_runs.datasets.Dataset.from_list(pairs),
        "reward": reward,
    }
