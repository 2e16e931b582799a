# SPDX-License-Identifier: Apache-2.0
"""Check, time and measure the memory of every provider on one problem."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from . import memory
from .checks import Judge
from .measuring import Clock, clock_for, stamp, take_turns
from .providers import DTYPES, PROVIDERS, Calls, Problem, Unavailable, chosen_by_auto, prepare
from .rows import PROBLEM, Row
from .shapes import Shape


def measure(
    shape: Shape,
    dtype: str,
    directions: Sequence[str],
    providers: Iterable[str] = (),
    *,
    device: str = "cpu",
    seconds: float = 1.0,
    at_least: int = 7,
    clock: Clock | None = None,
    with_memory: bool = True,
) -> list[Row]:
    """A row per direction and provider; all :data:`PROVIDERS` if none is named.

    ``status`` of a row is ``ok``, or one of these without times: ``unavailable`` or ``not timed`` with a ``reason``,
    ``wrong`` with the errors in ``reason``, ``failed`` with the exception. ``seconds`` is the time for all providers
    together, per direction.
    """
    problem = Problem.make(shape, DTYPES[dtype], device)
    named = list(providers)
    calls: dict[str, Calls] = {}
    without: dict[str, tuple[str, str]] = {}
    for name in named or PROVIDERS:
        reason = "" if named else PROVIDERS[name].by_default(problem)
        prepared = Unavailable(reason) if reason else _guarded(functools.partial(prepare, name, problem, directions))
        if isinstance(prepared, str):
            without[name] = ("failed", prepared)
        elif isinstance(prepared, Unavailable):
            without[name] = ("not timed" if reason else "unavailable", prepared.reason)
        else:
            calls[name] = prepared
    judge, auto = Judge(problem), chosen_by_auto(problem)
    base = key_columns(shape) | {"dtype": dtype, "device": device, "threads": torch.get_num_threads()}
    rows: list[Row] = []
    for direction in directions:
        judged = {name: _judge(name, c, direction, judge) for name, c in calls.items()}
        timed = {name: calls[name].of(direction) for name, row in judged.items() if row["status"] == "ok"}
        ready: dict[str, Callable[[], object]] = {name: call for name, call in timed.items() if call is not None}
        times = take_turns(ready, seconds, at_least, clock or clock_for(device))
        for name in named or PROVIDERS:
            status, reason = without.get(name, ("ok", ""))
            row = judged.get(name, {"status": status, "reason": reason})
            row = base | {"direction": direction, "provider": name, "auto": name == f"peftkern-{auto}"} | row
            if name in times:
                t, itemsize = times[name], problem.inputs[0].element_size()
                row |= {"p20_ms": t.p20 * 1e3, "p50_ms": t.median * 1e3, "p80_ms": t.p80 * 1e3, "spread": t.spread,
                        "tflops": shape.flops(direction) / t.median / 1e12,
                        "gb_s": shape.bytes(direction, itemsize) / t.median / 1e9}  # fmt: skip
            rows.append(row | stamp(device))
    if with_memory:
        add_memory(rows, shape, dtype, device)
    return rows


def key_columns(shape: Shape) -> Row:
    """The columns of :data:`~peftkern.tools.bench.rows.PROBLEM` that describe the shape."""
    return {name: getattr(shape, name) for name in PROBLEM if hasattr(shape, name)}


def _guarded(make: Callable[[], Any]) -> Any:
    """The result of ``make``, or its exception as text."""
    try:
        return make()
    except Exception as error:  # other providers keep their rows if one fails
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _judge(name: str, calls: Calls, direction: str, judge: Judge) -> Row:
    """The columns status, reason and errors."""
    backward = direction != "forward"
    provider = PROVIDERS[name]
    if backward and calls.both is None:
        return {"status": "unavailable", "reason": provider.why_no_backward(judge.problem)}
    verdict = _guarded(lambda: judge.judge(calls, backward, provider.uses_prefix))
    if isinstance(verdict, str):
        return {"status": "failed", "reason": verdict}
    return {"status": "wrong" if verdict.wrong else "ok", "reason": verdict.wrong, "error": verdict.error,
            "error_peft": verdict.baseline, "error_ratio": verdict.ratio}  # fmt: skip


def add_memory(rows: list[Row], shape: Shape, dtype: str, device: str) -> None:
    """Add ``peak_mb``, and ``saved_mb`` for directions with a backward, to the rows that were timed."""
    wanted = [(row["provider"], row["direction"]) for row in rows if row["status"] == "ok"]
    order = {"shape": asdict(shape), "dtype": dtype, "device": device, "wanted": wanted,
             "threads": torch.get_num_threads()}  # fmt: skip
    weigh = functools.partial(memory.in_own_process, ["-m", __name__]) if device == "cpu" else _weigh
    weighed = _guarded(lambda: weigh(order)) if wanted else []
    failed = {"reason": f"memory was not measured: {weighed}"}
    measured = iter([failed] * len(wanted) if isinstance(weighed, str) else weighed)
    for row in rows:
        if row["status"] == "ok":
            row |= next(measured)


def _weigh(order: dict[str, Any]) -> list[Row]:
    """A row with the memory columns per (provider, direction) of the order."""
    torch.set_num_threads(order["threads"])
    problem = Problem.make(Shape(**order["shape"]), DTYPES[order["dtype"]], order["device"])
    rows = []
    for name, direction in order["wanted"]:
        calls = prepare(name, problem)
        assert isinstance(calls, Calls)
        call = calls.of(direction)
        assert call is not None
        call()
        peak = memory.peak_bytes(call, order["device"])
        row: Row = {"peak_mb": None if peak is None else peak / 1e6, "saved_mb": None}
        if direction != "forward":
            attention = PROVIDERS[name].make(problem)
            leaves = [x.detach().requires_grad_() for x in problem.inputs]
            assert callable(attention)
            row["saved_mb"] = memory.saved_bytes(functools.partial(attention, *leaves), leaves) / 1e6
        rows.append(row)
    return rows


if __name__ == "__main__":
    memory.return_freed_memory()
    print(json.dumps(_weigh(json.load(sys.stdin))))
