# SPDX-License-Identifier: Apache-2.0
"""Attention kernels on the CPU: this package, PEFT's way, and torch's attention without a prefix.

    python benchmarks/cpu_attention.py                 training shapes, bf16 and fp32, one thread and all
    python benchmarks/cpu_attention.py --decode        a few queries against many keys

The providers run in one process and take turns, so that a slow moment of the machine hits all of them. Each row is
checked before it is timed: out, or every gradient, against fp64; ours may err twice (gradients: three times) as much
as PEFT's way. Medians; a spread is (third - first quartile) / median. `no prefix` computes less than the others and
is a yardstick. Writes results/cpu_attention.csv or results/cpu_decode.csv, and says how the figures stand to the bars
that the project has set itself (`python benchmarks/report.py` says it again, `python benchmarks/plot.py` draws it).

On a machine that others use, `--cpu-time` counts the processor time of one thread in place of the wall clock.
"""

from __future__ import annotations

import argparse
import functools
import gc
import time
from collections.abc import Callable

import report
import torch

from peftkern.tools.bench.checks import Truth
from peftkern.tools.bench.measuring import stamp, take_turns
from peftkern.tools.bench.providers import DTYPES, PROVIDERS, Calls, Problem, prepare
from peftkern.tools.bench.shapes import DECODE, DIRECTIONS, QUICK, QUICK_DECODE, TRAINING, Shape
from peftkern.tools.bench.show import add_options, progress, show, write

KEYS = {"peftkern": "peftkern", "peft": "peft", "no-prefix": "no_prefix"}  # a provider's name in columns


def calls_of(problem: Problem) -> dict[str, Calls]:
    """Of each provider."""
    calls = {}
    for name in KEYS:
        prepared = prepare(name, problem)
        assert isinstance(prepared, Calls), f"{problem.shape}: {name}: {prepared}"
        calls[name] = prepared
    return calls


def check(truth: Truth, calls: dict[str, Calls], backward: bool) -> tuple[float, float]:
    """Errors of out, or of the worst gradient, ours and PEFT's: of every provider it is checked that it is right.

    Raises:
        AssertionError: if one is much larger than PEFT's.
    """
    for name in KEYS:
        verdict = truth.judge(calls[name], backward, PROVIDERS[name].uses_prefix)
        assert not verdict.wrong, f"{truth.problem.shape}: {name}: {verdict.wrong}"
    verdict = truth.judge(calls["peftkern"], backward)
    return verdict.error, verdict.baseline


def matmul_gflops(dtype: torch.dtype, size: int, seconds: float, clock: Callable[[], float]) -> float:
    """torch.matmul's rate, the yardstick of the rates below."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    return 2 * size**3 / take_turns({"matmul": lambda: a @ b}, seconds, clock=clock)["matmul"].median / 1e9


def measure(
    shape: Shape,
    dtype: str,
    threads: int,
    directions: list[str],
    seconds: float,
    matmul: dict[tuple[str, int], float],
    clock: Callable[[], float],
) -> list[dict[str, object]]:
    """A row per direction; ``matmul`` holds the yardstick by (dtype, threads)."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    problem = Problem.make(shape, DTYPES[dtype])
    calls = calls_of(problem)
    errors = functools.cache(
        functools.partial(check, Truth(problem), calls)
    )  # the same for both directions with a backward
    rows = []
    for direction in directions:
        error, error_peft = errors(direction != "forward")
        times = take_turns({name: c.of(direction) for name, c in calls.items()}, seconds, clock=clock)
        ours, rate = times["peftkern"].median, matmul[dtype, threads]
        gflops = shape.flops(direction) / ours / 1e9
        row = {"shape": str(shape), "model": shape.model, "dtype": dtype, "threads": threads, "direction": direction}
        for provider, key in KEYS.items():
            row |= {f"{key}_ms": times[provider].median * 1e3, f"{key}_spread": times[provider].spread}
        row |= {
            "gflops": gflops, "matmul_gflops": rate, "over_matmul": gflops / rate,
            "speedup_over_peft": times["peft"].median / ours,
            "speedup_over_no_prefix": times["no-prefix"].median / ours, "error": error, "error_peft": error_peft,
        }  # fmt: skip
        rows.append(row | {"S": shape.S, "P": shape.P} | stamp())
        gc.collect()
    return rows


def show_rows(rows: list[dict]) -> None:
    columns = ("B,Hq,Hkv,S,D,P", "dtype", "thr", "direction", "ours ms", "PEFT ms", "no prefix ms", "GFLOP/s",
               "of matmul", "x PEFT", "x no prefix", "error", "PEFT's")  # fmt: skip

    def line(r: dict) -> list[str]:
        timings = [f"{r[f'{key}_ms']:.2f} ±{r[f'{key}_spread']:.0%}" for key in KEYS.values()]
        return [
            r["shape"], r["dtype"], str(r["threads"]), r["direction"], *timings, f"{r['gflops']:.0f}",
            f"{r['over_matmul']:.2f}", f"{r['speedup_over_peft']:.2f}", f"{r['speedup_over_no_prefix']:.2f}",
            f"{r['error']:.1e}", f"{r['error_peft']:.1e}",
        ]  # fmt: skip

    show("prefix attention on the CPU, medians ± spreads", columns, map(line, rows))


def main(arguments: list[str] | None = None) -> None:
    """Check, measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, seconds=1.0)
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS))
    parser.add_argument("--decode", action="store_true", help="decode shapes, forward only")
    parser.add_argument("--only", type=int, nargs="+", help="indices of the shapes to run")
    parser.add_argument("--cpu-time", action="store_true", help="processor time, of one thread")
    options = parser.parse_args(arguments)
    clock = time.process_time if options.cpu_time else time.perf_counter
    threads, dtypes = [1] if options.cpu_time else options.threads, options.dtypes or ["bf16", "fp32"]
    directions = ["forward"] if options.decode else options.directions
    shapes: tuple[Shape, ...] = DECODE if options.decode else TRAINING
    name, seconds, size = "cpu_decode.csv" if options.decode else "cpu_attention.csv", options.seconds, 2048
    if options.quick:
        shapes, seconds, size = QUICK_DECODE if options.decode else QUICK, 0.0, 128

    matmul: dict[tuple[str, int], float] = {}

    def yardstick(dtype: str, count: int) -> list:
        torch.set_num_threads(count)
        matmul[dtype, count] = matmul_gflops(DTYPES[dtype], size, min(seconds, 1.0), clock)
        return []

    tasks: list[tuple[str, Callable[[], list]]] = []
    for count in threads:
        for dtype in dtypes:
            about = f"{dtype}, threads={count}"
            tasks.append((f"torch.matmul {size}^3, {about}", functools.partial(yardstick, dtype, count)))
            tasks += [
                (f"{shape}, {about}",
                 functools.partial(measure, shape, dtype, count, directions, seconds, matmul, clock))
                for index, shape in enumerate(shapes) if options.only is None or index in options.only
            ]  # fmt: skip
    rows = list(progress(tasks))
    show_rows(rows)
    output = options.output or (None if options.quick else report.RESULTS / name)
    if output:
        write(rows, output)
        if not options.decode:
            report.show(attention=output)


if __name__ == "__main__":
    main()
