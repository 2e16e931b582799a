# SPDX-License-Identifier: Apache-2.0
"""Runs a model at patch time without changing its state."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from ..model_info import cache_argument
from ..overrides import overridden

__all__ = ["beside_encoder", "is_transient", "quiet", "some_tokens"]

#: Buffers with at most this many elements are copied, and restored if a forward writes to them.
_SMALL_BUFFER = 1 << 20


def is_transient(error: Exception) -> bool:
    """Whether an error is unrelated to the model: out of memory, a lost device or file."""
    kinds = [torch.OutOfMemoryError, MemoryError, OSError, getattr(torch, "AcceleratorError", MemoryError)]
    return isinstance(error, tuple(kinds)) or (
        isinstance(error, RuntimeError)
        and any(text in str(error) for text in ("out of memory", "CUDA error", "alloc"))
    )


@contextlib.contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Run a block with the model in eval mode, without gradients and autocast.

    Modes, buffers and random states are restored afterwards.
    """
    buffers = [(module, dict(module._buffers)) for module in model.modules() if module._buffers]
    values = [x for _, kept in buffers for x in kept.values() if x is not None]
    copies = [(x, x._version, x.clone()) for x in values if x.numel() <= _SMALL_BUFFER and not x.is_inference()]
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    kind = next((p.device.type for p in model.parameters()), "cpu")
    # Autocast would cache casts of the weights without gradients, and reuse them in the caller's block.
    autocast = (
        torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else contextlib.nullcontext()
    )
    evaluates = overridden(list(model.modules()), "training", False)
    try:
        with evaluates, torch.no_grad(), autocast, torch.random.fork_rng(devices=sorted(devices)):
            yield
    finally:
        for module, kept in buffers:
            module._buffers.update(kept)
        with torch.no_grad():
            for x, version, copy in copies:
                if x._version != version:
                    x.copy_(copy)


def beside_encoder(backbone: PreTrainedModel, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a decoder that cannot run without the output of an encoder: with states of two tokens."""
    tokens, width = arguments.get("input_ids"), backbone.get_input_embeddings().weight.shape[1]
    tokens = arguments["inputs_embeds"] if tokens is None else tokens
    width = getattr(backbone.config, "cross_attention_hidden_size", None) or width
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(1, 2, width, generator=generator).to(backbone.device, backbone.dtype)
    name = cache_argument(backbone)
    cache = EncoderDecoderCache(arguments[name], DynamicCache()) if arguments.get(name) is not None else None
    return {**arguments, name: cache, "encoder_hidden_states": states.expand(tokens.shape[0], -1, -1)}


def some_tokens(backbone: PreTrainedModel, count: int) -> Tensor:
    """[count] ids of ordinary tokens, repeated if the vocabulary is too small.

    Raises:
        ValueError: if the model has no embeddings of tokens.
    """
    try:
        weight = getattr(backbone.get_input_embeddings(), "weight", None)
    except NotImplementedError:
        weight = None
    if not isinstance(weight, Tensor):
        raise ValueError(f"model: expected a model that embeds tokens, got {type(backbone).__name__}")
    config = backbone.config.get_text_config()
    names = ("pad_token_id", "bos_token_id", "eos_token_id", "unk_token_id")
    special = {getattr(config, name, None) for name in names}
    vocabulary = min(weight.shape[0], getattr(config, "vocab_size", None) or weight.shape[0])
    ids = [i for i in range(min(vocabulary, count + len(special))) if i not in special] or [0]
    return torch.tensor(ids, device=weight.device).repeat(-(-count // len(ids)))[:count]
