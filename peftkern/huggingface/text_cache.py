# SPDX-License-Identifier: Apache-2.0
"""The key-value cache of a batch whose rows share text: each text once, and in every row what follows it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from .cache import KeyValue, PrefixCache
from .cache_layers import LazyLayer, PrefixLayer
from .packed_cache import PackedCache

__all__ = ["TextCache"]


class _Texts:
    """Keys and values [A, Hkv, P, D] of the texts in one layer, copied when they are first read.

    A forward whose caller does not continue the sequence, as in evaluation, never copies them.

    Args:
        keys, values: [1, Hkv, N, D], of a packed batch.
        rows: [A, P], the rows of each text.
    """

    def __init__(self, keys: Tensor, values: Tensor, rows: Tensor) -> None:
        self._packed: tuple[Tensor, Tensor, Tensor] | None = (keys, values, rows.to(keys.device, non_blocking=True))
        self._bank: KeyValue | None = None
        self.dtype, self.device = keys.dtype, keys.device

    def bank(self) -> KeyValue:
        """The keys and values. The packed ones are freed."""
        if self._bank is None:
            assert self._packed is not None
            *pair, rows = self._packed
            key, value = (x[0].index_select(1, rows.flatten()).unflatten(1, rows.shape).transpose(0, 1) for x in pair)
            self._bank, self._packed = (key, value), None
        return self._bank

    def padded(self, ids: Tensor | None, places: Tensor) -> KeyValue:
        """[B, Hkv, S, D] of the batch, from the text of each sample [B] and the token in it at each place [B, S]."""
        assert ids is not None
        key, value = (x[ids.clamp(min=0)[:, None], :, places].transpose(1, 2) for x in self.bank())
        return key, value


class TextCache(PrefixCache):
    """Keys and values of a batch whose rows share text.

    Callers count the tokens of the batch with their padding, as they do with a stock cache. Attention of the patched
    model reads a bank with one entry per different text. For all others, the cache becomes a stock cache with the
    texts in every row: for a model without a patch, and when tokens of the texts are removed.

    Args:
        cache: of the packed batch, with segments, one sequence per sample and no hidden rows.
    """

    def __init__(self, cache: PackedCache) -> None:
        packed = cache.packed
        rows, lens, ids = packed.texts()
        pairs = [(layer.keys, layer.values) if layer.is_initialized else None for layer in cache.layers]
        device = next(pair[0].device for pair in pairs if pair is not None)
        ids, lens = ids.to(device, non_blocking=True), lens.to(device, non_blocking=True)
        super().__init__(
            [None] * len(pairs), offset=packed.layout.shape[1], stores=True, offset_outside=True,
            options=cache.options, ids=ids, lens=lens, as_stored=True,
        )  # fmt: skip
        self._texts: list[_Texts | None] = [None if pair is None else _Texts(*pair, rows) for pair in pairs]
        self._places = packed.text_places().to(device)
        self.span = rows.shape[1]

    def fill(self, given: Any) -> None:
        """Store the keys and values in a caller's stock cache; they are copied when it reads them."""
        given.layers = [
            PrefixLayer(True)
            if texts is None
            else LazyLayer(partial(texts.padded, self.ids, self._places), texts.dtype, texts.device)
            for texts in self._texts
        ]

    def has_prefix(self, layer: int) -> bool:
        """Whether a layer has texts."""
        return self._texts[layer] is not None

    def _with_prefix(self, layer: int, key: Tensor, value: Tensor) -> tuple[KeyValue, KeyValue] | None:
        texts = self._texts[layer]
        return None if texts is None else ((key, value), texts.bank())

    def _become_stock(self) -> None:
        """Put the texts in front of every row."""
        if self.ids is None:
            return
        for layer, texts in zip(self.layers, self._texts, strict=True):
            if texts is not None:
                pair = texts.padded(self.ids, self._places)
                if layer.is_initialized:
                    pair = torch.cat([pair[0], layer.keys], 2), torch.cat([pair[1], layer.values], 2)
                layer.keys, layer.values, layer.is_initialized = *pair, True
                layer.dtype, layer.device = pair[0].dtype, pair[0].device
        self._forget_texts()

    def _forget_texts(self) -> None:
        self._texts = [None] * len(self._texts)
        self.ids = self.lens = None
        self._offset = self.span = 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(number of keys that attention will see, position of the first one)."""
        if self._running is None:  # a model without a patch
            self._become_stock()
        return super().get_mask_sizes(query_length, layer_idx)

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values of a layer; returns all that attention will see."""
        if self._running is None:
            self._become_stock()
        return super().update(*args, **kwargs)  # type: ignore[no-any-return]

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens."""
        if -tokens_to_remove > self.num_tokens:
            self._become_stock()
        DynamicCache.crop(self, tokens_to_remove)

    def reset(self) -> None:
        """Forget all tokens."""
        self._forget_texts()
        self.layers: list[Any] = [PrefixLayer(True) for _ in self._texts]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows for beam search."""
        super().reorder_cache(beam_idx)
        self._places = self._places[beam_idx.to(self._places.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)
        self._places = self._places.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows."""
        super().batch_select_indices(indices)
        self._places = self._places[indices]
