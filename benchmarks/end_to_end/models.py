# SPDX-License-Identifier: Apache-2.0
"""Models behind a prefix, their batches, and a training step."""

from __future__ import annotations

from typing import Any

import torch
from peft import PrefixTuningConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import peftkern
from peftkern.tools.bench.providers import DTYPES
from peftkern.tools.bench.shapes import MODELS, Model

from ..common import Row

REAL = "smollm2"
TINY = Model("llama", 2, 32, 48, 128, 4, 2, 8)
#: Arguments of peftkern.patch, None for stock PEFT.
ARMS: dict[str, dict[str, Any] | None] = {
    "PEFT": None, "patch": {"packing": False}, "patch + gc": {"packing": False}, "patch + packing": {},
}  # fmt: skip
SMOLLM2_TITLE = "SmolLM2-135M's shape, random weights"
TINY_TITLE = "a tiny Llama"


def config_of(name: str, layers: int) -> Any:
    """A ``transformers`` config with the sizes of a model, cut to ``layers`` layers.

    The vocabulary is cut by the same factor, so that layers and logits keep their proportion.
    """
    m = TINY if name == "tiny" else MODELS[name]
    layers = min(layers, m.layers)
    vocab = max(64, m.vocab * layers // m.layers)
    if m.family == "gpt2":
        return AutoConfig.for_model(
            "gpt2", vocab_size=vocab, n_embd=m.hidden, n_layer=layers, n_head=m.Hq, n_positions=65536
        )
    sizes: dict[str, Any] = {"head_dim": m.D, "max_position_embeddings": 65536}
    if m.window is not None:
        sizes["sliding_window"] = m.window
    return AutoConfig.for_model(
        m.family, vocab_size=vocab, hidden_size=m.hidden, intermediate_size=m.intermediate,
        num_hidden_layers=layers, num_attention_heads=m.Hq, num_key_value_heads=m.Hkv, **sizes,
    )  # fmt: skip


def smollm2_config(quick: bool = False) -> Any:
    """SmolLM2-135M's config, with ``quick`` a tiny Llama's. The output layer is the embedding."""
    config = config_of("tiny" if quick else "smollm2-135m", 30)
    config.tie_word_embeddings = True
    return config


def load(order: Row, arm: str, dtype: str, prefix: int) -> Any:
    """A model in training mode behind a prefix that is the same for every arm."""
    dtypes = DTYPES | {"fp64": torch.float64}
    if order["path"] is not None:
        base = AutoModelForCausalLM.from_pretrained(order["path"], dtype=dtypes[dtype])
    else:
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(config_of(order["model"], order["layers"]), dtype=dtypes[dtype])
    model = get_peft_model(base.train(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=prefix))
    prefix_of(model).data.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    options = ARMS[arm]
    if options is not None:
        peftkern.patch(model, **options)
    if arm == "patch + gc":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def prefix_of(model: Any) -> torch.nn.Parameter:
    """The trained prefix or prompt of a PEFT model."""
    weight: torch.nn.Parameter = model.prompt_encoder["default"].embedding.weight
    return weight


def make_batch(vocab: int, size: int, length: int, padded: bool) -> dict[str, Tensor]:
    """Random tokens, each with a label. ``padded``: rows of ``length`` / 4 to ``length`` tokens, evenly spaced."""
    ids = torch.randint(0, vocab, (size, length), generator=torch.Generator().manual_seed(0))
    if not padded:
        return {"input_ids": ids, "labels": ids}
    lengths = torch.linspace(max(1, length // 4), length, size).long()
    mask = (torch.arange(length) < lengths[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def step(model: Any, batch: dict[str, Tensor]) -> float:
    """Run forward and backward; return the loss."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return float(loss.item())
