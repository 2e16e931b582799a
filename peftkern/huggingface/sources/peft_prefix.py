# SPDX-License-Identifier: Apache-2.0
"""PEFT's prefix tuning and cartridges, with PEFT's parameters and checkpoints.

PEFT's forward, heads and checkpoints are unchanged. The instance's ``get_prompt`` returns a cache with views of
PEFT's parameter, instead of copies for every sample.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from ...layer_shapes import LayerShape
from ...model_info import given_cache, layers_of
from ..cache import KeyValue, PrefixCache
from ..call_arguments import tokens_of
from ..calls import running
from ..mixed import PrefixBank, why_not_mixed
from ..peft_model import BASE, AdapterNames, GenerationInputs, PeftCalls, PeftMethod, drop_token_types
from ..prefix_patch import PrefixPatch
from ..prefix_source import PrefixSource
from ..recurrent import recurrent_layers
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
        peft_bugs: count the prefix among the tokens from which positions and masks of images follow.
    """

    is_given = True
    fills_every_layer = True

    def __init__(self, model: Any, *, fix_seq2seq_layout: bool, peft_bugs: bool = False) -> None:
        self.model = model
        self.fix_seq2seq_layout = fix_seq2seq_layout
        self.keeps_bugs = peft_bugs
        self.patch: PrefixPatch | None = None
        self._known: dict[str, tuple[Any, list[LayerShape | None]]] = {}
        self.names = AdapterNames(model)
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

    def _check_adapter(self, name: str) -> list[LayerShape | None]:
        """The shape of each layer's prefix; None for a layer that PEFT gives none."""
        config = self.model.peft_config[name]
        known, shapes = self._known.get(name, (None, []))
        if known is not config:
            assert self.patch is not None
            shapes = self._shapes(name)
            skipped = frozenset(index for index, shape in enumerate(shapes) if shape is None)
            self.patch.check_geometry(f"adapter {name!r}", shapes, without=skipped)
            self._known[name] = config, shapes
        return shapes

    def _shapes(self, name: str) -> list[LayerShape | None]:
        """One shape for all layers; that of PEFT's own cache, which contains a part of the parameter, for others."""
        assert self.patch is not None
        config = self.model.peft_config[name]
        head_dim = config.token_dim // config.num_attention_heads
        shape = LayerShape(config.num_attention_heads, head_dim, head_dim)
        if all(info.shape == shape for info in self.patch.prefix_layers.values()):
            return [shape] * config.num_layers
        if any(info.shape.num_kv_heads > shape.num_kv_heads for info in self.patch.prefix_layers.values()):
            return [shape] * config.num_layers  # too few heads: the error names them
        active = self.model.active_adapter
        try:
            self.model.active_adapter = name
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PEFT warns about layers that share keys
                stock = type(self.model).get_prompt(self.model, 1)
        finally:
            self.model.active_adapter = active
        return [None if pair is None else LayerShape.of(pair) for pair in layers_of(stock)]

    def wire(self, patch: Patch) -> None:
        """Replace PEFT's ``get_prompt`` and the inputs of ``generate``."""
        PeftMethod(self.model, "get_prompt", self.get_prompt).install(patch.wiring)
        PeftCalls(self.model).install(patch.wiring)
        self.names.install(patch.wiring)
        GenerationInputs(self.model).install(patch.wiring)
        PeftMethod(self.model, "prepare_inputs_for_generation", self.prepare_inputs).install(patch.wiring)

    def get_prompt(
        self, peft_method: Any, batch_size: int, task_ids: Tensor | None = None, max_cache_len: int | None = None
    ) -> PrefixCache | EncoderDecoderCache:
        """Replaces ``PeftModel.get_prompt``. The result does not depend on the batch size."""
        self._check_adapter(self.model.active_adapter)
        assert self.patch is not None
        stores = not (self.model.training and torch.is_grad_enabled())
        names = self.names.of_call(batch_size)
        bank = None if names is None else self.bank(names)
        cache = self.patch.new_cache(stores=stores, offset_outside=True, bank=bank)
        if self.model.active_peft_config.num_transformer_submodules == 2:
            return EncoderDecoderCache(cache, DynamicCache())
        return cache

    def prepare_inputs(
        self, peft_method: Any, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
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
            if adapter_names is not None:
                raise ValueError(
                    "adapter_names: expected None with a cache that cannot hold several prefixes, got names"
                )
            return peft_method(*args, **kwargs)
        stores = inputs.get("use_cache") is not False
        bank = None
        if adapter_names is not None:
            bank = self.bank(self.names.of_rows(adapter_names, tokens_of(inputs).shape[0]))
        new: Any = self.patch.new_cache(stores=stores, offset_outside=False, given=cache, bank=bank)
        if submodules == 2:
            new = EncoderDecoderCache(new, getattr(given, "cross_attention_cache", None) or DynamicCache())
        inputs["past_key_values"] = new
        drop_token_types(inputs)
        return inputs

    def stock_cache(self, cache: PrefixCache, batch: int, backbone: PreTrainedModel) -> Any:
        """The cache that PEFT passes to the model; PEFT has none for a model with recurrent layers."""
        if recurrent_layers(cache.layers):
            return super().stock_cache(cache, batch, backbone)
        return type(self.model).get_prompt(self.model, batch)

    def layer_kv(self, patch: PrefixPatch, part: str = "decoder") -> Sequence[KeyValue | None]:
        """Per layer (prefix_k, prefix_v), views [Hkv, P, D] of PEFT's flat parameter [P, L * 2 * Hkv * D].

        A single ``unbind`` for all layers, so that the gradient is assembled once instead of once per layer.
        """
        active = running.module(self.model, self.model).active_adapter
        return self._layers(self._parts(active).unbind(1), active)

    def _parts(self, name: str) -> Tensor:
        """[P, 2 * L, Hkv, D], the parameter of an adapter, or what its MLP makes of it."""
        model = running.module(self.model, self.model)
        encoder, config = model.prompt_encoder[name], model.peft_config[name]
        flat: Tensor = encoder.embedding.weight
        if getattr(encoder, "transform", None) is not None:
            flat = encoder.transform(flat)
        return flat.view(config.num_virtual_tokens, 2 * config.num_layers, config.num_attention_heads, -1)

    def _layers(self, parts: Sequence[Tensor], name: str) -> list[KeyValue | None]:
        """Per layer (prefix_k, prefix_v), each [Hkv, P, D] or [A, Hkv, P, D].

        Args:
            parts: 2 * L of [P, Hkv, D] or [A, P, Hkv, D].
            name: of an adapter.
        """
        config, shapes = self.model.peft_config[name], self._check_adapter(name)
        stride = 4 if config.num_transformer_submodules == 2 and not self.fix_seq2seq_layout else 2
        firsts = [(stride * layer) % len(parts) for layer in range(config.num_layers)]
        return [
            shape and (_cut(parts[first], shape), _cut(parts[first + 1], shape))
            for first, shape in zip(firsts, shapes, strict=False)
        ]

    def bank(self, names: Sequence[str]) -> PrefixBank:
        """The prefixes of a batch of samples.

        Args:
            names: of the adapter of each sample, or :data:`BASE`.
        """
        assert self.patch is not None
        if (reason := why_not_mixed(self.patch)) is not None:
            raise ValueError(f"adapter_names: expected None, because {reason}, got names")
        used = sorted({name for name in names if name != BASE}) or [self.model.active_adapter]
        for name in used:
            self._check_adapter(name)
        parts = [self._parts(name) for name in used]
        host_lens, device = [part.shape[0] for part in parts], parts[0].device
        longest = max(host_lens)
        padded = [torch.nn.functional.pad(part, (0, 0, 0, 0, 0, 0, 0, longest - part.shape[0])) for part in parts]
        layers = self._layers(torch.stack(padded).unbind(2), used[0])
        host_ids = [-1 if name == BASE else used.index(name) for name in names]
        ids = torch.tensor(host_ids, dtype=torch.int32, device=device)
        lens = torch.tensor(host_lens, dtype=torch.int32, device=device)
        return PrefixBank(layers, ids, lens, lens)


def _cut(part: Tensor, shape: LayerShape) -> Tensor:
    """Keys [..., P, Hkv, D] -> [..., Hkv, P, D], the part that a narrower layer reads."""
    return part.transpose(-3, -2)[..., : shape.num_kv_heads, :, : shape.head_dim]
