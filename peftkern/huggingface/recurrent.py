# SPDX-License-Identifier: Apache-2.0
"""The states of recurrent layers (linear attention, state spaces, short convolutions) in a cache with a prefix.

A prefix of keys and values is read by attention alone. A recurrent layer starts with a fresh state, or with a state
that is given, and continues it as in a stock cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin, LinearAttentionLayer

from ..model_info import full_cache
from ..recurrent_state import LayerState

__all__ = [
    "RecurrentLayer",
    "RecurrentModule",
    "give_cache",
    "layers_with_states",
    "recurrent_layers",
    "watch_recurrent",
]


@dataclass(frozen=True)
class RecurrentModule:
    """A module that keeps a state in the cache.

    Attributes:
        name: its path in the model.
        layer: the cache layer.
        cache_name: its argument that takes the cache.
        gets_prefix: whether it gets the keyword argument ``peftkern_prefix`` of the model's call.
    """

    name: str
    layer: int
    cache_name: str
    gets_prefix: bool


class RecurrentLayer(LinearAttentionLayer):  # type: ignore[misc]
    """The states of one recurrent layer.

    Args:
        stores: False for a training step, where updates return what the layer needs and store nothing. Activation
            checkpointing runs a layer twice, and the second run must not find the state of the first in the cache.
        number_of_states: a layer may have several convolutions.
        initial: the states before the first token; empty for fresh ones.
    """

    def __init__(self, stores: bool, number_of_states: int = 1, initial: Sequence[LayerState] = ()) -> None:
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)
        self.stores = stores
        self.initial = tuple(initial)
        self._start()

    def _start(self) -> None:
        """Set the initial states. A layer that stores overwrites its own copies of them."""
        for index, (conv, recurrent) in enumerate(self.initial):
            for states, initialized, x in (
                (self.conv_states, self.is_conv_states_initialized, conv),
                (self.recurrent_states, self.is_recurrent_states_initialized, recurrent),
            ):
                if x is not None:
                    states[index], initialized[index] = x.clone() if self.stores else x, True
                    self.dtype, self.device = x.dtype, x.device
            self.conv_kernel_size[index] = None if conv is None else conv.shape[-1]
            self.has_previous_state[index] = True

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: object
    ) -> Tensor:
        """Append inputs [B, C, S] of the convolution; returns them behind those that it still sees."""
        if self.stores:
            full: Tensor = super().update_conv_state(conv_states, state_idx, conv_kernel_size, **kwargs)
            return full
        if self.has_previous_state[state_idx]:
            return torch.cat([self.conv_states[state_idx], conv_states], -1)
        return pad(conv_states, (max((conv_kernel_size or 0) - conv_states.shape[-1], 0), 0))

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: object) -> Tensor:
        """Replace the state of the recurrence; returns it."""
        if self.stores:
            recurrent_states = super().update_recurrent_state(recurrent_states, state_idx, **kwargs)
        return recurrent_states

    def reset(self) -> None:
        """Return to the states before the first token."""
        super().reset()
        self._start()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._select(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows."""
        self._select(lambda x: x[indices.to(x.device)])

    def _select(self, rows: Callable[[Tensor], Tensor]) -> None:
        for states in (self.conv_states, self.recurrent_states):
            for index, x in states.items():
                states[index] = None if x is None else rows(x)


def recurrent_layers(layers: Sequence[Any]) -> list[int]:
    """Those of a cache's layers that have a state, alone or beside keys and values."""
    return [index for index, layer in enumerate(layers) if isinstance(layer, LinearAttentionCacheLayerMixin)]


def layers_with_states(config: Any) -> list[Any]:
    """The layers of an empty stock cache of a model that has recurrent layers; empty for other models."""
    layers: list[Any] = full_cache(config).layers
    return layers if recurrent_layers(layers) else []


@contextmanager
def watch_recurrent(
    model: nn.Module, layers: Sequence[Any], names: dict[nn.Module, str]
) -> Iterator[dict[nn.Module, RecurrentModule]]:
    """Within the block, records the modules of ``model`` that keep a state in the layers of a cache.

    Args:
        model: runs once in the block.
        layers: of the cache.
        names: path of each module.
    """
    found: dict[nn.Module, RecurrentModule] = {}
    running: list[tuple[nn.Module, dict[str, Any]]] = []
    recurrent = recurrent_layers(layers)

    def enter(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        parameters = list(inspect.signature(type(module).forward).parameters)[1:] if args else []
        running.append((module, {**dict(zip(parameters, args, strict=False)), **kwargs}))

    def recording(layer: int, update: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def record(*args: Any, **kwargs: Any) -> Tensor:
            module, arguments = running[-1]
            cache_name = next(name for name, x in arguments.items() if isinstance(x, Cache))
            found[module] = RecurrentModule(names[module], layer, cache_name, "peftkern_prefix" in arguments)
            return update(*args, **kwargs)

        return record

    handles: list[Any] = []
    if recurrent:
        for module in model.modules():
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(lambda *_: running.pop() and None, always_call=True))
    for index in recurrent:
        for name in ("update_conv_state", "update_recurrent_state"):
            setattr(layers[index], name, recording(index, getattr(layers[index], name)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
        for index in recurrent:
            del layers[index].update_conv_state, layers[index].update_recurrent_state


def give_cache(info: RecurrentModule, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """Hook on a recurrent module: give it the cache if it reads or writes a state.

    A training step with fresh states needs no cache, without which models have faster kernels. With initial states it
    needs one, which activation checkpointing has removed.
    """
    given, prefix = kwargs.get(info.cache_name), kwargs.get("peftkern_prefix")
    cache = given if given is not None else prefix
    layers = getattr(cache, "layers", ())
    layer = layers[info.layer] if info.layer < len(layers) else None
    if isinstance(layer, RecurrentLayer):
        kwargs[info.cache_name] = cache if layer.initial else given if layer.stores else None
    return args, kwargs
