# SPDX-License-Identifier: Apache-2.0
"""The half of the connector that lives in each worker: its share of the prefixes, and the way into its cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .geometry import layers_by_index, rank_heads
from .scheduling import Load, Step

__all__ = ["Writing", "check_layer", "layers_with_cache"]


class Writing:
    """Writes prefixes with the same function by which the model's attention layers write their own keys and values.

    So nothing here depends on the layout, packing or quantisation of the paged cache.

    Args:
        dtype: of the model's keys and values.
        rank, world_size: of tensor parallelism.
    """

    def __init__(self, dtype: torch.dtype, rank: int, world_size: int) -> None:
        self.dtype, self.rank, self.world_size = dtype, rank, world_size
        self.prefixes: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}

    def run(self, step: Step, modules: Mapping[str, Any]) -> None:
        """Do the work of one step.

        Args:
            step: from the scheduler.
            modules: the worker's layers by name; those without a cache of their own are passed over.
        """
        for digest, pairs in step.arrivals.items():
            layers = layers_with_cache(modules)
            self.prefixes[digest] = {
                layers[index]: self._own(pair, modules[layers[index]].num_kv_heads)
                for index, pair in enumerate(pairs)
                if pair is not None
            }
        for load in step.loads:
            self._load(load, modules)
        for digest in step.drops:
            self.prefixes.pop(digest, None)

    def _own(self, pair: tuple[Tensor, Tensor], num_kv_heads: int) -> tuple[Tensor, Tensor]:
        """This rank's heads of a key and a value, in host memory, because vLLM has planned the device's."""
        key, value = (
            rank_heads(x, num_kv_heads, self.rank, self.world_size).to(self.dtype).contiguous() for x in pair
        )
        return key, value

    def _load(self, load: Load, modules: Mapping[str, Any]) -> None:
        n = len(load.slots)
        slots = torch.tensor(load.slots, dtype=torch.int64)
        for name, pair in self.prefixes[load.digest].items():
            layer = modules[name]
            slots = slots.to(layer.kv_cache.device)
            key, value = (x[-n:].to(slots.device) for x in pair)
            layer.impl.do_kv_cache_update(layer, key, value, layer.kv_cache, slots)


def layers_with_cache(modules: Mapping[str, Any]) -> dict[int, str]:
    """Names of the attention layers that write to a cache of their own, by their numbers."""
    return layers_by_index(
        name
        for name, module in modules.items()
        if getattr(module, "kv_cache", None) is not None
        and getattr(module, "kv_sharing_target_layer_name", None) is None
    )


def check_layer(name: str, layer: Any) -> None:
    """Raise ValueError if an attention layer's way of writing its cache cannot be called with keys and values."""
    backend = getattr(layer, "attn_backend", None)
    if getattr(backend, "forward_includes_kv_cache_update", True) or not hasattr(layer.impl, "do_kv_cache_update"):
        title = backend.get_name() if backend is not None else type(layer).__name__
        raise ValueError(
            f"attention backend: expected one that writes its cache in a step of its own, got {title} in {name}"
        )
