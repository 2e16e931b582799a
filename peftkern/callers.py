# SPDX-License-Identifier: Apache-2.0
"""Who called the package: the line that a warning names."""

from __future__ import annotations

import sys

__all__ = ["caller_level"]

#: This package, and what calls it on behalf of others: context managers, the dispatcher of ops, autograd.
_BETWEEN = ("peftkern", "contextlib", "torch._ops", "torch._library", "torch.autograd", "torch.utils._contextlib")


def caller_level() -> int:
    """The ``stacklevel`` of the first frame outside of this package, for a warning in the calling function."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and _is_between(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    return level


def _is_between(module: str) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in _BETWEEN)
