# SPDX-License-Identifier: Apache-2.0
"""The CUDA library for a CPU: csrc/cuda built by g++ with every access checked, and loaded in the real one's place.

A thread of a block is a fiber. Threads and blocks run in random order; shared and global memory are checked for
races, bounds, alignment and reads of what was never written, barriers for divergence, cp.async for missing waits.
What the package allocates starts as NaN; what it is given may be read within its bounds and not written.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from peftkern import native
from tests import faults

HERE = Path(__file__).parent
ROOT = HERE.parent.parent.parent
_CACHE = ROOT / "build" / "shim"
HEAD_DIMS = (64, 96, 128, 256)
#: Source files that are compiled once per head dim.
FAMILIES = ("prefix_forward", "prefix_backward", "sequence_forward", "sequence_backward")
_FLAGS = (
    "-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-w", "-DPEFTKERN_HOST_SHIM", "-DPEFTKERN_BUILD_LIBRARY",
    f"-I{HERE}",
)  # fmt: skip
CHECKED = ("-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0", "-Wno-tsan")


#: Executes launches in place of the shim: kernel, grid, threads, bytes of shared memory, parameters, their bytes.
LAUNCHER = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_int64, ctypes.POINTER(ctypes.c_uint), ctypes.c_int, ctypes.c_int, ctypes.c_void_p,
    ctypes.c_int64,
)  # fmt: skip


def sources() -> dict[str, str]:
    """The texts of csrc/cuda by their paths below it."""
    return faults.read(ROOT / "csrc" / "cuda", ".cu", ".cuh", ".h")


@functools.lru_cache
def build(edit=None, head_dims: tuple[int, ...] = HEAD_DIMS) -> Path:
    """The library. ``edit(sources) -> sources`` plants a fault. What has been built before is not built again."""
    csrc = sources()
    if edit is not None:
        csrc = edit(csrc)
    abi = (ROOT / "csrc" / "peftkern.h").read_text()
    code = _CACHE / _key(csrc, abi) / "cuda"
    code.mkdir(parents=True, exist_ok=True)
    (code.parent / "peftkern.h").write_text(abi)
    for name, text in csrc.items():
        (code / name).parent.mkdir(exist_ok=True)
        (code / name).write_text(text)
    jobs = [(HERE / "runtime.cpp", [])]
    for name, text in csrc.items():
        if name.endswith(".cu"):
            dims = head_dims if "PEFTKERN_HEAD_DIM" in text else (0,)
            jobs += [(code / name, [*CHECKED, f"-DPEFTKERN_HEAD_DIM={dim}"]) for dim in dims]
    return link(jobs)


@functools.lru_cache
def probes() -> ctypes.CDLL:
    """The kernels of probes.cpp, and the runtime under them."""
    return declare(ctypes.CDLL(str(link([(HERE / "runtime.cpp", []), (HERE / "probes.cpp", [*CHECKED])]))))


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Set the argument and result types of the runtime's functions, and return the library."""
    library.shim_message.restype = ctypes.c_char_p
    library.shim_register.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int, ctypes.c_char_p]
    library.shim_launches.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    library.shim_launches.restype = ctypes.c_int64
    return library


def link(jobs: list[tuple[Path, list[str]]]) -> Path:
    """A shared library of C++ sources with their flags."""
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        objects = list(pool.map(lambda job: _compile(*job), jobs))
    return _made(_CACHE / f"{_key([path.name for path in objects])}.so", ["-shared", *map(str, objects)])


def _compile(source: Path, flags: list[str]) -> Path:
    flags = [*_FLAGS, *flags, "-x", "c++"]
    preprocessed = subprocess.run(
        ["g++", *flags, "-E", "-P", str(source)], capture_output=True, text=True, check=True
    )
    relevant = [flag for flag in flags if not flag.startswith("-I")]
    target = _CACHE / f"{source.stem}-{_key(relevant, preprocessed.stdout)}.o"
    return _made(target, [*flags, "-c", str(source)])


def _made(target: Path, arguments: list[str]) -> Path:
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_suffix(f".{os.getpid()}")
        done = subprocess.run(["g++", "-o", str(temporary), *arguments], capture_output=True, text=True)
        assert done.returncode == 0, f"{target.name} does not build for the shim:\n{done.stderr[:4000]}"
        temporary.replace(target)
    return target


def _key(*parts) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


