# SPDX-License-Identifier: Apache-2.0
"""The patch for models without a prefix, in which text that rows share runs once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.utils.import_utils import is_tracing

from .cache import PrefixCache
from .call_arguments import is_plain, self_attention_cache, tokens_of
from .layout import HostNumbers
from .model_patch import ModelPatch
from .packed_cache import PackedCache
from .packing import PackedBatch
from .sharer import Sharer
from .text_cache import TextCache
from .trial import Trial
from .wiring import Patch, Source

__all__ = ["NoPrefix", "SharePatch"]


class NoPrefix(Source):
    """Stands for the prefix of a model that has none."""

    is_given = True

    def wire(self, patch: Patch) -> None:
        """Nothing to install."""


class SharePatch(ModelPatch):
    """Runs text that the rows of a batch share once."""

    sharer: Sharer

    def check(self, trial: Trial) -> None:
        """Raise ValueError unless packed batches with shared text agree with the stock model."""
        if not self.packer.reasons and (reason := trial.try_prefix()) is not None:
            self.packer.reasons = [reason]
        self.packer.try_out(trial, shared=True)
        self.packer.unpacks_routers = True
        if self.packer.reasons:
            raise ValueError(f"share: expected None, because {'; '.join(self.packer.reasons)}, got 'prefixes'")

    def explain(self) -> str:
        """One line: how batches run."""
        return f"{type(self.base).__name__}: {self.sharer.explain()}"

    def pack_call(self, kwargs: dict[str, Any], numbers: HostNumbers) -> PackedBatch | None:
        """Pack a call that starts sequences, if they share enough text or several of them are in one row."""
        groups, cache = kwargs.pop("group_ids", None), self_attention_cache(kwargs)
        if not is_plain(cache):
            if tokens_of(kwargs).shape[1] > 1:  # it starts sequences
                self.sharer.skip(f"its keys go into a {type(cache).__name__}, which has a place for each row")
            return None
        if cache is not None and cache.get_seq_length() > 0:
            return None  # it continues sequences
        if cache is not None and not self.stores(kwargs):
            self.sharer.skip("it fills a cache in training mode or with use_cache=False")
            return None
        tokens, host = tokens_of(kwargs), self.sharer.on_host(kwargs, group_ids=groups)
        packs = host is not None or not (is_tracing(tokens) or self.packer.why_unpackable(kwargs))
        selects = packs and self.selects_labels(kwargs)
        if not selects and (host is None or self.sharer.is_hopeless(host)):
            return None
        builder = self.packer.layout_builder(
            host or kwargs, numbers, count_labels=selects, without_padding=True, behind_prefix=False
        )
        numbers.fetch()
        if builder.several_per_row and self.stores(kwargs):
            self.sharer.reason = (
                "its rows contain several sequences, which a stock model with a cache does not separate"
            )
            return None
        usual_rows = tokens.shape[0] * tokens.shape[1]
        layout = builder.build() if host is None else self.sharer.build(builder, host, usual_rows)
        # Without a cache most stock models separate several sequences of a row, so they always run packed.
        if layout.segments is None and not selects and not layout.several_per_row:
            return None
        kwargs["use_cache"] = self.stores(kwargs)
        packed = PackedBatch(layout.to(tokens.device))
        if self.packer.head_runs_on_rows():
            self.pack_logits(packed, kwargs, numbers)
        return packed

    def find_cache(self, kwargs: dict[str, Any], packed: PackedBatch | None) -> PrefixCache | None:
        """The cache of a packed batch, or of sequences that continue one."""
        if packed is None:
            cache = self_attention_cache(kwargs)
            return self._continued(cache, kwargs) if isinstance(cache, PrefixCache) else None
        num_layers = 1 + max(info.layer for info in self.prefix_layers.values())
        cache = PackedCache(num_layers, packed, stores=bool(kwargs["use_cache"]), options=self.options)
        cache.given = self_attention_cache(kwargs)
        return cache

    def _continued(self, cache: PrefixCache, kwargs: dict[str, Any]) -> PrefixCache:
        """``cache``, for a call whose mask covers its texts and their padding, which they do not contain."""
        mask, before = kwargs.get("attention_mask"), cache.prefix_positions
        if isinstance(mask, Tensor) and mask.dim() == 2:
            if self.packer.count_mask and kwargs.get("position_ids") is None:
                kwargs["position_ids"] = (mask.cumsum(1) - 1)[:, -tokens_of(kwargs).shape[1] :]
            kwargs["attention_mask"] = torch.nn.functional.pad(mask[:, before:], (before, 0), value=1)
        return cache

    def unpack_cache(self, cache: PrefixCache) -> Any:
        """A cache that continues the batch: of the different texts if possible, else a stock one.

        The caller's own cache, which the caller may read instead of the output's, gets the same keys and values.
        """
        if not isinstance(cache, PackedCache) or not cache.stores:
            return None
        layout, segments = cache.packed.layout, cache.packed.layout.segments
        has_texts = segments is not None and not layout.several_per_row and layout.key_mask is None
        # Windows count the padding between a text and the tokens that continue it.
        if segments is None or not has_texts or (self.packer.has_windows and not segments.aligned):
            if cache.given is not None:
                cache.fill(cache.given)
            return cache.as_padded()
        texts = TextCache(cache)
        if cache.given is not None:
            texts.fill(cache.given)
        return texts
