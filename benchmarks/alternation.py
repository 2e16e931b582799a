# SPDX-License-Identifier: Apache-2.0
"""Calls that alternate round by round, for ratios of two of them, and the interval of a median."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

LEAST_SECONDS = 1e-3  # of one measurement, which repeats short calls


def alternate(calls: dict[str, Callable[[], object]], seconds: float, at_least: int) -> dict[str, list[float]]:
    """Seconds per call and round; each round starts with another call. Short calls are repeated within a round."""

    def clocked(call: Callable[[], object], repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats

    took = {name: clocked(call, 1) for name, call in calls.items()}
    for name, call in calls.items():  # the first call of a short one is no measure of it
        took[name] = took[name] if took[name] > 100 * LEAST_SECONDS else max(clocked(call, 1), 1e-7)
    repeats = {name: max(1, math.ceil(LEAST_SECONDS / x)) for name, x in took.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    names, end = list(calls), time.perf_counter() + seconds
    while len(times[names[0]]) < at_least or time.perf_counter() < end:
        for name in names:
            times[name].append(clocked(calls[name], repeats[name]))
        names = names[1:] + names[:1]
    return times


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95% interval of the median by order statistics; fewer than six values have none but 0 to infinity."""
    ordered, n = sorted(values), len(values)
    tail, rank = 0.0, 0  # tail: the probability that fewer than `rank` of the values lie below the true median
    while tail + math.comb(n, rank) / 2**n <= 0.025:
        tail += math.comb(n, rank) / 2**n
        rank += 1
    return (ordered[rank - 1], ordered[n - rank]) if rank else (0.0, math.inf)


def interval_text(low: float, high: float, form: str = ".3f") -> str:
    """The interval for tables; "-" if there is none."""
    return "-" if math.isinf(high) else f"{low:{form}} to {high:{form}}"
