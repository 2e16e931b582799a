# SPDX-License-Identifier: Apache-2.0
"""Key-value caches of models with a prefix: they store the sequence and know the length of the prefix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache
from transformers.utils.import_utils import is_tracing

from ..arguments import constant
from ..layer_shapes import expanded
from ..recurrent_state import LayerState
from .cache_layers import PrefixLayer, layer_like, stored_layers
from .packing import PackedBatch
from .recurrent import layers_with_states

__all__ = ["PrefixCache", "PrefixOptions", "like_key"]

KeyValue = tuple[Tensor, Tensor]

#: Attribute of an attention module that reads the prefix: its :class:`.survey.PrefixLayerInfo`.
LAYER_INFO = "_peftkern_layer_info"

#: Attribute of an attention module that raises when it is called without a prefix, unless it gets WITHOUT_PREFIX.
REQUIRED = "_peftkern_required"

#: Passed instead of a prefix in calls that intentionally have none.
WITHOUT_PREFIX: Any = "without prefix"


@dataclass(frozen=True)
class PrefixOptions:
    """How attention treats the prefix: see :func:`peftkern.patch`."""

    in_window: bool = True
    backend: str = "auto"


@dataclass(eq=False)
class _Forward:
    """One forward of the model.

    Attributes:
        calls: per attention module that reads the prefix, its calls until now. A module computes several layers if
            they share their weights.
        served: per name of an attention module, how many times it has received its prefix.
    """

    calls: dict[str, int] = field(default_factory=dict)
    served: dict[str, int] = field(default_factory=dict)


class PrefixCache(DynamicCache):  # type: ignore[misc]
    """The prefix of every layer, and the keys and values of the sequence.

    Models ask a cache two questions. How many positions precede this call (for rotary and learned positions)? Which
    keys will attention see (for the mask)? The answers are ``offset + seen``, and "``seen + S`` keys that start at
    position ``offset``". Stock model code therefore places the sequence after the prefix, although the cache contains
    no keys of the prefix.

    Args:
        prefix: per layer (prefix_k, prefix_v), each [Hkv, P, D] with any strides, or None for a layer without a
            prefix. With ``ids``, each is a bank [A, Hkv, P, D].
        beside: the same for the layers of cross-attention, whose keys are in another cache.
        offset: positions that the model counts for the prefix.
        stores: False for a training step.
        offset_outside: whether the offset also counts between two forwards, as PEFT's ``generate`` expects. If False,
            callers of the model see a cache of the sequence alone.
        options: passed on to the attention function.
        ids: [B], index into the bank for each sample, -1 for none; or [B, K], several.
        lens: [A], the number of tokens of each prefix in the bank; None if all have P.
        as_stored: whether ``prefix`` has the form of the model's cache. A layer with compressed keys expands it.
        offsets: [A], positions that each prefix of the bank takes before the samples that read it; None if the model
            counts ``offset`` for all samples.
        read_layers: the layers of the cache that self-attention reads; None for all. Others, as those of
            cross-attention, are left alone.
        bias: per layer [P], added to the scores of the prefix tokens in all heads, or None; empty if no layer has
            one.
        has_gaps: whether a prefix token's place does not tell its position, because tokens between others have been
            removed.
        like: the layers of a stock cache of the model, whose kinds this cache has too; empty if all layers attend.
        states: for each of them the states before the first token, empty for fresh ones.
        given: the caller's empty cache. If it is static or quantised, its layers store the sequence; if it offloads
            layers to the CPU, so does this one. None to store the sequence in tensors that grow.

    Attributes:
        packed: the packed batch of the current forward; None if the batch is not packed.
        padded: the packed batch in whose place the unpacked one runs, because the backbone could not run it.
        from_first: whether positions of a row count from its first token, so that padding before it takes none.
        hidden: whether callers of the model do not count the prefix during the current call.
        pause: handle of the pause of activation checkpointing during the current forward.
    """

    def __init__(
        self,
        prefix: Sequence[KeyValue | None],
        *,
        offset: int,
        stores: bool,
        offset_outside: bool,
        options: PrefixOptions,
        beside: Sequence[KeyValue | None] = (),
        ids: Tensor | None = None,
        lens: Tensor | None = None,
        as_stored: bool = False,
        offsets: Tensor | None = None,
        read_layers: frozenset[int] | None = None,
        bias: Sequence[Tensor | None] = (),
        has_gaps: bool = False,
        like: Sequence[Any] = (),
        states: Sequence[Sequence[LayerState]] = (),
        given: Cache | None = None,
    ) -> None:
        layers = stored_layers(given)
        if layers is None:
            layers = [layer_like(stock, stores, own) for stock, own in zip_longest(like, states, fillvalue=())]
            layers += [PrefixLayer(stores) for _ in prefix[len(layers) :]]
        Cache.__init__(self, layers=layers, offloading=given is not None and given.offloading)
        self.is_static = isinstance(given, StaticCache)
        for own, other in zip(layers, [] if given is None else given.layers, strict=False):
            if getattr(other, "record_past", False) and hasattr(
                own, "activate_past_recording"
            ):  # assisted generation will crop the cache
                own.activate_past_recording()
        self.prefix: Sequence[KeyValue | None] = list(prefix)
        self.bias = list(bias)
        self.has_gaps = has_gaps
        self.beside: Sequence[KeyValue | None] = list(beside)
        self.stores = stores
        self.options = options
        self.ids = _own(ids)
        self.lens = _own(lens)
        self.as_stored = as_stored
        self.offsets = offsets
        self._read_layers = read_layers
        self.packed: PackedBatch | None = None
        self.padded: PackedBatch | None = None
        #: Prefix tokens of the longest layer; relative position biases cover them.
        self.span = max([0] + [kv[0].shape[-2] for kv in prefix if kv is not None])
        self._offset = offset
        self._offset_outside = offset_outside
        self._running: _Forward | None = None
        self._used = False
        self.from_first = False
        self.hidden = False
        self.pause: Any = None

    @property
    def ids(self) -> Tensor | None:
        """The prefix, or the K prefixes, of each row. Constant, so that all layers share what follows from them."""
        return self._ids

    @ids.setter
    def ids(self, ids: Tensor | None) -> None:
        self._ids = ids if ids is None or is_tracing(ids) else constant(ids)

    @property
    def offset(self) -> int:
        """Positions that the model currently counts for the prefix."""
        return self._offset if self.counts_outside or self._running is not None else 0

    @property
    def counts_outside(self) -> bool:
        """Whether callers of the model count the prefix in masks and positions, as PEFT does."""
        return self._offset_outside and not self.hidden

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
        """Positions that the prefix consumes, of those that the model has."""
        return self.offset

    def as_stock(self, batch: int, dtype: torch.dtype, config: Any) -> DynamicCache:
        """A stock cache with one copy of the prefix per sample, as PEFT passes it to the model.

        Args:
            batch: B.
            dtype: of the model.
            config: of the model. Recurrent layers of its cache get no prefix.

        Raises:
            ValueError: for a layer without a prefix, gates, for which a stock cache has no place, and lengths that
                are not the positions that the prefix takes, since stock models count the tokens of the cache.
        """
        if any(bias is not None for bias in self.bias):
            raise ValueError(
                "output_attentions: expected False, because the stock attention, which returns its weights, has no "
                "gates for prefix tokens (learn_length), got True"
            )
        cache = DynamicCache()
        cache.layers = layers_with_states(config)
        lengths = set()
        for layer, kv in enumerate(self.prefix):
            unread = self._read_layers is not None and layer not in self._read_layers
            if unread or (layer < len(cache.layers) and not isinstance(cache.layers[layer], DynamicLayer)):
                continue
            if kv is None:
                raise ValueError(
                    f"prefix: expected a prefix in every layer of a stock cache, got none in layer {layer}"
                )
            key, value = (x.to(dtype).expand(batch, *x.shape[-3:]) for x in kv)
            cache.update(key, value, layer)
            lengths.add(key.shape[-2])
        if lengths != {self._offset}:
            raise ValueError(
                "output_attentions: expected False, because the stock attention, which returns its weights, counts "
                f"as many positions as the prefix has tokens, got layers of {sorted(lengths)} tokens at "
                f"{self._offset} positions (shift_positions)"
            )
        return cache

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """The state of a convolution, which models overwrite; a copy in a training step."""
        state: Tensor | None = super().get_conv_state(layer_idx, state_idx)
        return state if state is None or self.stores else state.clone()

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """The state of a recurrence, which models overwrite; a copy in a training step."""
        state: Tensor | None = super().get_recurrent_state(layer_idx, state_idx)
        return state if state is None or self.stores else state.clone()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions before this call, of prefix and sequence."""
        return super().get_seq_length(layer_idx) + self.offset  # type: ignore[no-any-return]

    def end(self, num_tokens: int) -> int:
        """Position after ``num_tokens`` more tokens; after the last column of a static cache.

        A static cache counts its tokens on the device, which the host does not wait for.
        """
        return self.offset + self.layers[0].max_cache_len if self.is_static else self.get_seq_length() + num_tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(number of sequence keys that attention will see, position of the first one)."""
        num_keys, _ = super().get_mask_sizes(query_length, layer_idx)
        return num_keys, self.offset

    def begin(self) -> None:
        """Start a forward of the model."""
        if self._used and not self.stores:
            raise ValueError(
                "cache: expected a cache that holds the sequence, got the one of a training step, which stores "
                "nothing; to continue a sequence, run it under model.eval() or torch.no_grad()"
            )
        self._running = _Forward()

    def finish(self, expected: Mapping[str, int]) -> list[str]:
        """End the forward; returns the attention modules that did not receive their prefix as often as expected."""
        served = {} if self._running is None else self._running.served
        self._running, self._used = None, True
        return [name for name, times in expected.items() if served.get(name, 0) < times]

    def prefix_lens(self) -> set[int]:
        """The different numbers of prefix tokens that layers read."""
        return {0 if kv is None else kv[0].shape[-2] for kv in self.prefix}

    def has_prefix(self, layer: int) -> bool:
        """Whether a layer has a prefix."""
        return self.prefix[layer] is not None

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens of the sequence.

        Raises:
            ValueError: if it has fewer tokens. Those of a prefix cannot be removed.
        """
        if -tokens_to_remove > self.num_tokens:
            raise ValueError(
                f"tokens_to_remove: expected at most the {self.num_tokens} tokens behind the prefix, got "
                f"{-tokens_to_remove}"
            )
        super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows for beam search."""
        super().reorder_cache(beam_idx)
        self.ids = None if self.ids is None else self.ids[beam_idx.to(self.ids.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)
        self.ids = None if self.ids is None else self.ids.repeat_interleave(repeats, 0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows."""
        super().batch_select_indices(indices)
        self.ids = None if self.ids is None else self.ids[indices]

    def prefix_for(
        self, module: nn.Module, key: Tensor, value: Tensor, mask: Any
    ) -> tuple[KeyValue, KeyValue, Tensor | None] | None:
        """What an attention module reads that is about to attend to ``key`` and ``value``.

        Returns:
            ((key, value), (prefix_k, prefix_v), bias), the prefix on the key's device, in the key's dtype or fp32,
            and what is added to its tokens' scores, [1, P] or None; None if the module reads no prefix.
        """
        info = getattr(module, LAYER_INFO, None)
        if info is None:
            return None
        layer, bias = self._layer_of(info), None
        if info.part == "cross":
            prefix = self.beside[layer] if self.beside else None
            found = None if prefix is None else ((key, value), prefix)
        else:
            found = self._with_prefix(layer, key, value)
            bias = self.bias[layer] if self.bias else None
        if found is None:
            return None
        sequence, prefix = found
        if self.as_stored:
            prefix = expanded(module, prefix)
        if self._running is not None:  # None where a layer is recomputed in the backward pass
            self._running.served[info.name] = self._running.served.get(info.name, 0) + 1
        return sequence, like_key(prefix, key), None if bias is None else bias[None].to(key.device)

    def _layer_of(self, info: Any) -> int:
        """The layer that an attention module with this :class:`.survey.PrefixLayerInfo` is about to compute."""
        if len(info.layers) == 1:
            return info.layer  # type: ignore[no-any-return]
        if self._running is None:
            raise ValueError(
                f"model: expected no activation checkpointing, because {info.name} computes layers "
                f"{list(info.layers)}, which cannot be told apart in the backward pass, got a recomputed layer"
            )
        call = self._running.calls.get(info.name, 0)
        self._running.calls[info.name] = call + 1
        return info.layers[call]  # type: ignore[no-any-return]

    def _with_prefix(self, layer: int, key: Tensor, value: Tensor) -> tuple[KeyValue, KeyValue] | None:
        prefix = self.prefix[layer]
        return None if prefix is None else ((key, value), prefix)


def _own(numbers: Tensor | None) -> Tensor | None:
    """A constant copy: the caller's tensor may change."""
    if numbers is None or is_tracing(numbers):
        return numbers
    return constant(numbers.detach().clone())


def like_key(prefix: KeyValue, key: Tensor) -> KeyValue:
    """The prefix on the key's device, in fp32 if both tensors are fp32 and in the key's dtype otherwise."""
    prefix_k, prefix_v = prefix
    dtype = torch.float32 if prefix_k.dtype == prefix_v.dtype == torch.float32 else key.dtype
    return prefix_k.to(key.device, dtype), prefix_v.to(key.device, dtype)
