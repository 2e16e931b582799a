# SPDX-License-Identifier: Apache-2.0
"""Tables of the documentation, made from the backends and from results.

A table stands between `<!-- NAME -->` and `<!-- end of NAME -->` in README.md or in docs.
`python -m benchmarks.readme_tables --write` fills every such block; without --write it prints those that are stale.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import peftkern
from peftkern import backends
from peftkern.testing.cases import FEATURES, Shape, feature, tensors
from peftkern.tools import versions
from peftkern.tools.bench.rows import Comparison, groups, read

from .review_training import by_arm, mean_and_error

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
#: Stands for a table whose results are missing.
NOT_RECORDED = "No results are recorded."

ROWS = {
    "fp16, bf16": [(torch.float16, {}), (torch.bfloat16, {})],
    "fp32": [(torch.float32, {})],
    "fp64": [(torch.float64, {})],
    "head dim 8, 16, 24 to 256": [(torch.bfloat16, {"D": D}) for D in (8, 40, 64, 80, 96, 128, 192, 256)],
    "any head dim to 256": [(torch.bfloat16, {"D": D}) for D in (1, 20, 63, 100)],
    "head dim over 256": [(torch.bfloat16, {"D": 264})],
    "values of another head dim (compressed keys)": [
        (torch.bfloat16, {"D": D, "Dv": Dv}) for D, Dv in ((192, 128), (24, 16), (16, 40))
    ],
}
NAMES = {
    "plain": "causal, grouped heads", "non_causal": "bidirectional", "kv_cache": "KV cache (T > S)",
    "key_mask": "padding on any side (`key_mask`)", "window": "sliding window", "softcap": "softcap (Gemma 2)",
    "window_after_prefix": "sliding window beside an always visible prefix", "sinks": "sinks (GPT-OSS)",
    "bias": "bias (T5), differentiable", "prefix_bias": "prefix bias", "gate": "gate (LLaMA-Adapter)",
    "dropout": "dropout, equal on every backend", "packed": "packed sequences (`cu_seqlens`)",
    "bank": "bank of prefixes, one per sample", "ragged_bank": "bank of prefixes of different lengths",
    "several_prefixes": "several prefixes per sample", "packed_shared": "prefixes in k and v (`prefix_starts`)",
}  # fmt: skip


def _runs(name: str, calls: list[backends.Call]) -> bool:
    """Whether the backend runs all of ``calls``, forward and backward, on a machine that meets its requirements."""
    return all(not backends.get_backend(name).limits(call) for call in calls)


def _call(dtype: torch.dtype, shape: Shape, options: dict) -> backends.Call:
    inputs = {n: x.requires_grad_() for n, x in tensors(shape, dtype).items()}
    return peftkern.explain(**inputs, **options).call


def support() -> str:
    """Markdown: the features that each backend supports, a row per feature."""
    rows = {title: [_call(dtype, Shape(**sizes), {}) for dtype, sizes in cases] for title, cases in ROWS.items()}
    for name in FEATURES:
        if name in NAMES:
            rows[NAMES[name]] = [_call(torch.bfloat16, *feature(name, Shape()))]
    lines = ["| forward and backward | " + " | ".join(f"`{name}`" for name in backends.BACKENDS) + " |"]
    lines.append("|---" * (1 + len(backends.BACKENDS)) + "|")
    for title, calls in rows.items():
        cells = ["yes" if _runs(name, calls) else "no" for name in backends.BACKENDS]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _rows(name: str) -> list[dict[str, str]]:
    with open(RESULTS / name, newline="") as file:
        return list(csv.DictReader(file))


def numbers() -> str:
    """Markdown: speed-ups of attention and of training steps, with the worst row of each kind."""
    lines = _kernel_lines()
    lines += ["", "| training step, SmolLM2-135M | times as fast as PEFT | vs. no prefix (SDPA) |", "|---|---|---|"]
    lines += [
        f"| {r['dtype']}, threads={r['threads']}, B={r['B']}, S={r['S']}, P={r['P']} | {float(r['over_peft']):.2f} "
        f"| {float(r['over_no_prefix']):.2f} |"
        for r in _rows("training_step.csv")
    ]
    columns = ("training step without padding, the prompt once (bf16)", "times fewer rows", "times as fast",
               "times less memory")  # fmt: skip
    lines += ["", f"| {' | '.join(columns)} |", "|---|---|---|---|"]
    for r in _rows("packing.csv"):
        title = f"{r['case']}, B={r['B']}, P={r['P']}, S={r['S']}"
        if r["case"] == "prompt, one label a row":
            title += ': `logits="labelled"` against all logits'
        lines.append(f"| {title} | {float(r['rows']):.2f} | {float(r['ratio']):.2f} | {float(r['peak_ratio']):.2f} |")
    return "\n".join(lines)


def _kernel_lines() -> list[str]:
    """A line per dtype and number of threads, from the rows of ``peftkern bench --shapes training``."""
    lines = [
        "| attention over ten shapes, compared with PEFT: geometric mean (minimum) | forward | backward | both |",
        "|---|---|---|---|",
    ]
    ratios: dict[tuple[str, int], dict[str, list[float]]] = {}
    for c in map(Comparison.of, groups(read(RESULTS / "bench" / "zen4" / "shapes" / "attention.csv"))):
        row, ratio = c.rows[0], c.over(c.peft)
        if not row["cached"] and ratio is not None:
            found = ratios.setdefault((row["dtype"], row["threads"]), {})
            found.setdefault(row["direction"], []).append(ratio)
    for (dtype, threads), found in ratios.items():
        shown = (found[direction] for direction in ("forward", "backward", "forward+backward"))
        cells = [f"{math.exp(statistics.fmean(map(math.log, x))):.1f} ({min(x):.1f})" for x in shown]
        lines.append(f"| {dtype}, threads={threads} | {' | '.join(cells)} |")
    return lines


def alternatives() -> str:
    """Markdown: a line per shape and processor in the rows of ``peftkern bench``; empty without rows."""
    found: dict[tuple[str, ...], dict[str, Comparison]] = {}
    for path in sorted((RESULTS / "bench").glob("*/attention.csv")):
        for c in map(Comparison.of, groups(read(path))):
            row = c.rows[0]
            shape = f"{row['model']}, B={row['B']} S={row['S']} P={row['P']}, {row['dtype']}"
            found.setdefault((processor(row["cpu"]), shape), {})[row["direction"]] = c
    if not found:
        return ""
    directions = ("forward", "forward+backward")
    lines = ["| processor | shape | " + " | ".join(directions) + " |", "|---|---|---|---|"]
    for key, by_direction in found.items():
        cells = (_standing(by_direction.get(direction)) for direction in directions)
        lines.append(f"| {' | '.join((*key, *cells))} |")
    return "\n".join(lines)


def processor(name: str) -> str:
    """Shorten the name of a processor."""
    return re.sub(r"\(R\)| Processor", "", name)


def _standing(c: Comparison | None) -> str:
    """Speed-ups over PEFT's way, the best alternative and attention without a prefix."""
    return "-" if c is None else " / ".join(_ratio(c.over(other)) for other in (c.peft, c.best, c.no_prefix))


