# SPDX-License-Identifier: Apache-2.0
"""Draw results: `python -m benchmarks.plot` writes a plot beside each CSV file of benchmarks/results.

Rows of `peftkern bench` give times per provider, over a swept size or per problem, and peak memory. scaling_*.csv
gives times with their fitted lines. training_step.csv gives the speed-ups over PEFT and over the model without a
prefix. roofline.csv gives the roofline of each instruction set with the kernels below it, and step_parts.csv a
stacked bar per training step.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt

from peftkern.tools.bench.plot import figures, save
from peftkern.tools.bench.rows import read

from .common import RESULTS
from .scaling import fit


def figures_of(path: Path) -> dict[str, Any]:
    """Figures of a CSV file, by the name that is appended to the file's. Empty if the file has no plot."""
    columns = set(pd.read_csv(path, nrows=0).columns)
    if {"provider", "status", "p50_ms"} <= columns:
        return figures(read(path))
    if {"axis", "value", "provider", "ms"} <= columns:
        return {"": draw_scaling(pd.read_csv(path))}
    if {"over_peft", "over_no_prefix", "S"} <= columns:
        return {"": draw_steps(pd.read_csv(path))}
    if {"peak_gflop_s", "read_gb_s", "intensity"} <= columns:
        return {"": draw_roofline(pd.read_csv(path))}
    if {"arm", "part", "seconds", "step_s"} <= columns:
        return {"": draw_parts(pd.read_csv(path))}
    return {}


def draw_roofline(rows: pd.DataFrame) -> Any:
    """Operations per second over operations per byte, a panel per number of threads and a colour per roof."""
    threads = list(rows["threads"].unique())
    figure, panels = plt.subplots(1, len(threads), figsize=(5.2 * len(threads), 4.4), squeeze=False, sharey=True,
                                  layout="constrained")  # fmt: skip
    markers = {"forward": "o", "backward": "s"}
    roofs = list(rows.groupby(["isa", "dtype"], sort=False).groups)
    for panel, number in zip(panels[0], threads, strict=True):
        for colour, (isa, dtype) in zip(plt.colormaps["tab10"].colors, roofs, strict=False):
            part = rows[(rows["threads"] == number) & (rows["isa"] == isa) & (rows["dtype"] == dtype)]
            peak, read = part["peak_gflop_s"].median(), part["read_gb_s"].median()
            x = np.geomspace(0.25, 2 * rows["intensity"].max(), 200)
            panel.plot(x, np.minimum(peak, read * x), color=colour, linewidth=1, label=f"{isa}, {dtype}")
            for direction, group in part.groupby("direction", sort=False):
                panel.plot(group["intensity"], group["gflop_s"], markers[direction], color=colour, markersize=4)
        panel.set(title=f"threads={number}", xscale="log", yscale="log", xlabel="operations per byte")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("GFLOP/s (circles: forward, squares: backward)")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=7)
    r = rows.iloc[0]
    figure.supxlabel(f"{r.cpu}, torch {r.torch}, peftkern {r.git}", x=0.99, ha="right", fontsize=6)
    return figure


def draw_parts(rows: pd.DataFrame) -> Any:
    """A stacked bar of the parts of each training step."""
    rows = rows.assign(
        step=rows["arm"] + rows[["dtype", "threads"]].apply(lambda r: "\n{}, threads={}".format(*r), axis=1)
    )
    parts, steps = list(rows["part"].unique()), list(rows["step"].unique())
    table = rows.pivot(index="step", columns="part", values="seconds").loc[steps[::-1], parts]
    figure, axis = plt.subplots(figsize=(8.5, 1.4 + 0.55 * len(steps)), layout="constrained")
    table.plot.barh(ax=axis, stacked=True, width=0.7, legend=False)
    for group, part in zip(axis.containers, parts, strict=True):
        shares = table[part] / table.sum(axis=1)
        axis.bar_label(group, [f"{x:.0%}" if x >= 0.04 else "" for x in shares], label_type="center", fontsize=7)
    axis.set(xlabel="seconds", ylabel="")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    r = rows.iloc[0]
    about = f"B={r.B} S={r.S} P={r.P}; {r.cpu}, torch {r.torch}, peftkern {r.git}"
    figure.supxlabel(about, x=0.99, ha="right", fontsize=6)
    return figure


