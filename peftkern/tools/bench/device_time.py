# SPDX-License-Identifier: Apache-2.0
"""Time a call on a GPU without the time that Python takes to launch it: :func:`enqueue`.

A call of a few kernels runs on the GPU in less time than the CPU needs to launch them. Events around such a call
measure the CPU. Here the GPU sleeps until several calls are in its queue, and then runs them without waiting for the
CPU. The time that the CPU took to fill the queue is returned beside it.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

#: GPU clock cycles per second, an upper limit: the sleep lasts at least as long as asked.
CYCLES = 2.5e9
#: A call that waits for the GPU can never be queued. The sleep is not doubled beyond this number of seconds.
LONGEST_SLEEP = 0.2


class Times(NamedTuple):
    """Seconds of several calls: of each on the GPU, and the mean that the CPU took to launch one.

    ``queued`` is false if a call waited for the GPU, so that the GPU's seconds include those of the CPU.
    """

    device: list[float]
    host: float
    queued: bool


def enqueue(call: Callable[[], object], count: int = 5, asleep: float = 2e-3) -> Times:
    """Run ``call`` ``count`` times behind a sleeping GPU, each with a cold L2 cache.

    Args:
        call: launches kernels on the current stream. It must have run before, so that nothing is compiled.
        count: number of calls. A GPU queues about a thousand kernels.
        asleep: seconds for which the GPU sleeps. Doubled, and all calls repeated, until the queue is full in time.
    """
    cache = _cache(torch.cuda.current_device())
    while True:
        begin, *marks = (torch.cuda.Event(enable_timing=True) for _ in range(2 * count + 1))
        torch.cuda.synchronize()
        begin.record()
        torch.cuda._sleep(int(asleep * CYCLES))  # type: ignore[no-untyped-call]
        host, started = 0.0, time.perf_counter()
        for start, end in zip(marks[::2], marks[1::2], strict=True):
            cache.zero_()
            start.record()
            before = time.perf_counter()
            call()
            host += time.perf_counter() - before
            end.record()
        filled = time.perf_counter() - started
        torch.cuda.synchronize()
        queued = filled <= begin.elapsed_time(marks[0]) / 1e3
        if queued or asleep >= LONGEST_SLEEP:
            device = [a.elapsed_time(b) / 1e3 for a, b in zip(marks[::2], marks[1::2], strict=True)]
            return Times(device, host / count, queued)
        asleep = min(LONGEST_SLEEP, max(2 * asleep, 1.5 * filled))


def device_seconds(call: Callable[[], object]) -> list[float]:
    """A clock for :func:`~peftkern.tools.bench.measuring.take_turns`: seconds on the GPU of several calls."""
    return enqueue(call).device


def host_seconds(call: Callable[[], object], rounds: int = 3) -> float:
    """Median over rounds of the seconds that the CPU takes to launch the call."""
    return statistics.median(enqueue(call).host for _ in range(rounds))


@functools.cache
def _cache(device: int) -> Any:
    """A buffer larger than the L2 cache of any GPU. Writing it leaves nothing else in the cache."""
    return torch.empty(64 << 20, dtype=torch.int32, device=f"cuda:{device}")
