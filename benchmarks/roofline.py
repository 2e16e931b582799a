# SPDX-License-Identifier: Apache-2.0
"""How close the CPU attention comes to what the processor can do, per instruction set.

    python -m benchmarks.roofline                   writes results/roofline.csv
    python -m benchmarks.roofline --isas avx512 --dtypes fp32 --threads 1 --plot

`peak` is a loop of the multiply-adds that the kernels use, in registers (peak.cpp): mulps and addps or FMA in fp32,
vdpbf16ps and tdpbf16ps in bf16 where the instruction set has them. `read` and `copy` are the bandwidths of memory; a
copy counts what it reads and what it writes. Peak, bandwidth, forward and backward take turns in one process, round
by round. A share is the median over the rounds of the kernel's operations per second divided by the peak's of the
same round, with the 95% interval of that median.

Operations are those of the matrix products over visible (query, key) pairs only, 2 per multiply-add: 4 D per pair
forward (q k and p v), 10 D backward (q k, dout v, dq, dk, dv). A causal query sees the prefix and the keys up to its
own. Masking, the softmax and the packing of keys are the kernels' expense. Bytes count each input and each output
once. `intensity` is operations per byte, and `roof` the lesser of peak and intensity times the read bandwidth.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from peftkern import native
from peftkern.tools.bench.attention import key_columns
from peftkern.tools.bench.measuring import stamp
from peftkern.tools.bench.providers import DTYPES, Problem
from peftkern.tools.bench.shapes import Shape

from .alternation import alternate, interval, interval_text
from .common import Row, output_of, progress, show, write
from .native_calls import FUNCTIONS, Library, pack
from .peak import Peak, compile_peak, kind_of

#: Long enough that multiply-adds outweigh everything else: 8 query heads, 2 key heads.
SHAPES = tuple(Shape(1, 8, 2, S, D, 64, model="8/2 heads") for D in (64, 128) for S in (1024, 2048))
QUICK = (Shape(1, 2, 1, 40, 16, 8, model="quick"),)
PEAK_SECONDS = 0.02  # of one measurement of the peak


def has_own_kernels(isa: str, dtype: str) -> bool:
    """Whether the instruction set has kernels of its own for a dtype; those for bf16 have others' in fp32."""
    return dtype == "bf16" or not isa.endswith("_bf16")


def steps_for(peak: Peak, kind: str, threads: int, seconds: float) -> int:
    """Steps of the peak's loop that take about ``seconds``."""
    steps = 1000
    while True:
        start = time.perf_counter()
        peak.run(kind, steps, threads)
        took = time.perf_counter() - start
        if took >= seconds / 4 or steps >= 1 << 40:
            return max(1, int(steps * seconds / took))
        steps *= 4


def measure(peak: Peak, dtype: str, threads: int, shape: Shape, options: argparse.Namespace) -> list[Row]:
    """A row per direction."""
    isa, kind, library = peak.isa, kind_of(peak.isa, dtype), options.library
    problem = Problem.make(shape, DTYPES[dtype])
    packed = pack(problem, isa, threads)
    steps = steps_for(peak, kind, threads, options.peak_seconds)
    floats = max(1, int(options.megabytes * 1e6 / 4))
    source, target = torch.ones(floats), torch.zeros(floats)
    calls: dict[str, Callable[[], object]] = {
        "peak": lambda: peak.run(kind, steps, threads),
        "read": lambda: peak.read(source, threads),
        "copy": lambda: peak.copy(target, source, threads),
    }
    calls |= {name: functools.partial(library.run, name, packed.structs[name]) for name in FUNCTIONS}
    times = alternate(calls, options.seconds, options.at_least)
    work = {"peak": peak.operations(kind) * steps * threads, "read": 4 * floats, "copy": 8 * floats}
    rates = {name: statistics.median(work[name] / x / 1e9 for x in times[name]) for name in work}
    itemsize = problem.inputs[0].element_size()
    rows: list[Row] = []
    for direction in FUNCTIONS:
        operations, moved = shape.flops(direction), shape.bytes(direction, itemsize)
        shares = [
            operations / mine * best / work["peak"]
            for mine, best in zip(times[direction], times["peak"], strict=True)
        ]
        low, high = interval(shares)
        intensity, seconds = operations / moved, statistics.median(times[direction])
        rows.append(
            {"isa": isa, "instruction": peak.instruction(kind), "dtype": dtype, "threads": threads}
            | key_columns(shape) | {"direction": direction, "gflop": operations / 1e9, "mb": moved / 1e6,
            "intensity": intensity, "ms": seconds * 1e3, "gflop_s": operations / seconds / 1e9,
            "peak_gflop_s": rates["peak"], "peak_spread": spread(times["peak"]),
            "read_gb_s": rates["read"], "read_spread": spread(times["read"]),
            "copy_gb_s": rates["copy"], "copy_spread": spread(times["copy"]),
            "roof_gflop_s": min(rates["peak"], intensity * rates["read"]),
            "share": statistics.median(shares), "low": low, "high": high, "rounds": len(shares)} | stamp()
        )  # fmt: skip
    return rows


