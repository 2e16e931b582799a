# SPDX-License-Identifier: Apache-2.0
"""Bytes that launches moved through global memory, counted, over the least that could do."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from .launch import Launch


def moved(launches: Iterable[Launch]) -> int:
    """Bytes loaded and stored, every time anew."""
    return sum(launch.counts.global_bytes for launch in launches)


def minimum(launches: Iterable[Launch]) -> int:
    """Each tensor that a launch loads from read once, each that it stores to written once."""
    total = 0
    for launch in launches:
        for name, value in launch.arguments:
            if isinstance(value, Tensor) and value.numel():
                touched = (launch.counts.loaded[name] > 0) + (launch.counts.stored[name] > 0)
                total += touched * value.numel() * value.element_size()
    return total


def ratio(launches: Iterable[Launch]) -> float:
    """:func:`moved` over :func:`minimum`; below 1 where a tensor is needed in part only.

    >>> ratio([]) != ratio([])  # nothing moved: not a number
    True
    """
    launches = list(launches)
    least = minimum(launches)
    return moved(launches) / least if least else float("nan")
