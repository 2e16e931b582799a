# SPDX-License-Identifier: Apache-2.0
"""Batches whose samples read prefixes of different lengths, and therefore begin at different positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .around_text import has_rope
from .cache import KeyValue, PrefixCache
from .call_arguments import tokens_of

__all__ = ["PrefixBank", "place_rows", "row_offsets", "why_not_mixed"]


@dataclass(frozen=True, eq=False)
class PrefixBank:
    """Several prefixes, of which every sample of a call reads one or more.

    Attributes:
        layers: per layer (prefix_k, prefix_v), each [A, Hkv, P, D]; None for a layer without a prefix.
        ids: [B], the prefix of each sample, -1 for none; or [B, K], several.
        lens: [A], the number of tokens of each prefix.
        offsets: [A], the positions that each prefix takes.
    """

    layers: Sequence[KeyValue | None]
    ids: Tensor
    lens: Tensor
    offsets: Tensor

    @property
    def rows(self) -> dict[str, Any]:
        """The arguments of a :class:`.cache.PrefixCache` that say which prefix each sample reads."""
        return {"ids": self.ids, "lens": self.lens, "offsets": self.offsets}


def why_not_mixed(patch: Any) -> str | None:
    """Why samples of a patched model cannot read prefixes of different lengths; None if they can.

    Args:
        patch: its :class:`.model_patch.ModelPatch`.
    """
    if any(table.padding_idx is not None for table in patch.tables):
        return "the model derives positions from its padding token"
    if patch.stock_layers:
        return "the model has recurrent layers"
    if has_rope(patch.base):
        return "the model derives positions from images"
    if "position_ids" not in patch.arguments:
        return "the model takes no position_ids"
    for info in patch.prefix_layers.values():
        if info.compressed:
            return f"{info.name} has compressed keys"
        if info.pattern is None or not info.pattern[0] or info.counts_rows:
            return f"{info.name} has a mask other than a causal one with at most a window"
    return "; ".join(reason for reason in patch.packer.reasons if reason != "packing=False") or None


def row_offsets(cache: PrefixCache) -> Tensor | None:
    """[B], positions before the first token of each sample; None if the model counts the cache's offset for all."""
    if cache.offsets is None or cache.ids is None:
        return None
    ids = cache.ids.long()
    offsets = torch.where(ids < 0, 0, cache.offsets[ids])
    return offsets if ids.dim() == 1 else offsets.sum(1)


def place_rows(cache: PrefixCache, kwargs: dict[str, Any], *, count_mask: bool) -> None:
    """Set the positions of a call whose samples stand behind prefixes of different lengths.

    Args:
        cache: the cache with the prefixes.
        kwargs: arguments of a call of the backbone, which count ``cache.offset`` for every sample; changed in place.
        count_mask: whether positions count the tokens of the mask.
    """
    offsets = row_offsets(cache)
    if offsets is None:
        return
    tokens, mask, position_ids = tokens_of(kwargs), kwargs.get("attention_mask"), kwargs.get("position_ids")
    if position_ids is not None and position_ids.dim() != 2:
        raise ValueError(
            f"position_ids: expected [B, S], as samples have different prefixes, got {position_ids.dim()} dims"
        )
    offsets, length = offsets.to(tokens.device)[:, None], tokens.shape[1]
    if position_ids is not None:
        positions = position_ids - cache.prefix_positions
    elif count_mask and isinstance(mask, Tensor):
        real = mask[:, cache.prefix_positions :] != 0
        positions = torch.where(real, real.long().cumsum(1) - 1, -1)[:, -length:]
    else:
        positions = torch.arange(cache.num_tokens, cache.num_tokens + length, device=tokens.device)[None]
    kwargs["position_ids"] = torch.where(positions < 0, positions, positions + offsets)
