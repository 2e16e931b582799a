# SPDX-License-Identifier: Apache-2.0
"""Time calls that take turns; describe the machine and the sources of a measurement.

Calls on a GPU are timed by :mod:`.device_time`, without the time that Python takes to launch them.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from ... import __version__, backends, native
from ...arguments import Call
from ...functional import prefix_attention
from ...processor import processor_name
from .device_time import device_seconds, host_seconds


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median, p20 and p80, and the spread (third - first quartile) / median."""

    median: float
    spread: float
    p20: float = 0.0
    p80: float = 0.0

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """Summarize two or more measurements of one call."""
        first, median, third = statistics.quantiles(seconds, n=4)
        fifths = statistics.quantiles(seconds, n=5)
        return cls(median, (third - first) / median if median else 0.0, fifths[0], fifths[3])


class Cost(NamedTuple):
    """Seconds of one call: until its result is there, or on a GPU those of the GPU alone, and of the launching CPU.

    ``host`` is 0 on a CPU, where launching is part of ``seconds``.
    """

    seconds: float
    host: float


_MOST_ROUNDS = 1000

#: Measures one call and returns one or several times in seconds.
Clock = Callable[[Callable[[], object]], list[float]]


def by(now: Callable[[], float]) -> Clock:
    """A clock from a function of ``time``: ``perf_counter``, or ``process_time`` for the CPU time of all threads."""

    def measure(call: Callable[[], object]) -> list[float]:
        start = now()
        call()
        return [now() - start]

    return measure


def clock_for(device: torch.device | str) -> Clock:
    """Seconds on the GPU for a GPU, the wall clock for other devices."""
    return device_seconds if torch.device(device).type == "cuda" else by(time.perf_counter)


def take_turns(
    calls: dict[str, Callable[[], object]],
    seconds: float,
    at_least: int = 7,
    clock: Clock | None = None,
    drop_slower: float = math.inf,
) -> dict[str, Timing]:
    """Time ``calls`` in rounds until ``seconds`` have passed; each round starts with another call.

    A slow moment of the machine thus hits all calls, and no call always runs in the caches that the same other one
    left behind. Every call runs once before the first round.

    Args:
        calls: functions to time, by name.
        seconds: time for all rounds together.
        at_least: number of measurements of each call that are made even if they take longer.
        clock: measures one call; the wall clock by default.
        drop_slower: after two rounds, calls that take this many times as long as the fastest one are timed no more.
    """
    clock = clock or by(time.perf_counter)
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for name in names:
        calls[name]()
    end, rounds = time.perf_counter() + seconds, 0
    while names and (len(times[names[0]]) < at_least or (time.perf_counter() < end and rounds < _MOST_ROUNDS)):
        for name in names:
            times[name] += clock(calls[name])
        rounds += 1
        names = names[1:] + names[:1]
        if rounds >= 2:
            best = min(min(times[name]) for name in names)
            names = [name for name in names if min(times[name]) <= drop_slower * best]
    return {name: Timing.of(times[name]) for name in calls}


def costs(
    calls: dict[str, Callable[[], object]],
    device: torch.device,
    seconds: float,
    at_least: int = 5,
    drop_slower: float = math.inf,
) -> dict[str, Cost]:
    """The cost of each call on ``device``, by :func:`take_turns`: medians."""
    on_gpu = device.type == "cuda"
    with torch.cuda.device(device) if on_gpu else contextlib.nullcontext():
        times = take_turns(calls, seconds, at_least, clock_for(device), drop_slower)
        return {name: Cost(times[name].median, host_seconds(call) if on_gpu else 0.0) for name, call in calls.items()}


def time_backends(
    call: Call,
    names: Iterable[str],
    seconds: float,
    at_least: int = 5,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Cost]:
    """The cost of ``call`` on each of the named backends, forward, and backward if the call needs gradients: medians.

    Backends that run out of memory are left out. Backends five times slower than the fastest one are timed only
    twice. ``options`` are further arguments of :func:`peftkern.prefix_attention`.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        value = torch.randn(shape, generator=generator).to(call.device, call.dtype)
        return value.requires_grad_(call.needs_grad)

    shapes = (call.q_shape, call.kv_shape, call.kv_shape, call.prefix_shape, call.prefix_shape)
    inputs = [draw(shape) for shape in shapes]
    dout = torch.ones_like(inputs[0])

    def run(name: str) -> None:
        out = prefix_attention(*inputs, backend=name, **options)
        if call.needs_grad:
            torch.autograd.grad(out, inputs, dout)

    ready: dict[str, Callable[[], object]] = {}
    for name in names:
        with contextlib.suppress(torch.OutOfMemoryError):
            run(name)
            ready[name] = functools.partial(run, name)
    return costs(ready, call.device, seconds, at_least, drop_slower=5.0)


def stamp(device: torch.device | str = "cpu") -> dict[str, object]:
    """Columns that describe the machine, the packages and the sources of a measurement."""
    row: dict[str, object] = {
        "cpu": cpu_name(), "cores": os.cpu_count(), "torch": torch.__version__, "peftkern": __version__,
        "git": git_sha(), "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    return row | gpu_facts() if torch.device(device).type == "cuda" else row


@functools.cache
def cpu_name() -> str:
    """The processor's name and, in parentheses, the instruction set that the native kernels use on it."""
    isa = native.cpu.default_isa(torch.bfloat16) if not native.cpu.MISSING else "no native library"
    return f"{processor_name()} ({isa})"


def gpu_facts() -> dict[str, object]:
    """Columns for the GPU: name, architecture, current clocks, driver, CUDA and Triton."""
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    facts: dict[str, object] = {
        "gpu": device.name, "arch": f"sm_{device.major}{device.minor}", "cuda": torch.version.cuda, "triton": "",
        "driver": "", "sm_mhz": "", "memory_mhz": "",
    }  # fmt: skip
    if torch.version.hip is not None:
        facts |= {"arch": device.gcnArchName, "cuda": f"HIP {torch.version.hip}"}
    try:
        import triton

        facts["triton"] = triton.__version__
    except ImportError:
        pass
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", f"--id={torch.cuda.current_device()}", "--format=csv,noheader,nounits"]
        names = ("driver", "sm_mhz", "memory_mhz")
        told = _output([*query, "--query-gpu=driver_version,clocks.sm,clocks.mem"]).split(", ")
        facts |= dict(zip(names, told, strict=False)) if len(told) == len(names) else {}
    return facts


@functools.cache
def git_sha() -> str:
    """The checkout's commit, with ``+`` if files differ from it; ``unknown`` for an installed package."""
    root = Path(backends.__file__).parents[2]
    if not (root / ".git").exists():
        return "unknown"
    git = ["git", "-C", str(root)]
    sha = _output([*git, "rev-parse", "--short=12", "HEAD"]) or "unknown"
    changed = _output([*git, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results"])
    return f"{sha}+" if changed else sha


def _output(command: list[str]) -> str:
    """The output of a command; empty if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
