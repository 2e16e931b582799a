# SPDX-License-Identifier: Apache-2.0
"""The plot of the cartridge demo: training losses, and KL and agreement of each row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..plot import FAINT, STYLE
from ..report import size
from .report import Findings, headline, setting

__all__ = ["save_plot"]

_COLOURS = ("#8a8f98", "#e8963e", "#1f4e9e", "#5b8c5a")


def save_plot(findings: Findings, path: Path) -> None:
    """Draw the findings into a PNG file."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 5.0), dpi=150)
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(1, 3, width_ratios=(1, 1.1, 1.1), wspace=0.3, left=0.05, right=0.985, top=0.76,
                                   bottom=0.12)  # fmt: skip
        _losses(figure.add_subplot(grid[0]), findings)
        kl, agreement = figure.add_subplot(grid[1]), figure.add_subplot(grid[2])
        _bars(kl, findings, "kl", "KL to the teacher (nats per token), 95 % intervals")
        _bars(agreement, findings, "agreement", "Same most likely token as the teacher")
        figure.text(0.05, 0.92, headline(findings), fontsize=14, fontweight="bold")
        figure.text(0.05, 0.86, f"{findings.model} · {setting(findings)}", fontsize=8.5, color=FAINT)
        figure.savefig(path)


def _losses(axes: Any, findings: Findings) -> None:
    for run, losses in enumerate(findings.losses):
        axes.plot(range(1, len(losses) + 1), losses, color=_COLOURS[2], alpha=1 / (1 + run), linewidth=1.3)
    axes.set_title("Training loss (nats per token)")
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylim(bottom=0)


def _bars(axes: Any, findings: Findings, field: str, title: str) -> None:
    rows = [*enumerate(findings.rows), *enumerate(findings.composed, len(findings.rows) + 1)]
    for place, row in rows:
        interval = row.interval(field)
        axes.barh(place, interval.mean, color=_COLOURS[place % 5], height=0.55)
        axes.plot([interval.low, interval.high], [place, place], color="black", linewidth=1.2)
        if field == "kl":
            axes.plot(row.runs, [place] * len(row.runs), "o", color="white", markeredgecolor="black", markersize=3.5)
        text = f"{row.name} · {size(row.bytes)}" if row.bytes else row.name
        axes.text(0, place - 0.42, text, fontsize=8.5, va="center")
    if findings.composed:
        place = len(findings.rows)
        axes.text(0, place, "The teacher reads two documents", fontsize=9, fontweight="bold", va="center")
    axes.set_ylim(rows[-1][0] + 0.5, -0.7)
    axes.set_yticks([])
    axes.set_xlim(left=0)
    axes.set_title(title, fontsize=10)