@functools.lru_cache
def symbols(library: str) -> dict[int, str]:
    """The names of the functions of a shared library, mangled, by their offsets in it."""
    listed = subprocess.run(["nm", library], capture_output=True, text=True, check=True).stdout
    return {int(x[0], 16): x[2] for x in map(str.split, listed.splitlines()) if len(x) == 3}


class Launch(NamedTuple):
    """One launch of a kernel: ``grid`` and ``threads`` of a block, bytes of dynamic shared memory, device."""

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    device: int

    @property
    def blocks(self) -> int:
        return math.prod(self.grid)


class Shim:
    """The library in place of the package's, for a test. ``seed`` orders threads, ``preempt`` switches them more."""

    def __init__(self, monkeypatch, seed: int = 0, preempt: bool = False, edit=None, head_dims=HEAD_DIMS) -> None:
        # lazy: a build of some head dims lacks the others' kernels
        self.library = declare(ctypes.CDLL(str(build(edit, head_dims)), mode=os.RTLD_LAZY))
        native.cuda.declare(self.library)
        self._writable: dict[int, torch.Tensor] = {}  # storages that kernels may write
        self._registered: dict[tuple[int, int], torch.Tensor] = {}  # kept alive: no address is used twice
        self.reset(seed, preempt)
        monkeypatch.setattr(native.cuda, "_library", self.library)
        monkeypatch.setattr(native.cuda, "MISSING", "")
        monkeypatch.setattr(native.cuda, "DEVICE_TYPE", "cpu")
        self._data_ptr = torch.Tensor.data_ptr
        monkeypatch.setattr(torch.Tensor, "data_ptr", lambda x: self._patched_data_ptr(x))
        for name in ("new_empty", "new_empty_strided"):
            allocate = functools.partial(self._patched_allocation, getattr(torch.Tensor, name))
            monkeypatch.setattr(torch.Tensor, name, lambda x, *a, _allocate=allocate, **k: _allocate(x, *a, **k))

    def reset(self, seed: int = 0, preempt: bool = False) -> None:
        """Forget all buffers and counts."""
        self.library.shim_reset(seed, int(preempt))
        self._registered.clear()

    def writable(self, *tensors: torch.Tensor) -> None:
        """Kernels may write these."""
        self._writable.update((x.untyped_storage().data_ptr(), x) for x in tensors)

    def counters(self) -> dict[str, int]:
        """Bytes of global memory loaded and stored, and tensor core instructions, since the last reset."""
        values = (ctypes.c_int64 * 3)()
        self.library.shim_counters(values)
        return dict(zip(("loaded", "stored", "mma"), values, strict=True))

    def launches(self) -> list[Launch]:
        """The launches since the last reset, in order."""
        count = self.library.shim_launches(None, 0)
        fields = (ctypes.c_int64 * (7 * count))()
        self.library.shim_launches(fields, count)
        names = symbols(self.library._name)
        return [
            Launch(re.search(r"peftkern\d+([a-z_]+)", names[kernel])[1], (x, y, z), *rest)
            for kernel, x, y, z, *rest in (fields[i : i + 7] for i in range(0, 7 * count, 7))
        ]

    @contextlib.contextmanager
    def only_recording(self, succeed: bool = True) -> Iterator[None]:
        """Within the block launches are listed and not executed; they succeed, or fail."""
        launcher = LAUNCHER(lambda *_: succeed)
        self.library.shim_set_launcher(launcher)
        yield
        self.library.shim_set_launcher(LAUNCHER())

    @property
    def device(self) -> int:
        """The current device of the CUDA runtime, which has two."""
        return self.library.shim_device()

    @device.setter
    def device(self, device: int) -> None:
        self.library.shim_set_device(device)

    def _patched_allocation(self, allocate, x, *args, **kwargs):
        tensor = allocate(x, *args, **kwargs)
        if _called_by_the_package():
            if tensor.is_floating_point():
                tensor.fill_(math.nan)
            self.writable(tensor)
        return tensor

    def _patched_data_ptr(self, x) -> int:
        address = self._data_ptr(x)
        if x.numel() and _called_by_the_package():
            size = (1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))) * x.element_size()
            if (address, size) not in self._registered:
                writable = x.untyped_storage().data_ptr() in self._writable
                initialised = not (writable and x.is_floating_point() and x.isnan().all())
                name = f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
                self.library.shim_register(address, size, writable, initialised, name.encode())
                self._registered[address, size] = x
        return address


def _called_by_the_package() -> bool:
    return sys._getframe(3).f_globals["__name__"].startswith("peftkern")
