# SPDX-License-Identifier: Apache-2.0
"""Greedy generation behind a prefix, PEFT beside peftkern: equal tokens in fp32, then tokens per second in bf16."""

from __future__ import annotations

import functools
import time
from typing import Any

import torch
from torch import Tensor

import peftkern

from .context import Context, Finding, Items, Row
from .models import peft_model, vocabulary

#: (model, layers, batch, prefix tokens), in the order of their worth.
CASES = tuple(
    (model, layers, batch, tokens)
    for sizes in (((1, 64), (16, 2048)), ((16, 64), (1, 2048)))
    for model, layers in (("smollm2-135m", 30), ("llama-3-8b", 4))
    for batch, tokens in sizes
)
PROMPT, NEW = 64, 24


def generation(context: Context) -> Items:
    """An item per case."""
    return {
        f"{model} B={batch} P={tokens}": functools.partial(_measure, context, model, layers, batch, tokens)
        for model, layers, batch, tokens in CASES
    }


def _measure(context: Context, name: str, layers: int, batch: int, tokens: int) -> Finding:
    prompt, new = (PROMPT, NEW) if not context.dry_run else (5, 3)
    if context.dry_run:
        name, layers, batch, tokens = "tiny", 2, min(batch, 2), min(tokens, 9)
    model = peft_model(name, layers, tokens, context.device, torch.float32).eval()
    ids = torch.randint(0, vocabulary(model), (batch, prompt), generator=torch.Generator().manual_seed(3))
    ids = ids.to(context.device)
    stock = _generate(model, ids[:2], 4)
    with peftkern.patched(model, strict=True):
        ours = _generate(model, ids[:2], 4)
    if not torch.equal(stock, ours):
        raise AssertionError(f"fp32 tokens {ours.tolist()} differ from PEFT's {stock.tolist()}")
    model, rows = model.to(torch.bfloat16), []
    for arm in ("PEFT", "peftkern"):
        if arm == "peftkern":
            peftkern.patch(model, strict=True)
        times = []
        for _ in range(3):  # the first one compiles
            start = time.perf_counter()
            _generate(model, ids, new)
            context.synchronize()
            times.append(time.perf_counter() - start)
        row: Row = {"arm": arm, "model": name, "layers": layers, "B": batch, "P": tokens, "new_tokens": new}
        row |= {"cold_s": times[0], "s": min(times[1:]), "tokens_per_s": batch * new / min(times[1:])}
        rows.append(row | {"times_as_fast": rows[0]["s"] / row["s"] if rows else 1.0})
    ms = [1e3 * row["s"] / new for row in rows]
    return Finding(
        f"{rows[1]['times_as_fast']:.2f} times PEFT's speed: {ms[1]:.2f} ms a token, PEFT {ms[0]:.2f}", rows
    )


def _generate(model: Any, ids: Tensor, new: int) -> Tensor:
    """The new tokens [B, new]."""
    with torch.no_grad():
        out: Tensor = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip
    return out[:, -new:]