def end_to_end() -> str:
    """Markdown: whole models, from ``benchmarks.end_to_end patch``; empty without results."""
    if not (RESULTS / "end_to_end.csv").exists():
        return ""
    rows = _rows("end_to_end.csv")
    processors = dict.fromkeys(row["cpu"] for row in rows)
    return "\n\n".join(table for cpu in processors for table in _end_to_end_on(cpu, rows))


def _end_to_end_on(cpu: str, rows: list[dict[str, str]]) -> list[str]:
    rows, tables, where = [row for row in rows if row["cpu"] == cpu], [], processor(cpu)
    steps = [r for r in rows if r["part"] == "step" and r["arm"] != "PEFT"]
    if steps:
        lines = [f"| training step, {where} | batch | | times as fast as PEFT | of its peak memory |",
                 "|---|---|---|---|---|"]  # fmt: skip
        for r in steps:
            peak = _ratio(1 / float(r["peak_over_peft"])) if r["peak_over_peft"] else "-"
            lines.append(f"| {_model(r)} | {r['data']} | {r['arm']} | {_ratio(r['over_peft'])} | {peak} |")
        tables.append("\n".join(lines))
    longest = [r for r in rows if r["part"] == "longest"]
    if longest:
        lines = [f"| longest sequence in a training step, {where} | MB beside the model | | tokens |",
                 "|---|---|---|---|"]  # fmt: skip
        for r in longest:
            most = {"ok": "", "the longest tried": " or more", "out of memory": ""}[r["status"]]
            tokens = f"{float(r['longest_S']):.0f}{most}"
            lines.append(f"| {_model(r)} | {float(r['budget_mb']):.0f} | {r['arm']} | {tokens} |")
        tables.append("\n".join(lines))
    stock = {_key(r): r for r in rows if r["part"] == "generate" and r["arm"] == "PEFT"}
    if stock:
        lines = [f"| generation, {where} | B | P | tokens/s | PEFT's | times as fast |", "|---|---|---|---|---|---|"]
        for r in rows:
            if r["part"] == "generate" and r["arm"] != "PEFT":
                peft = stock[_key(r)]
                speeds = (f"{float(x['tokens_per_s']):.0f}" if x["tokens_per_s"] else x["status"] for x in (r, peft))
                shown = (_model(r), r["B"], r["P"], *speeds, _ratio(r["over_peft"]))
                lines.append("| " + " | ".join(shown) + " |")
        tables.append("\n".join(lines))
    return tables


