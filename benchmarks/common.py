# SPDX-License-Identifier: Apache-2.0
"""Options, progress bars, tables and files that the benchmarks share. Needs rich and pandas."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from peftkern.tools.bench.measuring import cpu_name, git_sha
from peftkern.tools.bench.providers import DTYPES

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

Row = dict[str, Any]


def write(rows: list[Row], path: Path) -> None:
    """Write rows as CSV with five significant digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(path, index=False, float_format="%.5g")


def show(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Print a table that is as wide as its rows."""
    table = Table(title=title, caption=f"{cpu_name()}, torch {torch.__version__}, peftkern {git_sha()}")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=190).print(table)


def progress(tasks: list[tuple[str, Callable[[], list[Row]]]]) -> Iterator[Row]:
    """Yield the rows of every (description, measurement), with a progress bar, or a line each outside a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=len(tasks))
        for description, measure in tasks:
            bar.update(task, description=description)
            if not bar.console.is_terminal:
                print(f"{bar.tasks[0].completed:.0f}/{len(tasks)} {description}", file=sys.stderr, flush=True)
            yield from measure()
            bar.advance(task)


def add_options(parser: argparse.ArgumentParser, *, seconds: float, threads: list[int] | None = None) -> None:
    """Add the options that most benchmarks have. ``threads``: default numbers of threads, else one and all."""
    threads = threads or sorted({1, torch.get_num_threads()})
    parser.add_argument("--threads", type=int, nargs="+", default=threads, help="default %(default)s")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16"], help="default %(default)s")
    parser.add_argument("--seconds", type=float, default=seconds, help="time per row (default %(default)s)")
    parser.add_argument("--output", type=Path, help="CSV file; default in benchmarks/results, with --quick none")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that name SmolLM2-135M's weights."""
    parser.add_argument("--model", help="folder or hub name; default SmolLM2-135M-Instruct")
    parser.add_argument("--cache", type=Path, help="folder for the converted model")


def output_of(options: argparse.Namespace, name: str) -> Path | None:
    """The CSV file to write: ``--output``, else ``name`` in the results, with ``--quick`` none."""
    if options.output is not None or options.quick:
        return options.output  # type: ignore[no-any-return]
    return RESULTS / name
