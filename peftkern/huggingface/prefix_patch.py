# SPDX-License-Identifier: Apache-2.0
"""Patches for a prefix of keys and values in every layer: prefix tuning, cartridges, :class:`peftkern.PrefixKV`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.masking_utils import find_packed_sequence_indices
from transformers.utils.import_utils import is_tracing

from ..model_info import given_cache
from .cache import KeyValue, PrefixCache
from .call_arguments import check_replaceable, count_prefix, self_attention_cache, tokens_of
from .calls import running
from .layout import HostNumbers
from .model_patch import ModelPatch
from .packing import PackedBatch
from .trial import Trial
from .wiring import Source

__all__ = ["PrefixPatch", "PrefixSource"]


class PrefixSource(Source):
    """Provides the prefix keys and values of every layer."""

    @property
    @abstractmethod
    def offset(self) -> int:
        """Positions that the model counts for the prefix."""

    @abstractmethod
    def check(self, patch: PrefixPatch) -> None:
        """Raise ValueError unless the shape of the prefix fits the model."""

    @abstractmethod
    def layer_kv(self, patch: PrefixPatch) -> Sequence[KeyValue | None]:
        """Per layer (prefix_k, prefix_v), each [Hkv, P, D]; None for a layer without a prefix."""

    def stock_cache(self, cache: PrefixCache, batch: int, dtype: torch.dtype) -> Any:
        """A stock cache with one copy of the prefix per sample."""
        return cache.as_stock(batch, dtype)


class PrefixPatch(ModelPatch):
    """Puts a prefix of keys and values into one model."""

    source: PrefixSource

    def check(self, trial: Trial) -> None:
        """Raise ValueError unless the prefix fits the model and the patched model agrees with the stock model."""
        self.source.check(self)
        if (reason := trial.try_prefix()) is not None:
            raise ValueError(f"model: {reason}")
        if self.calls.packing:
            self.packer.try_out(trial, shared=self.calls.share)
        else:
            self.packer.reasons = ["packing=False"]
        if not self.calls.share:
            return
        if self.packer.reasons:
            raise ValueError(f"share: expected None, because {'; '.join(self.packer.reasons)}, got 'prefixes'")
        if self.packer.has_windows and not self.options.in_window:
            raise ValueError(
                "share: expected None, because windows count shared text but not the prefix (prefix_in_window=False "
                "or shift_positions=False), got 'prefixes'"
            )

    def explain(self) -> str:
        """One line: how batches run, and why they do not run faster."""
        because = "; ".join(self.packer.reasons)
        how = f"with their padding: {because}" if because else "without their padding"
        layers = len({info.layer for info in self.prefix_layers.values()})
        shared = "" if self.sharer is None else f"; {self.sharer.explain()}"
        prefix = f"a prefix in {layers} layers, read in place"
        return f"{type(self.base).__name__}: {prefix}; training batches run {how}{shared}"

    def check_geometry(self, name: str, num_layers: int, num_kv_heads: int, head_dim: int) -> None:
        """Raise ValueError unless a prefix of this shape fits the model."""
        for info in self.prefix_layers.values():
            if info.layer >= num_layers:
                raise ValueError(
                    f"{name}: expected a prefix for layer {info.layer} ({info.name}), got {num_layers} layers"
                )
            if (info.num_kv_heads, info.head_dim) != (num_kv_heads, head_dim):
                raise ValueError(
                    f"{name}: expected {info.num_kv_heads} key-value heads of {info.head_dim}, as {info.name} has, "
                    f"got {num_kv_heads} of {head_dim}"
                )

    def new_cache(self, *, stores: bool, offset_outside: bool, given: Cache | None = None) -> PrefixCache:
        """A cache with the prefix, for a call that starts a sequence. It stores the sequence as ``given`` does.

        Raises:
            ValueError: for a given cache that it cannot replace.
        """
        check_replaceable(given, plain=self.is_training_step or self.backbone.config.is_encoder_decoder)
        prefix = self.source.layer_kv(self)
        if self.is_training_step and any(map(_is_reentrant, self._checkpointed)):
            self._check_reentrant(prefix)
        return PrefixCache(
            prefix, offset=self.source.offset, stores=stores, offset_outside=offset_outside, options=self.options,
            given=given if stores else None,
        )  # fmt: skip

    def _check_reentrant(self, prefix: Sequence[KeyValue | None]) -> None:
        """Raise where reentrant checkpointing would fail, or would silently lose gradients."""
        keys = [kv[0] for kv in prefix if kv is not None]
        if keys and _saves_tensors(keys[0]):
            reason = "the prefix is computed (projection, MLP), and backward would run through it once per layer"
        elif len(self.prefix_layers) > len({info.layer for info in self.prefix_layers.values()}):
            reason = "layers share keys, whose gradients it loses"
        else:
            return
        advice = 'gradient_checkpointing_enable({"use_reentrant": False})'
        raise ValueError(f"use_reentrant: expected False, as {reason}, got True; use {advice}")

    def pack_call(self, kwargs: dict[str, Any], numbers: HostNumbers) -> PackedBatch | None:
        """Pack a training step whose batch has padding, several sequences per row, or text that rows share."""
        sharer, groups = self.sharer, kwargs.pop("group_ids", None) if self.calls.share else None
        cache, offset = self_attention_cache(kwargs), 0
        if isinstance(cache, PrefixCache):
            starts = not cache.stores
            offset = cache.offset if cache.counts_outside else 0
        else:
            starts = not self.source.is_given and cache is None and self.is_training_step
        if not starts:
            if sharer is not None and tokens_of(kwargs).shape[1] > 1:
                sharer.skip("behind a prefix, only training steps share text")
            return None
        mask, position_ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            mask = mask[:, offset:]
        if position_ids is not None:
            position_ids = position_ids - offset
        sequence = {**kwargs, "attention_mask": mask, "position_ids": position_ids}
        plain = mask is None and position_ids is None and sharer is None
        if plain and self.calls.logits != "labelled":
            return None
        if (reason := self.packer.why_unpackable(sequence)) is not None:
            if sharer is not None:
                sharer.skip(reason)
            return None
        if mask is not None and is_tracing(mask):  # the number of packed rows depends on values
            return None
        selects = self.selects_labels(kwargs)
        if plain and not selects:
            return None
        host = None if sharer is None else sharer.on_host(sequence, group_ids=groups)
        builder = self.packer.layout_builder(
            host or sequence, numbers, count_labels=selects, without_padding=host is not None
        )
        numbers.fetch()
        layout = builder.build() if sharer is None or host is None else sharer.build(builder, host)
        if layout.segments is None and not selects and not builder.saves_rows:
            if builder.is_all_real:
                kwargs["attention_mask"] = None  # so that the mask function need not check it again
            running.leave_note(self, _ONE_SEQUENCE_PER_ROW)
            return None
        packed = PackedBatch(layout.to(tokens_of(kwargs).device))
        if self.packer.head_runs_on_rows():
            self.pack_logits(packed, kwargs, numbers)
        return packed

    def find_cache(self, kwargs: dict[str, Any], packed: PackedBatch | None) -> PrefixCache | None:
        """The caller's cache if it contains the prefix, or a new one in place of an empty one."""
        given = given_cache(kwargs)
        sequence = self_attention_cache(kwargs)
        if isinstance(sequence, PrefixCache):
            cache = sequence
        elif self.source.is_given or hasattr(sequence, _REPLACED_CACHE):
            if hasattr(sequence, _REPLACED_CACHE) and not self.source.is_given:
                assert sequence is not None
                prefix: PrefixCache = getattr(sequence, _REPLACED_CACHE)
                count_prefix(prefix, kwargs, sequence.get_seq_length() - prefix.prefix_positions)
            return None
        else:
            stores = not self.is_training_step and kwargs.get("use_cache") is not False
            cache = self.new_cache(stores=stores, offset_outside=False, given=sequence)
            if isinstance(given, EncoderDecoderCache):
                kwargs[self.cache_name] = EncoderDecoderCache(cache, given.cross_attention_cache)
            elif kwargs.get("encoder_hidden_states") is not None:
                kwargs[self.cache_name] = EncoderDecoderCache(cache, DynamicCache())
            else:
                kwargs[self.cache_name] = cache
        if packed is None:
            self._refuse_packing(kwargs)
            if (reason := self._why_stock(kwargs)) is not None and cache.get_seq_length() == cache.offset:
                self._run_stock(cache, kwargs, reason)
                return None
        return cache

    def _why_stock(self, kwargs: dict[str, Any]) -> str | None:
        """Why a call needs the stock attention; None if it does not."""
        if kwargs.get("output_attentions", getattr(self.backbone.config, "output_attentions", False)):
            return "output_attentions"
        if self.source.is_given and kwargs.get("cu_seq_lens_q") is not None:
            return "cu_seq_lens_q without position_ids"
        return None

    def _run_stock(self, cache: PrefixCache, kwargs: dict[str, Any], reason: str) -> None:
        """Replace our cache by a stock cache that contains the prefix."""
        self.fall_back(reason, "such calls run the stock attention, with a copy of the prefix for every sample")
        batch = tokens_of(kwargs).shape[0]
        stock = self.source.stock_cache(cache, batch, self.backbone.dtype)
        self_attention = getattr(stock, "self_attention_cache", stock)
        setattr(self_attention, _REPLACED_CACHE, cache)
        given = kwargs.get(self.cache_name)
        if isinstance(given, EncoderDecoderCache) and self_attention is stock:
            stock = EncoderDecoderCache(stock, given.cross_attention_cache)
        kwargs[self.cache_name] = stock
        if not cache.counts_outside:
            count_prefix(cache, kwargs)

    def _refuse_packing(self, kwargs: dict[str, Any]) -> None:
        """Warn or raise for several sequences per row, which models separate by positions only without a cache."""
        position_ids = kwargs.get("position_ids")
        if kwargs.get("attention_mask") is not None or position_ids is None or position_ids.dim() != 2:
            return
        if position_ids.shape[1] < 2:  # a decoding step
            return
        if is_tracing(position_ids) or running.note(self) is _ONE_SEQUENCE_PER_ROW:
            return
        if find_packed_sequence_indices(position_ids) is None:
            return
        if self.source.is_given:
            self.fall_back("position_ids", "sequences packed into one row attend to each other, as in PEFT")
            return
        raise ValueError(
            "position_ids: expected one sequence per row, got packed sequences, which would attend to each other; "
            "pass padded sequences with an attention_mask"
        )


#: Note on a call in which every row is known to contain one sequence.
_ONE_SEQUENCE_PER_ROW = "one sequence per row"

#: Attribute of a stock cache that contains a prefix: the PrefixCache that it replaces.
_REPLACED_CACHE = "_peftkern_prefix_cache"


def _is_reentrant(module: Any) -> bool:
    """Whether a module uses reentrant checkpointing."""
    checkpoint = getattr(module, "_gradient_checkpointing_func", None)
    return bool(module.gradient_checkpointing and getattr(checkpoint, "keywords", {}).get("use_reentrant", False))


def _saves_tensors(tensor: Tensor) -> bool:
    """Whether the graph of ``tensor`` has saved tensors, which the first backward pass frees."""
    nodes, seen = [tensor.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if any(name.startswith("_raw_saved_") for name in dir(node)):
                return True
            nodes += [parent for parent, _ in node.next_functions]
    return False
