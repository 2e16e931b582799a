# SPDX-License-Identifier: Apache-2.0
"""The bytes that launches moved through global memory, and the minimum."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from .launch import Launch


def moved(launches: Iterable[Launch]) -> int:
    """The bytes loaded and stored, each access counted."""
    return sum(launch.counts.global_bytes for launch in launches)


def minimum(launches: Iterable[Launch]) -> int:
    """The bytes if each launch reads each tensor that it loads from once, and writes each that it stores to once."""
    total = 0
    for launch in launches:
        for name, value in launch.arguments:
            if isinstance(value, Tensor) and value.numel():
                touched = (launch.counts.loaded[name] > 0) + (launch.counts.stored[name] > 0)
                total += touched * value.numel() * value.element_size()
    return total


def ratio(launches: Iterable[Launch]) -> float:
    """:func:`moved` over :func:`minimum`; below 1 if only a part of a tensor is needed.

    >>> ratio([]) != ratio([])  # nothing moved: not a number
    True
    """
    launches = list(launches)
    least = minimum(launches)
    return moved(launches) / least if least else float("nan")
