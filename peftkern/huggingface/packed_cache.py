# SPDX-License-Identifier: Apache-2.0
"""The key-value cache of a packed batch whose prefixes are rows of it."""

from __future__ import annotations

from functools import partial

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from .cache import KeyValue, PrefixCache, PrefixOptions
from .cache_layers import LazyLayer, PrefixLayer, stored_layers
from .packing import PackedBatch

__all__ = ["PackedCache"]


class PackedCache(PrefixCache):
    """The cache of a packed batch whose prefixes are rows of it: prompts, or text that sequences share.

    Args:
        num_layers: number of layers of the cache.
        packed: the packed batch, with prompts or segments.
        stores: whether a cache that continues the sequences will be made of this one.
        options: passed on to the attention function.
    """

    packed: PackedBatch
    #: The caller's own empty cache, if there is one; :meth:`unpacked` stores in it as :class:`PrefixCache` does.
    given: Cache | None = None

    def __init__(self, num_layers: int, packed: PackedBatch, *, stores: bool, options: PrefixOptions) -> None:
        nothing: list[KeyValue | None] = [None] * num_layers
        super().__init__(nothing, offset=0, stores=stores, offset_outside=False, options=options)
        self.packed = packed
        self.ids, self.lens = packed.prefix_ids, packed.prompt_lens
        self.span = packed.prompt_len

    @property
    def consumed_positions(self) -> int:
        """Positions that the prompt consumes, of those that the model has."""
        return self.span

    def has_prefix(self, layer: int) -> bool:
        """Whether a layer has a prefix: every layer has."""
        return True

    def _with_prefix(self, layer: int, key: Tensor, value: Tensor) -> tuple[KeyValue, KeyValue]:
        """``key`` and ``value`` [1, Hkv, N, D], and the prompts' rows of them as banks [A, Hkv, P, D].

        With segments, attention reads the prompts where they lie in ``key`` and ``value``.
        """
        if self.packed.layout.segments is not None or self.packed.prompts is None:
            return (key, value), (key[0, :, :0], value[0, :, :0])
        key, bank_k = self.packed.with_bank(key)
        value, bank_v = self.packed.with_bank(value)
        return (key, value), (bank_k, bank_v)

    def as_padded(self) -> DynamicCache:
        """The same keys and values as a stock cache of the padded batch."""
        cache = DynamicCache()
        cache.layers = self._padded_layers()
        return cache

    def fill(self, given: Cache) -> None:
        """Store the same keys and values in a caller's stock cache."""
        given.layers = self._padded_layers()

    def _padded_layers(self) -> list[PrefixLayer]:
        return [
            LazyLayer(partial(_padded, self.packed, layer.keys, layer.values), layer.keys.dtype, layer.keys.device)
            if layer.is_initialized
            else PrefixLayer(True)
            for layer in self.layers
        ]

    def unpacked(self) -> PrefixCache:
        """The same keys and values as a cache of the padded batch, with the prompts as a shared prefix."""
        packed = self.packed
        ids = packed.prompt_ids
        # A layer that early exit has skipped has no keys.
        pairs = [(layer.keys, layer.values) if layer.is_initialized else None for layer in self.layers]
        banks = [None if pair is None else (packed.bank(pair[0]), packed.bank(pair[1])) for pair in pairs]
        if ids is None:
            banks = [None if bank is None else (bank[0][0], bank[1][0]) for bank in banks]
        cache = PrefixCache(
            banks, offset=packed.prompt_len, stores=True, offset_outside=False, options=self.options, ids=ids,
            as_stored=True, lens=packed.prompt_lens, offsets=packed.prompt_lens, given=self.given,
        )  # fmt: skip
        cache._used = True  # a compiled decoding step must not find another state than the steps after it
        padded = self._padded_layers()
        if stored_layers(self.given) is None:
            cache.layers = padded
            return cache
        for index, layer in enumerate(padded):
            if layer.is_initialized:
                cache.update(layer.keys, layer.values, index)
        return cache


def _padded(packed: PackedBatch, keys: Tensor, values: Tensor) -> KeyValue:
    """[1, Hkv, N, D] of a packed batch -> [B, Hkv, S, D]."""
    return packed.padded_heads(keys), packed.padded_heads(values)
