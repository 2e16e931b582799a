# SPDX-License-Identifier: Apache-2.0
"""Models of known sizes with random weights, behind a prefix or a prompt of PEFT."""

from __future__ import annotations

from typing import Any

import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from peftkern.tools.bench.shapes import MODELS, Model

TINY = Model("llama", 2, 32, 48, 128, 4, 2, 8)


def peft_model(name: str, layers: int, tokens: int, device: str, dtype: torch.dtype, *, prompt: bool = False) -> Any:
    """A PEFT model in training mode with ``tokens`` learned tokens; the same values for the same arguments.

    It is cut to ``layers`` layers, and its vocabulary to the same share, so that both keep their proportion.
    """
    sizes = TINY if name == "tiny" else MODELS[name]
    layers = min(layers, sizes.layers)
    config = AutoConfig.for_model(
        sizes.family, vocab_size=max(64, sizes.vocab * layers // sizes.layers), hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate, num_hidden_layers=layers, num_attention_heads=sizes.Hq,
        num_key_value_heads=sizes.Hkv, head_dim=sizes.D, max_position_embeddings=65536, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(config, dtype=dtype)
        kind = PromptTuningConfig if prompt else PrefixTuningConfig
        model = get_peft_model(base, kind(task_type="CAUSAL_LM", num_virtual_tokens=tokens))
    weight = learned(model)
    weight.data.copy_(0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    return model.to(device).train()


def learned(model: Any) -> torch.nn.Parameter:
    """The prefix or prompt of a PEFT model."""
    weight: torch.nn.Parameter = model.prompt_encoder["default"].embedding.weight
    return weight


def vocabulary(model: Any) -> int:
    """The size of the vocabulary."""
    return int(model.get_base_model().config.vocab_size)


def batch_of(model: Any, size: int, length: int, device: str, *, padded: bool = False) -> dict[str, Tensor]:
    """Random tokens, each with a label. ``padded``: rows of ``length`` / 4 to ``length`` tokens, evenly spaced."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, vocabulary(model), (size, length), generator=generator)
    batch = {"input_ids": ids, "labels": ids}
    if padded:
        lengths = torch.linspace(max(1, length // 4), length, size).long()
        mask = (torch.arange(length) < lengths[:, None]).long()
        batch = {"input_ids": ids * mask, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    return {name: x.to(device) for name, x in batch.items()}
