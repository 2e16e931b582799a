# SPDX-License-Identifier: Apache-2.0
"""The PTX that nvcc makes of the CUDA kernels for sm_80, in the PTX emulator, behind the library's own host code.

The host shim's library validates, fills in parameters and counts blocks as the real one does; each launch then goes
to the emulator, with the instructions that a GPU would get in place of g++'s.
"""

from __future__ import annotations

import hashlib
import re
import subprocess

import pytest
import torch

from peftkern import native
from peftkern.backends.cuda import CudaPrefixKernels
from peftkern.testing import bounds
from peftkern.testing.cases import Shape, tensors

from .. import skips
from . import merging
from .merging import args_of, sizes_of
from .ptx import machine
from .shim import FAMILIES, LAUNCHER, ROOT, Shim, sources, symbols

pytestmark = skips.needs("nvcc")


def _ptx(source: str, head_dim: int) -> str:
    """nvcc's PTX of one file, made once per version of the sources."""
    path = ROOT / "csrc" / "cuda" / f"{source}.cu"
    key = hashlib.sha256(repr((sources(), source, head_dim)).encode()).hexdigest()[:16]
    target = ROOT / "build" / "shim" / f"{path.stem}-{head_dim}-{key}.ptx"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        command = ["nvcc", "-std=c++17", "-O3", "-arch=sm_80", "-ptx", f"-DPEFTKERN_HEAD_DIM={head_dim}",
                   str(path), "-o", str(target)]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True)
    return target.read_text()


def kernels(ptx: str) -> dict[str, str]:
    """A module of its own for each kernel, whose parameter is the address of the struct and not the struct."""
    header, *entries = re.split(r"(?=^\s*(?://\s*\.globl.*\n)?\s*\.visible \.entry )", ptx, flags=re.M)
    return dict(_by_address(header, entry) for entry in entries if ".entry" in entry)


def _by_address(header: str, entry: str) -> tuple[str, str]:
    entry = entry[: re.search(r"^}", entry, re.M).end()]
    name = re.search(r"\.entry\s+([\w$]+)", entry)[1]
    parameter = re.search(r"\.param\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[\d+\]", entry)
    entry = entry.replace(parameter[0], f".param .u64 {parameter[1]}")
    entry = re.sub(rf"ld\.param(\.v\d)?(\.\w+)(\s+[^\[]*)\[{parameter[1]}", r"ld.global\1\2\3[%rd_params", entry)
    entry = re.sub(rf"mov\.b64(\s+%\w+,\s*){parameter[1]};", r"mov.b64\1%rd_params;", entry)
    entry = re.sub(r"ld\.param(\.v\d)?(\.\w+)", r"ld.global\1\2", entry)
    entry = entry.replace("cvta.param.u64", "mov.u64").replace("ld.global.nc", "ld.global")
    entry = re.sub(  # of tanhf, and not in the emulator: the sign of the first source, the rest of the second
        r"copysign\.f32\s+(\S+), (\S+), (\S+);",
        r"and.b32 %r_sign, \2, 0x80000000; and.b32 %r_rest, \3, 0x7fffffff; or.b32 \1, %r_sign, %r_rest;",
        entry,
    )
    start = entry.index("{") + 1
    load = f"\n.reg .b32 %r_sign, %r_rest;\n.reg .b64 %rd_params;\nld.param.u64 %rd_params, [{parameter[1]}];\n"
    return name, f"{header}{entry[:start]}{load}{entry[start:]}"


class Emulated(Shim):
    """The shim with its launches in the PTX emulator. ``seed`` orders the warps."""

    def __init__(self, monkeypatch, head_dim: int, seed: int = 0, edit=None) -> None:
        super().__init__(monkeypatch, head_dims=(head_dim,))
        self.seed, self.error, self.names = seed, None, []
        self._kernels = {}
        for source in ("api/merge", "api/concat", "api/embedding", *(f"launch/{name}" for name in FAMILIES)):
            self._kernels |= kernels(_ptx(source, head_dim))
        if edit is not None:
            self._kernels = {name: edit(name, text) for name, text in self._kernels.items()}
        self._symbols = symbols(self.library._name)
        self._callback = LAUNCHER(self._launch)
        self.library.shim_set_launcher(self._callback)

    def close(self) -> None:
        self.library.shim_set_launcher(LAUNCHER())

    def _launch(self, kernel, grid, threads, shared, parameters, size) -> int:
        try:
            name = self._symbols[kernel]
            self.names.append(name)
            buffers = [
                machine.Buffer(address, length, f"buffer {i}", x.untyped_storage().data_ptr() not in self._writable)
                for i, ((address, length), x) in enumerate(self._registered.items())
            ]
            buffers.append(machine.Buffer(parameters, size, "parameters", True))
            program = machine.load(self._kernels[name])
            assert program.warps * 32 == threads, f"{name}: launched with {threads} threads"
            machine.run(program, (grid[0], grid[1], grid[2]), [parameters], buffers, shared, self.seed)
        except Exception as error:  # through C code, to be raised by whoever looks
            self.error = error
            return 0
        return 1


