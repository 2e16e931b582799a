# SPDX-License-Identifier: Apache-2.0
"""What a processor can do at most: multiply-adds in registers per instruction set, and reading and copying memory.

:func:`compile_peak` compiles `peak.cpp` with the machine's compiler and with the kernels' own flags, which are read
from `csrc/cpu/CMakeLists.txt`.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import torch

from .common import ROOT

SOURCE = Path(__file__).with_name("peak.cpp")
CMAKE = ROOT / "csrc" / "cpu" / "CMakeLists.txt"
#: Multiply-adds by the name of what they multiply, as `peak.cpp` numbers them.
KINDS = {"floats": 0, "pairs": 1, "tiles": 2}
LANES = {
    "portable": 4, "avx2": 8, "avx512": 16, "avx512_bf16": 16, "amx_bf16": 16, "sve256": 8, "neon_bf16": 4,
}  # fmt: skip


def kind_of(isa: str, dtype: str) -> str:
    """What the kernels' products multiply: fp32, or in bf16 pairs or tiles where the instruction set has them."""
    if dtype != "bf16":
        return "floats"
    return {"avx512_bf16": "pairs", "neon_bf16": "pairs", "amx_bf16": "tiles"}.get(isa, "floats")


def flags_of(isa: str) -> list[str]:
    """The compiler's flags for an instruction set, and those of all kernels."""
    text = CMAKE.read_text()
    found = {name: flags.strip('"') for name, flags in re.findall(r"set\(flags_(\w+) (.*)\)", text)}
    flags = found[isa]
    while name := re.search(r"\$\{flags_(\w+)\}", flags):
        flags = flags.replace(name[0], found[name[1]])
    common = re.search(r"target_compile_options\(peftkern_cpu PRIVATE (-W.*?)\)", text, re.S)
    assert common is not None
    return ["-std=gnu++17", "-O3", "-DNDEBUG", *flags.split(), *common[1].split()]


def compiler() -> str:
    """The C++ compiler: ``CXX``, else c++, g++ or clang++.

    Raises:
        RuntimeError: if there is none.
    """
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for name in names:
        if path := shutil.which(name):
            return path
    raise RuntimeError(
        f"the peaks need a C++ compiler: expected {' or '.join(names)} on the PATH, found none. "
        "Install one or set CXX"
    )


class Peak:
    """`peak.cpp`, compiled for one instruction set."""

    def __init__(self, library: Path, isa: str) -> None:
        self.isa = isa
        self._library = ctypes.CDLL(str(library))
        self._library.peak_operations.restype = ctypes.c_int64
        self._library.peak_run.argtypes = [ctypes.c_int, *[ctypes.c_int64] * 2, *[ctypes.c_float] * 2]
        self._library.peak_read.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 2]
        self._library.peak_copy.argtypes = [*[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 2]
        for name in ("run", "read"):
            getattr(self._library, f"peak_{name}").restype = ctypes.c_float

    def operations(self, kind: str) -> int:
        """Floating-point operations of a step of one thread: two per multiply-add. 0 where there is no such kind."""
        return int(self._library.peak_operations(KINDS[kind]))

    def instruction(self, kind: str) -> str:
        """The instruction, or instructions, of a multiply-add."""
        fused = "FMA" if self._library.peak_is_fused() else "multiply and add"
        pairs = "bfdot" if self.isa == "neon_bf16" else "vdpbf16ps"
        return {"floats": fused, "pairs": pairs, "tiles": "tdpbf16ps"}[kind]

    def run(self, kind: str, steps: int, threads: int) -> float:
        """Run the loop of multiply-adds. The result shows that every step was made (see the tests)."""
        return float(self._library.peak_run(KINDS[kind], steps, threads, 0.5, 1.0))

    def read(self, data: torch.Tensor, threads: int) -> float:
        """Sum a contiguous fp32 tensor."""
        return float(self._library.peak_read(data.data_ptr(), data.numel(), threads))

    def copy(self, to: torch.Tensor, data: torch.Tensor, threads: int) -> None:
        """Copy a contiguous fp32 tensor."""
        self._library.peak_copy(to.data_ptr(), data.data_ptr(), data.numel(), threads)


def compile_peak(isa: str, folder: Path) -> Peak:
    """Compile for an instruction set, into ``folder``.

    Raises:
        RuntimeError: without a compiler, or with the compiler's message.
    """
    built, library = folder / f"peak_{isa}.o", folder / f"peak_{isa}.so"
    flags = [*flags_of(isa), f"-DPEFTKERN_LANES={LANES[isa]}", f"-I{ROOT / 'csrc' / 'cpu'}"]
    name = compiler()
    # linked without -fopenmp, as the CPU library is: the process has torch's OpenMP runtime
    for command in (
        [name, *flags, "-fopenmp", "-fPIC", "-c", str(SOURCE), "-o", str(built)],
        [name, "-shared", str(built), "-o", str(library)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"peak.cpp does not compile for {isa}:\n{' '.join(command)}\n{done.stderr.strip()}")
    return Peak(library, isa)
