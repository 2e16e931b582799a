# SPDX-License-Identifier: Apache-2.0
"""Whole training steps, PEFT beside peftkern: parity in fp32, then time, memory, launches and waits in bf16."""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import peftkern

from .context import Context, Finding, Items, Row
from .models import batch_of, learned, peft_model


class Case(NamedTuple):
    """A training step. ``tokens`` are learned; ``arms`` as in :data:`ARMS`."""

    model: str
    layers: int
    batch: int
    length: int
    tokens: int
    padded: bool = False
    prompt: bool = False
    arms: tuple[str, ...] = ("PEFT", "peftkern")


#: PEFT refuses gradient checkpointing with a prefix.
CASES = {
    "llama-3-8b S=1024": Case("llama-3-8b", 4, 4, 1024, 128),
    "padded": Case("llama-3-8b", 4, 8, 2048, 128, padded=True),
    "llama-3-8b S=4096": Case("llama-3-8b", 4, 2, 4096, 128),
    "prompt tuning": Case("llama-3-8b", 4, 8, 1024, 64, prompt=True),
    "gradient checkpointing": Case(
        "llama-3-8b", 4, 4, 2048, 128, arms=("PEFT", "peftkern", "peftkern, checkpointing")
    ),
    "smollm2": Case("smollm2-135m", 30, 8, 512, 32),
}  # fmt: skip


def training(context: Context) -> Items:
    """An item per case."""
    found = CASES
    if context.dry_run:
        found = {n: case._replace(model="tiny", layers=2, batch=2, length=24, tokens=5) for n, case in CASES.items()}
    return {name: functools.partial(_measure, context, name, case) for name, case in found.items()}


def _measure(context: Context, name: str, case: Case) -> Finding:
    model = peft_model(case.model, case.layers, case.tokens, context.device, torch.float32, prompt=case.prompt)
    parity = _parity(model, batch_of(model, 2, min(case.length, 128), context.device, padded=case.padded), case.arms)
    model, rows, details = model.to(torch.bfloat16), [], []
    batch = batch_of(model, case.batch, case.length, context.device, padded=case.padded)
    tokens = int((batch["labels"] != -100).sum())
    for arm in case.arms:
        with _arm(model, arm):
            row, lines = _time(context, f"{name}, {arm}", model, batch)
        row = {"arm": arm, **case._asdict(), **row, "tokens_per_s": tokens / row["step_s"], "parity": parity}
        row["times_as_fast"] = rows[0]["step_s"] / row["step_s"] if rows else 1.0
        rows.append({key: x for key, x in row.items() if key != "arms"})
        details += lines
    loss, stock = rows[1]["loss"], rows[0]["loss"]
    if not abs(loss - stock) <= 0.02 * abs(stock):
        raise AssertionError(f"bf16: loss {loss:.4f}, PEFT's {stock:.4f}")
    speeds = ", ".join(f"{row['arm']} {row['step_s'] * 1e3:.4g} ms" for row in rows)
    return Finding(f"{rows[-1]['times_as_fast']:.2f} times PEFT's speed: {speeds}; {parity}", rows, details)


@contextlib.contextmanager
def _arm(model: Any, arm: str) -> Iterator[None]:
    """Within the block, the model is PEFT's, patched, or patched with gradient checkpointing."""
    with contextlib.ExitStack() as stack:
        if arm != "PEFT":
            stack.enter_context(peftkern.patched(model, strict=True))
        if "checkpointing" in arm:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            stack.callback(model.gradient_checkpointing_disable)
        yield


def _step(model: Any, batch: dict[str, Tensor]) -> Tensor:
    model.zero_grad()
    loss: Tensor = model(**batch).loss
    loss.backward()
    return loss.detach()


def _parity(model: Any, batch: dict[str, Tensor], arms: tuple[str, ...]) -> str:
    """Compare loss and gradient in fp32. Raises AssertionError if they differ by more than rounding explains."""
    stock = _step(model, batch).item()
    true = learned(model).grad.clone()  # type: ignore[union-attr]
    found = []
    for arm in arms[1:]:
        with _arm(model, arm):
            loss = _step(model, batch).item()
        error = ((learned(model).grad - true).norm() / true.norm()).item()  # type: ignore[operator]
        found.append(f"fp32 loss {loss:.6f}, PEFT's {stock:.6f}, gradients differ by {error:.1e}")
        if not (abs(loss - stock) <= 1e-4 * abs(stock) and error <= 1e-3):
            raise AssertionError(f"{arm}: {found[-1]}")
    return found[-1]


def _time(context: Context, title: str, model: Any, batch: dict[str, Tensor]) -> tuple[Row, list[str]]:
    """The columns of one arm, and the places where its step waits for the GPU."""
    cold = time.monotonic()
    _step(model, batch)
    context.synchronize()
    cold = time.monotonic() - cold
    if context.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times, loss = [], torch.zeros(())
    for _ in range(2 if context.dry_run else 6):
        start = time.perf_counter()
        loss = _step(model, batch)
        context.synchronize()
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 1e6 if context.device == "cuda" else 0.0
    waits = _waits(model, batch) if context.device == "cuda" else []
    row: Row = {"step_s": statistics.median(times), "cold_s": cold, "peak_mb": peak, "loss": loss.item()}
    return row | _profile(context, title, model, batch) | {"waits": len(waits)}, [f"waits: {line}" for line in waits]


def _waits(model: Any, batch: dict[str, Tensor]) -> list[str]:
    """Where a step waits for the GPU."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            _step(model, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [f"{w.filename}:{w.lineno}" for w in said if "synchroniz" in str(w.message)]


def _profile(context: Context, title: str, model: Any, batch: dict[str, Tensor]) -> Row:
    """Seconds of the GPU and the number of its kernels in a step; the profiler's table goes to a file."""
    on_gpu = context.device == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]) as profiled:
        _step(model, batch)
        context.synchronize()
    averages = profiled.key_averages()
    order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    folder = context.folder / "profiles"
    folder.mkdir(exist_ok=True)
    table = averages.table(sort_by=order, row_limit=25, max_name_column_width=80)
    (folder / f"{title.replace(' ', '_').replace(',', '')}.txt").write_text(table)
    kernels = [event for event in profiled.events() if event.device_type == DeviceType.CUDA]
    return {"device_s": sum(event.time_range.elapsed_us() for event in kernels) / 1e6, "kernels": len(kernels)}
