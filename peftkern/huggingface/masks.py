# SPDX-License-Identifier: Apache-2.0
"""Attention masks as descriptions: the S x S tensor is built only for a reader who cannot do without it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionMaskInterface
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
    sliding_window_overlay,
)
from transformers.utils.import_utils import is_tracing

__all__ = ["CompactMask", "LazyMask", "additive"]


class CompactMask(NamedTuple):
    """A mask in the terms of :func:`peftkern.prefix_attention`.

    Attributes:
        causal, window: the pattern over sequence keys.
        key_mask: bool [B, T], false hides a key; None when every key is real.
    """

    causal: bool
    window: int | None
    key_mask: Tensor | None


class LazyMask:
    """What ``transformers`` asks of a mask function, kept until a layer says in which form it needs the answer.

    Registered in ``AttentionMaskInterface``; models hand the object from the mask's creation to the attention
    function without looking into it. All layers of a forward share it, and so the forms that it has built.

    Args:
        request: the keyword arguments of a mask function (:func:`transformers.masking_utils.sdpa_mask`).
    """

    def __init__(self, **request: Any) -> None:
        self._request = request
        self._forms: dict[tuple[Any, ...], Any] = {}

    @property
    def _end(self) -> int:
        """Position after the last key."""
        return int(self._request["kv_offset"]) + int(self._request["kv_length"])

    @property
    def pattern(self) -> tuple[bool, int | None] | None:
        """(causal, window), or None if it is anything else."""
        return _read_pattern(self._request["mask_function"])

    def compact(self, num_keys: int) -> CompactMask | None:
        """The mask over the last ``num_keys`` keys, or None if it has no such form.

        An encoder's mask has columns for the prefix as well, hence the last ones.
        """
        key = ("compact", num_keys)
        if key not in self._forms:
            self._forms[key] = self._compact(num_keys)
        return self._forms[key]  # type: ignore[no-any-return]

    def _compact(self, num_keys: int) -> CompactMask | None:
        pattern = self.pattern
        if pattern is None:
            return None
        causal, window = pattern
        if causal and self._end != self._request["q_offset"] + self._request["q_length"]:
            return None  # not aligned bottom-right
        if window is not None and not causal:
            return None
        return CompactMask(causal, window, self._key_mask(num_keys))

    def bias(self, num_keys: int, prefix_len: int, dtype: torch.dtype) -> Tensor:
        """[B, 1, S, P + T], 0 where visible and -inf elsewhere; [B, 1, S, T] if the mask has no prefix columns."""
        columns = num_keys + (prefix_len if self._end - num_keys >= prefix_len else 0)
        key = ("bias", columns, dtype)
        if key not in self._forms:
            unskipped = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
            self._forms[key] = additive(sdpa_mask(**{**self._last_columns(columns), **unskipped}), dtype)
        return self._forms[key]  # type: ignore[no-any-return]

    def for_implementation(self, name: str, num_keys: int) -> Any:
        """The mask that the attention implementation ``name`` expects over the last ``num_keys`` keys."""
        key = (name, num_keys)
        if key not in self._forms:
            make = AttentionMaskInterface().get(name)
            self._forms[key] = None if make is None else make(**self._last_columns(num_keys))
        return self._forms[key]

    def contiguous(self) -> Any:
        """The mask of the implementation below.

        ``generate`` makes masks for static caches, which hold no prefix, before the model runs; some versions ask
        this of them.
        """
        return self.for_implementation(self._request["config"]._attn_implementation.over, self._request["kv_length"])

    def _last_columns(self, columns: int) -> dict[str, Any]:
        return {**self._request, "kv_offset": self._end - columns, "kv_length": columns}

    def _key_mask(self, num_keys: int) -> Tensor | None:
        request = self._request
        padding = prepare_padding_mask(request["attention_mask"], request["kv_length"], request["kv_offset"])
        if padding is None:
            return None
        key_mask: Tensor = padding[:, self._end - num_keys : self._end].expand(request["batch_size"], -1)
        # One synchronisation a forward, as the stock mask functions have it, buys every layer the faster kernel.
        return None if not is_tracing(key_mask) and bool(key_mask.all()) else key_mask


# A pattern is recognised by what it is, not by its effect: the very functions of masking_utils, or closures made from
# their code. Whatever else a model composes is unknown and gets the dense form.
_AND = and_masks(causal_mask_function).__code__
_SLIDING = sliding_window_overlay(1).__code__


def _read_pattern(mask_function: Callable[..., Any]) -> tuple[bool, int | None] | None:
    """(causal, window) of a mask function, or None if it is anything else."""
    if mask_function is causal_mask_function:
        return True, None
    if mask_function is bidirectional_mask_function:
        return False, None
    if torch.compiler.is_compiling():  # which cannot look into closures: a compiled sliding window is dense
        return None
    code = getattr(mask_function, "__code__", None)
    if code is _SLIDING:
        return False, int(inspect.getclosurevars(mask_function).nonlocals["sliding_window"])
    if code is _AND:
        patterns = [_read_pattern(part) for part in inspect.getclosurevars(mask_function).nonlocals["mask_functions"]]
        known = [pattern for pattern in patterns if pattern is not None]
        if len(known) == len(patterns):
            windows = [window for _, window in known if window is not None]
            return any(causal for causal, _ in known), min(windows, default=None)
    return None


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """bool, true where visible -> float, 0 where visible and -inf elsewhere, same shape."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, float("-inf"))
