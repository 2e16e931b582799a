# SPDX-License-Identifier: Apache-2.0
"""A tiny model and made-up reviews for the demo, and what tests do with a run."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
from pathlib import Path

import torch

from peftkern.tools.demo import session, training

GOOD = ["brave", "fine", "warm", "witty", "lovely", "moving"]
BAD = ["dull", "stale", "noisy", "cold", "clumsy", "empty"]
FILLER = ["the", "film", "plot", "cast", "is", "and", "with", "a", "very", "scene", "ending"]


def write_assets(folder: Path) -> Path:
    """Write ``model`` (Llama, 2 layers, GQA) and ``reviews.csv`` (96 rows of two sources)."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["[UNK]", "Review", "Sentiment", ":", ".", "positive", "negative", *GOOD, *BAD, *FILLER]
    words += ["Classify", "movie", "review", "below", "as", "or", "in", "sentiment"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(dict.fromkeys(words))}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / "model")
    rng = random.Random(0)
    with (folder / "reviews.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "source"])
        for i in range(96):
            text = rng.choices(FILLER, k=rng.randrange(4, 30)) + rng.choices(GOOD if i % 2 else BAD, k=3)
            writer.writerow([" ".join(text), i % 2, "imdb" if i % 3 else "rotten_tomatoes"])
    return folder


def losses(out: Path) -> list[dict[str, float]]:
    return [step["loss"] for step in json.loads((out / "result.json").read_text())["steps"]]


def interrupt_in_step(monkeypatch, step: int) -> None:
    """Send a real SIGINT during step ``step`` (from 0)."""
    train_pair = training.train_pair

    def interrupted(arms, task, train, at, options):
        if at == step:
            os.kill(os.getpid(), signal.SIGINT)
        return train_pair(arms, task, train, at, options)

    monkeypatch.setattr(session, "train_pair", interrupted)
