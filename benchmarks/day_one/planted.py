# SPDX-License-Identifier: Apache-2.0
"""Steps with planted faults, for the tests of the runner. A good item comes before and after each fault."""

from __future__ import annotations

import os
import time

from .context import Context, Finding, Items


def _good() -> Finding:
    return Finding("good", [{"value": 1.0}])


def _wrong() -> Finding:
    raise AssertionError("off by a hundredth")


def _crash() -> Finding:
    os.abort()


def _hang() -> Finding:
    time.sleep(3600)
    return Finding("never")


def _slow() -> Finding:
    time.sleep(0.6)
    return Finding("slow")


def good(context: Context) -> Items:
    """Nothing is wrong."""
    return {"first": _good, "last": _good}


def wrong(context: Context) -> Items:
    """A result is wrong."""
    return {"first": _good, "fault": _wrong, "last": _good}


def crash(context: Context) -> Items:
    """The process dies."""
    return {"first": _good, "fault": _crash, "last": _good}


def hang(context: Context) -> Items:
    """An item does not end."""
    return {"first": _good, "fault": _hang, "last": _good}


def start(context: Context) -> Items:
    """The step cannot even say which items there are."""
    raise SystemExit("no GPU here")


def slow(context: Context) -> Items:
    """More items than time."""
    return {"first": _good, **{f"slow {i}": _slow for i in range(1000)}}
