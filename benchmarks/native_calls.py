# SPDX-License-Identifier: Apache-2.0
"""Calls of a CPU library by its path, without the package's choice of a backend and without autograd.

A call is packed once and then costs what the library takes, so that several builds can take turns on the same tensors
in one process.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from peftkern.arguments import AttentionArgs, allocate_gradients, allocate_outputs
from peftkern.native import abi, fill
from peftkern.tools.bench.providers import Problem

FUNCTIONS = {"forward": "prefix_attention", "backward": "prefix_attention_backward"}


class Library:
    """A build of the CPU library, loaded beside others: its symbols stay local.

    Attributes:
        path: the file.
        name: its name and the first digits of its SHA-256, for tables.
        isas: instruction sets that both this processor and this build support, plainest first.
    """

    def __init__(self, path: Path) -> None:
        """Load ``path``.

        Raises:
            ValueError: if it is no CPU library with the ABI of this checkout.
        """
        if not path.is_file():
            raise ValueError(f"{path}: expected a CPU library (libpeftkern_cpu.so), got no file")
        expected = f"expected a CPU library with ABI {abi.CPU_VERSION}, that of this checkout"
        try:
            self._library = ctypes.CDLL(str(path.resolve()), mode=os.RTLD_LOCAL | os.RTLD_NOW)
            version = self._library.peftkern_abi_version()
        except (OSError, AttributeError) as error:
            raise ValueError(f"{path}: {expected}, got a file that does not load as one: {error}") from error
        if version != abi.CPU_VERSION:
            raise ValueError(f"{path}: {expected}, got ABI {version}")
        for name in ("error_string", "isa_name"):
            getattr(self._library, f"peftkern_{name}").restype = ctypes.c_char_p
        self._functions = {name: getattr(self._library, f"peftkern_{FUNCTIONS[name]}") for name in FUNCTIONS}
        for function in self._functions.values():
            function.argtypes = [ctypes.c_char_p]
        self.path = path
        self.name = f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()[:10]}"
        available = self._library.peftkern_isa_available
        self.isas = tuple(isa for isa, code in abi.ISAS.items() if code and available(code))

    def default_isa(self, dtype: torch.dtype) -> str:
        """The instruction set that ``"auto"`` selects for ``dtype``."""
        return str(self._library.peftkern_isa_name(self._library.peftkern_isa_default(abi.DTYPES[dtype])).decode())

    def run(self, direction: str, struct: bytes) -> None:
        """Make a call that :func:`pack` has packed.

        Raises:
            RuntimeError: with the library's reason.
        """
        if status := self._functions[direction](struct):
            reason = self._library.peftkern_error_string(status).decode()
            raise RuntimeError(f"{self.name}: {FUNCTIONS[direction]}: {reason}")


@dataclass(frozen=True)
class Packed:
    """One problem's calls.

    Attributes:
        structs: ``peftkern_attention`` and ``peftkern_attention_backward`` by direction.
        results: what each direction writes, by name.
        kept: owns the tensors that the structs point to.
    """

    structs: dict[str, bytes]
    results: dict[str, dict[str, Tensor]]
    kept: object


def attention_args(problem: Problem) -> AttentionArgs:
    """The problem as backends receive it."""
    shape, nothing = problem.shape, [None] * 10
    numbers = (shape.D**-0.5, True, shape.window, True, shape.softcap or 0.0, 0.0)
    return AttentionArgs(*problem.inputs, *nothing, *numbers)  # type: ignore[arg-type]


def pack(problem: Problem, isa: str, threads: int) -> Packed:
    """Pack the forward and the backward, with gradients of all five inputs, for an instruction set ("auto" too)."""
    args, dout = attention_args(problem), problem.dout
    out, lse = allocate_outputs(args)
    gradients = allocate_gradients(args, [True] * 5 + [False] * 4)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)  # which the structs hold
    try:
        tensors, copies = fill.attention_tensors(args, out, lse)
        forward, layout = fill.backward_constants(dout, None, out, args, gradients, isa)
    finally:
        torch.set_num_threads(before)
    pointers = {name: x.data_ptr() for name, x in gradients._asdict().items()}
    gradient_tensors = abi.GRADIENT_TENSORS.pack(dout=dout.data_ptr(), dlse=0, **pointers)
    written = {name: x for name, x in gradients._asdict().items() if name in ("dq", "dk", "dv")}
    written |= {name: x for name, x in gradients._asdict().items() if name in ("dprefix_k", "dprefix_v")}
    return Packed(
        {"forward": tensors + forward, "backward": tensors + forward + gradient_tensors + layout},
        {"forward": {"out": out, "lse": lse}, "backward": written},
        (args, dout, gradients, copies),
    )
