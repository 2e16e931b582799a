# SPDX-License-Identifier: Apache-2.0
"""Print the modelled time of every plan for some calls on a GPU that need not be here.

    python -m benchmarks.plan_table
    python -m benchmarks.plan_table --arch sm_80 --shapes 4x2048x128 --forward

A plan is a backend or a pair of an attention kernel of torch and prefix kernels. A shape is BxSxP; the heads are
those of a layer of Llama-8B (32 query heads, 8 key heads, head dim 128), in bf16. All times are modelled
(peftkern/backends/cost/model.py), not measured.
"""

from __future__ import annotations

import argparse

import torch

from peftkern.arguments import Call
from peftkern.backends import registry
from peftkern.backends.cost.model import RATES, Estimate, Machine
from peftkern.backends.torch_attention import KERNELS

from .common import show

SHAPES = ("4x2048x128", "8x4096x128", "4x512x128", "4x2048x16", "4x2048x512", "1x8192x128:packed", "1x8192x20:prompt")
#: What follows a shape, and the features that it stands for.
KINDS = {"": (), "packed": ("cu_seqlens",), "prompt": ("cu_seqlens", "bank"), "masked": ("key_mask",)}


def call_of(text: str, training: bool) -> Call:
    """The call that a shape describes."""
    sizes, _, kind = text.partition(":")
    try:
        batch, length, prefix = map(int, sizes.split("x"))
        features = KINDS[kind]
    except (ValueError, KeyError):
        kinds = ", ".join(name for name in KINDS if name)
        raise argparse.ArgumentTypeError(f"expected BxSxP or BxSxP:KIND with one of {kinds}, got {text!r}") from None
    bank = (1, 8, prefix, 128) if "bank" in features else (8, prefix, 128)
    return Call(
        "prefix_attention", torch.device("cuda"), torch.bfloat16, torch.bfloat16, (batch, 32, length, 128),
        (batch, 8, length, 128), bank, features, training,
    )  # fmt: skip


def times(call: Call, arch: str, flash: str | None = None) -> dict[str, Estimate]:
    """The modelled time of each plan with known rates, fastest first."""
    machine = Machine(arch, tuple(kernel.name for kernel in KERNELS), flash=flash)
    return {plan: time for plan, time in registry.rank(call, machine).items() if time is not None}


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="sm_90", choices=RATES["gpu"])
    parser.add_argument(
        "--shapes", nargs="+", default=SHAPES, metavar="BxSxP[:KIND]", help=f"KIND: {', '.join(KINDS)}"
    )
    parser.add_argument("--forward", action="store_true", help="forward only, as in evaluation")
    parser.add_argument("--flash", choices=("FA3", "FA4"), help="the FlashAttention registered in torch's place")
    options = parser.parse_args(arguments)
    try:
        calls = {shape: call_of(shape, not options.forward) for shape in options.shapes}
    except argparse.ArgumentTypeError as error:
        parser.error(f"--shapes: {error}")
    columns = {shape: times(call, options.arch, options.flash) for shape, call in calls.items()}
    plans = list(dict.fromkeys(plan for column in columns.values() for plan in column))
    direction = "forward" if options.forward else "forward and backward"
    show(f"modelled us on {options.arch}, {direction}; * is what 'auto' takes", ("plan", *columns), (
        [plan, *(_cell(plan, column) for column in columns.values())] for plan in plans
    ))  # fmt: skip


def _cell(plan: str, column: dict[str, Estimate]) -> str:
    time = column.get(plan)
    mark = "*" if plan == next(iter(column)) else ""
    return "-" if time is None else f"{time.seconds * 1e6:.0f}{mark}"


if __name__ == "__main__":
    main()
