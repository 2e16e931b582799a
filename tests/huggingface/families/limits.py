# SPDX-License-Identifier: Apache-2.0
"""Calls that may fail or hang without ending the run."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any

__all__ = ["TimeLimit", "attempt", "message_of"]


class TimeLimit(BaseException):
    """A call took too long. Not an ``Exception``, so that no handler of the model's takes it for its own."""


def _stop(*_: Any) -> None:
    raise TimeLimit


def attempt(call: Callable[[], Any], seconds: float = 30.0) -> tuple[Any, BaseException | None]:
    """(what the call returns, None) or (None, what it raised). Limits time in the main thread only."""
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGALRM, _stop) if in_main else None
    try:
        if in_main:
            signal.setitimer(signal.ITIMER_REAL, seconds)
        return call(), None
    except TimeLimit:
        return None, TimeLimit(f"not done after {seconds:.0f} s")
    except Exception as error:
        return None, error.with_traceback(None)
    finally:
        if in_main:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, before)


def message_of(error: BaseException, longest: int = 600) -> str:
    """One line on an exception; of a ValueError its message alone."""
    text = " ".join(str(error).split())
    text = text if len(text) <= longest else f"{text[: longest - 1]}…"
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"
