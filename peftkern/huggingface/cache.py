# SPDX-License-Identifier: Apache-2.0
"""The key-value cache of a model with a prefix: it stores the sequence, and knows how long the prefix is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

if TYPE_CHECKING:
    from .packing import PackedBatch

__all__ = ["PrefixCache", "PrefixLayer", "PrefixOptions", "PromptCache"]

KeyValue = tuple[Tensor, Tensor]

#: Attribute of an attention module that takes a prefix: its :class:`.survey.PrefixLayerInfo`.
LAYER_INFO = "_peftkern_layer_info"


#: Attribute of an attention module that must not run without a prefix, unless told so by WITHOUT_PREFIX.
REQUIRED = "_peftkern_required"

#: In place of the prefix of a call that has none.
WITHOUT_PREFIX: Any = "without prefix"


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
        prefix: per layer (prefix_k, prefix_v), each [Hkv, P, D] with any strides, or None for a layer left out; with
            ``ids``, a bank [A, Hkv, P, D].
        offset: positions that the model counts for the prefix.
        stores: false for a training step.
        offset_outside: whether the offset also counts between two forwards, as PEFT's ``generate`` expects. If not,
            callers outside of the model see a cache of the sequence alone.
        options: passed on to the attention function.
        ids: [B], which prefix of the bank a sample has.

    Attributes:
        stream: how the batch of this forward is packed; None for one that is not.
        from_first: positions of a row count from its first token, which padding may precede.
        pause: of activation checkpointing, during this forward.
    """

    def __init__(
        self,
        prefix: Sequence[KeyValue | None],
        *,
        offset: int,
        stores: bool,
        offset_outside: bool,
        options: PrefixOptions,
        ids: Tensor | None = None,
    ) -> None:
        Cache.__init__(self, layers=[PrefixLayer(stores) for _ in prefix])
        self.prefix = list(prefix)
        self.stores = stores
        self.options = options
        self.ids = ids
        self.packed: PackedBatch | None = None
        #: Prefix tokens of the longest layer, which relative position biases span.
        self.span = max([0] + [kv[0].shape[-2] for kv in prefix if kv is not None])
        self._offset = offset
        self._offset_outside = offset_outside
        self._running: _Forward | None = None
        self._used = False
        self.from_first = False
        self.pause: Any = None

    @property
    def offset(self) -> int:
        """Positions that the model counts for the prefix at this moment."""
        return self._offset if self._offset_outside or self._running is not None else 0

    @property
    def counts_outside(self) -> bool:
        """Whether callers of the model count the prefix in masks and positions, as PEFT does."""
        return self._offset_outside

    @property
    def prefix_positions(self) -> int:
        """Positions that the model counts for the prefix during a forward."""
        return self._offset

    @property
    def num_tokens(self) -> int:
        """Tokens of the sequence in the cache."""
        return int(super().get_seq_length())

    @property
    def consumed_positions(self) -> int:
        """Positions of the sequence that the prefix takes."""
        return self.offset

    def as_stock(self, batch: int, dtype: torch.dtype) -> DynamicCache:
        """A stock cache that holds the prefix once per sample, as PEFT hands it to the model.

        Args:
            batch: B.
            dtype: of the model.
        """
        cache = DynamicCache()
        for layer, kv in enumerate(self.prefix):
            if kv is None:
                raise ValueError(f"prefix: expected one in every layer of a stock cache, got none in layer {layer}")
            key, value = (x.to(dtype).expand(batch, *x.shape[-3:]) for x in kv)
            cache.update(key, value, layer)
        return cache

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
                "cache: expected a cache that holds the sequence, got the one of a training step, which "
                "stores nothing; to continue a sequence, run it under model.eval() or torch.no_grad()"
            )
        self._running = _Forward()

    def finish(self, names: Sequence[str]) -> list[str]:
        """The forward has ended; those of ``names`` (attention modules) that did not take their prefix."""
        taken = set() if self._running is None else self._running.taken
        self._running, self._used = None, True
        return [name for name in names if name not in taken]

    def has_prefix(self, layer: int) -> bool:
        """Whether a layer has a prefix."""
        return self.prefix[layer] is not None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beams of other rows."""
        super().reorder_cache(beam_idx)
        self.ids = None if self.ids is None else self.ids[beam_idx.to(self.ids.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row several times."""
        super().batch_repeat_interleave(repeats)
        self.ids = None if self.ids is None else self.ids.repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Some rows."""
        super().batch_select_indices(indices)
        self.ids = None if self.ids is None else self.ids[indices]

    def prefix_for(self, module: nn.Module, key: Tensor, value: Tensor, mask: Any) -> KeyValue | None:
        """(prefix_k, prefix_v) for an attention module that is about to run on these; None if it gets none.

        They are on the key's device, and of its dtype or fp32.
        """
        info = getattr(module, LAYER_INFO, None)
        if info is None or (prefix := self.prefix[info.layer]) is None:
            return None
        if self._running is not None:  # a layer recomputed in the backward pass has been counted before
            self._running.taken.add(info.name)
        return _like_key(prefix, key)


def _like_key(prefix: KeyValue, key: Tensor) -> KeyValue:
    """A prefix on the key's device, in fp32 if all of it is and in the key's dtype otherwise."""
    dtype = torch.float32 if all(x.dtype == torch.float32 for x in prefix) else key.dtype
    prefix_k, prefix_v = prefix
    return prefix_k.to(key.device, dtype), prefix_v.to(key.device, dtype)


class _PackedLayer(PrefixLayer):
    """Keys and values of a stream's sequences, which are laid out as a batch when somebody reads them.

    A forward whose caller does not continue the sequence, as in evaluation, need not copy them.

    Args:
        stream: the packed batch.
        keys, values: [1, Hkv, N, D].
    """

    def __init__(self, packed: PackedBatch, keys: Tensor, values: Tensor) -> None:
        super().__init__(True)
        self._packed: tuple[PackedBatch, Tensor, Tensor] | None = (packed, keys, values)
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def _unpack(self) -> None:
        if self._packed is not None:
            packed, keys, values = self._packed
            self._packed = None
            self.__dict__["keys"], self.__dict__["values"] = packed.padded_heads(keys), packed.padded_heads(values)

    @property
    def keys(self) -> Tensor:
        """[B, Hkv, S, D]."""
        self._unpack()
        return self.__dict__["keys"]  # type: ignore[no-any-return]

    @keys.setter
    def keys(self, keys: Tensor) -> None:
        self.__dict__["keys"] = keys

    @property
    def values(self) -> Tensor:
        """[B, Hkv, S, D]."""
        self._unpack()
        return self.__dict__["values"]  # type: ignore[no-any-return]

    @values.setter
    def values(self, values: Tensor) -> None:
        self.__dict__["values"] = values


class PromptCache(PrefixCache):
    """The cache of a forward over a stream whose first rows are prompts: their keys are the prefix of the others.

    Args:
        num_layers: layers of the cache.
        stream: the packed batch, with prompts.
        stores: whether :meth:`unpacked` will be asked for.
        options: passed on to the attention function.
    """

    def __init__(self, num_layers: int, packed: PackedBatch, *, stores: bool, options: PrefixOptions) -> None:
        nothing: list[KeyValue | None] = [None] * num_layers
        super().__init__(nothing, offset=0, stores=stores, offset_outside=False, options=options)
        self.packed = packed
        self.ids = packed.prefix_ids
        self.span = packed.prompt_len

    @property
    def prefix_positions(self) -> int:
        """Positions that the model counts for the prefix during a forward."""
        return self._offset

    @property
    def num_tokens(self) -> int:
        """Tokens of the sequence in the cache."""
        return int(super().get_seq_length())

    @property
    def consumed_positions(self) -> int:
        """The prompt's."""
        return self.span

    def has_prefix(self, layer: int) -> bool:
        """Every layer."""
        return True

    def prefix_for(self, module: nn.Module, key: Tensor, value: Tensor, mask: Any) -> KeyValue | None:
        """Views [A, Hkv, P, D] of the prompts' rows of ``key`` and ``value`` [1, Hkv, N, D]."""
        info = getattr(module, LAYER_INFO, None)
        if info is None:
            return None
        if self._running is not None:
            self._running.taken.add(info.name)
        assert self.packed is not None
        return _like_key((self.packed.bank(key), self.packed.bank(value)), key)

    def unpacked(self) -> PrefixCache:
        """The same keys and values as a cache of the padded batch, behind the prompts as a shared prefix."""
        packed = self.packed
        assert packed is not None
        ids = packed.prompt_ids
        # A layer that early exit has skipped has no keys.
        pairs = [(layer.keys, layer.values) if layer.is_initialized else None for layer in self.layers]
        banks = [None if pair is None else (packed.bank(pair[0]), packed.bank(pair[1])) for pair in pairs]
        if ids is None:
            banks = [None if bank is None else (bank[0][0], bank[1][0]) for bank in banks]
        cache = PrefixCache(
            banks, offset=packed.prompt_len, stores=True, offset_outside=False, options=self.options, ids=ids
        )
        cache.layers = [PrefixLayer(True) if pair is None else _PackedLayer(packed, *pair) for pair in pairs]
        return cache
