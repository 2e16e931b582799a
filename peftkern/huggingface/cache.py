# SPDX-License-Identifier: Apache-2.0
"""The key-value cache of a model with a prefix: it stores the sequence, and knows how long the prefix is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

__all__ = ["PrefixCache", "PrefixLayer", "PrefixOptions"]

KeyValue = tuple[Tensor, Tensor]

#: Attribute of an attention module that takes a prefix: its :class:`.survey.Site`.
SITE = "_peftkern_site"


class PrefixLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values [B, Hkv, T, D] of the sequence.

    The prefix is in no batch row, so reordering beams, repeating and cropping concern what is here and nothing else.

    Args:
        stores: false for a training step, which returns what it is given. A layer that activation checkpointing runs
            twice must not find its own first pass in the cache.
    """

    def __init__(self, stores: bool) -> None:
        super().__init__()
        self.stores = stores

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The sequence's keys and values up to these; the first ones are kept without a copy."""
        if not self.stores:
            return key_states, value_states
        if self.get_seq_length() > 0:
            return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[no-any-return]
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values, self.is_initialized = key_states, value_states, True
        return key_states, value_states


@dataclass(frozen=True)
class PrefixOptions:
    """How attention treats the prefix: see :func:`peftkern.patch`."""

    in_window: bool = True
    backend: str = "auto"


@dataclass(eq=False)
class _Forward:
    """One run of the model: which attention modules have taken their prefix."""

    taken: set[str] = field(default_factory=set)


class PrefixCache(DynamicCache):  # type: ignore[misc]
    """The prefix of every layer, beside the keys and values of the sequence.

    Models ask a cache two things: how many positions lie before this call (for rotary and learned positions), and
    which keys attention will see (for the mask). The answers are ``offset + seen`` and "``seen + S`` keys that start
    at position ``offset``", so that stock model code puts the sequence behind the prefix without a key of it being
    there.

    Args:
        prefix: per layer (prefix_k, prefix_v), each [Hkv, P, D] with any strides, or None for a layer left out.
        offset: positions that the model counts for the prefix.
        stores: false for a training step.
        offset_outside: whether the offset also counts between two forwards, as PEFT's ``generate`` expects. If not,
            callers outside of the model see a cache of the sequence alone.
        options: passed on to the attention function.
    """

    def __init__(
        self,
        prefix: Sequence[KeyValue | None],
        *,
        offset: int,
        stores: bool,
        offset_outside: bool,
        options: PrefixOptions,
    ) -> None:
        Cache.__init__(self, layers=[PrefixLayer(stores) for _ in prefix])
        self.prefix = list(prefix)
        self.stores = stores
        self.options = options
        #: Prefix tokens of the longest layer, which relative position biases span.
        self.span = max([0] + [kv[0].shape[-2] for kv in prefix if kv is not None])
        self._offset = offset
        self._offset_outside = offset_outside
        self._running: _Forward | None = None
        self._used = False

    @property
    def offset(self) -> int:
        """Positions that the model counts for the prefix at this moment."""
        return self._offset if self._offset_outside or self._running is not None else 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions before this call: prefix and sequence."""
        return super().get_seq_length(layer_idx) + self.offset  # type: ignore[no-any-return]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(keys that attention will see, position of the first): the sequence's."""
        num_keys, _ = super().get_mask_sizes(query_length, layer_idx)
        return num_keys, self.offset

    def begin(self) -> None:
        """A forward of the model starts."""
        if self._used and not self.stores:
            raise ValueError(
                "past_key_values: expected a cache that holds the sequence, got the one of a training step, which "
                "stores nothing; use model.eval() or torch.no_grad() to continue a sequence"
            )
        self._running = _Forward()

    def finish(self, names: Sequence[str]) -> list[str]:
        """The forward has ended; those of ``names`` (attention modules) that did not take their prefix."""
        taken = set() if self._running is None else self._running.taken
        self._running, self._used = None, True
        return [name for name in names if name not in taken]

    def take(self, module: nn.Module, key: Tensor) -> KeyValue | None:
        """(prefix_k, prefix_v) for an attention module that is about to run on ``key``; None if it gets none.

        They are on the key's device, and of its dtype or fp32.
        """
        site = getattr(module, SITE, None)
        if site is None or (prefix := self.prefix[site.layer]) is None:
            return None
        if self._running is not None:  # a layer recomputed in the backward pass has been counted before
            self._running.taken.add(site.name)
        prefix_k, prefix_v = prefix
        dtype = torch.float32 if prefix_k.dtype == torch.float32 else key.dtype
        return prefix_k.to(key.device, dtype), prefix_v.to(key.device, dtype)
