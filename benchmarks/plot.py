# SPDX-License-Identifier: Apache-2.0
"""Draws results: ``python benchmarks/plot.py`` makes an SVG (``--format png``: a PNG) beside each CSV.

Kernels and decode: times as fast as PEFT's way, per shape; a bar per dtype and number of threads, a panel per
direction.
Training step: the same, over PEFT and over the frozen model without a prefix.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import pandas as pd
from matplotlib import pyplot as plt
from report import RESULTS


def _panel(axes, table: pd.DataFrame, title: str, label: str) -> None:
    """Horizontal bars, a group per row of ``table``, a colour per column; a line where both are as fast."""
    table.iloc[::-1].plot.barh(ax=axes, width=0.8, legend=False)
    for bars in axes.containers:
        axes.bar_label(bars, fmt="%.1f", fontsize=6, padding=1)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set(title=title, xlabel=label, ylabel="")
    axes.margins(x=0.1)
    axes.spines[["top", "right"]].set_visible(False)


def _series(rows: pd.DataFrame) -> pd.Series:
    return rows["dtype"] + ", " + rows["threads"].map(lambda n: f"{n} thread{'s' * (n > 1)}")


def draw(rows: pd.DataFrame) -> plt.Figure:
    """A figure of one result file."""
    if "direction" in rows:
        names = rows["shape"] + rows["model"].map(lambda model: f"\n{model}")
        rows = rows.assign(name=names, series=_series(rows))
        panels = [(rows[rows["direction"] == d], d, "speedup_over_peft") for d in rows["direction"].unique()]
        label = "times as fast as PEFT's way"
    else:
        rows = rows.assign(name=rows[["B", "S", "P"]].apply(lambda r: "B={} S={} P={}".format(*r), axis=1))
        rows = rows.assign(series=_series(rows))
        panels = [(rows, "over PEFT", "over_peft"), (rows, "over the model without a prefix", "over_no_prefix")]
        label = "times as fast"
    order = list(dict.fromkeys(rows["name"]))
    bars = len(order) * rows["series"].nunique()
    figure, axes = plt.subplots(
        1, len(panels), figsize=(2.5 + 3.2 * len(panels), 1.6 + 0.16 * bars + 0.12 * len(order)), sharey=True,
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for axis, (part, title, column) in zip(axes[0], panels, strict=True):
        _panel(axis, part.pivot_table(column, "name", "series", sort=False).reindex(order), title, label)
    axes[0][0].tick_params(axis="y", labelsize=7)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    if "cpu" in rows:
        first = rows.iloc[0]
        about = f"{first['cpu']}, torch {first['torch']}, peftkern {first['git']}"
        figure.supxlabel(about, x=0.99, ha="right", fontsize=6)
    return figure


def main(arguments: list[str] | None = None) -> None:
    """Draw and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, nargs="*", help="default: all CSVs of this repository's CPU benchmarks")
    parser.add_argument("--format", choices=["svg", "png"], default="svg")
    options = parser.parse_args(arguments)
    names = ("cpu_attention", "cpu_decode", "training_step")
    for path in options.csv or [RESULTS / f"{name}.csv" for name in names]:
        target = path.with_suffix(f".{options.format}")
        figure = draw(pd.read_csv(path))
        figure.savefig(target, dpi=150)
        plt.close(figure)
        print(target)


if __name__ == "__main__":
    main()
