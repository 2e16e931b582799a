# SPDX-License-Identifier: Apache-2.0
"""Figures of results: :func:`draw` of the scripts' CSVs, :func:`figures` of the rows of ``peftkern bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.ticker import FormatStrFormatter, NullFormatter, NullLocator

from .rows import PROBLEM, Row, groups, is_ours, title

plt.rcParams["svg.fonttype"] = "none"  # text stays text
OURS, PEER, FLOOR = "#1b6ca8", "#b8b8b8", "#e0a030"


def save(figure: Any, path: Path) -> Path:
    """Write and close the figure."""
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def figures(rows: list[Row]) -> dict[str, Any]:
    """By the name of a file: a panel of bars for each problem, or for sweeps curves over S, P or B."""
    ok = [row for row in rows if row["status"] == "ok"]
    drawn = {}
    for axis, words in (("S", "sequence S"), ("P", "prefix P"), ("B", "batch B")):
        if len({row[axis] for row in ok}) > 1:
            drawn[f"over_{axis}"] = _curves(ok, axis, words)
    if ok:
        drawn["times"] = _bars(ok, "p50_ms", "ms, median, p20 to p80")
    if any(row["peak_mb"] for row in ok if row.get("peak_mb") is not None):
        drawn["memory"] = _bars([row for row in ok if row.get("peak_mb") is not None], "peak_mb", "peak MB")
    return drawn


def _colour(provider: str) -> str:
    return OURS if is_ours(provider) else FLOOR if provider == "no-prefix" else PEER


def _bars(rows: list[Row], column: str, label: str, most: int = 12) -> Any:
    """A panel per problem, the shortest bar on top; ours in blue, the floor in yellow."""
    shown = groups(rows)[:most]
    columns = min(2, len(shown))
    lines = -(-len(shown) // columns)
    tall = max(map(len, shown))
    figure, axes = plt.subplots(
        lines, columns, figsize=(5.2 * columns, lines * (1 + 0.2 * tall)), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    for axis, group in zip(axes.flat, shown, strict=False):
        group = sorted(group, key=lambda row: row[column])
        values = [row[column] for row in group]
        names = [f"{row['provider']}  {row[column]:.3g}" for row in group]
        axis.barh(names, values, color=[_colour(row["provider"]) for row in group])
        if column == "p50_ms":
            low = [row["p50_ms"] - row["p20_ms"] for row in group]
            high = [row["p80_ms"] - row["p50_ms"] for row in group]
            axis.errorbar(values, range(len(group)), xerr=[low, high], fmt="none", ecolor="black", elinewidth=0.8)
        axis.invert_yaxis()
        axis.margins(x=0.05)
        axis.tick_params(labelsize=7)
        axis.set_title(title(group[0]).replace(" Hq=", "\nHq="), fontsize=7, loc="left")
        axis.set_xlabel(label, fontsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    _say_where(figure, rows)
    return figure


def _curves(rows: list[Row], axis_name: str, words: str, most: int = 6) -> Any:
    """Time over one size, both logarithmic; a panel for every value of the other sizes."""
    others = [name for name in PROBLEM if name != axis_name]
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(str(row[name]) for name in others), []).append(row)
    shown = [part for part in found.values() if len({row[axis_name] for row in part}) > 1][:most]
    columns = min(2, len(shown))
    lines = -(-len(shown) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(5.2 * columns, 3.4 * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    for axis, part in zip(axes.flat, shown, strict=False):
        for provider in dict.fromkeys(row["provider"] for row in part):
            line = sorted((row[axis_name], row["p50_ms"]) for row in part if row["provider"] == provider)
            ours = is_ours(provider)
            axis.plot(*zip(*line, strict=True), marker="o", markersize=3, label=provider, linewidth=2 if ours else 1,
                      linestyle="--" if provider == "no-prefix" else "-")  # fmt: skip
        axis.set(xscale="symlog" if axis_name == "P" else "log", yscale="log", xlabel=words, ylabel="ms")
        fixed = [f"{name}={part[0][name]}" for name in ("B", "S", "P") if name != axis_name]
        axis.set_title(" ".join([part[0]["model"], *fixed, part[0]["dtype"], part[0]["direction"]]), fontsize=8)
        sizes = sorted({row[axis_name] for row in part})
        axis.set_xticks(sizes, map(str, sizes), fontsize=7)
        axis.xaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.legend(fontsize=6, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        axis.spines[["top", "right"]].set_visible(False)
    _say_where(figure, rows)
    return figure


def _say_where(figure: Any, rows: list[Row]) -> None:
    first = rows[0]
    device = first.get("gpu") or first.get("cpu")
    about = f"{device}, torch {first.get('torch')}, peftkern {first.get('git')}, {first.get('date')}"
    figure.supxlabel(about, x=0.99, ha="right", fontsize=6)


def _panel(axes: Any, table: pd.DataFrame, title: str, label: str) -> None:
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


def draw(rows: pd.DataFrame) -> Any:
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
    for axis, (part, words, column) in zip(axes[0], panels, strict=True):
        _panel(axis, part.pivot_table(column, "name", "series", sort=False).reindex(order), words, label)
    axes[0][0].tick_params(axis="y", labelsize=7)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    if "cpu" in rows:
        first = rows.iloc[0]
        about = f"{first['cpu']}, torch {first['torch']}, peftkern {first['git']}"
        figure.supxlabel(about, x=0.99, ha="right", fontsize=6)
    return figure
