# SPDX-License-Identifier: Apache-2.0
"""What a call costs the CPU: microseconds to launch it, and the number of its kernels, per plan."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from peftkern.tools.bench.device_time import enqueue
from peftkern.tools.bench.providers import Problem, Unavailable, prepare
from peftkern.tools.bench.shapes import Shape

from . import plans
from .context import Context, Finding, Items, LeftOut, Row
from .machine import plan_calls

#: Small for the GPU, so that only the CPU counts.
TRAINING = Shape(B=1, Hq=32, Hkv=8, S=128, D=128, P=32)
DECODING = Shape(B=1, Hq=32, Hkv=8, S=1, D=128, P=64, cached=511)


def host(context: Context) -> Items:
    """An item per shape and plan, with PEFT's way beside them."""
    items: Items = {}
    for title, shape in (("training", TRAINING), ("decoding", DECODING)):
        found = plans.names(plans.shape_call(context.device, shape))
        for name in ("auto", *found, "peft", "no-prefix"):
            items[f"{title}: {name}"] = functools.partial(_measure, context, title, shape, name)
    return items


def _measure(context: Context, title: str, shape: Shape, name: str) -> Finding:
    problem = Problem.make(shape, torch.bfloat16, context.device)
    calls = prepare(name, problem) if name in ("peft", "no-prefix") else plan_calls(problem, name)
    if isinstance(calls, Unavailable):
        raise LeftOut(calls.reason)
    row: Row = {"what": name, "shape": title}
    directions = {"forward": calls.forward, "both": calls.both if shape.S > 1 else None}
    for direction, call in directions.items():
        if call is not None:
            call()
            row |= {f"{direction}_us": _microseconds(context, call), f"{direction}_kernels": _kernels(context, call)}
    texts = (f"{d} {row[f'{d}_us']:.0f} us, {row[f'{d}_kernels']} kernels" for d in directions if f"{d}_us" in row)
    return Finding("; ".join(texts), [row])


def _microseconds(context: Context, call: Callable[[], object]) -> float:
    """Of the CPU per call, while the GPU lags behind; on a CPU of the whole call."""
    if context.device == "cuda":
        return 1e6 * min(enqueue(call, 20).host for _ in range(5))
    start = time.perf_counter()
    call()
    return 1e6 * (time.perf_counter() - start)


def _kernels(context: Context, call: Callable[[], object]) -> int:
    """The number of kernels, copies and fills that a call puts on the GPU."""
    if context.device != "cuda":
        return 0
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in profiled.events())
