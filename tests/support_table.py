# SPDX-License-Identifier: Apache-2.0
"""The README's support table, made from what each backend says of itself: ``python -m tests.support_table``."""

from __future__ import annotations

from pathlib import Path

import torch

import peftkern
from peftkern import backends

from .cases import FEATURES, Shape, feature, tensors

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- support table -->", "<!-- end of support table -->"

ROWS = {
    "fp32, fp16, bf16": [(torch.float32, {}), (torch.float16, {}), (torch.bfloat16, {})],
    "fp64": [(torch.float64, {})],
    "head dim 1 to 256": [(torch.float32, {"D": D}) for D in (1, 40, 64, 80, 96, 128, 192, 256)],
    "head dim over 256": [(torch.float32, {"D": 264})],
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


def table() -> str:
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


def in_readme() -> str:
    """The table as the README has it."""
    return README.read_text().partition(BEGIN)[2].partition(END)[0].strip()


if __name__ == "__main__":
    before, _, rest = README.read_text().partition(BEGIN)
    README.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}")
