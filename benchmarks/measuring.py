# SPDX-License-Identifier: Apache-2.0
"""What benchmarks share: calls that take turns, medians and spreads, and rows that say where they come from."""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import peftkern

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median, and (third - first quartile) / median."""

    median: float
    spread: float

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """Of one call's measurements, two at least."""
        first, median, third = statistics.quantiles(seconds, n=4)
        return cls(median, (third - first) / median)


def take_turns(
    calls: dict[str, Callable[[], object]],
    seconds: float,
    at_least: int = 7,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Each call's timing. They alternate until ``seconds`` have passed, each round from another one on.

    So a slow moment of the machine hits all of them, and none always runs in the caches that the same other one left.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for name in names:
        calls[name]()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[names[0]]) < at_least:
        for name in names:
            start = clock()
            calls[name]()
            times[name].append(clock() - start)
        names = names[1:] + names[:1]
    return {name: Timing.of(times[name]) for name in calls}


def stamp() -> dict[str, object]:
    """Columns that say on what, with what and from which sources a row was measured."""
    return {
        "cpu": cpu_name(), "cores": os.cpu_count(), "torch": torch.__version__, "peftkern": peftkern.__version__,
        "git": git_sha(), "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


@functools.cache
def cpu_name() -> str:
    """As the kernel names it, with what decides which kernels run."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    isa = peftkern.native.default_isa(torch.bfloat16) if not peftkern.native.MISSING else "no native library"
    return f"{names[0] if names else 'unknown'} ({isa})"


@functools.cache
def git_sha() -> str:
    """Of the commit, with ``+`` where files differ from it."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    sha = git("rev-parse", "--short=12", "HEAD") or "unknown"
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "..", ":!../benchmarks/results")
    return f"{sha}+" if changed else sha


def write(rows: list[dict[str, object]], path: Path) -> None:
    """Rows as CSV, five significant digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(path, index=False, float_format="%.5g")


def show(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """A table, wide enough for its rows."""
    table = Table(title=title, caption=f"{cpu_name()}, torch {torch.__version__}, peftkern {git_sha()}")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=190).print(table)


def progress(tasks: list[tuple[str, Callable[[], list[dict[str, object]]]]]) -> Iterator[dict[str, object]]:
    """The rows of every (description, measurement), with a bar on the terminal that names the one at hand."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=len(tasks))
        for description, measure in tasks:
            bar.update(task, description=description)
            yield from measure()
            bar.advance(task)


def add_options(parser: argparse.ArgumentParser, *, seconds: float) -> None:
    """Options of every benchmark."""
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, torch.get_num_threads()}))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES)
    parser.add_argument("--seconds", type=float, default=seconds, help="per row (default %(default)s)")
    parser.add_argument("--output", type=Path, help="CSV; default benchmarks/results, with --quick none")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run, not how fast")
