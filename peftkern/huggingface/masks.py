# SPDX-License-Identifier: Apache-2.0
"""Attention masks as descriptions; the S x S tensor is built only when needed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
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

from ..arguments import constant

__all__ = ["CompactMask", "LazyMask", "additive", "mask_function", "unmade"]


class CompactMask(NamedTuple):
    """A mask in the terms of :func:`peftkern.prefix_attention`.

    Attributes:
        causal, window: the pattern over sequence keys.
        key_mask: bool [B, T], false for a hidden key; None if all keys are visible.
    """

    causal: bool
    window: int | None
    key_mask: Tensor | None


class LazyMask:
    """The arguments of a mask function, stored until a layer requests the mask in a particular form.

    Most models pass the object from the mask function to the attention function without reading it. All layers of a
    forward share the object and the forms that it has built.

    To model code that slices it, adds to it or reads its shape, it behaves like the dense tensor [B, 1, S, P + T]
    that the previous implementation would have made. It is not a subclass of ``torch.Tensor``: a subclass would have
    to allocate memory of that size, or report a false size to autograd and torch.compile.

    Args:
        request: the keyword arguments of a mask function (:func:`transformers.masking_utils.sdpa_mask`).

    Attributes:
        edited: whether the dense tensor has been changed in place, so that only the tensor describes the mask.
    """

    def __init__(self, **request: Any) -> None:
        self._request = request
        self._forms: dict[tuple[Any, ...], Any] = {}
        self.edited = False

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a torch operation on the dense tensor."""
        changes = getattr(func, "__name__", "").endswith("_") or "out" in (kwargs or {})

        def dense(x: Any) -> Any:
            if not isinstance(x, LazyMask):
                return x
            x.edited |= changes
            return x.dense()

        return func(*tree_map(dense, args), **tree_map(dense, kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        self.edited |= name.endswith("_")
        return getattr(self.dense(), name)

    def __getitem__(self, index: Any) -> Any:
        """The dense tensor's element; a mask of the last queries where the index selects these alone."""
        count = None if self.edited else _last_queries(index, self.shape)
        if count is None:
            return self.dense()[index]
        request, before = self._request, self._request["q_length"] - count
        return (
            LazyMask(**{**request, "q_length": count, "q_offset": request["q_offset"] + before}) if before else self
        )

    def __setitem__(self, index: Any, value: Any) -> None:
        self.edited = True
        self.dense()[index] = value

    @property
    def shape(self) -> torch.Size:
        """[B, 1, S, P + T]."""
        return torch.Size(self.metadata[0])

    @property
    def ndim(self) -> int:
        """4."""
        return 4

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the dense tensor."""
        return self.metadata[1]

    @property
    def device(self) -> torch.device:
        """The device of the dense tensor."""
        return torch.device(self.metadata[2])

    def dim(self) -> int:
        """4."""
        return 4

    def size(self, dim: int | None = None) -> Any:
        """[B, 1, S, P + T], or the size of one dim."""
        return self.shape if dim is None else self.shape[dim]

    @property
    def metadata(self) -> tuple[tuple[int, ...], torch.dtype, Any]:
        """Shape, dtype and device of the dense tensor."""
        request = self._request
        shape = (request["batch_size"], 1, request["q_length"], self._end)
        is_additive = self._previous_implementation == "eager"
        dtype = request.get("dtype", torch.float32) if is_additive else torch.bool
        return tuple(map(int, shape)), dtype, request["device"]

    def dense(self) -> Tensor:
        """The mask of the previous implementation, or bool [B, 1, S, P + T] where that implementation makes none.

        It has columns for the prefix, as in the stock model, whose cache contains the prefix.
        """
        num_keys = self._end
        mask: Any = self.for_implementation(self._previous_implementation, num_keys)
        if isinstance(mask, Tensor):
            return mask
        key = ("dense", num_keys)
        if key not in self._forms:
            self._forms[key] = self._visible(num_keys)
        return self._forms[key]  # type: ignore[no-any-return]

    @property
    def _previous_implementation(self) -> str:
        """Name of the attention implementation that the model had before the patch."""
        return self._request["config"]._attn_implementation.over  # type: ignore[no-any-return]

    @property
    def _end(self) -> int:
        """Position after the last key."""
        return int(self._request["kv_offset"]) + int(self._request["kv_length"])

    @property
    def is_aligned(self) -> bool:
        """Whether the last query is at the last key. In a static cache, columns without a token follow it.

        A static cache counts its tokens on the device, which the host does not wait for.
        """
        begin = self._request["q_offset"]
        return not isinstance(begin, Tensor) and self._end == begin + self._request["q_length"]

    @property
    def pattern(self) -> tuple[bool, int | None] | None:
        """(causal, window); None for any other pattern."""
        return _read_pattern(self._request["mask_function"])

    def compact(self, num_keys: int) -> CompactMask | None:
        """The mask over the last ``num_keys`` keys; None if it has no such form.

        The last ones, because an encoder's mask also has columns for the prefix.
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
        if causal and not self.is_aligned:
            if self._request["q_length"] > 1 or window is not None:
                return None
            return CompactMask(False, None, self._visible(num_keys)[:, 0, 0])
        if window is not None and not causal:
            return None
        key_mask, hides_prefix = self._key_mask(num_keys)
        return None if hides_prefix else CompactMask(causal, window, key_mask)

    def bias(self, num_keys: int, prefix_len: int, dtype: torch.dtype) -> Tensor:
        """[B, 1, S, P + T], 0 where visible and -inf elsewhere; [B, 1, S, T] if the mask hides no prefix keys.

        A mask that was made before the prefix was known has no columns for it. Its windows then count the prefix as
        positions before the sequence, as in a mask that was made with the prefix in the cache.
        """
        if self.pattern is not None and self.pattern[1] is None and not self._key_mask(num_keys)[1]:
            prefix_len = 0  # neither a window nor padding hides the prefix
        knows_prefix = self._end - num_keys >= prefix_len
        columns = num_keys + (prefix_len if knows_prefix else 0)
        key = ("bias", columns, prefix_len, dtype)
        if key not in self._forms:
            visible = self._visible(columns)
            window = None if knows_prefix else min(_windows_in(self._request["mask_function"]), default=None)
            if window is not None and prefix_len:
                visible = torch.cat([self._prefix_in_window(window, prefix_len, visible), visible], -1)
            self._forms[key] = additive(visible, dtype)
        return self._forms[key]  # type: ignore[no-any-return]

    def _visible(self, columns: int) -> Tensor:
        """bool [B, 1, S, columns], the last columns of the mask."""
        unskipped = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        return sdpa_mask(**{**self._last_columns(columns), **unskipped})  # type: ignore[no-any-return]

    def _prefix_in_window(self, window: int, prefix_len: int, like: Tensor) -> Tensor:
        """bool [B, 1, S, P]: whether a prefix position, which precedes position 0, is less than a window away."""
        queries = self._request["q_offset"] + torch.arange(like.shape[2], device=like.device)
        prefix = torch.arange(-prefix_len, 0, device=like.device)
        in_window: Tensor = queries[:, None] - prefix < window
        return in_window.expand(*like.shape[:2], -1, -1)

    def for_implementation(self, name: str, num_keys: int) -> Any:
        """The mask that the attention implementation ``name`` expects over the last ``num_keys`` keys."""
        key = (name, num_keys)
        if key not in self._forms:
            make = AttentionMaskInterface().get(name)
            self._forms[key] = None if make is None else make(**self._last_columns(num_keys))
        return self._forms[key]

    def for_static_cache(self) -> Any:
        """The mask of the previous implementation over the keys of a static cache, which contains no prefix.

        ``generate`` makes such masks before the model runs.
        """
        return self.for_implementation(self._previous_implementation, self._request["kv_length"])

    def contiguous(self) -> Any:
        """:meth:`for_static_cache`: some versions of ``generate`` call ``contiguous()`` on these masks.

        The tensor remembers the padding mask, for :func:`unmade`.
        """
        mask = self.for_static_cache()
        if isinstance(mask, Tensor):
            setattr(mask, _MADE_OF, self.made_of())
        return mask

    def made_of(self) -> tuple[Tensor | None] | None:
        """(The padding mask [B, T] that the mask was made of,); None if it was made of more."""
        return None if self.edited or self.pattern is None else (self._request["attention_mask"],)

    def is_skipped(self) -> bool:
        """Whether the previous implementation makes no mask."""
        return self.for_implementation(self._previous_implementation, self._end) is None

    def _last_columns(self, columns: int) -> dict[str, Any]:
        return {**self._request, "kv_offset": self._end - columns, "kv_length": columns}

    def _key_mask(self, num_keys: int) -> tuple[Tensor | None, bool]:
        """(bool [B, T], or None if all keys are visible; whether padding hides keys before the last ``num_keys``)."""
        request = self._request
        padding = prepare_padding_mask(request["attention_mask"], request["kv_length"], request["kv_offset"])
        if padding is None:
            return None, False
        begin = self._end - num_keys
        key_mask: Tensor = padding[:, begin : self._end].expand(request["batch_size"], -1)
        if is_tracing(key_mask):
            return key_mask, False
        # One synchronisation per forward, as in the stock mask functions; every layer can then use the faster kernel.
        all_real, all_before = torch.stack([key_mask.all(), padding[:, :begin].all()]).tolist()
        return None if all_real else constant(key_mask), not all_before


def mask_function(**request: Any) -> LazyMask | None:
    """The mask function registered in ``AttentionMaskInterface``.

    A decoding step without padding has no mask, as in the stock model.
    """
    mask = LazyMask(**request)
    if request["q_length"] == 1 and mask.is_aligned and not torch.compiler.is_compiling() and mask.is_skipped():
        return None
    return mask


#: Attribute of a mask that ``generate`` has made for a static cache: what :meth:`LazyMask.made_of` returns.
_MADE_OF = "_peftkern_made_of"


def unmade(mask: Any) -> Any:
    """The padding mask of which ``generate`` has made ``mask`` for a static cache; any other argument unchanged.

    The model makes the same mask of it, for the cache that replaces the static one.
    """
    masks = list(mask.values()) if isinstance(mask, dict) else [mask]
    made_of: list[Any] = [x.made_of() if isinstance(x, LazyMask) else getattr(x, _MADE_OF, None) for x in masks]
    if not made_of or any(padding is None for padding in made_of):
        return mask
    return made_of[0][0]


# A pattern is recognised by identity: it is a function of masking_utils, or a closure with the same code. Any other
# function that a model composes is unknown and gets the dense form.
_AND = and_masks(causal_mask_function).__code__
_SLIDING = sliding_window_overlay(1).__code__


def _read_pattern(mask_function: Callable[..., Any]) -> tuple[bool, int | None] | None:
    """(causal, window) of a mask function; None for any other pattern."""
    if mask_function is causal_mask_function:
        return True, None
    if mask_function is bidirectional_mask_function:
        return False, None
    if torch.compiler.is_compiling():  # the compiler cannot read closures, so compiled sliding windows are dense
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


def _windows_in(mask_function: Callable[..., Any]) -> list[int]:
    """The sliding windows anywhere in a composed mask function."""
    code = getattr(mask_function, "__code__", None)
    if code is None or torch.compiler.is_compiling():
        return []
    values = inspect.getclosurevars(mask_function).nonlocals
    if code is _SLIDING:
        return [int(values["sliding_window"])]
    return [window for part in values.get("mask_functions", ()) for window in _windows_in(part)]


def _last_queries(index: Any, shape: torch.Size) -> int | None:
    """Number of last queries that an index of [B, 1, S, P + T] selects; None if it selects anything else."""
    if not isinstance(index, tuple) or len(index) > 4 or any(not isinstance(part, slice) for part in index):
        return None
    ranges = [part.indices(size) for part, size in zip(index, shape, strict=False)]
    whole = [(0, size, 1) for size in shape]
    first, last, step = ranges[2] if len(ranges) > 2 else whole[2]
    others_whole = all(r == w for dim, (r, w) in enumerate(zip(ranges, whole, strict=False)) if dim != 2)
    return last - first if others_whole and (last, step) == (shape[2], 1) and first < last else None


def _forwarded(name: str) -> Callable[..., Any]:
    def operator(self: LazyMask, *args: Any) -> Any:
        return getattr(self.dense(), name)(*(x.dense() if isinstance(x, LazyMask) else x for x in args))

    operator.__name__ = name
    return operator


# Python looks these up on the type, so __getattr__ does not see them.
for _name in (
    "len", "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "neg", "and", "rand", "or", "ror",
    "xor", "invert", "eq", "ne", "lt", "le", "gt", "ge",
):  # fmt: skip
    setattr(LazyMask, f"__{_name}__", _forwarded(f"__{_name}__"))
LazyMask.__hash__ = object.__hash__  # type: ignore[method-assign]


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """bool, true where visible -> float of the same shape, 0 where visible and -inf elsewhere."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, float("-inf"))
