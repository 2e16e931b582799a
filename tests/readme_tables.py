# SPDX-License-Identifier: Apache-2.0
"""The README's tables, from what backends say of themselves and from results: ``python -m tests.readme_tables``."""

from __future__ import annotations

import csv
import math
import statistics
from pathlib import Path

import torch

import peftkern
from peftkern import backends

from .cases import FEATURES, Shape, feature, tensors

README = Path(__file__).parent.parent / "README.md"
RESULTS = README.parent / "benchmarks" / "results"

ROWS = {
    "fp16, bf16": [(torch.float16, {}), (torch.bfloat16, {})],
    "fp32": [(torch.float32, {})],
    "fp64": [(torch.float64, {})],
    "head dim 8, 16, 24 to 256": [(torch.bfloat16, {"D": D}) for D in (8, 40, 64, 80, 96, 128, 192, 256)],
    "any head dim to 256": [(torch.bfloat16, {"D": D}) for D in (1, 20, 63, 100)],
    "head dim over 256": [(torch.bfloat16, {"D": 264})],
}
NAMES = {
    "plain": "causal, grouped heads", "non_causal": "bidirectional", "kv_cache": "KV cache (T > S)",
    "key_mask": "padding on any side (`key_mask`)", "window": "sliding window", "softcap": "softcap (Gemma 2)",
    "window_after_prefix": "sliding window beside an always visible prefix", "sinks": "sinks (GPT-OSS)",
    "bias": "bias (T5), differentiable", "prefix_bias": "prefix bias", "gate": "gate (LLaMA-Adapter)",
    "dropout": "dropout, equal on every backend", "packed": "packed sequences (`cu_seqlens`)",
    "bank": "bank of prefixes, one per sample", "ragged_bank": "bank of prefixes of different lengths",
}  # fmt: skip


def _runs(name: str, calls: list[backends.Call]) -> bool:
    """Whether the backend runs all of ``calls``, forward and backward, on a machine that has what it needs."""
    backend = backends.get_backend(name)
    limits = getattr(backend, "limits", backend.why_not)
    return all(not limits(call) for call in calls)


def _call(dtype: torch.dtype, shape: Shape, options: dict) -> backends.Call:
    inputs = {n: x.requires_grad_() for n, x in tensors(shape, dtype).items()}
    return peftkern.explain(**inputs, **options).call


def support() -> str:
    """Markdown: a row per feature, a column per backend."""
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
    """Markdown: what the results in ``benchmarks/results`` say, the worst row of each kind included."""
    kernel = _rows("cpu_attention.csv")
    lines = [
        "| attention kernel over ten shapes | dtype | threads | times as fast as PEFT's way | least |",
        "|---|---|---|---|---|",
    ]
    for key in dict.fromkeys((r["direction"], r["dtype"], r["threads"]) for r in kernel):
        ratios = [float(r["speedup_over_peft"]) for r in kernel if (r["direction"], r["dtype"], r["threads"]) == key]
        mean = math.exp(statistics.fmean(map(math.log, ratios)))
        lines.append(f"| {' | '.join(key)} | {mean:.1f} | {min(ratios):.1f} |")
    lines += ["", "| training step, SmolLM2-135M | times as fast as PEFT | as without any prefix |", "|---|---|---|"]
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


TABLES = {"support table": support, "numbers": numbers}


def in_readme(name: str) -> str:
    """The table as the README has it, between its two comments."""
    return README.read_text().partition(f"<!-- {name} -->")[2].partition(f"<!-- end of {name} -->")[0].strip()


if __name__ == "__main__":
    for name, make in TABLES.items():
        before, begin, rest = README.read_text().partition(f"<!-- {name} -->")
        _, end, after = rest.partition(f"<!-- end of {name} -->")
        README.write_text(f"{before}{begin}\n{make()}\n{end}{after}")
