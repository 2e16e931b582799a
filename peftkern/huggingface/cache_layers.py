# SPDX-License-Identifier: Apache-2.0
"""Layers of a cache with a prefix: they store the keys, values and states of the sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer, LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

from ..recurrent_state import LayerState
from .recurrent import RecurrentLayer

__all__ = ["HybridLayer", "PrefixLayer", "layer_like"]


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
