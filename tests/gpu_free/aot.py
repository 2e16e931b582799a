# SPDX-License-Identifier: Apache-2.0
"""Compiles, without a GPU, the kernels that a call would launch; ``python -m tests.gpu_free.report`` shows them.

A call with CPU tensors goes through the backend with launching replaced by compiling, so that the launcher's own
arguments, tiles and constants are what is compiled. The figures are static counts over the whole kernel: they say
whether it fits and uses tensor cores, not how fast it runs.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from peftkern import functional
from peftkern.arguments import AttentionArgs
from peftkern.backends.triton import prefix_kernels, tiles

from .recorder import gpu_of

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
#: Shared memory that one block may have, in bytes.
SHARED_MEMORY = {
    "sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376,
    "gfx942": 65536, "gfx950": 163840,
}  # fmt: skip

#: Instructions of the tensor cores and asynchronous copies, as regular expressions, by the name that people use.
MATRIX_UNITS = {"HMMA": "HMMA", "HGMMA": "HGMMA", "UTC.*MMA": "tcgen05", "v_mfma": "MFMA"}
ASYNC_COPIES = {"LDGSTS": "LDGSTS", "UTMALDG": "UTMALDG", "(global|buffer)_load.*lds": "to LDS"}


@dataclass
class Compiled:
    """One kernel for one architecture. ``spills`` are bytes (NVIDIA: stores to the stack) or registers (AMD)."""

    kernel: str
    arch: str
    tile: tuple[int, ...]
    registers: int
    spills: int
    shared: int
    instructions: Counter[str]
    seconds: float

    def count(self, pattern: str) -> int:
        """Instructions whose name starts with ``pattern``, a regular expression."""
        return sum(n for name, n in self.instructions.items() if re.match(pattern, name))

    @property
    def tensor_cores(self) -> int:
        return sum(map(self.count, MATRIX_UNITS))

    @property
    def async_copies(self) -> int:
        return sum(map(self.count, ASYNC_COPIES))

    def __str__(self) -> str:
        tile = "x".join(map(str, self.tile[:2])) + f" w{self.tile[2]} s{self.tile[3]}"
        mix = f"tensor {self.tensor_cores:4} async {self.async_copies:3} instructions {self.instructions.total():6}"
        return (
            f"{self.arch:7} {self.kernel:8} {tile:14} registers {self.registers:3} spills {self.spills:4} "
            f"shared {self.shared:6} {mix} ({self.seconds:.1f} s)"
        )


@contextlib.contextmanager
def recorded_launches(arch: str) -> Iterator[list[tuple[JITFunction, tuple, dict]]]:
    """Within the block the backend sees a GPU of ``arch``. Launches are recorded, and nothing runs."""
    launches: list[tuple[JITFunction, tuple, dict]] = []

    def record(self, *args, grid, warmup, **kwargs):
        launches.append((self, args, kwargs))

    with gpu_of(arch), mock.patch.object(JITFunction, "run", record):
        yield launches


def attention_launches(
    arch: str, head_dim: int, dtype: torch.dtype, prefix_dtype=None, prefix_len=32, batch=2, bank=(),
    backend="triton", value_dim: int | None = None, **options,
):  # fmt: skip
    """The launches of one call, forward and backward, with all gradients. ``bank`` is (A,) for a bank of prefixes.

    ``value_dim`` is the values' head dim if it is not ``head_dim``.
    """
    dims = head_dim, value_dim or head_dim

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, requires_grad=True)

    with recorded_launches(arch) as launches:
        out = functional.prefix_attention(
            empty(batch, 4, 64, head_dim), *(empty(batch, 2, 64, dim) for dim in dims),
            *(empty(*bank, 2, prefix_len, dim, dtype=prefix_dtype or dtype) for dim in dims), backend=backend,
            **options,
        )  # fmt: skip
        out.backward(torch.empty_like(out))
    return launches


def decode_launches(
    arch: str, head_dim: int, dtype: torch.dtype, prefix_dtype=None, bank=(), value_dim: int | None = None, **options
):
    """The launches of one decoding step, two queries over a cache."""
    dims = head_dim, value_dim or head_dim
    shapes = ((16, 8, 2, head_dim), *((16, 2, 2048, dim) for dim in dims))
    with recorded_launches(arch) as launches:
        functional.prefix_attention(
            *(torch.empty(shape, dtype=dtype) for shape in shapes),
            *(torch.empty(*bank, 2, 1024, dim, dtype=prefix_dtype or dtype) for dim in dims), backend="triton",
            **options,
        )  # fmt: skip
    return launches


def packed_prefix_launches(arch: str, head_dim: int, dtype: torch.dtype, value_dim: int | None = None):
    """The launches of the prefix kernels for packed sequences, and of the merge of two results."""
    kernels = prefix_kernels.TritonPrefixKernels()
    value_dim = value_dim or head_dim
    q, key, prefix = (torch.empty(1, n, 64, head_dim, dtype=dtype) for n in (4, 2, 2))
    out, value, prefix_v = (torch.empty(1, n, 64, value_dim, dtype=dtype) for n in (4, 2, 2))
    starts, lse = torch.zeros(3, dtype=torch.int32), torch.empty(1, 4, 64)
    args = AttentionArgs(
        q, key, value, prefix.float(), prefix_v.float(), None, None, None, None, None, cu_seqlens=starts,
        prefix_ids=starts[1:], prefix_lens=None, prefix_starts=None, dropout_seed=None, scale=1.0, causal=True,
        window=None, prefix_in_window=True, softcap=0.0, dropout_p=0.0,
    )  # fmt: skip
    with recorded_launches(arch) as launches:
        joined = kernels.concat_prefix(args, starts)
        kernels.split_gradient(args, *joined, starts, key, value)
        kernels.sum_prefix_gradient(args, joined[0], prefix.float(), starts)
        kernels.merge_states(out, lse, out, lse)
    return launches


def table_launches(arch: str, head_dim: int, dtype: torch.dtype, value_dim: int | None = None):
    """One launch of each kernel of the tile table: forward, backward, the bias's gradient, decoding."""
    bias, dims = torch.zeros(1, 4, 64, 64, requires_grad=True), {"value_dim": value_dim}
    launches = [
        *attention_launches(arch, head_dim, dtype, **dims),
        *(x for x in attention_launches(arch, head_dim, dtype, bias=bias, **dims) if "bwd_bias" in x[0].__name__),
        *decode_launches(arch, head_dim, dtype, **dims),
    ]
    return list({launch[0].__name__: launch for launch in launches}.values())


