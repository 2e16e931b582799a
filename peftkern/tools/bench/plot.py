# SPDX-License-Identifier: Apache-2.0
"""Figures of the rows of ``peftkern bench``."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

from matplotlib import pyplot as plt
from matplotlib.ticker import FormatStrFormatter, NullFormatter, NullLocator

from .rows import PROBLEM, Row, groups, is_ours, title

plt.rcParams["svg.fonttype"] = "none"  # keep text as text, not as outlines
OURS, PEER, FLOOR = "#1b6ca8", "#b8b8b8", "#e0a030"


def save(figure: Any, path: Path) -> Path:
    """Write the figure and close it."""
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def as_svg(figure: Any) -> str:
    """The figure as an ``<svg>`` element; closes it."""
    picture = io.StringIO()
    figure.savefig(picture, format="svg")
    plt.close(figure)
    text = picture.getvalue()
    return text[text.index("<svg") :]


def figures(rows: list[Row]) -> dict[str, Any]:
    """Figures by name: bars for each problem, and for sweeps curves over S, P or B."""
    ok = [row for row in rows if row["status"] == "ok"]
    drawn = {}
    for axis, words in (("S", "sequence S"), ("P", "prefix P"), ("B", "batch B")):
        if panels := _sweeps(ok, axis):
            drawn[f"over_{axis}"] = _curves(panels, axis, words)
    if ok:
        drawn["times"] = _bars(ok, "p50_ms", "ms, median, p20 to p80")
    if any(row["peak_mb"] for row in ok if row.get("peak_mb") is not None):
        drawn["memory"] = _bars([row for row in ok if row.get("peak_mb") is not None], "peak_mb", "peak MB")
    return drawn


def _colour(provider: str) -> str:
    return OURS if is_ours(provider) else FLOOR if provider == "no-prefix" else PEER


def _bars(rows: list[Row], column: str, label: str, most: int = 12) -> Any:
    """A panel per problem, the shortest bar on top; peftkern in blue, attention without a prefix in yellow."""
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
        if column == "p50_ms" and all(row.get("p20_ms") and row.get("p80_ms") for row in group):
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


def _sweeps(rows: list[Row], axis_name: str, most: int = 6) -> list[list[Row]]:
    """Groups of rows that differ only in one size and the provider, and in that size do differ."""
    others = [name for name in PROBLEM if name != axis_name]
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(str(row[name]) for name in others), []).append(row)
    return [part for part in found.values() if len({row[axis_name] for row in part}) > 1][:most]


def _curves(shown: list[list[Row]], axis_name: str, words: str) -> Any:
    """Time over one size, both axes logarithmic; a panel for every combination of the other sizes."""
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
    _say_where(figure, shown[0])
    return figure


def _say_where(figure: Any, rows: list[Row]) -> None:
    first = rows[0]
    device = first.get("gpu") or first.get("cpu")
    about = f"{device}, torch {first.get('torch')}, peftkern {first.get('git')}, {first.get('date')}"
    figure.supxlabel(about, x=0.99, ha="right", fontsize=6)
