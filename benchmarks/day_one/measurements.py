# SPDX-License-Identifier: Apache-2.0
"""Stages that measure: rates of the GPU, the choice of backends, microbenchmarks, and training steps."""

from __future__ import annotations

import functools
import shutil
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import peftkern
from peftkern.backends.cost import measured
from peftkern.backends.machine import identity, machine_of, registered_flash
from peftkern.tools import calibrate
from peftkern.tools.bench import attention, rows
from peftkern.tools.bench import shapes as bench_shapes

from .context import DTYPES, Context


def _seconds(context: Context, call: Callable[[], object]) -> float:
    """Median seconds of a call; on a GPU with a cold L2 cache, by triton.testing.do_bench."""
    if not context.dry_run:
        from triton.testing import do_bench

        return float(do_bench(call, warmup=10, rep=50, return_mode="median")) / 1e3
    times = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def ceilings(context: Context) -> None:
    rows = []
    count = 1 << (16 if context.dry_run else 29)
    source, target = (torch.ones(count, dtype=torch.bfloat16, device=context.device) for _ in range(2))
    rate = 4 * count / _seconds(context, lambda: target.copy_(source)) / 1e9
    rows.append({"what": f"copy, {2 * count >> 20} MiB", "rate": rate, "unit": "GB/s, read and written"})
    size = 64 if context.dry_run else 8192
    for name, dtype in DTYPES.items():
        a, b = (torch.randn(size, size, device=context.device).to(dtype) for _ in range(2))
        rate = 2 * size**3 / _seconds(context, functools.partial(torch.matmul, a, b)) / 1e12
        rows.append({"what": f"matmul {name}, {size}^3", "rate": rate, "unit": "TFLOP/s"})
    context.table("ceilings", rows)
    context.lines += [", ".join(f"{r['what']}: {r['rate']:.4g} {r['unit']}" for r in rows)]


def crossovers(context: Context) -> None:
    """Measure every backend, and judge the choice of ``auto`` before and after calibration with these rows."""
    device = torch.device(context.device, torch.cuda.current_device() if context.device == "cuda" else None)
    shapes = calibrate.SHAPES[:2] if context.dry_run else None
    budget = 0.0 if context.dry_run else 0.5 * (context.end - time.monotonic())
    dtypes = (torch.float32,) if context.dry_run else (torch.bfloat16, torch.float32)
    machine = machine_of(device, dtypes[0], registered_flash(), torch.get_num_threads())
    file = calibrate.calibrate(device, budget, shapes, dtypes, print, 0.9 * (context.end - time.monotonic()))
    rows = calibrate.read_rows(file)
    calls: dict[tuple, dict[str, calibrate.Row]] = {}
    for row in rows:
        calls.setdefault((row.kind.partition(" ")[2], tuple(row.shape)), {})[row.backend] = row
    scales = dict(measured.load(device, identity(device)))
    table: list[dict[str, Any]] = []
    regret: dict[str, list[float]] = {"modelled": [], "calibrated": []}

    def calibrated(row: calibrate.Row) -> float:
        launches, work = scales[row.kind]
        return row.launches * launches + row.work * work

    for (kind, shape), found in calls.items():
        best = min(row.seconds for row in found.values())
        picks = {
            "modelled": min(found.values(), key=lambda r: r.launches + r.work),
            "calibrated": min(
                found.values(), key=lambda r: r.launches * scales[r.kind][0] + r.work * scales[r.kind][1]
            ),
        }
        for how, row in picks.items():
            regret[how].append(row.seconds / best)
        line: dict[str, Any] = {"call": kind, "B,Hq,Hkv,S,T,D,P": ",".join(map(str, shape)), "arch": machine.arch}
        for name, row in found.items():
            line |= {f"{name}_ms": row.seconds * 1e3, f"{name}_modelled_ms": (row.launches + row.work) * 1e3}
        table.append(line | {f"{how}_choice": row.backend for how, row in picks.items()})
    context.table("crossovers", table)
    shutil.copy(file, context.folder / file.name)
    for how, values in regret.items():
        within = sum(value <= 1.15 for value in values)
        context.lines.append(
            f"{how} choice: {within} of {len(values)} within 1.15x of the best, worst {max(values):.2f}x"
        )
    context.lines.append(f"the calibrated profile is in {file}, where 'auto' reads it, and in this folder")


#: Shapes of the microbenchmarks.
MICRO = (
    *bench_shapes.sweep(["llama-3-8b"], [2048], [128], [4]),
    *bench_shapes.sweep(["llama-3-8b"], [512], [16, 2048], [8]),
    *bench_shapes.sweep(["gpt2"], [512], [32], [8]),
    *bench_shapes.sweep(["llama-3-8b"], [8192], [128], [1]),
    *bench_shapes.sweep(["llama-3-8b"], [1], [2048], [32], cached=511),
    *bench_shapes.sweep(["llama-3-8b"], [1], [64], [1], cached=16383),
    *bench_shapes.sweep(["smollm2-135m"], [512], [20], [16]),
    *bench_shapes.sweep(["gemma-2-9b"], [1024], [64], [2]),
)


