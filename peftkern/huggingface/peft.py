# SPDX-License-Identifier: Apache-2.0
"""PEFT's prefix tuning and cartridges: the same parameters and checkpoints, read where they lie.

PEFT's heads, ``generate`` and checkpoints stay as they are; of the model only the instance's ``get_prompt`` changes.
It returns a cache that holds views of PEFT's parameter, instead of copies of it for every sample.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from ..base_model import rename_cache
from .cache import KeyValue, PrefixCache, PrefixOptions
from .model_patch import ModelPatch, self_attention_cache
from .packing import Stream

__all__ = ["GenerationInputs", "PeftPatch", "is_peft_model"]

KEY_VALUE_TYPES = ("PREFIX_TUNING", "CARTRIDGE")


def is_peft_model(model: nn.Module) -> bool:
    """Whether ``model`` is a ``peft.PeftModel``; imports nothing."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def has_prompt(model: Any) -> bool:
    """Whether a ``PeftModel`` has an adapter that is a prompt or a prefix."""
    return any(config.is_prompt_learning for config in model.peft_config.values())


class GenerationInputs:
    """The base model's ``prepare_inputs_for_generation``, with the cache under the name by which PEFT looks for it.

    PEFT knows ``past_key_values`` alone. Where models say ``cache``, it takes every step of ``generate`` for the
    first, and hands over a second cache, or the prompt once more.

    Args:
        model: a ``PeftModel``, of any task.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.prepare = model.__dict__.get("base_model_prepare_inputs_for_generation")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Inputs of the next step."""
        assert self.prepare is not None
        inputs = self.prepare(*args, **kwargs)
        rename_cache(inputs, "past_key_values")
        return inputs

    def install(self) -> None:
        """Change the model, if its task has ``generate``."""
        if self.prepare is not None:
            self.model.base_model_prepare_inputs_for_generation = self

    def remove(self) -> None:
        """Undo :meth:`install`. PEFT's ``generate`` leaves what it used on the base model."""
        if self.prepare is not None:
            self.model.base_model_prepare_inputs_for_generation = self.prepare
            left = self.model.base_model.__dict__
            if left.get("prepare_inputs_for_generation") is self:
                left["prepare_inputs_for_generation"] = self.prepare


class PeftPatch(ModelPatch):
    """The prefix is that of the active adapter.

    Args:
        model: a ``PeftModel`` whose adapters are PREFIX_TUNING or CARTRIDGE.
        fix_seq2seq_layout: give each decoder layer of an encoder-decoder a prefix of its own. PEFT lays two copies of
            the parameter side by side and reads keys of layer l from block 4l mod 2L: with an even number L of
            layers, layers l and l + L/2 share a prefix, and half of the parameter is never used.
    """

    model: Any

    def __init__(
        self, model: Any, *, fix_seq2seq_layout: bool, options: PrefixOptions, packing: bool, logits: str
    ) -> None:
        for name, config in model.peft_config.items():
            kind = config.peft_type.value
            if kind not in KEY_VALUE_TYPES:
                raise ValueError(
                    f"model: expected {' or '.join(KEY_VALUE_TYPES)} adapters, or prompts, got {kind} ({name!r}); "
                    "to train a prefix beside it, patch(model, PrefixKV(...))"
                )
        super().__init__(model, model.get_base_model(), options, packing=packing, logits=logits)
        self.fix_seq2seq_layout = fix_seq2seq_layout
        self.inputs = GenerationInputs(model)

    def install(self) -> None:
        """Change the model, with ``get_prompt`` as :meth:`get_prompt`."""
        super().install()
        self.inputs.install()
        self.model.get_prompt = self.get_prompt

    def remove(self) -> None:
        """Undo :meth:`install`."""
        self.inputs.remove()
        self.model.__dict__.pop("get_prompt", None)
        super().remove()

    def check_prefix(self) -> None:
        """Raise ValueError unless all adapters fit the model."""
        for name in self.model.peft_config:
            self._check_adapter(name)

    def _check_adapter(self, name: str) -> None:
        config = self.model.peft_config[name]
        head_dim = config.token_dim // config.num_attention_heads
        self.check_geometry(f"adapter {name!r}", config.num_layers, config.num_attention_heads, head_dim)

    def find_cache(self, kwargs: dict[str, Any]) -> PrefixCache | None:
        """What :meth:`get_prompt` returned, unless the adapter is disabled."""
        cache = self_attention_cache(kwargs)
        return cache if isinstance(cache, PrefixCache) else None

    def open_stream(self, kwargs: dict[str, Any]) -> Stream | None:
        """A training step on a padded batch, or on packed rows; PEFT has put both behind the prefix."""
        cache = self.find_cache(kwargs)
        if cache is None or cache.stores:
            return None
        mask, position_ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            mask = mask[:, cache.offset :]
        return self.pack_sequences(kwargs, mask, None if position_ids is None else position_ids - cache.offset)

    def get_prompt(
        self, batch_size: int, task_ids: Tensor | None = None, max_cache_len: int | None = None
    ) -> PrefixCache | EncoderDecoderCache:
        """In place of ``PeftModel.get_prompt``; nothing in it depends on the batch."""
        config = self.model.active_peft_config
        self._check_adapter(self.model.active_adapter)
        cache = self.new_cache(
            self._layer_kv(),
            offset=config.num_virtual_tokens,
            stores=not (self.model.training and torch.is_grad_enabled()),
            offset_outside=True,
        )
        if config.num_transformer_submodules == 2:
            return EncoderDecoderCache(cache, DynamicCache())
        return cache

    def _layer_kv(self) -> list[KeyValue]:
        """Per layer (prefix_k, prefix_v), views [Hkv, P, D] of PEFT's flat parameter [P, L * 2 * Hkv * D].

        One unbind for all layers, so that the gradient is laid together once and not once a layer.
        """
        config = self.model.active_peft_config
        encoder = self.model.prompt_encoder[self.model.active_adapter]
        flat: Tensor = encoder.embedding.weight
        if getattr(encoder, "transform", None) is not None:
            flat = encoder.transform(flat)
        num_heads, blocks = config.num_attention_heads, 2 * config.num_layers
        parts = flat.view(config.num_virtual_tokens, blocks, num_heads, -1).unbind(1)
        stride = 4 if config.num_transformer_submodules == 2 and not self.fix_seq2seq_layout else 2
        firsts = [(stride * layer) % blocks for layer in range(config.num_layers)]
        return [(parts[first].transpose(0, 1), parts[first + 1].transpose(0, 1)) for first in firsts]
