# SPDX-License-Identifier: Apache-2.0
"""The plot of a run: both loss curves, paired step times, accuracy and memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .report import Findings, duration, headline, setting, size, verdict
from .training import ARMS, TITLES

_COLOURS = {"stock": "#e8963e", "peftkern": "#1f4e9e"}
_INK, FAINT = "#22252b", "#8a8f98"
STYLE = {
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": "#c9ccd2",
    "axes.labelcolor": FAINT,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
}


def save_plot(findings: Findings, path: Path) -> None:
    """Draw the findings into a PNG file."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 5.4), dpi=150)
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(
            2, 3, width_ratios=(1.25, 1.25, 0.8), height_ratios=(3.2, 1), hspace=0.12, wspace=0.22,
            left=0.055, right=0.985, top=0.77, bottom=0.1,
        )  # fmt: skip
        loss = figure.add_subplot(grid[0, 0])
        _loss(loss, findings)
        _difference(figure.add_subplot(grid[1, 0], sharex=loss), findings)
        _seconds(figure.add_subplot(grid[:, 1]), findings)
        _bars(figure.add_subplot(grid[:, 2]), findings)
        figure.text(0.055, 0.925, headline(findings), fontsize=14.5, fontweight="bold")
        told = f"{findings.model} · {setting(findings.options, findings.threads, findings.backend)}"
        figure.text(0.055, 0.872, told, fontsize=9.5, color=FAINT)
        figure.savefig(path)


def _loss(axes: Any, findings: Findings) -> None:
    steps = [pair.step + 1 for pair in findings.pairs]
    widths = {"stock": 5.0, "peftkern": 1.3}
    for arm in ARMS:
        values = [pair.loss[arm] for pair in findings.pairs]
        axes.plot(steps, values, color=_COLOURS[arm], linewidth=widths[arm], label=TITLES[arm])
    axes.legend(
        frameon=False, loc="lower right", bbox_to_anchor=(1.02, 0.98), ncols=2, handlelength=1, columnspacing=1
    )
    axes.set_title("Training loss")
    axes.tick_params(labelbottom=False)
    axes.set_ylim(bottom=0)


def _difference(axes: Any, findings: Findings) -> None:
    steps = [pair.step + 1 for pair in findings.pairs]
    values = [pair.loss["peftkern"] - pair.loss["stock"] for pair in findings.pairs]
    axes.axhline(0, color=_COLOURS["stock"], linewidth=1)
    axes.bar(steps, values, color=_COLOURS["peftkern"], width=0.7)
    axes.set_ylabel("difference")
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)


def _seconds(axes: Any, findings: Findings) -> None:
    pairs, spreads = findings.timed, findings.seconds
    steps = [pair.step + 1 for pair in pairs]
    columns = {arm: [pair.seconds[arm] for pair in pairs] for arm in ARMS}
    axes.vlines(steps, columns["stock"], columns["peftkern"], color="#d5d8de", linewidth=1.2, zorder=1)
    for arm in ARMS:
        median = spreads[arm].median
        axes.scatter(steps, columns[arm], s=20, color=_COLOURS[arm], zorder=3, linewidths=0)
        axes.axhline(median, color=_COLOURS[arm], linewidth=1, linestyle=(0, (4, 3)), zorder=2)
    _direct_labels(axes, {arm: spread.median for arm, spread in spreads.items()})
    axes.set_title(f"Step time, same batches: {verdict(findings.speedup.median, 'faster', 'slower')}")
    axes.set_xlabel("step")
    axes.set_ylabel("seconds")
    axes.xaxis.get_major_locator().set_params(integer=True)
    top = 2.5 * max(spread.median for spread in spreads.values())
    axes.set_ylim(0, min(top, 1.25 * max(map(max, columns.values()))))
    beyond = sum(max(pair) > top for pair in zip(*columns.values(), strict=True))
    if beyond:
        axes.set_xlabel(f"step ({beyond} beyond this axis)")


def _direct_labels(axes: Any, medians: dict[str, float]) -> None:
    """Label the medians at their right end, the higher one above its line, the lower one below."""
    top = max(medians, key=lambda arm: medians[arm])
    for arm, median in medians.items():
        axes.annotate(
            f"{TITLES[arm]}  {duration(median)}", (1, median), xycoords=("axes fraction", "data"),
            xytext=(0, 28 if arm == top else -28), textcoords="offset points", ha="right", va="center",
            color=_COLOURS[arm], fontweight="bold",
        )  # fmt: skip


def _bars(axes: Any, findings: Findings) -> None:
    """Draw accuracy and memory as labelled bars."""
    shares = findings.accuracy
    zero_shot = shares["zero-shot"]["stock"]
    groups = [("Accuracy, zero-shot", "no prefix", {"": (zero_shot.value, f"{zero_shot.value:.1%}")})]
    for moment, title in (("untrained", "prefix attached, untrained"), ("final", "after training")):
        bars = {arm: (share.value, f"{share.value:.1%}") for arm, share in shares[moment].items()}
        groups.append((title, f"± {shares[moment]['stock'].standard_error:.1%}", bars))
    for kind, title in (("peak", "Peak memory"), ("saved", "saved for backward")):
        ratio = findings.memory_ratio(kind)
        if ratio is not None:
            sizes = {arm: findings.measured[arm][kind] or 0 for arm in ARMS}
            bars = {arm: (x / max(sizes.values()), size(x)) for arm, x in sizes.items()}
            groups.append((title, verdict(ratio, "smaller", "larger"), bars))
    y = 0.0
    for title, remark, bars in groups:
        axes.text(0, y, title, fontweight="bold" if title[0].isupper() else "normal")
        axes.text(1, y, remark, color=FAINT, ha="right")
        for arm, (width, label) in bars.items():
            y -= 0.75
            axes.barh(y, width, height=0.66, color=_COLOURS.get(arm, FAINT))
            axes.text(0.02, y - 0.03, label, color="white", va="center", fontsize=9, fontweight="bold")
        y -= 1.25
    axes.set(xlim=(0, 1), ylim=(y + 0.8, 0.3))
    axes.set_axis_off()