@pytest.fixture
def emulated(monkeypatch):
    shims = []

    def make(head_dim: int, **options) -> Emulated:
        shims.append(Emulated(monkeypatch, head_dim, **options))
        return shims[-1]

    yield make
    for shim in shims:
        shim.close()
        if shim.error is not None:
            raise shim.error


FAST = {("plain", 64), ("ragged_bank", 64), ("prefix_bias", 64)}


@pytest.mark.parametrize(
    ("name", "head_dim"),
    [
        pytest.param(name, dim, marks=() if (name, dim) in FAST else pytest.mark.slow)
        for name in (
            "plain",
            "window",
            "softcap",
            "sinks",
            "prefix_bias",
            "gate",
            "packed",
            "packed_bank",
            "packed_prompt",
            "ragged_bank",
        )
        for dim in (64, 96, 128, 256)
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_attention(emulated, name, head_dim, dtype):
    emulated(head_dim)
    shape, options = sizes_of(name, D=head_dim, P=37)
    bounds.check_backend("cuda", tensors(shape, dtype), options)


@pytest.mark.parametrize("head_dim", [64, *(pytest.param(dim, marks=pytest.mark.slow) for dim in (96, 128, 256))])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_merging(emulated, monkeypatch, head_dim, dtype):
    shim = emulated(head_dim, seed=1)
    merging.install(monkeypatch, shim)
    bounds.check_backend("merging", tensors(Shape(B=2, Hq=6, Hkv=2, S=33, P=130, D=head_dim), dtype), {})


def test_concat_and_embedding(emulated):
    emulated(64)
    shape, options = sizes_of("bank", D=64)
    args = args_of(tensors(shape, torch.float16, torch.float32), **options)
    joined_k, _ = CudaPrefixKernels().concat_prefix(args)
    assert torch.equal(joined_k[:, :, shape.P :], args.k)
    weight, prompt, tokens = torch.randn(11, 24).half(), torch.randn(5, 24), torch.tensor([[3, 1], [0, 10]])
    out = CudaPrefixKernels.attention.soft_prompt_embedding(tokens, weight, prompt, None)
    assert torch.equal(out[:, 5:], weight[tokens])
    assert torch.equal(out[:, :5], prompt.half().expand(2, -1, -1))


FAULTS = {
    "softmax_sums": r"bar\.sync\s+0;",
    "prefix_bias_backward": r"bar\.sync\s+0;",
    "prefix_forward": r"cp\.async\.wait_group\s+0;|bar\.sync\s+0;",
    "prefix_backward": r"bar\.sync\s+0;",
}


@pytest.mark.parametrize(
    ("kernel", "index"),
    [
        ("prefix_forward", 1), ("prefix_forward", 2), ("prefix_backward", 3),
        ("softmax_sums", 0), ("prefix_bias_backward", 1),
    ],
)  # fmt: skip
def test_a_dropped_instruction_is_named(emulated, monkeypatch, kernel, index):
    """The wait for the prefix and the barrier after it; those between p, ds and the sums over rows."""

    def edit(name: str, text: str) -> str:
        if kernel not in name:
            return text
        place = list(re.finditer(FAULTS[kernel], text))[index]
        return text[: place.start()] + text[place.end() :]

    shim = emulated(64, edit=edit)
    merging.install(monkeypatch, shim)
    by_head = {"prefix_bias": torch.zeros(6, 1)}
    backend, options = ("merging", {}) if kernel in ("prefix_forward", "prefix_backward") else ("cuda", by_head)
    with pytest.raises(native.cuda.NativeError, match="the launcher failed"):
        bounds.check_backend(backend, tensors(Shape(B=2, Hq=6, Hkv=2, S=33, P=70, D=64), torch.bfloat16), options)
    assert isinstance(shim.error, machine.Violation)
    shim.error = None
