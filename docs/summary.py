# SPDX-License-Identifier: Apache-2.0
"""The plot and the summary of the README, and the regressions in docs/benchmarks.md, from `benchmarks/results`.

`python docs/summary.py` exits with status 1 if they are out of date. With `--write` it rewrites them.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import sys
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[1]
PLOT = ROOT / "docs" / "_static" / "speedup.svg"

WIDTH, LEFT, RIGHT, TOP, ROW = 780, 340, 64, 76, 30
BLUE, ORANGE, INK, GREY = "#1f6feb", "#d9661f", "#1f2328", "#59636e"


def rows(name: str, **values: object) -> list[dict[str, str]]:
    """The rows of a results file in which every named column has the given value."""
    with open(ROOT / "benchmarks" / "results" / f"{name}.csv", newline="") as file:
        return [row for row in csv.DictReader(file) if all(row[key] == str(x) for key, x in values.items())]


def row(name: str, **values: object) -> dict[str, str]:
    """The only such row."""
    (found,) = rows(name, **values)
    return found


def attention(direction: str, prefix: int | None = None) -> dict[str, list[dict[str, str]]]:
    """The rows of `peftkern bench` on the AMD EPYC by provider, those of one problem at the same index."""
    wanted = {"direction": direction, "status": "ok"} | ({} if prefix is None else {"P": prefix})
    return {name: rows("bench/zen4/attention", provider=name, **wanted) for name in ("peftkern", "peft", "no-prefix")}


def ratios(other: list[dict[str, str]], ours: list[dict[str, str]]) -> list[float]:
    """The speed of ``ours`` relative to ``other``, problem by problem."""
    for a, b in zip(other, ours, strict=True):
        assert all(a[name] == b[name] for name in ("model", "B", "S", "P", "dtype", "threads"))
    return [float(a["p50_ms"]) / float(b["p50_ms"]) for a, b in zip(other, ours, strict=True)]


def processor(row: dict[str, str]) -> str:
    """``AMD EPYC`` or ``Intel Xeon``, from the processor's full name."""
    return next(name for name in ("AMD EPYC", "Intel Xeon") if name in row["cpu"].replace("(R)", ""))


def bars() -> list[tuple[str, float]]:
    """Label and speed relative to PEFT of each training step in the plot, the fastest first."""
    full = {"part": "step", "model": "smollm2", "data": "full"}
    full_batch, checkpointed = (
        next(r for r in rows("end_to_end", arm=arm, **full) if processor(r) == "AMD EPYC")
        for arm in ("patch", "patch + gc")
    )
    found = [
        ("Prompt, padded batch", row("packing", case="prompt, padded"), "ratio"),
        ("Prefix, padded batch", row("packing", case="prefix, padded"), "ratio"),
        ("Prompt, full batch", row("packing", case="prompt", B=8), "ratio"),
        ("Prefix, one sequence", row("training_step", S=2048), "over_peft"),
        ("Prefix, one sequence", row("training_step", S=512), "over_peft"),
        ("Prefix, full batch", full_batch, "over_peft"),
        ("Prefix, gradient checkpointing", checkpointed, "over_peft"),
    ]
    assert {processor(r) for _, r, _ in found} == {"AMD EPYC"}, "the plot shows one processor"
    assert {r["dtype"] for _, r, _ in found} == {"bf16"}
    labelled = []
    for name, r, column in found:
        up_to = "≤" if "padded" in name else "="  # S is the longest sequence of a padded batch
        labelled.append((f"{name}, B={r['B']} P={r['P']} S{up_to}{r['S']}", float(r[column])))
    return sorted(labelled, key=lambda bar: -bar[1])


