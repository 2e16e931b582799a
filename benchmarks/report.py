# SPDX-License-Identifier: Apache-2.0
"""How the results stand to the bars that the project has set itself: ``python benchmarks/report.py``.

Reads results/cpu_attention.csv and results/training_step.csv. Geometric mean and worst row of each figure.
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

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Figure:
    """Ratios (larger is better) of the rows that ``query`` selects, and what their mean and least should reach."""

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


PEFT, BARE, LONG = "speedup_over_peft", "speedup_over_no_prefix", " and S >= 1024"
FIGURES = (
    _kernel("bf16 forward over PEFT", "bf16", "forward", PEFT, mean=4.5, worst=2.5),
    _kernel("bf16 backward over PEFT", "bf16", "backward", PEFT, mean=3.5, worst=2.0),
    _kernel("fp32 forward over PEFT", "fp32", "forward", PEFT, mean=2.5),
    _kernel("fp32 backward over PEFT", "fp32", "backward", PEFT, mean=2.0),
    _kernel("bf16 forward+backward over SDPA without a prefix, P <= 64", "bf16", "forward+backward", BARE,
            " and P <= 64", mean=2.0),
    _kernel("bf16 forward GFLOP/s over torch.matmul 2048^3, S >= 1024", "bf16", "forward", "over_matmul", LONG,
            worst=1.1),
    _kernel("fp32 forward GFLOP/s over torch.matmul 2048^3, S >= 1024", "fp32", "forward", "over_matmul", LONG,
            worst=1.4),
    _step(512, 1.3),
    _step(1024, 1.5),
    _step(2048, 1.8),
    Figure("bf16 training step over the frozen model without a prefix, S >= 512", "step",
           "dtype == 'bf16' and B == 1 and P == 20 and S >= 512", "over_no_prefix", worst=1.0),
)  # fmt: skip


def geometric_mean(ratios: pd.Series) -> float:
    """NaN of nothing."""
    return math.exp(np.log(ratios).mean()) if len(ratios) else math.nan


def judge(figure: Figure, rows: pd.DataFrame) -> tuple[float, float, bool]:
    """(geometric mean, least, whether the bars are reached)."""
    ratios = rows[figure.column]
    mean, worst = geometric_mean(ratios), ratios.min()
    reached = all(got >= bar for got, bar in ((mean, figure.mean), (worst, figure.worst)) if bar is not None)
    return mean, worst, reached


def show(attention: Path | None = None, step: Path | None = None) -> None:
    """The table, a part per number of threads; figures without rows are named too."""
    results = {name: pd.read_csv(path) for name, path in (("attention", attention), ("step", step)) if path}
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
    """Print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attention", type=Path, default=RESULTS / "cpu_attention.csv")
    parser.add_argument("--step", type=Path, default=RESULTS / "training_step.csv")
    options = parser.parse_args(arguments)
    show(options.attention, options.step)


if __name__ == "__main__":
    main()
