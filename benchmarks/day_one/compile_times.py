# SPDX-License-Identifier: Apache-2.0
"""The time that Triton takes to compile kernels, or to load them from its cache, during an item."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def recorded() -> Iterator[list[dict[str, Any]]]:
    """A list that receives a row per compiled kernel: its name, seconds, and whether it came from the cache."""
    rows: list[dict[str, Any]] = []
    if "torch" not in sys.modules or importlib.util.find_spec("triton") is None:
        yield rows  # nothing here can compile a kernel
        return
    from triton import knobs

    def listener(*, src: Any, metadata: dict[str, Any], times: Any, cache_hit: bool, **_: Any) -> None:
        rows.append({"kernel": metadata.get("name", src.name), "s": times.total / 1e6, "cached": cache_hit})

    before, knobs.compilation.listener = knobs.compilation.listener, listener
    try:
        yield rows
    finally:
        knobs.compilation.listener = before
