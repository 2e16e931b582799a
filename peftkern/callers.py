# SPDX-License-Identifier: Apache-2.0
"""Who called the package: the line that a warning names."""

from __future__ import annotations

import sys

__all__ = ["caller_level"]


def caller_level() -> int:
    """The ``stacklevel`` of the first frame outside of this package, for a warning in the calling function."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("peftkern"):
        level, frame = level + 1, frame.f_back
    return level
