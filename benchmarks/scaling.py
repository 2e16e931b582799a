# SPDX-License-Identifier: Apache-2.0
"""Times and memory of attention as the batch B, the sequence S, the prefix P or a bank of A prefixes grows.

    python -m benchmarks.scaling                     on the CPU, writes results/scaling_cpu.csv
    python -m benchmarks.scaling --device cuda

One size grows; the others stay at the base (smollm2-135m's heads, B = 4, S = 256, P = 64). peftkern and PEFT's way
take turns, forward and backward separately. Each line is a least-squares fit of relative errors:

    B, P, A   ms = fixed + slope x         turns at x = fixed / slope, where the growing part is half of the cost
    S         ms = fixed S + slope S^2     turns at S = fixed / slope, where attention becomes quadratic

`prefix_mb` is what forward saves for backward with the prefix minus without it. It does not grow with B in peftkern
and does in PEFT's way. At `wall` it alone fills 80 GB over 32 layers (empty: never).
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import peftkern
from peftkern.tools.bench.measuring import clock_for, stamp, take_turns
from peftkern.tools.bench.memory import saved_bytes
from peftkern.tools.bench.providers import DTYPES, PROVIDERS, Calls, Problem, prepare
from peftkern.tools.bench.shapes import Shape

from .common import RESULTS, progress, show, write

BASE = Shape(4, 9, 3, 256, 64, 64, model="smollm2-135m")
AXES = {
    "B": (1, 2, 4, 8, 16), "S": (128, 256, 512, 1024, 2048), "P": (0, 16, 64, 256, 1024, 4096),
    "A": (1, 2, 4, 16, 64),
}  # fmt: skip
QUICK_BASE = Shape(2, 4, 2, 24, 16, 8, model="quick")
QUICK = {"B": (1, 2, 4), "S": (8, 16, 32), "P": (0, 8, 32), "A": (1, 2, 4)}
DIRECTIONS = ("forward", "backward")
MEMORY, LAYERS = 80e9, 32


def fit(axis: str, x: np.ndarray, ms: np.ndarray) -> tuple[float, float, float]:
    """(fixed, slope, largest relative residual) of the line for ``axis``."""
    columns = np.stack([x, x**2] if axis == "S" else [np.ones_like(x), x], 1)
    solution = np.linalg.lstsq(columns / ms[:, None], np.ones_like(ms), rcond=None)[0]
    residual = np.abs(columns @ solution / ms - 1).max()
    return float(solution[0]), float(solution[1]), float(residual)


def _bank(problem: Problem, size: int) -> tuple[Problem, Callable[..., Any]]:
    """The problem with ``size`` prefixes, which its samples use in turn, and its attention."""
    inputs = (*problem.inputs[:3], *(x.expand(size, -1, -1, -1).clone() for x in problem.inputs[3:]))
    ids = torch.arange(problem.shape.B, device=problem.device) % size
    return replace(problem, inputs=inputs), functools.partial(peftkern.prefix_attention, prefix_ids=ids)


def _saved(attention: Callable[..., Any], problem: Problem) -> int:
    leaves = [x.detach().requires_grad_() for x in problem.inputs]
    return saved_bytes(functools.partial(attention, *leaves), leaves)


def measure(
    axis: str, value: int, base: Shape, dtype: str, device: str, seconds: float, at_least: int
) -> list[dict[str, object]]:
    """A row per direction and provider at one size."""
    shape = base if axis == "A" else replace(base, **{axis: value})
    problem = Problem.make(shape, DTYPES[dtype], device)
    calls: dict[str, Calls] = {}
    kept: dict[str, float] = {}
    if axis == "A":
        banked, attention = _bank(problem, value)
        name = "peftkern"
        leaves = [x.detach().requires_grad_() for x in banked.inputs]
        out = attention(*leaves)

        def forward() -> Any:
            with torch.no_grad():
                return attention(*banked.inputs)

        def backward() -> Any:
            return torch.autograd.grad(out, leaves, problem.dout, retain_graph=True)

        calls[name] = Calls(forward, backward, None)
    else:
        bare = Problem.make(replace(shape, P=0), DTYPES[dtype], device)
        for name in ("peftkern", "peft"):
            prepared = prepare(name, problem)
            assert isinstance(prepared, Calls), prepared
            calls[name] = prepared
            with_it, without = (PROVIDERS[name].make(p) for p in (problem, bare))
            assert callable(with_it)
            assert callable(without)
            kept[name] = max(0, _saved(with_it, problem) - _saved(without, bare))
    rows = []
    for direction in DIRECTIONS:
        ready = {name: call.of(direction) for name, call in calls.items()}
        times = take_turns({n: c for n, c in ready.items() if c}, seconds, at_least, clock=clock_for(device))
        for name, time in times.items():
            row: dict[str, object] = {"axis": axis, "value": value, "provider": name, "direction": direction}
            row |= {"ms": time.median * 1e3, "spread": time.spread}
            row["prefix_mb"] = kept[name] / 1e6 if name in kept else None
            base_sizes = {key: getattr(base, key) for key in ("B", "S", "P", "Hq", "Hkv", "D")}
            rows.append(row | base_sizes | {"dtype": dtype, "threads": torch.get_num_threads()} | stamp(device))
    return rows


def fits(rows: pd.DataFrame) -> pd.DataFrame:
    """A row per axis, provider and direction: the fitted line, its turning point, and the memory wall."""
    found = []
    for (axis, provider, direction), part in rows.groupby(["axis", "provider", "direction"], sort=False):
        part = part.sort_values("value")
        x, ms, mb = (part[name].to_numpy(float) for name in ("value", "ms", "prefix_mb"))
        fixed, slope, residual = fit(axis, x, ms)
        growth = (mb[-1] - mb[0]) / (x[-1] - x[0])
        wall = x[0] + (MEMORY / LAYERS / 1e6 - mb[0]) / growth if growth > 0 else np.nan
        found.append({
            "axis": axis, "provider": provider, "direction": direction, "fixed": fixed, "slope": slope,
            "turns": fixed / slope if fixed > 0 and slope > 0 else np.nan, "residual": residual,
            "mb_first": mb[0], "mb_last": mb[-1], "wall": wall,
        })  # fmt: skip
    return pd.DataFrame(found)


def show_fits(table: pd.DataFrame) -> None:
    def number(x: float, form: str = "{:.3g}") -> str:
        return "-" if np.isnan(x) else form.format(x)

    show(
        "fitted lines in ms, and MB saved for the prefix at the smallest and the largest size",
        ("grows", "provider", "direction", "fixed", "slope", "turns at", "off by", "MB", "MB", "wall at"),
        ([r.axis, r.provider, r.direction, number(r.fixed), number(r.slope), number(r.turns, "{:.0f}"),
          f"{r.residual:.0%}", number(r.mb_first), number(r.mb_last), number(r.wall, "{:.0f}")]
         for r in table.itertuples()),
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Measure, fit, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="time per size and direction (default %(default)s)"
    )
    parser.add_argument("--output", type=Path, help="CSV file; default in benchmarks/results")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    options = parser.parse_args(arguments)
    base, axes = (QUICK_BASE, QUICK) if options.quick else (BASE, AXES)
    seconds, at_least = (0.0, 2) if options.quick else (options.seconds, 5)
    rows = pd.DataFrame(progress([
        (f"{axis} = {value}",
         functools.partial(measure, axis, value, base, options.dtype, options.device, seconds, at_least))
        for axis in options.axes for value in axes[axis]
    ]))  # fmt: skip
    rows["prefix_mb"] = rows["prefix_mb"].astype(float)
    show_fits(fits(rows))
    output = options.output or (None if options.quick else RESULTS / f"scaling_{options.device}.csv")
    if output:
        write(rows.to_dict("records"), output)


if __name__ == "__main__":
    main()
