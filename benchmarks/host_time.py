# SPDX-License-Identifier: Apache-2.0
"""Time what a call of `prefix_attention` costs the host, beside torch.cat and SDPA, and what its parts cost.

    python -m benchmarks.host_time
    PYTHONPATH=../other-checkout python benchmarks/host_time.py --no-parts  # of another version

B = S = 1 and a prefix of 8 tokens leave the kernels nothing to compute. The time is processor time of one thread; the
calls take turns, and each figure is the least of many short repeats, since other processes only ever add. A part is
timed alone in a loop, where the processor's caches hold nothing else: the parts add up to less than the whole.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin would count as the call's time

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import peftkern

HEADS, KV_HEADS, HEAD_DIM, PREFIX = 4, 2, 16, 8
#: The most that a call may take, in calls of torch.cat and SDPA.
BARS = {"forward": 1.5, "forward and backward": 1.2}
CALLS = 20  # per repeat: short enough that some repeats run undisturbed

Calls = dict[str, Callable[[], object]]


def inputs(grad: bool) -> list[Tensor]:
    """q [1, Hq, 1, D], k and v [1, Hkv, 1, D], prefix_k and prefix_v [Hkv, P, D] in fp32."""
    generator = torch.Generator().manual_seed(0)
    rows = [(1, heads, 1, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    shapes = [*rows, (KV_HEADS, PREFIX, HEAD_DIM), (KV_HEADS, PREFIX, HEAD_DIM)]
    return [torch.randn(shape, generator=generator).requires_grad_(grad) for shape in shapes]


def concatenated(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    """The same attention by torch.cat and SDPA."""
    keys, values = torch.cat([prefix_k[None], k], 2), torch.cat([prefix_v[None], v], 2)
    return torch.nn.functional.scaled_dot_product_attention(q, keys, values, enable_gqa=True)


def microseconds(calls: Calls, repeats: int) -> dict[str, list[float]]:
    """Per call the microseconds of every repeat; the calls take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.process_time_ns()
            for _ in range(CALLS):
                call()
            times[name].append((time.process_time_ns() - start) / CALLS / 1e3)
    return times


def whole_calls(direction: str) -> Calls:
    """Our call and torch.cat with SDPA."""
    given = inputs(direction != "forward")
    dout = torch.ones_like(given[0])

    def of(attention: Callable[..., Tensor]) -> Callable[[], object]:
        if direction == "forward":
            return lambda: attention(*given)
        return lambda: torch.autograd.grad(attention(*given), given, dout)

    return {"prefix_attention": of(peftkern.prefix_attention), "torch.cat and SDPA": of(concatenated)}


def part_calls() -> Calls:
    """The steps of a forward, and what the op takes behind torch's dispatcher."""
    from peftkern import dispatcher, functional, native, ops
    from peftkern.arguments import AttentionArgs, allocate_outputs
    from peftkern.backends import registry

    given = AttentionArgs(*inputs(False), *[None] * 11, True, None, True, None, 0.0)  # type: ignore[call-arg, arg-type]
    signature, (requested, state) = functional._signature(given), registry.choice("auto", True)
    args, _, _ = functional.prepare(given, None, "auto")
    out, lse = allocate_outputs(args)
    tensors, constants = (
        native.fill.attention_tensors(args, out, lse)[0],
        native.fill.attention_constants(args, out.stride()),
    )
    return {
        "arguments, key, look-up and checks": lambda: functional.prepare(given, None, "auto"),
        "  key": lambda: functional._signature(given),
        "  look-up": lambda: functional._prepared(signature, False, requested, state),
        "  requested backend and threads": lambda: registry.choice("auto", True),
        "whether to dispatch": lambda: dispatcher.is_needed(args.tensors),
        "allocation of out and lse": lambda: allocate_outputs(args),
        "addresses": lambda: native.fill.attention_tensors(args, out, lse),
        "C function": lambda: native.cpu._call("prefix_attention", tensors + constants),
        "not in a call: sizes, strides and options": lambda: native.fill.attention_constants(args, out.stride()),
        "not in a call: the op by torch's dispatcher": lambda: ops.prefix_attention(*args, "cpu"),
    }  # fmt: skip


def row(name: str, times: list[float]) -> list[str]:
    """Name, least and median."""
    return [name, f"{min(times):.2f}", f"{statistics.median(times):.2f}"]


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Measure, print, return the ratio per direction."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1500, help="repeats of 20 calls (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, which show the spread (default %(default)s)")
    parser.add_argument("--no-parts", action="store_true", help="public calls only: for older checkouts")
    options = parser.parse_args(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    table = Table("microseconds of host time", "least", "median", title=f"torch {torch.__version__}")
    ratios = {}
    for direction, bar in BARS.items():
        found = []
        for _ in range(options.rounds):
            times = microseconds(whole_calls(direction), options.repeats)
            for name, values in times.items():
                table.add_row(*row(f"{direction}: {name}", values))
            ours, theirs = (min(values) for values in times.values())
            found.append(ours / theirs)
        ratios[direction] = statistics.median(found)
        table.add_row(f"  ratios {', '.join(f'{x:.2f}' for x in found)}: bar {bar}", "", "", end_section=True)
    if not options.no_parts:
        for name, values in microseconds(part_calls(), options.repeats).items():
            table.add_row(*row(name, values))
    torch.set_num_threads(threads)
    Console(width=100).print(table)
    return ratios


if __name__ == "__main__":
    main()
