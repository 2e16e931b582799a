# SPDX-License-Identifier: Apache-2.0
"""Records, without a GPU, what each call launches: kernels, grids, arguments, and how often Triton would compile.

Triton's own ``JITFunction.run`` binds and specialises the arguments, for a device that does not exist. Nothing is
compiled, and no kernel runs. Kernels that are launched in another way are recorded by :meth:`Recorder.add`.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from peftkern.backends.triton import backend, launch

_DEVICES = itertools.count(1000)  # one for each recorder, whose cache of compiled kernels is empty


class Launch(NamedTuple):
    """One launch.

    Attributes:
        kernel: the kernel's name.
        grid: the number of programs or blocks in each direction, or their total number.
        arguments: the values that the kernel receives, by name.
        variant: which of the kernel's compiled variants it is; the same for all launches of code built ahead of time.
    """

    kernel: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    variant: str = ""


class Recorder:
    """The launches under :func:`recorder`, in order."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []

    def add(self, recorded: Launch) -> None:
        """Record one launch."""
        self.launches.append(recorded)

    def counts(self) -> Counter[str]:
        """The number of launches of each kernel."""
        return Counter(x.kernel for x in self.launches)

    def variants(self) -> dict[str, int]:
        """The number of compiled variants of each kernel."""
        found: defaultdict[str, set[str]] = defaultdict(set)
        for x in self.launches:
            found[x.kernel].add(x.variant)
        return {kernel: len(variants) for kernel, variants in found.items()}


class _Compiled:
    """What Triton's launcher calls once it has bound the arguments."""

    function = packed_metadata = None

    def __init__(self, recorder: Recorder, kernel: JITFunction, variant: str) -> None:
        self.recorder, self.kernel, self.variant = recorder, kernel, variant

    def launch_metadata(self, *arguments: object) -> None:
        return None

    def run(
        self, x: int, y: int, z: int, stream: int, function: None, metadata: None, launch_metadata: None,
        enter: object, leave: object, *values: Any,
    ) -> None:  # fmt: skip
        named = dict(zip(self.kernel.arg_names, values, strict=True))
        self.recorder.add(Launch(self.kernel.__name__, (x, y, z), named, self.variant))


@contextlib.contextmanager
def gpu_of(arch: str) -> Iterator[None]:
    """Within the block the Triton backend takes CPU tensors for those of a GPU of ``arch``."""
    with (
        mock.patch.object(launch, "architecture", return_value=arch),
        mock.patch.object(launch, "processors", return_value=128),
        mock.patch.object(backend, "lacks", return_value=[]),
    ):
        yield


@contextlib.contextmanager
def recorder(arch: str = "sm_90") -> Iterator[Recorder]:
    """Within the block Triton launches on CPU tensors are recorded, as if on a GPU of ``arch``."""
    recorded, number = Recorder(), next(_DEVICES)
    device = mock.Mock()
    device.get_current_device.return_value = number
    device.get_current_stream.return_value = 0
    device.get_current_target.return_value = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)

    def compile_nothing(
        kernel: JITFunction, key: str, signature: object, where: int, *described: object
    ) -> _Compiled:
        compiled = _Compiled(recorded, kernel, key)
        kernel.device_caches[where][0][key] = compiled
        return compiled

    with (
        gpu_of(arch),
        mock.patch.object(driver, "_active", device),
        mock.patch.object(JITFunction, "_do_compile", compile_nothing),
    ):
        yield recorded