def kernel_name(kernel: JITFunction) -> str:
    """The short name of a kernel: dq for ``_prefix_attention_bwd_dq_kernel``."""
    return re.sub("_?prefix_attention_|_kernel|^_", "", kernel.__name__).removeprefix("bwd_")


def embedding_launches(arch: str):
    """The launches of the soft prompt's embedding, forward and backward."""
    weight, prompt = torch.empty(96, 64, dtype=torch.bfloat16), torch.empty(16, 64, requires_grad=True)
    with recorded_launches(arch) as launches:
        tokens = torch.zeros(2, 16, dtype=torch.int64)
        out = functional.soft_prompt_embedding(tokens, weight, prompt, backend="triton")
        out.backward(torch.empty_like(out))
    return launches


def compile_launch(arch: str, launch: tuple[JITFunction, tuple, dict]) -> Compiled:
    """Compile one launch as Triton's launcher specialises it; on a GPU, too, tensors are aligned to 16 bytes."""
    kernel, args, kwargs = launch
    target = _target(arch)
    device = make_backend(target)
    bound, specialization, options = create_function_from_signature(kernel.signature, kernel.params, device)(
        *args, **kwargs
    )
    options, *described = kernel._pack_args(device, kwargs, bound, specialization, options)
    start = time.perf_counter()
    compiled = triton.compile(ASTSource(kernel, *described), target=target, options=options.__dict__)
    seconds = time.perf_counter() - start
    tile = tuple(kwargs.get(field, 0) for field in tiles.Tile._fields)
    measure = _amd if arch.startswith("gfx") else _nvidia
    return Compiled(kernel_name(kernel), arch, tile, *measure(compiled), seconds)


def _target(arch: str) -> GPUTarget:
    return GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)


def _nvidia(compiled) -> tuple[int, int, int, Counter[str]]:
    def tool(name: str, *arguments: str) -> str:
        return subprocess.run([_TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "-res-usage", file.name)
        assembly = tool("nvdisasm", "-c", file.name)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", assembly, re.M)
    return int(registers), int(stack), compiled.metadata.shared, Counter(names)


def _amd(compiled) -> tuple[int, int, int, Counter[str]]:
    assembly = compiled.asm["amdgcn"]
    registers, spills = (int(re.search(rf"\.{n}:\s+(\d+)", assembly)[1]) for n in ("vgpr_count", "vgpr_spill_count"))
    return registers, spills, compiled.metadata.shared, Counter(re.findall(r"^\s+([vsbdg]\w*_\w+)", assembly, re.M))
