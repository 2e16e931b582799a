# SPDX-License-Identifier: Apache-2.0
"""The processor's name. Standard library only, so that ``peftkern doctor`` can use it without torch."""

from __future__ import annotations

import functools
import platform

__all__ = ["processor_name"]


@functools.cache
def processor_name() -> str:
    """The processor's name in ``/proc/cpuinfo``; elsewhere the machine's architecture, such as ``arm64``."""
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()
