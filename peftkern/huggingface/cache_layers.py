# SPDX-License-Identifier: Apache-2.0
"""Layers of a cache with a prefix: they store the keys, values and states of the sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
    QuantizedCache,
    StaticCache,
    StaticLayer,
)

from ..recurrent_state import LayerState
from .recurrent import RecurrentLayer

__all__ = ["HybridLayer", "LazyLayer", "PrefixLayer", "layer_like", "stored_layers"]

_KeyValue = tuple[Tensor, Tensor]


class PrefixLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values [B, Hkv, T, D] of the sequence.

    The prefix is not part of any batch row, so reordering beams, repeating and cropping only affect the sequence.

    Args:
        stores: False for a training step, where :meth:`update` returns its arguments and stores nothing. Activation
            checkpointing runs a layer twice, and the second run must not find the keys of the first in the cache.
    """

    def __init__(self, stores: bool) -> None:
        super().__init__()
        self.stores = stores

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values; returns all of the sequence's. The first call stores its arguments uncopied."""
        if not self.stores:
            return key_states, value_states
        if self.get_seq_length() > 0:
            return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[no-any-return]
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values, self.is_initialized = key_states, value_states, True
        return key_states, value_states


class HybridLayer(RecurrentLayer, PrefixLayer, LinearAttentionAndFullAttentionLayer):  # type: ignore[misc]
    """Keys and values of the sequence, and the states of a recurrence that runs beside attention or within it."""

    def __init__(self, stores: bool, number_of_states: int = 1, initial: Sequence[LayerState] = ()) -> None:
        DynamicLayer.__init__(self)
        RecurrentLayer.__init__(self, stores, number_of_states, initial)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        RecurrentLayer.batch_repeat_interleave(self, repeats)
        DynamicLayer.batch_repeat_interleave(self, repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows."""
        RecurrentLayer.batch_select_indices(self, indices)
        DynamicLayer.batch_select_indices(self, indices)


def layer_like(stock: Any, stores: bool, initial: Sequence[LayerState] = ()) -> Any:
    """A layer that stores what a stock layer stores. Layers of neither kind store nothing."""
    if isinstance(stock, DynamicLayer) and isinstance(stock, LinearAttentionLayer):
        return HybridLayer(stores, stock.number_of_states, initial)
    if isinstance(stock, LinearAttentionLayer):
        return RecurrentLayer(stores, stock.number_of_states, initial)
    return PrefixLayer(stores) if isinstance(stock, DynamicLayer) else stock


class LazyLayer(PrefixLayer):
    """Keys and values [B, Hkv, S, D] that are computed when they are first read.

    A forward whose caller does not continue the sequence, as in evaluation, never computes them.

    Args:
        compute: returns both.
        dtype, device: of both.
    """

    def __init__(self, compute: Callable[[], _KeyValue], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(True)
        self._compute: Callable[[], _KeyValue] | None = compute
        self.dtype, self.device, self.is_initialized = dtype, device, True

    def _read(self, name: str) -> Tensor:
        if self._compute is not None:
            self.__dict__["keys"], self.__dict__["values"] = self._compute()
            self._compute = None
        return self.__dict__[name]  # type: ignore[no-any-return]

    @property
    def keys(self) -> Tensor:
        """[B, Hkv, S, D]."""
        return self._read("keys")

    @keys.setter
    def keys(self, keys: Tensor) -> None:
        self.__dict__["keys"] = keys

    @property
    def values(self) -> Tensor:
        """[B, Hkv, S, D]."""
        return self._read("values")

    @values.setter
    def values(self, values: Tensor) -> None:
        self.__dict__["values"] = values


def stored_layers(cache: Cache | None) -> list[Any] | None:
    """The layers of a static or quantised cache if all keep every token of the sequence; None for other caches."""
    if isinstance(cache, QuantizedCache):
        return list(cache.layers)
    if isinstance(cache, StaticCache) and all(type(layer) is StaticLayer for layer in cache.layers):
        return list(cache.layers)
    return None
