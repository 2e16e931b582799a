# SPDX-License-Identifier: Apache-2.0
"""Times of calls that take turns, their quantiles, and columns that say where a row comes from.

Needs torch, and on a GPU Triton, whose ``do_bench`` clears the L2 cache before each call and times with events.
"""

from __future__ import annotations

import functools
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ... import __version__, backends, native
from ...processor import processor_name


@dataclass(frozen=True)
class Timing:
    """Seconds per call: quantiles, and (third - first quartile) / median."""

    median: float
    spread: float
    p20: float = 0.0
    p80: float = 0.0

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """Of one call's measurements, two at least."""
        first, median, third = statistics.quantiles(seconds, n=4)
        fifths = statistics.quantiles(seconds, n=5)
        return cls(median, (third - first) / median if median else 0.0, fifths[0], fifths[3])


#: Measures one call: its seconds, one figure or several.
Clock = Callable[[Callable[[], object]], list[float]]


def by(now: Callable[[], float]) -> Clock:
    """A clock of ``time``: ``perf_counter``, or ``process_time`` for the processor time of all threads."""

    def measure(call: Callable[[], object]) -> list[float]:
        start = now()
        call()
        return [now() - start]

    return measure


def events(call: Callable[[], object]) -> list[float]:
    """A GPU's events around calls that find the L2 cache cold: :func:`triton.testing.do_bench`."""
    from triton.testing import do_bench

    return [ms / 1e3 for ms in do_bench(call, warmup=2, rep=20, return_mode="all")]


def clock_for(device: torch.device | str) -> Clock:
    """Events on a GPU, the wall clock elsewhere."""
    return events if torch.device(device).type == "cuda" else by(time.perf_counter)


def take_turns(
    calls: dict[str, Callable[[], object]],
    seconds: float,
    at_least: int = 7,
    clock: Callable[[], float] | None = None,
    measure: Clock | None = None,
) -> dict[str, Timing]:
    """Each call's timing. They alternate until ``seconds`` have passed, each round from another one on.

    So a slow moment of the machine hits all of them, and none always runs in the caches that the same other one left.
    ``clock`` is a function of ``time``, ``measure`` any other :data:`Clock`; without both, the wall clock.
    """
    measure = measure or by(clock or time.perf_counter)
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for name in names:
        calls[name]()
    end = time.perf_counter() + seconds
    while names and (time.perf_counter() < end or len(times[names[0]]) < at_least):
        for name in names:
            times[name] += measure(calls[name])
        names = names[1:] + names[:1]
    return {name: Timing.of(times[name]) for name in calls}


def stamp(device: torch.device | str = "cpu") -> dict[str, object]:
    """Columns that say on what, with what and from which sources a row was measured."""
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
    """Name and architecture of the GPU, its clocks at this moment, the driver, CUDA and Triton."""
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
    """Of the commit of a checkout, with ``+`` where files differ from it; ``unknown`` for an installed package."""
    root = Path(backends.__file__).parents[2]
    if not (root / ".git").exists():
        return "unknown"
    git = ["git", "-C", str(root)]
    sha = _output([*git, "rev-parse", "--short=12", "HEAD"]) or "unknown"
    changed = _output([*git, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results"])
    return f"{sha}+" if changed else sha


def _output(command: list[str]) -> str:
    """What it prints; nothing if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
