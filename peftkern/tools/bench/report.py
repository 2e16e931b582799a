# SPDX-License-Identifier: Apache-2.0
"""The report of ``peftkern bench`` as one HTML page with plots, and as Markdown without.

Problems where peftkern loses come first. Wrong and failed providers are listed with the reason.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .plot import as_svg, figures
from .rows import Comparison, Row, absent, groups, is_ours, title

_HOW = (
    "Medians (p50) with the second and eighth decile. The providers of a problem take turns in one process. Before a "
    "provider is timed, its outputs or gradients are compared with fp64; they may err twice (gradients: three times) "
    "as much as PEFT's way in the same dtype. Ratios are times as fast: below 1, peftkern is slower. 'no prefix' "
    "is torch's SDPA on the sequence alone, and is no lower bound. TFLOP/s count useful operations, GB/s count each "
    "input and output once. Peak memory is the growth during the call. Saved memory is what forward saves for "
    "backward in addition to its inputs."
)
_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:.6em 0 1.6em;font-size:13px}td,th{padding:.2em .7em;text-align:right}
td:first-child,th:first-child,td:last-child{text-align:left}th{border-bottom:1px solid #888}
tr.ours{font-weight:600;background:#eef5fb}tr.loses td{background:#fdeeee}tr.bad{color:#b00020}tr.none{color:#888}
svg{max-width:100%;height:auto}h3{font-size:1em;margin-bottom:0}p.where{color:#666}"""

#: A heading, column names, (class, cells) per line, and a sentence above the table.
Section = tuple[str, Sequence[str], list[tuple[str, list[str]]], str]


def write_report(rows: list[Row], folder: Path) -> list[Path]:
    """Write report.html and report.md into ``folder``; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = sections(rows)
    page, text = folder / "report.html", folder / "report.md"
    page.write_text(_html(rows, parts, [as_svg(figure) for figure in figures(rows).values()]))
    text.write_text(_markdown(rows, parts))
    return [page, text]


def sections(rows: list[Row]) -> list[Section]:
    """The tables: the comparison, losses first; wrong and failed rows; providers that did not run; every row."""
    compared = [Comparison.of(group) for group in groups(rows)]
    found = [_comparison(compared)]
    bad = [row for row in rows if row["status"] in ("wrong", "failed")]
    if bad:
        lines = [("bad", [title(row), row["provider"], row["status"], row["reason"]]) for row in bad]
        found.append(("Wrong or failed, hence not timed", ("problem", "provider", "", ""), lines, ""))
    if missing := absent(rows):
        lines = [("none", list(line)) for line in missing]
        found.append(("Not timed here", ("provider", "", "why"), lines, ""))
    found += [_group(c) for c in compared]
    return found


def _comparison(compared: list[Comparison]) -> Section:
    columns = ("problem", "peftkern ms", "x PEFT", "x best alternative", "which", "x no prefix", "error / PEFT's", "")
    lines = []
    for c in sorted(compared, key=lambda c: c.over(c.best) or math.inf):
        ours = c.ours
        cells = [title(c.rows[0]), _number(ours and ours["p50_ms"])]
        cells += [_number(c.over(c.peft)), _number(c.over(c.best)), c.best["provider"] if c.best else "-"]
        cells += [_number(c.over(c.no_prefix)), _number(ours and ours["error_ratio"])]
        verdict = "not timed" if ours is None else "loses" if c.loses else ""
        lines.append(("loses" if c.loses else "", [*cells, verdict]))
    losses = sum(c.loses for c in compared)
    ratios = [x for c in compared if (x := c.over(c.peft)) is not None]
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else math.nan
    words = f"{len(compared)} problems; peftkern loses to the best alternative in {losses}."
    if ratios:
        words += f" Times as fast as PEFT's way: geometric mean {mean:.2f}, least {min(ratios):.2f}."
    return "Speed-up by peftkern, the worst first", columns, lines, words


def _group(c: Comparison) -> Section:
    columns = ("provider", "p20 ms", "p50 ms", "p80 ms", "TFLOP/s", "GB/s", "x PEFT", "peak MB", "saved MB",
               "error / PEFT's", "")  # fmt: skip
    lines = []
    for row in sorted((r for r in c.rows if r["status"] == "ok"), key=lambda row: float(row["p50_ms"])):
        numbers = [row.get(name) for name in ("p20_ms", "p50_ms", "p80_ms", "tflops", "gb_s")]
        numbers.append(None if c.peft is None else c.peft["p50_ms"] / row["p50_ms"])
        numbers += [row.get(name) for name in ("peak_mb", "saved_mb", "error_ratio")]
        note = "chosen by auto" if row["auto"] else "no prefix, torch SDPA" if row["provider"] == "no-prefix" else ""
        style = "ours" if is_ours(row["provider"]) else ""
        lines.append((style, [row["provider"], *map(_number, numbers), note]))
    return title(c.rows[0]), columns, lines, f"{c}."


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.3g}"


def _where(rows: list[Row]) -> list[str]:
    """Descriptions of machine and sources; several if the rows differ."""
    names = ("gpu", "arch", "sm_mhz", "memory_mhz", "driver", "cuda", "cpu", "cores", "torch", "triton", "peftkern",
             "git", "date")  # fmt: skip
    lines = [", ".join(f"{name} {row[name]}" for name in names if row.get(name)) for row in rows]
    return list(dict.fromkeys(lines))


def _html(rows: list[Row], parts: Iterable[Section], pictures: list[str]) -> str:
    out = ["<!doctype html><meta charset=utf-8><title>peftkern bench</title>", f"<style>{_STYLE}</style>"]
    out += ["<h1>Prefix attention: peftkern and its alternatives</h1>"]
    out += [f"<p class=where>{html.escape(line)}</p>" for line in _where(rows)] + [f"<p>{html.escape(_HOW)}</p>"]
    for index, (heading, columns, lines, words) in enumerate(parts):
        out.append(f"<h2>{html.escape(heading)}</h2>" + (f"<p>{html.escape(words)}</p>" if words else ""))
        cells = "".join(f"<th>{html.escape(c)}</th>" for c in columns)
        body = "".join(
            f'<tr class="{style}">' + "".join(f"<td>{html.escape(str(c))}</td>" for c in line) + "</tr>"
            for style, line in lines
        )
        out.append(f"<table><tr>{cells}</tr>{body}</table>")
        if index == 0:
            out += pictures
    return "\n".join(out) + "\n"


def _markdown(rows: list[Row], parts: Iterable[Section]) -> str:
    out = ["# Prefix attention: peftkern and its alternatives", "", *_where(rows), "", _HOW, ""]
    for heading, columns, lines, words in parts:
        out += [f"## {heading}", "", *([words, ""] if words else [])]
        out += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        out += ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for _, line in lines]
        out.append("")
    return "\n".join(out)
