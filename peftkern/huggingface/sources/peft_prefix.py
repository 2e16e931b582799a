# SPDX-License-Identifier: Apache-2.0
"""PEFT's prefix tuning and cartridges, with PEFT's parameters and checkpoints.

PEFT's forward, heads and checkpoints are unchanged. The instance's ``get_prompt`` returns a cache with views of
PEFT's parameter, instead of copies for every sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from ...model_info import given_cache
from ..cache import KeyValue, PrefixCache
from ..calls import running
from ..peft_model import GenerationInputs, PeftCalls, PeftMethod
from ..prefix_patch import PrefixPatch, PrefixSource
from ..wiring import Patch

__all__ = ["KEY_VALUE_TYPES", "PeftPrefix"]

KEY_VALUE_TYPES = ("PREFIX_TUNING", "CARTRIDGE")


class PeftPrefix(PrefixSource):
    """The prefix is that of a ``PeftModel``'s active adapter.

    Args:
        model: a ``PeftModel`` whose adapters are PREFIX_TUNING or CARTRIDGE.
        fix_seq2seq_layout: give each decoder layer of an encoder-decoder its own prefix. PEFT concatenates two copies
            of the parameter and reads the keys of layer l from block 4l mod 2L. With an even number L of layers,
            layers l and l + L/2 share a prefix, and half of the parameter is never used.
    """

    is_given = True

    def __init__(self, model: Any, *, fix_seq2seq_layout: bool) -> None:
        self.model = model
        self.fix_seq2seq_layout = fix_seq2seq_layout
        self.patch: PrefixPatch | None = None
        if "get_prompt" in model.__dict__:
            raise ValueError("model: its get_prompt has been replaced, so the prefix may not be that of its adapter")

    @property
    def offset(self) -> int:
        """Positions that the model counts for the prefix."""
        return int(self.model.active_peft_config.num_virtual_tokens)

    def check(self, patch: PrefixPatch) -> None:
        """Raise ValueError unless the adapters fit the model."""
        self.patch = patch
        for name in self.model.peft_config:
            self._check_adapter(name)

    def _check_adapter(self, name: str) -> None:
        config = self.model.peft_config[name]
        head_dim = config.token_dim // config.num_attention_heads
        assert self.patch is not None
        self.patch.check_geometry(f"adapter {name!r}", config.num_layers, config.num_attention_heads, head_dim)

    def wire(self, patch: Patch) -> None:
        """Replace PEFT's ``get_prompt`` and the inputs of ``generate``."""
        PeftMethod(self.model, "get_prompt", self.get_prompt).install(patch.wiring)
        PeftCalls(self.model).install(patch.wiring)
        GenerationInputs(self.model).install(patch.wiring)
        PeftMethod(self.model, "prepare_inputs_for_generation", self.prepare_inputs).install(patch.wiring)

    def get_prompt(
        self, peft_method: Any, batch_size: int, task_ids: Tensor | None = None, max_cache_len: int | None = None
    ) -> PrefixCache | EncoderDecoderCache:
        """Replaces ``PeftModel.get_prompt``. The result does not depend on the batch size."""
        self._check_adapter(self.model.active_adapter)
        assert self.patch is not None
        stores = not (self.model.training and torch.is_grad_enabled())
        cache = self.patch.new_cache(stores=stores, offset_outside=True)
        if self.model.active_peft_config.num_transformer_submodules == 2:
            return EncoderDecoderCache(cache, DynamicCache())
        return cache

    def prepare_inputs(self, peft_method: Any, *args: Any, **kwargs: Any) -> Any:
        """Replaces ``PeftModel.prepare_inputs_for_generation``: the base model's inputs and a cache with the prefix.

        PEFT counts the prefix in masks and lengths, which chunked prefill, assistants and a second turn on the
        returned cache do not expect. Here ``generate`` sees a cache of the sequence alone.
        """
        assert self.patch is not None
        inputs = self.model.base_model_prepare_inputs_for_generation(
            *args, **{name: x for name, x in kwargs.items() if name != "task_ids"}
        )
        given, submodules = given_cache(inputs), self.model.active_peft_config.num_transformer_submodules
        cache = getattr(given, "self_attention_cache", given)
        if isinstance(cache, PrefixCache):
            if cache.counts_outside:
                raise ValueError(
                    "cache: expected one that generate returned, got one that a forward of the PeftModel returned"
                )
            return inputs
        if cache is not None and cache.get_seq_length() > 0:
            return peft_method(*args, **kwargs)
        stores = inputs.get("use_cache") is not False
        new: Any = self.patch.new_cache(stores=stores, offset_outside=False, given=cache)
        if submodules == 2:
            new = EncoderDecoderCache(new, getattr(given, "cross_attention_cache", None) or DynamicCache())
        inputs["past_key_values"] = new
        return inputs

    def stock_cache(self, cache: PrefixCache, batch: int, dtype: torch.dtype) -> Any:
        """The cache that PEFT passes to the model."""
        return type(self.model).get_prompt(self.model, batch)

    def layer_kv(self, patch: PrefixPatch) -> Sequence[KeyValue | None]:
        """Per layer (prefix_k, prefix_v), views [Hkv, P, D] of PEFT's flat parameter [P, L * 2 * Hkv * D].

        A single ``unbind`` for all layers, so that the gradient is assembled once instead of once per layer.
        """
        model = running.module(self.model, self.model)
        config = model.active_peft_config
        encoder = model.prompt_encoder[model.active_adapter]
        flat: Tensor = encoder.embedding.weight
        if getattr(encoder, "transform", None) is not None:
            flat = encoder.transform(flat)
        num_heads, blocks = config.num_attention_heads, 2 * config.num_layers
        parts = flat.view(config.num_virtual_tokens, blocks, num_heads, -1).unbind(1)
        stride = 4 if config.num_transformer_submodules == 2 and not self.fix_seq2seq_layout else 2
        firsts = [(stride * layer) % blocks for layer in range(config.num_layers)]
        return [(parts[first].transpose(0, 1), parts[first + 1].transpose(0, 1)) for first in firsts]