def sharing() -> str:
    """Markdown: steps in which text that rows share runs once, and batches with nothing to gain."""
    rows = _rows("sharing.csv")
    where = f"{rows[0]['dtype']}, threads={rows[0]['threads']}, {rows[0]['cpu'].split(' @')[0]}"
    lines = [
        f"| SmolLM2-135M with LoRA, {where} | rows | times fewer rows | times as fast | peak memory |",
        "|---|---|---|---|---|",
    ]
    for r in rows:
        if r["part"] == "shapes":
            cells = [f"{r['case']}, B={r['B']} S={r['S']}"]
            cells += [f"{float(r['rows_before']):.0f} to {float(r['rows_after']):.0f}"]
            cells += [_ratio(r[name]) for name in ("rows_ratio", "speedup", "peak_ratio")]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"| other batches, 4 layers, {where} | times as fast |", "|---|---|"]
    lines += [
        f"| {r['case']}, B={r['B']} S={r['S']} | {_ratio(r['speedup'])} |" for r in rows if r["part"] == "adversarial"
    ]
    return "\n".join(lines)


def hybrids() -> str:
    """Markdown: what is trained on the movie reviews, from ``benchmarks.hybrids``."""
    lines = [
        "| SmolLM2-135M, trained | parameters | accuracy, mean of the seeds | seconds per step |",
        "|---|---|---|---|",
    ]
    for rows in by_arm(_rows("hybrids.csv")):
        name, trained = rows[0]["arm"], rows[0]["steps"] != "0"
        seconds = f"{statistics.fmean(float(row['step_s']) for row in rows):.2f}" if trained else "-"
        lines.append(f"| {name} | {int(rows[0]['parameters']):,} | {_accuracy(rows)} | {seconds} |")
    return "\n".join(lines)


def starts() -> str:
    """Markdown: accuracies from different initial values, from ``benchmarks.starts``."""
    found = {rows[0]["arm"]: _accuracy(rows) for rows in by_arm(_rows("starts.csv"))}
    lines = ["| accuracy by start | prefix | prompt |", "|---|---|---|"]
    for start in dict.fromkeys(name.partition(", ")[2] for name in found):
        if start:
            cells = (found.get(f"{kind}, {start}", "-") for kind in ("prefix", "prompt"))
            lines.append(f"| {start} | {' | '.join(cells)} |")
    return "\n".join(lines)


