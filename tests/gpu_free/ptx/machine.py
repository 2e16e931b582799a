# SPDX-License-Identifier: Apache-2.0
"""Runs a parsed kernel on host memory, through the core in C++ (built on first use, kept in the temporary folder)."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .parse import Program, parsed

_CORE = Path(__file__).parent / "core"
_FLAGS = ("-std=c++20", "-O2", "-march=native", "-ffp-contract=off", "-fPIC", "-shared")


class Violation(Exception):
    """What a GPU would do wrong in silence: names the PTX line, the address, the warp and the block."""


@dataclass(frozen=True)
class Buffer:
    """Memory that a kernel may access; ``allowed`` has a byte per byte, 0 in gaps, None where there are none."""

    address: int
    size: int
    name: str
    read_only: bool = False
    allowed: np.ndarray | None = None


@dataclass(frozen=True)
class TensorMap:
    """What a tensor memory accelerator is told of a tensor and its tiles.

    ``strides`` are bytes, the last dim is contiguous; ``swizzle`` is 0 or, for 32, 64, 128 bytes, 1 to 3.
    """

    address: int
    element: int
    swizzle: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]

    def row(self) -> list[int]:
        """As ptx_set_tensor_maps takes it, the contiguous dim first."""
        padding = [1] * (5 - len(self.shape))
        dims = [x for sizes in (self.shape, self.strides, self.box) for x in (*reversed(sizes), *padding)]
        return [self.address, len(self.shape), self.element, self.swizzle, *dims]


@dataclass
class Counts:
    """Of one launch. ``instructions`` are a warp's, bytes those of all lanes, ``loaded`` and ``stored`` by buffer."""

    instructions: int = 0
    mma: int = 0
    async_copies: int = 0
    shared_read: int = 0
    shared_written: int = 0
    conflicting_bytes: int = 0  # in shared memory, written differently by lanes of one store
    loaded: dict[str, int] = field(default_factory=dict)
    stored: dict[str, int] = field(default_factory=dict)

    @property
    def global_bytes(self) -> int:
        return sum(self.loaded.values()) + sum(self.stored.values())


@functools.cache
def core() -> ctypes.CDLL:
    """The emulator's shared library, compiled once for each version of its sources."""
    sources = sorted(_CORE.iterdir())
    compiler = os.environ.get("CXX", "g++")
    digest = hashlib.sha256(b"".join(s.read_bytes() for s in sources) + repr((compiler, _FLAGS)).encode()).hexdigest()
    folder = Path(tempfile.gettempdir()) / f"peftkern_ptx_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"core_{digest[:16]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / "core.so"
            subprocess.run([compiler, *_FLAGS, _CORE / "emulator.cpp", "-o", built], check=True)
            built.replace(library)
    loaded = ctypes.CDLL(str(library))
    loaded.ptx_run.restype = ctypes.c_char_p
    return loaded


@functools.cache
def opcode_number(name: str) -> int:
    return core().ptx_opcode(name.encode())


def load(ptx: str) -> Program:
    """The program of a module's only kernel."""
    return parsed(ptx, opcode_number)


def run(
    program: Program,
    grid: tuple[int, ...],
    parameters: list[int],
    buffers: list[Buffer],
    shared: int = 0,
    seed: int = 0,
    tensor_maps: list[TensorMap] = (),
) -> Counts:
    """Run a grid of blocks; ``parameters`` are the bits of each parameter, ``seed`` sets the order of the warps.

    The parameter of a tensor map is its index. Raises :class:`Violation` with the first finding.
    """
    library, pointer, i64 = core(), ctypes.c_void_p, ctypes.c_int64
    initial = program.initial.copy()
    for register, value in zip(program.parameter_registers, parameters, strict=True):
        initial[register] = value & (2**64 - 1)
    library.ptx_clear_buffers()
    for b in buffers:
        allowed = pointer(None if b.allowed is None else b.allowed.ctypes.data)
        library.ptx_add_buffer(
            ctypes.c_uint64(b.address), ctypes.c_uint64(b.size), allowed, int(b.read_only), b.name.encode()
        )
    maps = np.array([m.row() for m in tensor_maps], np.int64)
    library.ptx_set_tensor_maps(pointer(maps.ctypes.data), len(tensor_maps))
    dims = np.array([*grid, 1, 1][:3], np.int64)
    counters = np.zeros(6, np.uint64)
    found = library.ptx_run(
        pointer(program.table.ctypes.data), i64(len(program.table)), pointer(program.operands.ctypes.data),
        i64(len(program.operands)), pointer(initial.ctypes.data), i64(len(initial)),
        pointer(program.special.ctypes.data), pointer(dims.ctypes.data), i64(program.warps), i64(shared), i64(seed),
        int(program.has_wgmma), pointer(counters.ctypes.data),
    )  # fmt: skip
    counts = Counts(*(int(x) for x in counters))
    traffic = np.zeros(2, np.uint64)
    for index, b in enumerate(buffers):
        library.ptx_buffer_traffic(index, pointer(traffic.ctypes.data))
        counts.loaded[b.name] = counts.loaded.get(b.name, 0) + int(traffic[0])
        counts.stored[b.name] = counts.stored.get(b.name, 0) + int(traffic[1])
    if found is not None:
        raise Violation(f"{program.name}: {_with_text(found.decode(), program)}")
    return counts


def _with_text(finding: str, program: Program) -> str:
    """The finding with the text of its line and, where the compiler says so, the line of Triton behind it."""
    line = int(re.search(r"line (\d+)\]", finding)[1])
    if not line:
        return finding
    finding += f": {program.lines[line - 1].strip()}"
    for text in reversed(program.lines[:line]):
        if location := re.match(r"\s*\.loc\s+(\d+) (\d+)", text):
            file = next((x for x in program.lines if re.match(rf"\s*\.file\s+{location[1]} ", x)), '"?"')
            path = file.split('"')[1]
            return f"{finding} ({Path(path).name}:{location[2]})"
    return finding