def spread(values: list[float]) -> float:
    """(third - first quartile) / median."""
    first, median, third = statistics.quantiles(values, n=4)
    return (third - first) / median


def show_rows(rows: list[Row]) -> None:
    """Print a line per kernel call."""

    def line(r: Row) -> list[str]:
        bandwidth = [f"{r[f'{name}_gb_s']:.1f} ±{r[f'{name}_spread']:.0%}" for name in ("read", "copy")]
        cells = [r["isa"], r["instruction"], r["dtype"], str(r["threads"])]
        cells += [f"{r['peak_gflop_s']:.1f} ±{r['peak_spread']:.0%}", *bandwidth]
        cells += [f"S={r['S']} D={r['D']} P={r['P']}", r["direction"], f"{r['gflop']:.3g}", f"{r['intensity']:.0f}"]
        cells += [f"{r['ms']:.2f}", f"{r['gflop_s']:.1f}", f"{r['gflop_s'] / r['roof_gflop_s']:.0%}"]
        return [*cells, f"{r['share']:.1%}", interval_text(r["low"], r["high"], ".1%")]

    names = (
        "isa",
        "peak of",
        "dtype",
        "thr",
        "peak GFLOP/s",
        "read GB/s",
        "copy GB/s",
        "shape",
        "direction",
        "GFLOP",
    )
    names += ("FLOP/byte", "ms", "GFLOP/s", "of roof", "of peak", "95%")
    show("CPU attention and what the processor can do", names, map(line, rows))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--isas", nargs="+", choices=native.cpu.available_isas(), help="default all that this processor has")
    add("--dtypes", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"], help="default %(default)s")
    add("--threads", type=int, nargs="+", default=[1, 2], help="default %(default)s")
    add("--seconds", type=float, default=4.0, help="time per shape (default %(default)s)")
    add("--at-least", type=int, default=9, help="rounds per shape, even if they take longer (default %(default)s)")
    add("--megabytes", type=float, default=256.0, help="what is read and copied; several times the caches")
    add("--library", type=Path, default=native.cpu._PATH, help="another build of the CPU library")
    add("--output", type=Path, help="CSV file; default results/roofline.csv, with --quick none")
    add("--plot", action="store_true", help="draw the CSV file, as SVG beside it; needs matplotlib")
    add("--quick", action="store_true", help="tiny sizes, to see that it runs")
    options = parser.parse_args(arguments)
    options.peak_seconds = PEAK_SECONDS
    if options.quick:
        options.seconds, options.at_least, options.megabytes, options.peak_seconds = 0.0, 2, 0.1, 1e-4
    try:
        options.library = Library(options.library)
    except ValueError as error:
        parser.error(f"--library: {error}")
    options.isas = options.isas or list(options.library.isas)
    options.output = output_of(options, "roofline.csv")
    if options.plot and (options.output is None or importlib.util.find_spec("matplotlib") is None):
        parser.error("--plot: expected matplotlib and a CSV file to draw, which --output names with --quick")
    return options


def main(arguments: list[str] | None = None) -> list[Row]:
    """Compile, measure, print, write, return the rows.

    Raises:
        SystemExit: if the peaks do not compile, with the reason.
    """
    options = parse(arguments)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            peaks = {isa: compile_peak(isa, Path(folder)) for isa in options.isas}
        except RuntimeError as error:
            raise SystemExit(f"roofline: {error}") from error
        tasks = [
            (f"{isa}, {dtype}, threads={threads}, S={shape.S} D={shape.D}",
             functools.partial(measure, peaks[isa], dtype, threads, shape, options))
            for isa, dtype, threads, shape in itertools.product(
                options.isas, options.dtypes, options.threads, QUICK if options.quick else SHAPES)
            if has_own_kernels(isa, dtype)
        ]  # fmt: skip
        try:
            for row in progress(tasks):
                rows.append(row)
                if options.output:
                    write(rows, options.output)
        except KeyboardInterrupt:
            print("stopped; the rows that were measured are kept", file=sys.stderr)
    if rows:
        show_rows(rows)
    if options.plot:
        from . import plot

        plot.main([str(options.output)])
    return rows


if __name__ == "__main__":
    main()
