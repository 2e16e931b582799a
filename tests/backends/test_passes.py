# SPDX-License-Identifier: Apache-2.0
"""The launches, operations and bytes by which plans are priced, as a table: a change of the model shows in its rows.

``python -m tests.backends.test_passes`` writes the table anew.
"""

from __future__ import annotations

import csv
from pathlib import Path

import torch

from peftkern.backends import registry
from peftkern.backends.cost.model import Machine

from .test_cost import ALL_KERNELS, _call

TABLE = Path(__file__).with_name("passes.csv")
CALLS = {
    "training": _call(queries=512, prefix=200),
    "cached": _call(batch=2, queries=33, keys=97, needs_grad=False, dim=64),
    "sinks": _call(queries=100, features=("sinks",), prefix=40),
    "cpu": _call(batch=1, heads=8, kv_heads=2, queries=65, device="cpu", dtype=torch.float32),
}


def rows() -> list[list[str]]:
    """call, plan, and the sums of kernels, flops, bytes and setup over the plan's passes."""
    machine, found = Machine("sm_90", ALL_KERNELS), []
    for name, call in CALLS.items():
        for plan, passes in registry.costs(call, machine).items():
            if passes is not None:
                sums = [sum(getattr(x, field) for x in passes) for field in ("kernels", "flops", "bytes", "setup")]
                found.append([name, plan, *(f"{x:.12g}" for x in sums)])
    return found


def test_the_passes_are_those_of_the_table():
    with TABLE.open() as file:
        expected = list(csv.reader(file))[1:]
    got = rows()
    changed = [f"{row}, expected {was}" for row, was in zip(got, expected, strict=False) if row != was]
    assert got == expected, f"if this is meant, run python -m {__spec__.name}: {changed[:5]}"


if __name__ == "__main__":
    with TABLE.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(
            [["call", "plan", "kernels", "flops", "bytes", "setup"], *rows()]
        )