def draw_steps(rows: pd.DataFrame) -> Any:
    """Bars of the speed-ups of training steps, a panel for each yardstick."""
    rows = rows.assign(
        name=rows[["B", "S", "P"]].apply(lambda r: "B={} S={} P={}".format(*r), axis=1),
        series=rows["dtype"] + ", " + rows["threads"].map(lambda n: f"{n} thread{'s' * (n > 1)}"),
    )
    panels = [("over PEFT", "over_peft"), ("over the model without a prefix", "over_no_prefix")]
    order = list(dict.fromkeys(rows["name"]))
    bars = len(order) * rows["series"].nunique()
    figure, axes = plt.subplots(1, 2, figsize=(9, 1.6 + 0.28 * bars), sharey=True, layout="constrained")
    for axis, (words, column) in zip(axes, panels, strict=True):
        table = rows.pivot_table(column, "name", "series", sort=False).reindex(order)
        table.iloc[::-1].plot.barh(ax=axis, width=0.8, legend=False)
        for group in axis.containers:
            axis.bar_label(group, fmt="%.1f", fontsize=6, padding=1)
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set(title=words, xlabel="times as fast", ylabel="")
        axis.margins(x=0.1)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].tick_params(axis="y", labelsize=7)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    if "cpu" in rows:
        first = rows.iloc[0]
        about = f"{first['cpu']}, torch {first['torch']}, peftkern {first['git']}"
        figure.supxlabel(about, x=0.99, ha="right", fontsize=6)
    return figure


def draw_scaling(rows: pd.DataFrame) -> Any:
    """Times and fitted lines, a panel per axis; saved bytes over B."""
    axes = list(rows["axis"].unique())
    figure, panels = plt.subplots(1, len(axes) + 1, figsize=(3.4 * (len(axes) + 1), 3.6), layout="constrained")
    colours = {"peftkern": "tab:blue", "peft": "tab:orange"}
    styles = {"forward": "-", "backward": "--"}
    for panel, axis in zip(panels, axes, strict=False):
        for (provider, direction), part in rows[rows["axis"] == axis].groupby(["provider", "direction"], sort=False):
            x, ms = (part[name].to_numpy(float) for name in ("value", "ms"))
            fixed, slope, _ = fit(axis, x, ms)
            panel.plot(x, ms, "o", color=colours[provider], markersize=4)
            line = np.linspace(x.min(), x.max(), 200)
            fitted = fixed * line + slope * line**2 if axis == "S" else fixed + slope * line
            panel.plot(line, fitted, styles[direction], color=colours[provider], label=f"{provider}, {direction}")
        panel.set(title=f"{axis} grows", xlabel=axis, ylabel="ms", xscale="symlog" if x.min() == 0 else "log")
        panel.set(yscale="log")
    for provider, part in rows[(rows["axis"] == "B") & (rows["direction"] == "forward")].groupby("provider"):
        panels[-1].plot(part["value"], part["prefix_mb"], "o-", color=colours[provider], label=provider)
    panels[-1].set(title="saved for the prefix", xlabel="B", ylabel="MB per layer")
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    r = rows.iloc[0]
    about = f"B={r.B} S={r.S} P={r.P} Hq={r.Hq} Hkv={r.Hkv} D={r.D} {r['dtype']}, {r.threads} threads"
    figure.supxlabel(f"{about}; {r.cpu}, torch {r.torch}, peftkern {r.git}", x=0.99, ha="right", fontsize=6)
    return figure


def main(arguments: list[str] | None = None) -> None:
    """Draw and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, nargs="*", help="default: every file of benchmarks/results that has a plot")
    parser.add_argument("--format", choices=["svg", "png"], default="svg", help="default %(default)s")
    options = parser.parse_args(arguments)
    for path in options.csv or sorted(RESULTS.rglob("*.csv")):
        for name, figure in figures_of(path).items():
            stem = f"{path.stem}_{name}" if name else path.stem
            print(save(figure, path.with_name(f"{stem}.{options.format}")))


if __name__ == "__main__":
    main()