def distillation() -> str:
    """Markdown: memory and time of the loss of distillation, and of its teacher."""
    rows = _rows("distillation.csv")
    where = f"threads={rows[0]['threads']}, {processor(rows[0]['cpu'])}"
    lines = [f"| distillation, {where} | memory, of the logits' bytes | bar |", "|---|---|---|"]
    lines += [
        f"| {r['case']}, {r['dtype']}, N={r['N']} | {float(r['ratio']):.1%} | {r['bar']} |"
        for r in rows
        if r["part"] == "memory"
    ]
    lines += [
        "",
        f"| distillation, {where} | seconds | the other way's | times as fast | bar |",
        "|---|---|---|---|---|",
    ]
    for r in rows:
        if r["part"] != "memory":
            seconds = [f"{float(r[name]):.2f}" if r[name] else "-" for name in ("peftkern_s", "other_s")]
            cells = (f"{r['case']}, {r['dtype']}, N={r['N']}", *seconds, _ratio(r["ratio"]), r["bar"])
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def roofline() -> str:
    """Markdown: peaks, bandwidths and the kernels' shares of the peak, from ``benchmarks.roofline``."""
    if not (RESULTS / "roofline.csv").exists():
        return NOT_RECORDED
    rows, tables = _rows("roofline.csv"), []
    for cpu in dict.fromkeys(row["cpu"] for row in rows):
        here = [row for row in rows if row["cpu"] == cpu]
        shapes = list(dict.fromkeys((row["D"], row["S"]) for row in here))
        names = (f"{processor(cpu)}: forward / backward, % of the peak", "threads", "peak, GFLOP/s", "read, GB/s",
                 "copy, GB/s", *(f"D={D} S={S}" for D, S in shapes))  # fmt: skip
        lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
        calls: dict[tuple[str, ...], list[dict[str, str]]] = {}
        for row in here:
            calls.setdefault((row["isa"], row["dtype"], row["instruction"], row["threads"]), []).append(row)
        for (isa, dtype, instruction, threads), found in calls.items():
            rates = (f"{statistics.median(float(r[name]) for r in found):.0f}"
                     for name in ("peak_gflop_s", "read_gb_s", "copy_gb_s"))  # fmt: skip
            shares = {(r["D"], r["S"], r["direction"]): f"{float(r['share']):.0%}".rstrip("%") for r in found}
            pairs = (
                " / ".join(shares.get((*shape, way), "-") for way in ("forward", "backward")) for shape in shapes
            )
            lines.append(f"| {' | '.join((f'{isa}, {dtype}, {instruction}', threads, *rates, *pairs))} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def step_parts() -> str:
    """Markdown: the parts of a training step, from ``benchmarks.step_parts``."""
    if not (RESULTS / "step_parts.csv").exists():
        return NOT_RECORDED
    rows = _rows("step_parts.csv")
    first, parts = rows[0], list(dict.fromkeys(row["part"] for row in rows))
    where = f"B={first['B']} S={first['S']} P={first['P']}, {processor(first['cpu'])}: seconds"
    lines = [
        f"| {where} | {' | '.join((*parts, 'step', 'times as fast as PEFT'))} |",
        "|---" * (len(parts) + 3) + "|",
    ]
    arms: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    for row in rows:
        arms.setdefault((row["dtype"], row["threads"], row["arm"]), {})[row["part"]] = row
    for (dtype, threads, arm), found in arms.items():
        cells = [f"{float(found[part]['seconds']):.2f} ({float(found[part]['share']):.0%})" for part in parts]
        whole, stock = (float(arms[dtype, threads, name][parts[0]]["step_s"]) for name in (arm, "PEFT"))
        cells += [f"{whole:.2f}", "-" if arm == "PEFT" else _ratio(stock / whole)]
        lines.append(f"| {' | '.join((f'{arm}, {dtype}, threads={threads}', *cells))} |")
    return "\n".join(lines)


def serving() -> str:
    """Markdown: all rows of ``benchmarks.serving``."""
    rows = _rows("serving.csv")
    first = rows[0]
    lines = [
        f"| {first['model']}, float32, threads={first['threads']}, {first['cpu'].split(' @')[0]} | prefix caching "
        "| requests at once | requests per second | times as fast as text in every prompt | same tokens |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        rate = f"{float(r['requests per second']):.2f}"
        same = {"True": "yes", "False": "no"}[r["same tokens as text"]] if r["document"] == "cartridge" else "-"
        cells = [r["document"], r["prefix caching"], r["requests at once"], rate, _ratio(r["ratio to text"]), same]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def cartridge() -> str:
    """Markdown: the result of ``peftkern demo --method cartridge``."""
    found = json.loads((RESULTS / "cartridge.json").read_text())
    lines = []
    for title, rows in (("of one document", found["rows"]), ("of both documents", found["composed"])):
        if rows:
            lines += [
                f"| beside a teacher {title} | tokens | keys and values, kB | KL, nats | same most likely token |",
                "|---|---|---|---|---|",
            ]
            lines += [_divergence(row) for row in rows] + [""]
    closed, runs = found["gap_closed"], found["rows"][2]["kl_of_runs"]
    each = ", ".join(f"{value:.3f}" for value in runs)
    lines.append(
        f"Training closes {closed['mean']:.0%} [{closed['low']:.0%}, {closed['high']:.0%}] of the gap between the "
        f"truncated text and the whole document. The KL after each run: {each}."
    )
    return "\n".join(lines)


def _divergence(row: dict[str, Any]) -> str:
    kl, agreement = row["kl"], row["agreement"]
    cells = (
        row["name"], f"{row['tokens']:,}", f"{row['bytes'] / 1000:,.0f}",
        f"{kl['mean']:.3f} [{kl['low']:.3f}, {kl['high']:.3f}]",
        f"{agreement['mean']:.1%} [{agreement['low']:.1%}, {agreement['high']:.1%}]",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _accuracy(rows: list[dict[str, str]]) -> str:
    """In percent, with the standard error of the mean of several seeds."""
    mean, error = mean_and_error([100 * float(row["accuracy"]) for row in rows])
    return f"{mean:.1f} ± {error:.1f}" if len(rows) > 1 else f"{mean:.1f}"


def _key(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row[name] for name in ("model", "dtype", "threads", "B", "S", "P"))


def _model(row: dict[str, str]) -> str:
    cut = "SmolLM2-135M" if row["model"] == "smollm2" else f"{row['model']} cut to {row['layers']} layers"
    where = "" if row["part"] == "generate" else f", B={row['B']} P={row['P']}"
    sizes = f" S={row['S']}" if row["part"] == "step" else ""
    return f"{cut}, {row['dtype']}{where}{sizes}"


def _ratio(value: str | float | None) -> str:
    return "-" if value in (None, "") else f"{float(value):.2f}"


TABLES = {
    "support table": support, "numbers": numbers, "alternatives": alternatives, "end to end": end_to_end,
    "sharing": sharing, "versions": versions.sentence, "hybrids": hybrids, "starts": starts,
    "distillation": distillation, "serving": serving, "cartridge": cartridge, "roofline": roofline,
    "step parts": step_parts,
}  # fmt: skip


def placed() -> Iterator[tuple[Path, str]]:
    """Every file of the documentation with the name of a table in it."""
    for path in (README, *sorted((ROOT / "docs").rglob("*.md"))):
        for name in re.findall(r"<!-- end of (.+?) -->", path.read_text()):
            if name in TABLES:
                yield path, name


def in_file(path: Path, name: str) -> str:
    """The table as the file has it, between its two comments."""
    return path.read_text().partition(f"<!-- {name} -->")[2].partition(f"<!-- end of {name} -->")[0].strip()


def write(path: Path, name: str) -> None:
    """Replace the table in the file by the current one."""
    before, begin, rest = path.read_text().partition(f"<!-- {name} -->")
    _, end, after = rest.partition(f"<!-- end of {name} -->")
    path.write_text(f"{before}{begin}\n{TABLES[name]()}\n{end}{after}")


def main(arguments: list[str] | None = None) -> int:
    """Write the tables or list the stale ones; 1 if there are stale ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="fill the tables in README.md and docs")
    options = parser.parse_args(arguments)
    stale = [(path, name) for path, name in placed() if in_file(path, name) != TABLES[name]()]
    for path, name in stale:
        print(f"{path.relative_to(ROOT)}: {name}: {'written' if options.write else 'stale'}")
        if options.write:
            write(path, name)
    return int(bool(stale) and not options.write)


if __name__ == "__main__":
    sys.exit(main())
