# SPDX-License-Identifier: Apache-2.0
"""Reads and changes the keyword arguments of a call of a model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from ..model_info import given_cache
from .cache import PrefixCache
from .cache_layers import stored_layers

__all__ = [
    "BOUNDARIES",
    "bind",
    "check_replaceable",
    "count_prefix",
    "forward_arguments",
    "is_plain",
    "self_attention_cache",
    "tokens_of",
]  # fmt: skip

#: Arguments that tell flash kernels where packed sequences start, which position ids determine too.
BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def forward_arguments(model: nn.Module) -> tuple[str, ...]:
    """The names of the arguments of the class's own ``forward``, without ``self``."""
    return tuple(inspect.signature(type(model).forward).parameters)[1:]


def tokens_of(kwargs: Mapping[str, Any]) -> Tensor:
    """The argument [B, S, ...] of a call with one entry per token."""
    for name in ("input_ids", "inputs_embeds"):
        if kwargs.get(name) is not None:
            return kwargs[name]  # type: ignore[no-any-return]
    raise ValueError("input_ids: expected input_ids or inputs_embeds, got neither")


def bind(module: nn.Module, names: tuple[str, ...], args: Any, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """All arguments of a call by name; None if the module's forward was replaced by one with other arguments.

    Args:
        module: the module that is called.
        names: the arguments of the module's own forward.
        args, kwargs: of the call.
    """
    if args and tuple(inspect.signature(module.forward).parameters) != names:
        return None
    return {**dict(zip(names, args, strict=False)), **kwargs}


def self_attention_cache(kwargs: dict[str, Any]) -> Cache | None:
    """The part of a call's cache that self-attention reads."""
    cache = given_cache(kwargs)
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def count_prefix(cache: PrefixCache, kwargs: dict[str, Any], seen: int | None = None) -> None:
    """Count the prefix in the mask and positions of a caller who does not.

    Args:
        cache: the cache with the prefix.
        kwargs: arguments of a call of the backbone, changed in place.
        seen: tokens of the sequence before the call; default: those in ``cache``.
    """
    offset = cache.prefix_positions
    if seen is None and not cache.is_static:  # the host would wait for a static cache's number
        seen = cache.num_tokens
    mask, position_ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        if position_ids is None and cache.from_first:
            length = tokens_of(kwargs).shape[1]
            columns = torch.arange(mask.shape[1] - length, mask.shape[1], device=mask.device)
            position_ids = (columns - (mask != 0).to(torch.int8).argmax(1, keepdim=True)).clamp(min=0)
        if offset and seen is not None and mask.shape[1] == offset + seen + tokens_of(kwargs).shape[1]:
            return  # the caller counts the prefix, as PEFT's own generate does
        kwargs["attention_mask"] = torch.cat([mask.new_ones(mask.shape[0], offset), mask], dim=1)
    if position_ids is not None:
        kwargs["position_ids"] = position_ids + offset


def is_plain(cache: Cache | None) -> bool:
    """Whether a cache only grows on its device, so that any other cache can replace it while it is empty."""
    return cache is None or (isinstance(cache, DynamicCache) and not cache.offloading)


def check_replaceable(cache: Cache | None, *, plain: bool = False) -> None:
    """Raise ValueError unless a cache is empty and a :class:`PrefixCache` can store the sequence as it does.

    Args:
        cache: the caller's.
        plain: whether it must be a plain one.
    """
    if not (is_plain(cache) if plain else is_plain(cache) or isinstance(cache, DynamicCache) or stored_layers(cache)):
        kind = type(cache).__name__ + (" with offloading" if getattr(cache, "offloading", False) else "")
        others = "" if plain else ", a QuantizedCache, a StaticCache without sliding windows"
        without = " without offloading" if plain else ""
        raise ValueError(f"cache: expected None{others} or a DynamicCache{without}, got a {kind}")
    if cache is not None and cache.get_seq_length() > 0:
        raise ValueError(
            f"cache: expected an empty cache or one that this model returned, got {cache.get_seq_length()} tokens "
            "that have not attended to the prefix"
        )
