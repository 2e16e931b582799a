# SPDX-License-Identifier: Apache-2.0
"""Attention kernels on the CPU: this package, PEFT's way, and torch's attention without a prefix.

    python benchmarks/cpu_attention.py --threads 1 2 --dtypes bf16 fp32

All providers run in one process and take turns, so that a slow moment of the machine hits all of them. Each row is
checked against fp64 before it is timed. Medians; the spread is (third - first quartile) / median of ours. Writes
results/cpu_attention.csv, with `--decode` results/cpu_decode.csv.

On a machine that others use, `--cpu-time` counts the processor time of one thread in place of the wall clock.
"""

from __future__ import annotations

import argparse
import csv
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from providers import PROVIDERS
from rich.console import Console
from rich.table import Table
from shapes import DECODE, TRAINING, Shape
from torch import Tensor

import peftkern
from peftkern import reference

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
RESULTS = Path(__file__).parent / "results"
COLUMNS = (
    "shape", "model", "dtype", "threads", "direction", "peftkern_ms", "peft_ms", "no_prefix_ms", "spread",
    "gflops", "matmul_gflops", "speedup_over_peft", "speedup_over_no_prefix", "error", "error_peft",
)  # fmt: skip


def make_inputs(shape: Shape, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v as a model has them ([B, S, H, D] in memory), and an fp32 prefix."""
    g = torch.Generator().manual_seed(0)
    sizes = [(shape.B, shape.S, shape.Hq), (shape.B, shape.T, shape.Hkv), (shape.B, shape.T, shape.Hkv)]
    qkv = [torch.randn(*size, shape.D, generator=g).to(dtype).transpose(1, 2) for size in sizes]
    return qkv + [torch.randn(shape.Hkv, shape.P, shape.D, generator=g).to(dtype) for _ in range(2)]


clock = time.perf_counter


def take_turns(calls: dict[str, Callable[[], object]], seconds: float, at_least: int = 7) -> dict[str, list[float]]:
    """Seconds per call, the calls alternating until ``seconds`` have passed."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < at_least:
        for name, call in calls.items():
            start = clock()
            call()
            times[name].append(clock() - start)
    return times


def relative_errors(shape: Shape, inputs: list[Tensor]) -> tuple[float, float]:
    """Of out, ours and PEFT's, by the Frobenius norm against fp64 on a few samples and heads."""
    samples, group = min(shape.B, 2), shape.Hq // shape.Hkv
    q, k, v = (x[:samples] for x in inputs[:3])
    prefix_k, prefix_v = inputs[3:]
    doubles = (q[:, :group].double(), *(x[:, :1].double() for x in (k, v)), *(x[:1].double() for x in inputs[3:]))
    true, _ = reference.prefix_attention(*doubles)
    errors = []
    for name in ("peftkern", "PEFT"):
        out = PROVIDERS[name](q, k, v, prefix_k, prefix_v)[:, :group].double()
        errors.append(((out - true).norm() / true.norm()).item())
    return errors[0], errors[1]


def backward_calls(inputs: list[Tensor]) -> dict[str, Callable[[], object]]:
    """A backward pass per provider, for q, k, v and the prefix, of a graph that is kept."""
    calls = {}
    dout = torch.randn_like(inputs[0])
    for name, provider in PROVIDERS.items():
        leaves = [x.detach().requires_grad_() for x in inputs]
        wanted = leaves[:3] if name == "no prefix" else leaves
        out = provider(*leaves)
        calls[name] = lambda out=out, wanted=wanted: torch.autograd.grad(out, wanted, dout, retain_graph=True)
    return calls


def matmul_gflops(dtype: torch.dtype, n: int = 2048) -> float:
    """torch.matmul's rate, the yardstick of the rates below."""
    a, b = (torch.randn(n, n).to(dtype) for _ in range(2))
    times = take_turns({"matmul": lambda: a @ b}, 0.5)["matmul"]
    return 2 * n**3 / statistics.median(times) / 1e9


def measure(
    shape: Shape, dtype_name: str, threads: int, directions: list[str], seconds: float, matmul: float
) -> list:
    """One row of the table per direction."""
    dtype = DTYPES[dtype_name]
    inputs = make_inputs(shape, dtype)
    error, error_peft = relative_errors(shape, inputs)
    assert error <= 2 * error_peft + torch.finfo(dtype).eps, f"{shape}: error {error:.1e}, PEFT's {error_peft:.1e}"
    rows = []
    for direction in directions:
        if direction == "forward":
            with torch.no_grad():
                calls = {name: lambda p=p: p(*inputs) for name, p in PROVIDERS.items()}
                times = take_turns(calls, seconds)
        else:
            times = take_turns(backward_calls(inputs), seconds)
        ours, peft, bare = (statistics.median(times[name]) for name in ("peftkern", "PEFT", "no prefix"))
        quartiles = statistics.quantiles(times["peftkern"], n=4)
        rows.append(
            (str(shape), shape.model, dtype_name, threads, direction, ours * 1e3, peft * 1e3, bare * 1e3,
             (quartiles[2] - quartiles[0]) / ours, shape.flops(direction) / ours / 1e9, matmul, peft / ours,
             bare / ours, error, error_peft)
        )  # fmt: skip
    return rows


def show(rows: list[tuple], console: Console) -> None:
    """The table, and the figures that summarise it."""
    table = Table(title="prefix attention on the CPU", caption=f"{platform.processor()} torch {torch.__version__}")
    for name in ("B,Hq,Hkv,S,D,P", "dtype", "thr", "direction", "ours ms", "PEFT ms", "no prefix ms", "spread",
                 "GFLOP/s", "of matmul", "x PEFT", "x no prefix", "error", "PEFT's"):  # fmt: skip
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        shape, _, dtype, threads, direction, ours, peft, bare, spread, rate, matmul, x, y, error, error_peft = row
        table.add_row(
            shape, dtype, str(threads), direction[:3], f"{ours:.2f}", f"{peft:.2f}", f"{bare:.2f}", f"{spread:.0%}",
            f"{rate:.0f}", f"{rate / matmul:.2f}", f"{x:.2f}", f"{y:.2f}", f"{error:.1e}", f"{error_peft:.1e}",
        )  # fmt: skip
    console.print(table)
    for key in sorted({(row[2], row[3], row[4]) for row in rows}):
        speedups = [row[11] for row in rows if (row[2], row[3], row[4]) == key]
        mean = math.exp(statistics.fmean(map(math.log, speedups)))
        console.print(f"{' '.join(map(str, key))}: over PEFT geometric mean {mean:.2f}, worst {min(speedups):.2f}")


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    parser.add_argument("--directions", nargs="+", choices=["forward", "backward"], default=["forward", "backward"])
    parser.add_argument("--decode", action="store_true", help="decode shapes, forward only")
    parser.add_argument("--only", type=int, nargs="+", help="indices of the shapes to run")
    parser.add_argument("--seconds", type=float, default=1.0, help="per row")
    parser.add_argument("--cpu-time", action="store_true", help="processor time, of one thread")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.cpu_time:
        global clock
        clock, options.threads = time.process_time, [1]
    print(f"peftkern {peftkern.__version__}, torch {torch.__version__}")
    shapes, directions = (DECODE, ["forward"]) if options.decode else (TRAINING, options.directions)
    rows = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for dtype in options.dtypes:
            matmul = matmul_gflops(DTYPES[dtype])
            for index, shape in enumerate(shapes):
                if options.only is None or index in options.only:
                    rows += measure(shape, dtype, threads, directions, options.seconds, matmul)
    show(rows, Console(width=180))
    output = options.output or RESULTS / ("cpu_decode.csv" if options.decode else "cpu_attention.csv")
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(output, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows([f"{x:.5g}" if isinstance(x, float) else x for x in row] for row in rows)


if __name__ == "__main__":
    main()