def plot() -> str:
    """An SVG of :func:`bars`. It brings its own background, for light and dark pages."""
    shown = bars()
    height = TOP + ROW * len(shown) + 50
    scale = (WIDTH - LEFT - RIGHT) / max(speed for _, speed in shown)
    peft, bottom = LEFT + scale, TOP + ROW * len(shown)

    def text(x: float, y: float, words: str, size: int = 13, color: str = INK, **attributes: str) -> str:
        more = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in attributes.items())
        return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{color}"{more}>{escape(words)}</text>'

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="-apple-system, Segoe UI, Helvetica, Arial, sans-serif">',
        f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="6" fill="#ffffff" stroke="#d1d9e0"/>',
        text(20, 30, "Training step: speed relative to PEFT", 16, font_weight="600"),
        text(20, 50, "SmolLM2-135M, bf16, two threads of an AMD EPYC (Zen 4). Measured.", 12, GREY),
    ]
    for i, (label, speed) in enumerate(shown):
        y = TOP + ROW * i
        color = BLUE if speed >= 1 else ORANGE
        end = LEFT + scale * speed
        end = peft if peft - 46 < end < peft else end  # keeps the number clear of PEFT's line
        lines += [
            text(LEFT - 12, y + 19, label, text_anchor="end"),
            f'<rect x="{LEFT}" y="{y + 5}" width="{scale * speed:.1f}" height="20" rx="2" fill="{color}"/>',
            text(end + 6, y + 19, f"{speed:.2f}x", font_weight="600"),
        ]
    lines += [
        f'<line x1="{peft:.1f}" y1="{TOP - 4}" x2="{peft:.1f}" y2="{bottom + 4}" stroke="{INK}" '
        'stroke-dasharray="4 3"/>',
        text(peft, bottom + 20, "PEFT", 12, GREY, text_anchor="middle"),
        text(20, bottom + 20, "PEFT refuses gradient checkpointing with a prefix", 12, GREY),
        text(20, bottom + 35, "and runs without it.", 12, GREY),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def speed(ratio: float) -> str:
    """The ratio in words; bold if it is a regression."""
    return f"{ratio:.2f}x speed" if ratio >= 1 else f"**{ratio:.2f}x speed**"


def table() -> str:
    """Markdown: six workloads, those that are slower included."""
    kernel = attention("forward+backward")
    over_peft = ratios(kernel["peft"], kernel["peftkern"])
    mean = math.exp(statistics.fmean(map(math.log, over_peft)))
    steps = [r for r in rows("end_to_end", part="step", model="smollm2") if processor(r) == "AMD EPYC"]
    packed, checkpointed = (
        next(r for r in steps if r["data"] == data and r["arm"] == arm)
        for data, arm in (("padded", "patch + packing"), ("full", "patch + gc"))
    )
    longest = {r["arm"]: r for r in rows("end_to_end", part="longest")}
    many, one = (row("end_to_end", part="generate", arm="patch", B=B, P=64) for B in (128, 1))

    def step(r: dict[str, str]) -> str:
        return f"{speed(float(r['over_peft']))}, {1 / float(r['peak_over_peft']):.2f}x peak memory"

    def tokens(arm: str) -> int:
        return round(float(longest[arm]["longest_S"]))

    shown = [
        (f"attention, forward and backward, {len(over_peft)} shapes", kernel["peft"][0],
         f"{mean:.1f}x speed (geometric mean; worst shape {min(over_peft):.1f}x)"),
        ("training step, padded batch", packed, step(packed)),
        ("training step, full batch, gradient checkpointing", checkpointed,
         f"{step(checkpointed)} (PEFT without checkpointing)"),
        (f"longest training sequence in {float(longest['PEFT']['budget_mb']):.0f} MB beside the model",
         longest["PEFT"], f"{tokens('patch + gc')} tokens with gradient checkpointing, PEFT {tokens('PEFT')}"),
        ("`generate`, 128 samples", many, speed(float(many["over_peft"]))),
        ("`generate`, 1 sample", one, speed(float(one["over_peft"]))),
    ]  # fmt: skip
    lines = ["| prefix tuning, bf16, two threads | processor | peftkern vs PEFT |", "|---|---|---|"]
    lines += [f"| {workload} | {processor(r)} | {result} |" for workload, r, result in shown]
    return "\n".join(lines)


#: The steps of `benchmarks/sharing.py` in the summary, in words.
SHARED = {
    "grpo": "GRPO-shaped step, 8 completions of one prompt",
    "dpo": "DPO-shaped step, 2 answers to each of 4 prompts",
    "choices": "scoring 4 choices for each of 4 few-shot questions",
}


def shared_text() -> str:
    """Markdown: steps in which text that rows share runs once."""
    lines = ["| text that rows share, LoRA, two threads | processor | peftkern vs the stock model |", "|---|---|---|"]
    for r in rows("sharing", part="shapes"):
        if r["case"] in SHARED:
            result = f"{speed(float(r['speedup']))}, {float(r['peak_ratio']):.2f}x peak memory"
            lines.append(f"| {SHARED[r['case']]} | {processor(r)}, {r['dtype']} | {result} |")
    return "\n".join(lines)


def regressions() -> str:
    """Markdown: the cases in the results that are slower, and by how much."""
    checkpointed = rows("end_to_end", part="step", arm="patch + gc", data="full")
    single = rows("end_to_end", part="generate", arm="patch", B=1)
    memory = [1 / float(r["peak_over_peft"]) for r in checkpointed]
    long = attention("forward+backward", 1024)
    steps, tokens = ([float(r["over_peft"]) for r in found] for found in (checkpointed, single))
    return "\n".join([
        f"- Gradient checkpointing on full batches: {min(steps):.2f} to {max(steps):.2f} times the speed of PEFT",
        f"  without it, in {min(memory):.2f} to {max(memory):.2f} times the peak memory. PEFT refuses gradient "
        "checkpointing with a prefix.",
        f"- Generation for a single sample: {min(tokens):.2f} to {max(tokens):.2f} times PEFT's speed.",
        f"- Attention behind a prefix of 1024 tokens: down to {min(ratios(long['no-prefix'], long['peftkern'])):.2f} "
        "times the speed of attention without a prefix,",
        f"  but at least {min(ratios(long['peft'], long['peftkern'])):.2f} times PEFT's speed (AMD EPYC, forward and "
        "backward).",
    ])  # fmt: skip


BLOCKS = {
    "summary": (ROOT / "README.md", table), "shared text": (ROOT / "README.md", shared_text),
    "regressions": (ROOT / "docs" / "benchmarks.md", regressions),
}  # fmt: skip


def current() -> dict[Path, str]:
    """The plot, and the files with blocks, as they should be."""
    files = {PLOT: plot()}
    for name, (path, make) in BLOCKS.items():
        before, begin, rest = files.get(path, path.read_text()).partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- end of {name} -->")
        assert end, f"{path.name}: expected the markers of {name!r}"
        files[path] = f"{before}{begin}{make()}\n{end}{after}"
    return files


def main(arguments: list[str] | None = None) -> int:
    """Write, or compare: 1 if something is out of date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="rewrite the files")
    options = parser.parse_args(arguments)
    files = current()
    outdated = [path for path, text in files.items() if not path.exists() or path.read_text() != text]
    for path in outdated:
        print(f"{path.relative_to(ROOT)}: {'written' if options.write else 'out of date'}", file=sys.stderr)
        if options.write:
            path.write_text(files[path])
    return int(bool(outdated) and not options.write)


if __name__ == "__main__":
    sys.exit(main())
