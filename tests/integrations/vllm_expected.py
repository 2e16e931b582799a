# SPDX-License-Identifier: Apache-2.0
"""Requests for a vLLM engine, and the tokens that the patched transformers model generates for them."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import peftkern
from peftkern.integrations.prompt_embeds import prompt_embeds

TOKENS = 64
#: Lengths on both sides of vLLM's block on a CPU, which has 128 tokens: one is a multiple, one is that and 1.
LENGTHS = {"short": 21, "block": 128, "longer": 129, "cartridge": 300}
PROMPT_LENGTH = 16
TEXT = (
    "The lighthouse keeper wrote a letter to the harbour master every evening. He described the ships, the weather, "
    "the colour of the sea and the state of the lamp, and he never forgot to ask for more oil. "
)
QUESTIONS = (
    "What did the keeper ask for?", "The capital of France is", "A short poem about the sea:\n", "Once upon a time",
    "The three primary colours are", "In the letter he wrote that", "def add(a, b):\n", "The ship",
)  # fmt: skip
#: Kinds of the 32 requests of the mixed batch.
KINDS = ("short", "prompt", "cartridge", "plain", "longer", "prompt", "block", "cartridge")


def build(model_folder: str, folder: Path, kinds: tuple[str, ...] = KINDS, repeats: int = 4) -> list[dict[str, Any]]:
    """Write prefixes, prompts and ``cases.json`` into ``folder``, and return the cases."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    learned = {name: _prefix(model, tokenizer, name, length) for name, length in LENGTHS.items()}
    learned["prompt"] = peftkern.SoftPrompt.from_text(model, tokenizer, TEXT, PROMPT_LENGTH)
    _disturb(learned["prompt"], 0.02)
    for name, prefix in learned.items():
        if name != "prompt":
            peftkern.export(prefix, folder / "prefixes", "kv", name=name)
    _write_bad_files(folder / "prefixes")
    cases = []
    for index in range(repeats * len(kinds)):
        ids = tokenizer(QUESTIONS[(index * 5 + index // 8) % len(QUESTIONS)]).input_ids
        cases.append({"kind": kinds[index % len(kinds)], "ids": ids})
    for kind in sorted(set(kinds)):
        own = [case for case in cases if case["kind"] == kind]
        for case, tokens in zip(own, generate(model, learned.get(kind), [case["ids"] for case in own]), strict=True):
            case["expected"] = tokens
    for index, case in enumerate(cases):
        if case["kind"] == "prompt":
            case["embeds"] = f"embeds-{index}.pt"
            embeds = prompt_embeds(learned["prompt"], case["ids"], model)
            torch.save(embeds, folder / case["embeds"])
    (folder / "cases.json").write_text(json.dumps(cases))
    return cases


def generate(model: Any, learned: Any, texts: list[list[int]]) -> list[list[int]]:
    """Greedy tokens of the patched model for each text; of the plain model without anything learned."""
    width = max(map(len, texts))
    inputs = {
        "input_ids": torch.tensor([[0] * (width - len(ids)) + ids for ids in texts]),
        "attention_mask": torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in texts]),
    }
    with nullcontext() if learned is None else peftkern.patched(model, learned):
        out = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
    return out[:, width:].tolist()


def _prefix(model: Any, tokenizer: Any, name: str, length: int) -> peftkern.PrefixKV:
    num_frozen = 1 if name == "cartridge" else 0
    prefix = peftkern.PrefixKV.from_text(model, tokenizer, TEXT * 8, length, num_frozen_tokens=num_frozen)
    _disturb(prefix, 0.05)
    return prefix


@torch.no_grad()
def _disturb(module: torch.nn.Module, std: float) -> None:
    """A learned prefix is not exactly that of a text."""
    for weight in module.parameters():
        if weight.requires_grad:
            weight.add_(torch.randn_like(weight) * std * weight.std())


def _write_bad_files(folder: Path) -> None:
    """A prefix of another model, and half of a file."""
    foreign = peftkern.PrefixKV(None, 4, num_layers=2, num_kv_heads=2, head_dim=16)
    peftkern.export(foreign, folder, "kv", name="foreign")
    data = (folder / "short.safetensors").read_bytes()
    (folder / "damaged.safetensors").write_bytes(data[: len(data) // 2])