def microbenchmarks(context: Context) -> None:
    """Run `peftkern bench` on each shape, with all providers and backends."""
    results = rows.Results(context.folder / "microbenchmarks.csv")
    shapes = bench_shapes.QUICK[:1] if context.dry_run else MICRO
    for shape in context.in_time(shapes):
        directions = ["forward"] if shape.cached else ["forward", "forward+backward"]
        key = attention.key_columns(shape)
        if any(all(str(row[n]) == str(x) for n, x in key.items() if x is not None) for row in results.rows):
            continue  # an interrupted run measured it
        results.add(attention.measure(
            shape, "bf16", directions, device=context.device, seconds=0.0 if context.dry_run else 1.0, at_least=3,
            with_memory=not context.dry_run,
        ))  # fmt: skip
    context.tables.append("microbenchmarks.csv")
    speedups = []
    for group in rows.groups(results.rows):
        times = {row["provider"]: row["p50_ms"] for row in group if row["status"] == "ok"}
        context.lines.append(f"{rows.title(group[0])}: " + ", ".join(f"{n} {t:.4g} ms" for n, t in times.items()))
        context.lines += [f"  {r['provider']}: {r['status']}, {r['reason']}" for r in group if r["status"] != "ok"]
        if {"peft", "peftkern"} <= times.keys():
            speedups.append(times["peft"] / times["peftkern"])
    if speedups:
        context.lines.insert(0, f"auto is {min(speedups):.2f} to {max(speedups):.2f} times as fast as PEFT's way")
    bad = [r for r in results.rows if r["status"] in ("wrong", "failed") and rows.is_ours(r["provider"])]
    if bad:
        raise AssertionError(f"{len(bad)} rows of ours are bad: {bad[0]['provider']}, {bad[0]['reason']}")


def training(context: Context) -> None:
    """Compare a step of prefix tuning with PEFT's in fp32, then time both in bf16."""
    from peft import PrefixTuningConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = (64, 128, 2, 4, 2) if context.dry_run else (4096, 14336, 4, 32, 8)
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    config = LlamaConfig(vocab_size=512, **dict(zip(keys, sizes, strict=True)))
    batch, length, prefix = (2, 24, 5) if context.dry_run else (4, 1024, 128)

    def model(dtype: torch.dtype) -> torch.nn.Module:
        torch.manual_seed(0)
        with torch.device(context.device):
            stock = LlamaForCausalLM(config).to(dtype)
        adapted = get_peft_model(stock, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=prefix))
        weight = adapted.prompt_encoder["default"].embedding.weight
        generator = torch.Generator().manual_seed(1)
        weight.data.copy_(0.3 * torch.randn(weight.shape, generator=generator))
        return adapted.to(context.device).train()

    def step(adapted: torch.nn.Module, ids: Tensor) -> tuple[float, Tensor]:
        adapted.zero_grad()
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.item(), adapted.prompt_encoder["default"].embedding.weight.grad.clone()

    ids = torch.randint(0, 512, (batch, length), generator=torch.Generator().manual_seed(2)).to(context.device)
    adapted = model(torch.float32)
    few = ids[:2, :128]
    stock_loss, stock_gradient = step(adapted, few)
    with peftkern.patched(adapted):
        loss, gradient = step(adapted, few)
    error = ((gradient - stock_gradient).norm() / stock_gradient.norm()).item()
    context.lines.append(f"fp32: loss {loss:.6f}, PEFT's {stock_loss:.6f}; gradients differ by {error:.1e}")
    if not (abs(loss - stock_loss) < 1e-4 * abs(stock_loss) and error < 1e-3):
        raise AssertionError(context.lines[-1])
    del adapted, gradient, stock_gradient
    adapted, seconds, peaks = model(torch.bfloat16), {}, {}
    for name in ("PEFT", "peftkern"):
        if name == "peftkern":
            peftkern.patch(adapted)
        step(adapted, ids)
        times = []
        if not context.dry_run:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        for _ in range(2 if context.dry_run else 8):
            start = time.perf_counter()
            step(adapted, ids)
            if not context.dry_run:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        seconds[name] = statistics.median(times)
        peaks[name] = 0.0 if context.dry_run else torch.cuda.max_memory_allocated() / 1e6
    about = {"B": batch, "S": length, "P": prefix}
    rates = {n: batch * length / s for n, s in seconds.items()}
    context.table("training", [
        {"what": n, **about, "ms": 1e3 * s, "tokens_per_s": rates[n], "peak_mb": peaks[n]} for n, s in seconds.items()
    ])  # fmt: skip
    context.lines.insert(0, f"a step is {seconds['PEFT'] / seconds['peftkern']:.2f} times as fast as PEFT's")
