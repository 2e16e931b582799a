# SPDX-License-Identifier: Apache-2.0
"""Tensors that follow from a call's masks and offsets: computed once for all layers that pass the same ones."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..arguments import is_constant

_Value = TypeVar("_Value")


class _Entry(NamedTuple):
    """A remembered value, and the tensors that it was computed from."""

    sources: tuple[weakref.ref[Tensor] | None, ...]
    value: Any


#: The number of values that are remembered; the one that was used least recently is dropped.
_CAPACITY = 8
_entries: OrderedDict[tuple[object, ...], _Entry] = OrderedDict()
_lock = threading.Lock()


def derived(
    what: str, sources: tuple[Tensor | None, ...], facts: tuple[object, ...], compute: Callable[[], _Value]
) -> _Value:
    """``compute()``, or its earlier result for the same tensors.

    It is remembered for sources that are marked as :func:`~peftkern.arguments.constant`, until one of them is freed.
    Other tensors may change in ways that leave no trace. While a CUDA graph is captured, nothing is remembered,
    because the memory belongs to the graph. Each stream has its own results.

    Args:
        what: names the computation.
        sources: the tensors whose values it reads.
        facts: everything else that it depends on, hashable.
        compute: the computation.
    """
    present = [x for x in sources if x is not None]
    if not present or not all(map(is_constant, present)) or _is_capturing():
        return compute()
    key = (what, facts, tuple(map(id, sources)), _stream(present[0].device))
    with _lock:
        entry = _entries.get(key)
        if entry and _same(entry.sources, sources):
            _entries.move_to_end(key)
            return entry.value  # type: ignore[no-any-return]
    value = compute()
    with _lock:
        references = tuple(None if x is None else weakref.ref(x, lambda _: _forget(key)) for x in sources)
        _entries[key] = _Entry(references, value)
        _entries.move_to_end(key)
        while len(_entries) > _CAPACITY:
            _entries.popitem(last=False)
    return value


def _same(references: tuple[weakref.ref[Tensor] | None, ...], sources: tuple[Tensor | None, ...]) -> bool:
    return all(
        x is None if reference is None else reference() is x for reference, x in zip(references, sources, strict=True)
    )


def _forget(key: tuple[object, ...]) -> None:
    _entries.pop(key, None)  # atomic: a finalizer may run while this thread holds the lock


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
