# SPDX-License-Identifier: Apache-2.0
"""A :class:`peftkern.PrefixKV` in a plain Hugging Face model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeGuard

from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from ..base_model import CACHE_NAMES, given_cache
from .cache import KeyValue, PrefixCache, PrefixOptions
from .model_patch import ModelPatch, check_replaceable, place_behind, self_attention_cache
from .packing import Stream

__all__ = ["LayerPrefix", "PrefixPatch", "is_layer_prefix"]

#: Name of the prefix as a submodule of the model.
SUBMODULE = "peftkern_prefix"


class LayerPrefix(Protocol):
    """What a patch needs of a prefix; :class:`peftkern.PrefixKV` is one."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    lengths: Sequence[int]

    def layer_kv(self) -> Sequence[KeyValue | None]:
        """Per layer (prefix_k, prefix_v), each [Hkv, P, D]; anything for a layer of length 0, which is left out."""


def is_layer_prefix(value: object) -> TypeGuard[LayerPrefix]:
    """Not by ``isinstance``, which from Python 3.12 on does not see a module's parameters and buffers."""
    return all(hasattr(value, name) for name in (*LayerPrefix.__annotations__, "layer_kv"))


class PrefixPatch(ModelPatch):
    """The prefix is a submodule of the model.

    Callers speak of the sequence alone: masks, positions and caches are put behind the prefix on their way into the
    backbone.

    Args:
        shift_positions: the sequence's positions start behind the longest prefix; else at 0.
        freeze: switch ``requires_grad`` off for the model's own parameters while patched.
    """

    def __init__(
        self,
        model: nn.Module,
        base: PreTrainedModel,
        prefix: LayerPrefix,
        *,
        shift_positions: bool,
        freeze: bool,
        options: PrefixOptions,
        packing: bool,
        logits: str,
    ) -> None:
        super().__init__(model, base, options, packing=packing, logits=logits)
        self.prefix = prefix
        self.offset = max(prefix.lengths, default=0) if shift_positions else 0
        self.frozen = [p for p in model.parameters() if p.requires_grad] if freeze else []

    def check_prefix(self) -> None:
        """Raise ValueError unless the prefix fits the model."""
        self.check_geometry("prefix", self.prefix.num_layers, self.prefix.num_kv_heads, self.prefix.head_dim)

    def install(self) -> None:
        """Change the model, with the prefix as its submodule."""
        super().install()
        for parameter in self.frozen:
            parameter.requires_grad_(False)
        self.model.add_module(SUBMODULE, self.prefix)  # type: ignore[arg-type]

    def remove(self) -> None:
        """Undo :meth:`install`."""
        super().remove()
        self.model._modules.pop(SUBMODULE, None)
        for parameter in self.frozen:
            parameter.requires_grad_(True)

    def open_stream(self, kwargs: dict[str, Any]) -> Stream | None:
        """A training step on a padded batch, or on packed rows."""
        sequence = self_attention_cache(kwargs)
        if not self.is_training_step or sequence is not None:
            return None
        return self.pack_sequences(kwargs, kwargs.get("attention_mask"), kwargs.get("position_ids"))

    def find_cache(self, kwargs: dict[str, Any]) -> PrefixCache | None:
        """The cache that the caller continues, or one in place of an empty one."""
        given = given_cache(kwargs)
        sequence = self_attention_cache(kwargs)
        if isinstance(sequence, PrefixCache):
            return sequence
        check_replaceable(sequence)
        lengths = self.prefix.lengths
        cache = self.new_cache(
            [kv if length else None for kv, length in zip(self.prefix.layer_kv(), lengths, strict=True)],
            offset=self.offset,
            stores=not self.is_training_step and kwargs.get("use_cache") is not False,
            offset_outside=False,
        )
        if isinstance(given, EncoderDecoderCache):
            kwargs[self.cache_name] = EncoderDecoderCache(cache, given.cross_attention_cache)
        elif kwargs.get("encoder_hidden_states") is not None:
            kwargs[self.cache_name] = EncoderDecoderCache(cache, DynamicCache())
        else:
            kwargs[self.cache_name] = cache
        return cache

    def place_sequence(self, cache: PrefixCache, kwargs: dict[str, Any]) -> None:
        """Columns of the mask and positions for the prefix, as PEFT has them."""
        place_behind(cache, kwargs)

    def clean_output(self, cache: PrefixCache, kwargs: dict[str, Any], output: Any) -> Any:
        """Without ``use_cache`` there is no cache in the output, or ``generate`` would go on with it."""
        if kwargs.get("use_cache") is not False:
            return output
        if isinstance(output, tuple):
            return tuple(item for item in output if item is not given_cache(kwargs))
        return type(output)(**{key: value for key, value in output.items() if key not in CACHE_NAMES})
