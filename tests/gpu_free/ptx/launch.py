# SPDX-License-Identifier: Apache-2.0
"""Runs ``kernel[grid](...)`` on CPU tensors with Triton's own launcher, by emulating the PTX compiled for a GPU.

A stand-in driver tells Triton which architecture to compile for. Triton then does what it does for a real GPU:
specialises on the arguments, compiles, and asks the driver to load and launch; here loading parses the PTX and
launching runs it in the emulator. Any kernel and any host code will do::

    with emulated("sm_80") as watch:
        kernel[grid](...)
    watch.launches[-1].counts
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from torch import Tensor

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver as active_driver

from peftkern.backends.triton import backend, launch

from ..aot import SHARED_MEMORY
from . import machine
from .machine import Buffer, Counts, TensorMap, Violation

__all__ = ["Launch", "Violation", "Watch", "emulated"]


@dataclass
class Launch:
    """One launch and its arguments, (name, value), so that it can run again, perhaps with other PTX."""

    kernel: str
    ptx: str
    grid: tuple[int, ...]
    arguments: list[tuple[str, object]]
    shared: int
    read_only: list[Tensor]
    counts: Counts = field(default_factory=Counts)

    def run(self, seed: int = 0) -> Counts:
        """Run the launch; raises :class:`Violation`."""
        program = machine.load(self.ptx)
        maps = [value.map for _, value in self.arguments if isinstance(value, _Tiles)]
        values = [maps.index(x.map) if isinstance(x, _Tiles) else _bits(x) for _, x in self.arguments]
        values += [0] * (len(program.parameters) - len(values))  # Triton's scratch pointers
        protected = [_extent(x) for x in self.read_only if x.numel()]
        buffers = []
        for name, value in self.arguments:
            value = value.tensor if isinstance(value, _Tiles) else value
            if isinstance(value, Tensor) and value.numel():
                begin, end = _extent(value)
                inside = any(first <= begin and end <= last for first, last in protected)
                buffers.append(Buffer(begin, end - begin, name, inside, _gaps(value)))
        return machine.run(program, self.grid, values, buffers, self.shared, seed, maps)


@dataclass(frozen=True)
class _Tiles:
    """A tensor descriptor made by the host."""

    tensor: Tensor
    map: TensorMap


@dataclass
class Watch:
    """The launches within :func:`emulated`, in order."""

    launches: list[Launch] = field(default_factory=list)

    def of(self, kernel: str) -> list[Launch]:
        """The launches of kernels whose name contains ``kernel``."""
        return [launch for launch in self.launches if kernel in launch.kernel]


def _bits(value: object) -> int:
    if isinstance(value, Tensor):
        return value.data_ptr()
    if isinstance(value, float):
        return int(np.float32(value).view(np.uint32))
    return int(value)


def _extent(x: Tensor) -> tuple[int, int]:
    last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def _gaps(x: Tensor) -> np.ndarray | None:
    """Which bytes of a tensor's extent belong to elements; None if all do."""
    begin, end = _extent(x)
    if end - begin == x.numel() * x.element_size():
        return None
    allowed = torch.zeros((end - begin) // x.element_size(), dtype=torch.bool)
    allowed.as_strided(x.shape, x.stride()).fill_(True)
    return allowed.repeat_interleave(x.element_size()).to(torch.uint8).numpy()


class _Driver(DriverBase):
    """Triton's driver interface for a GPU that does not exist."""

    def __init__(
        self, arch: str, watch: Watch, seed: int, rewrite: Callable[[str, str], str], read_only: list[Tensor]
    ):
        self.arch, self.watch, self.seed, self.rewrite, self.read_only = arch, watch, seed, rewrite, read_only
        self.utils = SimpleNamespace(
            load_binary=lambda name, binary, shared, device: (None, binary.decode(), 0, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": SHARED_MEMORY[arch], "multiprocessor_count": 4},
        )

    @classmethod
    def is_active(cls) -> bool:
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_benchmarker(self):
        raise NotImplementedError("nothing is timed in the emulator")

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", int(self.arch.removeprefix("sm_")), 32)

    def get_current_device(self) -> str:
        return f"emulated {self.arch}"  # the key of Triton's caches

    def get_current_stream(self, device: object) -> int:
        return 0

    def launcher_cls(self, source, metadata):
        names, types = list(source.signature), list(source.signature.values())

        def run(x, y, z, stream, ptx, packed, launch_metadata, enter_hook, exit_hook, *values):
            drv = active_driver.active
            described = iter(metadata.tensordesc_meta or ())
            arguments = [
                a for n, t, v in zip(names, types, values, strict=True) for a in _flatten(n, t, v, described)
            ]
            kernel = source.fn.__name__
            record = Launch(
                kernel, drv.rewrite(kernel, ptx), (x, y, z), arguments, metadata.shared, drv.read_only
            )  # fmt: skip
            drv.watch.launches.append(record)
            record.counts = record.run(drv.seed)

        return run


def _flatten(name: str, kind: object, value: object, described: Iterator[dict]) -> Iterator[tuple[str, object]]:
    """(name, value) of each parameter of the compiled kernel, in order; ``described`` has the layouts of tiles."""
    if isinstance(kind, tuple):
        fields = getattr(value, "_fields", range(len(value)))
        for part, inner, x in zip(fields, kind, value, strict=True):
            yield from _flatten(f"{name}.{part}", inner, x, described)
    elif isinstance(kind, str) and kind.startswith("tensordesc"):
        layout, tensor = next(described), value.base.detach()
        strides = tuple(s * tensor.element_size() for s in value.strides)
        box = tuple(layout["block_size"])
        yield name, _Tiles(tensor, TensorMap(
            tensor.data_ptr(), tensor.element_size(), layout["swizzle"], tuple(value.shape), strides, box
        ))  # fmt: skip
        for part, numbers in (("shape", value.shape), ("strides", value.strides)):
            yield from ((f"{name}.{part}{i}", x) for i, x in enumerate(numbers))
    elif kind != "constexpr":
        yield name, value.detach() if isinstance(value, Tensor) else value


def _ptx_is_the_binary(*arguments):
    """Make the PTX the binary instead of a cubin. Without arguments: the key of such entries in Triton's cache."""
    if not arguments:
        return "emulated", "emulated"
    _, stages, *_ = arguments
    stages["cubin"] = lambda ptx, metadata: ptx.encode()
    return None


@contextlib.contextmanager
def emulated(
    arch: str,
    *,
    seed: int = 0,
    rewrite: Callable[[str, str], str] = lambda kernel, ptx: ptx,
    read_only: list[Tensor] = (),
    processors: int = 4,
) -> Iterator[Watch]:
    """Within the block Triton kernels run in the emulator, on CPU tensors, as compiled for ``arch``.

    ``rewrite`` (kernel, ptx) -> ptx plants faults; no kernel may store to ``read_only``; ``processors`` is how many
    the GPU is said to have.
    """
    watch = Watch()
    previous = active_driver._active
    active_driver.set_active(_Driver(arch, watch, seed, rewrite, list(read_only)))
    try:
        with (
            mock.patch.object(knobs.runtime, "add_stages_inspection_hook", _ptx_is_the_binary),
            mock.patch.object(launch, "architecture", return_value=arch),
            mock.patch.object(launch, "processors", return_value=processors),
            mock.patch.object(backend, "lacks", return_value=[]),
        ):
            yield watch
    finally:
        active_driver.set_active(previous)
