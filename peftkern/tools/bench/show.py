# SPDX-License-Identifier: Apache-2.0
"""Tables and a progress bar on the terminal, and the options that scripts share. Needs rich and pandas."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .measuring import cpu_name, git_sha
from .providers import DTYPES

Row = dict[str, Any]


def write(rows: list[Row], path: Path) -> None:
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


def progress(tasks: list[tuple[str, Callable[[], list[Row]]]]) -> Iterator[Row]:
    """The rows of every (description, measurement), with a bar on the terminal that names the one at hand."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=len(tasks))
        for description, measure in tasks:
            bar.update(task, description=description)
            yield from measure()
            bar.advance(task)


def add_options(parser: argparse.ArgumentParser, *, seconds: float) -> None:
    """Options of every script."""
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, torch.get_num_threads()}))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES)
    parser.add_argument("--seconds", type=float, default=seconds, help="per row (default %(default)s)")
    parser.add_argument("--output", type=Path, help="CSV; default benchmarks/results, with --quick none")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run, not how fast")
