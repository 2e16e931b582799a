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
from measuring import DTYPES, add_options, progress, show, stamp, take_turns, write
from providers import PROVIDERS
from shapes import DECODE, QUICK, QUICK_DECODE, TRAINING, Shape
from torch import Tensor

from peftkern import reference

DIRECTIONS = ("forward", "backward", "forward+backward")
KEYS = {"peftkern": "peftkern", "PEFT": "peft", "no prefix": "no_prefix"}  # a provider's name in columns
GRADIENTS = ("dq", "dk", "dv", "dprefix_k", "dprefix_v")


def make_inputs(shape: Shape, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v as a model has them ([B, S, H, D] in memory), and a prefix."""
    g = torch.Generator().manual_seed(0)
    sizes = [(shape.B, shape.S, shape.Hq), (shape.B, shape.T, shape.Hkv), (shape.B, shape.T, shape.Hkv)]
    qkv = [torch.randn(*size, shape.D, generator=g).to(dtype).transpose(1, 2) for size in sizes]
    return qkv + [torch.randn(shape.Hkv, shape.P, shape.D, generator=g).to(dtype) for _ in range(2)]


def _first_group(x: Tensor, heads: int) -> Tensor:
    """What belongs to the first kv head: ``heads`` heads of a [B, H, ...] tensor, one of a prefix [H, P, D]."""
    return x[:, :heads] if x.dim() == 4 else x[:1]


def _outputs(attention: Callable, inputs: list[Tensor], dout: Tensor | None) -> list[Tensor]:
    """[out], or the five gradients."""
    if dout is None:
        with torch.no_grad():
            return [attention(*inputs)]
    leaves = [x.detach().requires_grad_() for x in inputs]
    return list(torch.autograd.grad(attention(*leaves), leaves, dout))


def check(shape: Shape, inputs: list[Tensor], with_gradients: bool) -> tuple[float, float]:
    """Errors of out, or of the worst gradient, ours and PEFT's: Frobenius norms against fp64, on the first kv head.

    Raises:
        AssertionError: if ours is much the larger one.
    """
    group, dtype = shape.Hq // shape.Hkv, inputs[0].dtype
    dout = torch.randn(inputs[0].shape).to(dtype) if with_gradients else None
    heads = (group, 1, 1, 1, 1)
    doubles = [_first_group(x, n).double() for x, n in zip(inputs, heads, strict=True)]
    true = _outputs(
        lambda *x: reference.prefix_attention(*x)[0], doubles, None if dout is None else dout[:, :group].double()
    )
    names, heads = (("out",), (group,)) if dout is None else (GRADIENTS, heads)
    ours, peft = (
        [
            ((_first_group(x, n).double() - y).norm() / y.norm()).item()
            for x, y, n in zip(_outputs(PROVIDERS[provider], inputs, dout), true, heads, strict=True)
        ]
        for provider in ("peftkern", "PEFT")
    )
    factor, floor = 2 if dout is None else 3, torch.finfo(dtype).eps
    for name, error, error_peft in zip(names, ours, peft, strict=True):
        assert error <= factor * error_peft + floor, f"{shape}: {name} errs by {error:.1e}, PEFT by {error_peft:.1e}"
    return max(ours), max(peft)


def calls_of(inputs: list[Tensor], direction: str) -> dict[str, Callable[[], object]]:
    """A call per provider. Gradients are those of q, k, v and the prefix; ``backward`` is of a graph that is kept."""
    if direction == "forward":
        return {name: functools.partial(provider, *inputs) for name, provider in PROVIDERS.items()}
    calls: dict[str, Callable[[], object]] = {}
    dout = torch.randn_like(inputs[0])
    for name, provider in PROVIDERS.items():
        leaves = [x.detach().requires_grad_() for x in inputs]
        wanted = leaves[:3] if name == "no prefix" else leaves
        if direction == "backward":
            out = provider(*leaves)
            calls[name] = functools.partial(torch.autograd.grad, out, wanted, dout, retain_graph=True)
        else:
            calls[name] = lambda p=provider, x=leaves, w=wanted: torch.autograd.grad(p(*x), w, dout)
    return calls


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
    inputs = make_inputs(shape, DTYPES[dtype])
    errors = functools.cache(functools.partial(check, shape, inputs))  # the same for both directions with a backward
    rows = []
    for direction in directions:
        error, error_peft = errors(direction != "forward")
        with torch.set_grad_enabled(direction != "forward"):
            times = take_turns(calls_of(inputs, direction), seconds, clock=clock)
        ours, rate = times["peftkern"].median, matmul[dtype, threads]
        gflops = shape.flops(direction) / ours / 1e9
        row = {"shape": str(shape), "model": shape.model, "dtype": dtype, "threads": threads, "direction": direction}
        for provider, key in KEYS.items():
            row |= {f"{key}_ms": times[provider].median * 1e3, f"{key}_spread": times[provider].spread}
        row |= {
            "gflops": gflops, "matmul_gflops": rate, "over_matmul": gflops / rate,
            "speedup_over_peft": times["PEFT"].median / ours,
            "speedup_over_no_prefix": times["no prefix"].median / ours, "error": error, "error_peft": error_peft,
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
