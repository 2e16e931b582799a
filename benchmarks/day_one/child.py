# SPDX-License-Identifier: Apache-2.0
"""The process of one step: runs its items one after another, and writes down each."""

from __future__ import annotations

import faulthandler
import importlib
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import compile_times
from .context import Context, LeftOut
from .plan import Step
from .record import DONE, OUT_OF_TIME, RESTART, Record


def child(step: Step, folder: Path, limit: float, dry_run: bool) -> None:
    """Run the items of a step that have not ended in this run, until ``limit`` seconds have passed."""
    faulthandler.enable()  # the log says where a process was when it died or was stopped
    end, record, parent = time.monotonic() + limit, Record(folder, step.name), os.getppid()
    module, _, function = step.function.partition(":")
    make = getattr(importlib.import_module(f"{__package__}.{module}"), function)
    context = Context(folder, dry_run)
    items = make(context, *step.arguments)
    record.write(items=list(items))
    ended = record.read().ends
    for name, item in items.items():
        if name in ended and ended[name]["status"] != OUT_OF_TIME:
            continue
        if time.monotonic() > end or os.getppid() != parent:  # the runner may have been killed
            return
        start = time.monotonic()
        record.write(start=name, at=start)
        with compile_times.recorded() as compiled:
            status, line, more = outcome(item)
        record.end(
            name, status, time.monotonic() - start, line, **more, **({"compiled": compiled} if compiled else {})
        )
        if status not in DONE and context.is_broken():
            raise SystemExit(RESTART)


def outcome(item: Callable[[], Any]) -> tuple[str, str, dict[str, Any]]:
    """(status, line, rows and details) of an item."""
    try:
        finding = item()
        return "ok", finding.line, {"rows": finding.rows, "details": finding.details}
    except LeftOut as reason:
        return "left out", str(reason), {}
    except AssertionError as error:
        return "wrong", _first_line(error), {"details": traceback.format_exc().splitlines()[-6:]}
    except Exception as error:
        return "failed", _first_line(error), {"details": traceback.format_exc().splitlines()[-12:]}


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:500]
