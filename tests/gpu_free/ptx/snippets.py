# SPDX-License-Identifier: Apache-2.0
"""Small kernels written by hand, for tests of single instructions and checks."""

from __future__ import annotations

import numpy as np

from . import machine
from .machine import Buffer, Counts


def module(body: str, warps: int = 1, pointers: int = 2) -> str:
    """A module whose kernel ``test`` has ``pointers`` in %x0, %x1, ... and its thread in %tid.

    ``body`` may use any register name; labels and blocks in braces are as in PTX.
    """
    parameters = ", ".join(f".param .u64 test_param_{i}" for i in range(pointers))
    loads = "\n".join(f"ld.param.b64 %x{i}, [test_param_{i}];" for i in range(pointers))
    return (
        f".version 8.8\n.target sm_90a\n.address_size 64\n.extern .shared .align 16 .b8 smem[];\n"
        f".visible .entry test({parameters})\n.reqntid {32 * warps}\n{{\n"
        f"mov.u32 %tid, %tid.x;\n{loads}\n{body}\nret;\n}}\n"
    )


def run(
    body: str, *arrays: np.ndarray, warps: int = 1, grid=(1,), shared: int = 0, seed: int = 0, read_only=()
) -> Counts:
    """Run ``body`` on arrays named a0, a1, ..., which it finds at %x0, %x1, ..."""
    program = machine.load(module(body, warps, len(arrays)))
    buffers = [Buffer(a.ctypes.data, a.nbytes, f"a{i}", i in read_only) for i, a in enumerate(arrays)]
    return machine.run(program, grid, [a.ctypes.data for a in arrays], buffers, shared, seed)


def evaluate(statement: str, *sources: np.ndarray, results: int = 1) -> list[np.ndarray]:
    """Each lane runs ``statement`` on its elements %s0, %s1, ... of ``sources`` [32]; its %d0, %d1, ... as 64 bits.

    A source is taken by its bits; its items may have 1 to 8 bytes.
    """
    inputs = np.zeros((max(1, len(sources)), 32), np.uint64)
    for row, source in zip(inputs, sources, strict=False):
        bits = np.ascontiguousarray(source)
        row[:] = bits.view(f"u{bits.itemsize}")
    outputs = np.full((results, 32), 0xDEAD, np.uint64)
    lines = ["mad.wide.u32 %p0, %tid, 8, %x0;", "mad.wide.u32 %p1, %tid, 8, %x1;"]
    lines += [f"ld.global.b64 %s{i}, [%p0+{256 * i}];" for i in range(len(sources))]
    lines += [f"mov.b64 %d{i}, 0;" for i in range(results)]
    lines.append(statement)
    lines += [f"st.global.b64 [%p1+{256 * i}], %d{i};" for i in range(results)]
    run("\n".join(lines), inputs, outputs)
    return list(outputs)


def as_type(bits: np.ndarray, dtype) -> np.ndarray:
    """The low bytes of 64-bit results."""
    return bits.astype(f"u{np.dtype(dtype).itemsize}").view(dtype)
