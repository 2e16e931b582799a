# SPDX-License-Identifier: Apache-2.0
"""Compare results with the project's own bars: `python -m benchmarks.bars`.

Reads the rows of `peftkern bench --shapes training` and results/training_step.csv; prints the geometric mean and the
worst row of each figure.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from peftkern.tools.bench.rows import Comparison, groups, read

from .common import RESULTS

ATTENTION = RESULTS / "bench" / "zen4" / "shapes" / "attention.csv"


@dataclass(frozen=True)
class Figure:
    """Ratios (larger is better) in the rows that ``query`` selects, with bars for their mean and their worst."""

    title: str
    source: str  # "attention" or "step"
    query: str
    column: str
    mean: float | None = None
    worst: float | None = None


def _kernel(title: str, dtype: str, direction: str, column: str, extra: str = "", **bars: float) -> Figure:
    return Figure(title, "attention", f"dtype == '{dtype}' and direction == '{direction}'{extra}", column, **bars)


def _step(length: int, bar: float) -> Figure:
    query = f"dtype == 'bf16' and B == 1 and P == 20 and S == {length}"
    return Figure(f"bf16 training step over PEFT, S={length}, P=20", "step", query, "over_peft", worst=bar)


PEFT, BARE = "over_peft", "over_no_prefix"
FIGURES = (
    _kernel("bf16 forward over PEFT", "bf16", "forward", PEFT, mean=4.5, worst=2.5),
    _kernel("bf16 backward over PEFT", "bf16", "backward", PEFT, mean=3.5, worst=2.0),
    _kernel("fp32 forward over PEFT", "fp32", "forward", PEFT, mean=2.5),
    _kernel("fp32 backward over PEFT", "fp32", "backward", PEFT, mean=2.0),
    _kernel("bf16 forward+backward over SDPA without a prefix, P <= 64", "bf16", "forward+backward", BARE,
            " and P <= 64", mean=2.0),
    _step(512, 1.3),
    _step(1024, 1.5),
    _step(2048, 1.8),
    Figure("bf16 training step over the frozen model without a prefix, S >= 512", "step",
           "dtype == 'bf16' and B == 1 and P == 20 and S >= 512", "over_no_prefix", worst=1.0),
)  # fmt: skip


def geometric_mean(ratios: pd.Series) -> float:
    """Geometric mean; NaN for an empty series."""
    return math.exp(np.log(ratios).mean()) if len(ratios) else math.nan


def judge(figure: Figure, rows: pd.DataFrame) -> tuple[float, float, bool]:
    """(geometric mean, worst, whether both reach their bars)."""
    ratios = rows[figure.column]
    mean, worst = geometric_mean(ratios), ratios.min()
    reached = all(got >= bar for got, bar in ((mean, figure.mean), (worst, figure.worst)) if bar is not None)
    return mean, worst, reached


def attention_ratios(path: Path) -> pd.DataFrame:
    """A row per training problem in a CSV file of `peftkern bench`, with peftkern's speed-ups."""
    compared = [Comparison.of(group) for group in groups(read(path))]
    keys = ("dtype", "threads", "direction", "S", "P")
    return pd.DataFrame(
        {name: c.rows[0][name] for name in keys} | {PEFT: c.over(c.peft), BARE: c.over(c.no_prefix)}
        for c in compared if not c.rows[0]["cached"]
    )  # fmt: skip


def show(attention: Path | None = None, step: Path | None = None) -> None:
    """Print the table, per number of threads. Figures without rows are listed as not measured."""
    results = {"attention": attention_ratios(attention)} if attention else {}
    results |= {"step": pd.read_csv(step)} if step else {}
    threads = sorted({int(n) for rows in results.values() for n in rows["threads"]})
    table = Table(title="figures and bars: geometric mean / worst")
    for name in ("figure", "threads", "rows", "bar", "measured", ""):
        table.add_column(name, justify="left" if name == "figure" else "right", no_wrap=True)
    for count in threads:
        for figure in (f for f in FIGURES if f.source in results):
            rows = results[figure.source].query(f"threads == {count} and {figure.query}")
            bars = " / ".join("-" if bar is None else f"{bar:.1f}" for bar in (figure.mean, figure.worst))
            if rows.empty:
                table.add_row(figure.title, str(count), "0", bars, "-", "not measured")
                continue
            mean, worst, reached = judge(figure, rows)
            verdict = "[green]reached[/]" if reached else "[red]missed[/]"
            table.add_row(figure.title, str(count), str(len(rows)), bars, f"{mean:.2f} / {worst:.2f}", verdict)
    Console(width=150).print(table)


def main(arguments: list[str] | None = None) -> None:
    """Print the table for the files of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attention", type=Path, default=ATTENTION)
    parser.add_argument("--step", type=Path, default=RESULTS / "training_step.csv")
    options = parser.parse_args(arguments)
    show(options.attention, options.step)


if __name__ == "__main__":
    main()
