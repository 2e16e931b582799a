# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels compiled by nvcc without a GPU: registers, spills, occupancy, instructions per mma."""

from __future__ import annotations

import re
import subprocess
import time
from dataclasses import dataclass, field

import pytest
import torch

from .. import skips
from . import aot
from .shim import FAMILIES, HEAD_DIMS, ROOT

pytestmark = skips.needs("nvcc")
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
#: Bytes of shared memory of a multiprocessor, and what a block reserves for the system.
SHARED_MEMORY = {"sm_80": 164, "sm_86": 100, "sm_89": 100, "sm_90": 228, "sm_100": 228, "sm_120": 100}
RESERVED = 1024


@dataclass
class Kernel:
    """One instance: ``name`` with its head dim and whether it takes options."""

    name: str
    element: str
    head_dim: int
    options: bool
    registers: int
    stack: int
    spills: int
    instructions: list[tuple[int, str]] = field(default_factory=list)

    def blocks(self, arch: str, threads: int, shared_bytes: int) -> int:
        """That fit a multiprocessor: registers come in units of 256 a warp."""
        per_warp = -(-self.registers * 32 // 256) * 256
        by_registers = 65536 // (per_warp * threads // 32)
        return min(by_registers, SHARED_MEMORY[arch] * 1024 // (shared_bytes + RESERVED))


def compile_kernels(arch: str, family: str, head_dim: int, folder) -> list[Kernel]:
    cubin = folder / f"{family}_{head_dim}_{arch}.cubin"
    source = ROOT / "csrc" / "cuda" / ("launch" if family in FAMILIES else "api") / f"{family}.cu"
    command = ["nvcc", "-std=c++17", "-O3", f"-arch={arch}", "-cubin", "-Xptxas", "-v",
               f"-DPEFTKERN_HEAD_DIM={head_dim}", str(source), "-o", str(cubin)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    pattern = (
        r"Function properties for (\w+)\n"
        r"\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
        r".*?Used (\d+) registers"
    )
    kernels = []
    for mangled, stack, stores, loads, registers in re.findall(pattern, done.stderr):
        name = re.search(r"peftkern\d+([a-z_]+)", mangled)[1]
        element = re.search(r"4(fp16|bf16)E", mangled)
        dim, options = re.search(r"Li(\d+)E", mangled), re.search(r"Lb([01])E", mangled)
        kernels.append(
            Kernel(name, element[1] if element else "", int(dim[1]) if dim else 0,
                   bool(options and options[1] == "1"), int(registers), int(stack), int(stores) + int(loads))
        )  # fmt: skip
    return kernels


#: Kernels of each source file, which is compiled once per head dim where they depend on it.
KERNELS = {
    "merge": {"add_splits"},
    "concat": {"concat", "concat_backward"},
    "embedding": {"soft_prompt_embedding", "soft_prompt_embedding_backward"},
    "prefix_forward": {"prefix_forward"},
    "prefix_backward": {"prefix_backward", "prefix_bias_backward"},
    "sequence_forward": {"sequence_forward", "combine_splits"},
    "sequence_backward": {"row_sums", "softmax_sums", "sequence_backward_queries", "sequence_backward_keys"},
}  # fmt: skip
FAST = {("sm_80", "prefix_forward", 128), ("sm_80", "concat", 0), ("sm_120", "prefix_backward", 64)}


@pytest.mark.parametrize(
    ("arch", "family", "head_dim"),
    [
        pytest.param(*case, marks=() if case in FAST else pytest.mark.slow)
        for case in ((a, f, d) for a in ARCHITECTURES for f in KERNELS for d in (HEAD_DIMS if f in FAMILIES else [0]))
    ],
)
def test_registers_spills_and_occupancy(arch, family, head_dim, tmp_path):
    start = time.perf_counter()
    kernels = compile_kernels(arch, family, head_dim, tmp_path)
    print(f"{arch} {family} D={head_dim}: {time.perf_counter() - start:.1f} s")
    assert {k.name for k in kernels} == KERNELS[family]
    for kernel in kernels:
        print(f"  {kernel.name} {kernel.element} options={kernel.options}: {kernel.registers} registers")
        assert kernel.spills == 0, f"{arch}: registers spill: {kernel}"
        assert kernel.stack == 0, f"{arch}: locals in memory: {kernel}"
        if kernel.name == "prefix_forward" and head_dim <= 128:
            prefix = 2 * 64 * head_dim * 2
            assert kernel.blocks(arch, 128, prefix) >= 2, f"{arch}: too few blocks at P=64: {kernel}"


def _loops(assembly: str) -> list[list[str]]:
    """Opcodes of each loop of a kernel: from a label to the last branch back to it."""
    labels, opcodes, loops = {}, [], []
    for line in assembly.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(opcodes)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", line):
            opcodes.append(instruction[1])
            target = re.search(r"BRA(?:\.\w+)* .*`\((\.L_x_\d+)\)", line)
            if target and target[1] in labels:
                loops.append(opcodes[labels[target[1]] :])
    return loops


def instructions_per_mma(assembly: str) -> float:
    """Of the innermost loop that holds most of the mma instructions."""
    loops = [loop for loop in _loops(assembly) if any(op.startswith("HMMA") for op in loop)]
    most = max(sum(op.startswith("HMMA") for op in loop) for loop in loops)
    inner = min((loop for loop in loops if 2 * sum(op.startswith("HMMA") for op in loop) >= most), key=len)
    return len(inner) / sum(op.startswith("HMMA") for op in inner)


def _disassemble(cubin, kernel: str) -> str:
    text = subprocess.run(
        [aot._TOOLS / "nvdisasm", "-c", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    sections = re.split(r"^\s*\.section\s+\.text\.", text, flags=re.M)[1:]
    return next(s for s in sections if kernel in s.partition("\n")[0])


@pytest.mark.slow
def test_instructions_per_mma_are_no_more_than_tritons(tmp_path, monkeypatch):
    """Of the same tile: 64 rows, 64 keys, 4 warps."""
    compile_kernels("sm_80", "prefix_forward", 128, tmp_path)
    ours = instructions_per_mma(
        _disassemble(tmp_path / "prefix_forward_128_sm_80.cubin", "prefix_forwardINS_4bf16ELi128ELb0E")
    )
    monkeypatch.setattr(aot.launch, "tile", lambda *_: aot.tiles.Tile(64, 64, 4, 2))
    launch = next(x for x in aot.attention_launches("sm_80", 128, torch.bfloat16) if "fwd" in x[0].__name__)
    cubin, measure = tmp_path / "triton.cubin", aot._nvidia
    monkeypatch.setattr(aot, "_nvidia", lambda c: (cubin.write_bytes(c.asm["cubin"]), measure(c))[1])
    aot.compile_launch("sm_80", launch)
    theirs = instructions_per_mma(_disassemble(cubin, "fwd"))
    print(f"instructions per mma in the main loop, sm_80, D=128: {ours:.1f}; Triton's fused kernel {theirs:.1f}")
    assert ours <= theirs
