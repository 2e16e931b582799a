# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C that lets a step end."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["deferred_interrupt"]


@contextmanager
def deferred_interrupt() -> Iterator[list[int]]:
    """A list that the first Ctrl-C makes non-empty, so that the current step can end; a second Ctrl-C interrupts."""
    interrupted: list[int] = []

    def note(number: int, _: Any) -> None:
        interrupted.append(number)
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)
