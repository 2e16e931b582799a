# SPDX-License-Identifier: Apache-2.0
"""A table of every Triton kernel on every GPU, compiled without one: ``python -m tests.gpu_free.report --help``.

registers, spills, shared memory, instructions: of the machine code that the project's tile table leads to, static
counts over the whole kernel. warps: how many one multiprocessor holds at a time, from its limits. bytes: loads and
stores of one call, counted in Triton's interpreter with the tiles of the table, over the minimum, in which each input
is read and each output written once; what is above 1 is read again by another block of rows, from cache if it fits.
None of it was measured on a GPU.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from peftkern.backends.triton import tiles


class Device(NamedTuple):
    """What a multiprocessor (AMD: compute unit) has; registers of 32 bits per thread slot, memory in bytes."""

    warps: int
    blocks: int
    shared: int
    warp_size: int = 32
    registers: int = 65536
    register_step: int = 8  # per thread
    reserved: int = 1024  # shared memory that each block costs beside its own


DEVICES = {
    "sm_80": Device(64, 32, 167936), "sm_86": Device(48, 16, 102400), "sm_89": Device(48, 24, 102400),
    "sm_90": Device(64, 32, 233472), "sm_100": Device(64, 32, 233472), "sm_120": Device(48, 24, 102400),
    "gfx942": Device(32, 32, 65536, 64, 131072, 8, 0), "gfx950": Device(32, 32, 163840, 64, 131072, 8, 0),
}  # fmt: skip


def resident_warps(arch: str, registers: int, shared: int, num_warps: int) -> int:
    """Warps (AMD: wavefronts) of one kernel that a multiprocessor holds.

    >>> resident_warps("sm_80", 184, 32768, 8), resident_warps("sm_80", 128, 32768, 8)
    (8, 16)
    """
    device = DEVICES[arch]
    per_warp = -(-max(1, registers) // device.register_step) * device.register_step * device.warp_size
    blocks = min(
        device.registers // per_warp // num_warps, device.warps // num_warps, device.blocks,
        device.shared // max(1, shared + device.reserved),
    )  # fmt: skip
    return blocks * num_warps


# The calls whose bytes are counted: q [B, Hq, S, D], k and v [B, Hkv, T, D], a prefix [Hkv, P, D], all in bf16
TRAINING = {"B": 1, "Hq": 4, "Hkv": 2, "S": 256, "T": 256, "P": 64}
DECODING = {"B": 8, "Hq": 4, "Hkv": 2, "S": 1, "T": 1024, "P": 512}


def minimum_bytes(kernel: str, head_dim: int) -> int:
    """The bytes of each input and each output, once. Partial sums in fp32 count as one input and one output."""
    size = DECODING if kernel.startswith("decode") else TRAINING
    rows = size["B"] * size["Hq"] * size["S"]
    q = 2 * rows * head_dim
    kv = 2 * 2 * size["B"] * size["Hkv"] * size["T"] * head_dim
    prefix = 2 * 2 * size["Hkv"] * size["P"] * head_dim
    statistic, partial = 4 * rows, 4 * rows * (head_dim + 1)
    return {
        "fwd": q + kv + prefix + q + statistic,
        "prepare": 2 * q + statistic + 2 * statistic,
        "dq": 2 * q + kv + prefix + 2 * statistic + q,
        "dkv": 2 * q + kv + 2 * statistic + kv,
        "prefix": 2 * q + prefix + 2 * statistic + 2 * prefix,
        "decode_prefix": q + prefix + partial,
        "decode_sequence": q + kv + partial,
        "decode_combine": 2 * partial + q + statistic,
    }.get(kernel, 0)


def count_bytes(arch: str, head_dim: int) -> dict[str, int]:
    """The bytes that each kernel moves, counted in another process, as Triton reads TRITON_INTERPRET at import."""
    command = [sys.executable, "-m", "tests.gpu_free.report", "--count-bytes", arch, str(head_dim)]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"counting bytes failed:\n{done.stderr[-2000:]}")
    return dict(json.loads(done.stdout))


def _count_bytes_here(arch: str, head_dim: int) -> dict[str, int]:
    from unittest import mock

    import torch

    from peftkern import functional
    from peftkern.backends.triton import launch

    from .aot import kernel_name
    from .guard import guard

    def call(size: dict[str, int], needs_grad: bool) -> torch.Tensor:
        kv = (size["B"], size["Hkv"], size["T"], head_dim)
        shapes = ((size["B"], size["Hq"], size["S"], head_dim), kv, kv, *[(size["Hkv"], size["P"], head_dim)] * 2)
        inputs = [torch.randn(shape, dtype=torch.bfloat16, requires_grad=needs_grad) for shape in shapes]
        return functional.prefix_attention(*inputs, backend="triton")

    table = tiles.tile
    with (
        mock.patch.object(launch, "tile", lambda _, direction, *key: table(arch, direction, *key)),
        mock.patch.object(launch, "processors", return_value=128),
        guard() as watch,
    ):
        call(TRAINING, True).sum().backward()
        call(DECODING, False)
    counts = {name: watch.loads[name] + watch.stores[name] for name in watch.stores}
    return {kernel_name(mock.Mock(__name__=name)): n for name, n in counts.items()}


def rows_of(arch: str, head_dim: int, dtype: str, kernels: list[str] | None, tile: list[int] | None, advance):
    """One dict per kernel. ``advance(text)`` is called before each step."""
    from unittest import mock

    import torch

    from peftkern.backends.triton import launch

    from .aot import ASYNC_COPIES, MATRIX_UNITS, compile_launch, kernel_name, table_launches

    counted = {}
    if dtype == "bfloat16" and tile is None:
        advance(f"{arch} D {head_dim}: bytes")
        counted = count_bytes(arch, head_dim)
    table = tiles.tile
    with mock.patch.object(launch, "tile", lambda *key: tiles.Tile(*tile) if tile else table(*key)):
        launches = table_launches(arch, head_dim, getattr(torch, dtype))
    for recorded in launches:
        name = kernel_name(recorded[0])
        if kernels and name not in kernels:
            continue
        advance(f"{arch} D {head_dim}: {name}")
        c = compile_launch(arch, recorded)
        per = c.instructions.total() / c.tensor_cores if c.tensor_cores else None
        minimum = minimum_bytes(name, head_dim)
        yield {
            "kernel": name,
            "arch": arch,
            "D": head_dim,
            "tile": "x".join(map(str, c.tile[:2])) + f" w{c.tile[2]} s{c.tile[3]}" if c.tile[0] else "",
            "registers": c.registers,
            "spills": c.spills,
            "shared": c.shared,
            "warps": resident_warps(arch, c.registers, c.shared, c.tile[2] or 4),
            "tensor cores": _mix(c, MATRIX_UNITS),
            "async copies": _mix(c, ASYNC_COPIES),
            "instructions": c.instructions.total(),
            "per tensor": "" if per is None else f"{per:.1f}",
            "bytes / min": f"{counted[name] / minimum:.2f}" if minimum and name in counted else "",
        }


def _mix(compiled, names: dict[str, str]) -> str:
    counts = ((compiled.count(pattern), name) for pattern, name in names.items())
    return " ".join(f"{n} {name}" for n, name in counts if n)


def main() -> None:
    """Parse the command line, compile, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--archs", nargs="*", default=["sm_80", "sm_90", "sm_100", "gfx942"], choices=tiles.ARCHITECTURES
    )
    parser.add_argument("--head-dims", nargs="*", type=int, default=[64, 128], help="default: 64 128")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument(
        "--kernels", nargs="*", help="fwd, prepare, dq, dkv, prefix, bias, decode_prefix, …; default: all"
    )
    parser.add_argument(
        "--tile", nargs=4, type=int, metavar=("M", "N", "WARPS", "STAGES"), help="in place of the table's"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the rows to a file too")
    parser.add_argument("--count-bytes", nargs=2, metavar=("ARCH", "D"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.count_bytes:
        print(json.dumps(_count_bytes_here(chosen.count_bytes[0], int(chosen.count_bytes[1]))))
        return

    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    rows: list[dict] = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(chosen.archs) * len(chosen.head_dims))
        for arch in chosen.archs:
            for head_dim in chosen.head_dims:
                rows += rows_of(
                    arch, head_dim, chosen.dtype, chosen.kernels, chosen.tile,
                    lambda text: progress.update(task, description=text),
                )  # fmt: skip
                progress.advance(task)
    if chosen.csv and rows:
        with chosen.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    console = Console(width=None if sys.stdout.isatty() else 160)
    table = Table(*rows[0] if rows else (), title=f"{chosen.dtype}; compiled and counted, not measured", box=None)
    for row in rows:
        table.add_row(*map(str, row.values()))
    console.print(table)


if __name__ == "__main__":
    main()
