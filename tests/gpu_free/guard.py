# SPDX-License-Identifier: Apache-2.0
"""Watches kernels in Triton's interpreter: addresses, alignment, double stores, bytes moved."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from unittest import mock

import numpy as np
import torch
from triton.runtime import interpreter

from peftkern.backends.triton.interpreter import repair


class Fault(Exception):
    """An error that a GPU would not report."""


class Guard:
    """Bytes that the launches under :func:`guard` load and store, by kernel."""

    def __init__(self) -> None:
        self.loads: Counter[str] = Counter()
        self.stores: Counter[str] = Counter()
        self.kernel = ""
        self._ranges: list[tuple[int, int, int, str]] = []  # (start, end, element size, name)
        self._writers: dict[int, tuple[int, int, int]] = {}  # address -> program

    def enter(self, kernel: str, arguments: dict[str, object]) -> None:
        """Prepare for a launch: forget the last one."""
        self.kernel = kernel
        self._ranges.clear()
        self._writers.clear()
        self._allow(arguments)

    def _allow(self, arguments: dict[str, object]) -> None:
        """Allow accesses to a tensor from its first element to its last, gaps between its rows included."""
        for name, value in arguments.items():
            if isinstance(value, tuple):
                names = getattr(value, "_fields", range(len(value)))
                self._allow({f"{name}.{field}": x for field, x in zip(names, value, strict=True)})
            elif isinstance(value, torch.Tensor) and value.numel():
                last = sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
                start, size = value.data_ptr(), value.element_size()
                self._ranges.append((start, start + (last + 1) * size, size, name))

    def check(self, what: str, program: tuple[int, int, int], pointers: np.ndarray, mask: np.ndarray, size: int):
        """Check that all active addresses are aligned and within the launch's arguments, and return them."""
        active = pointers[np.broadcast_to(mask, pointers.shape).astype(bool)].ravel()
        inside = np.zeros(active.shape, bool)
        for start, end, _, _ in self._ranges:
            inside |= (active >= start) & (active + size <= end)
        if not inside.all():
            first = int(active[~inside][0])
            start, end, _, name = min(self._ranges, key=lambda r: min(abs(first - r[0]), abs(first - r[1])))
            raise Fault(
                f"{self.kernel}: {what} out of bounds in program {program}: {(~inside).sum()} of {active.size} "
                f"addresses, the first {first - start:+d} bytes from the start of {name} ({end - start} bytes)"
            )
        if (active % size).any():
            raise Fault(f"{self.kernel}: misaligned {what} in program {program}")
        return active

    def stored(self, program: tuple[int, int, int], active: np.ndarray) -> None:
        """Check that a launch stores to no address twice: on a GPU the order would be undefined."""
        if np.unique(active).size != active.size:
            raise Fault(f"{self.kernel}: one store writes an address twice in program {program}")
        addresses = active.tolist()
        clash = next((a for a in addresses if a in self._writers), None)
        if clash is not None:
            raise Fault(f"{self.kernel}: programs {self._writers[clash]} and {program} store to one address")
        self._writers.update(dict.fromkeys(addresses, program))


@contextlib.contextmanager
def guard() -> Iterator[Guard]:
    """Within the block every launch in the interpreter is checked. A :class:`Fault` is raised inside the kernel."""
    repair()
    builder = interpreter.InterpreterBuilder
    load, store, launch = builder.create_masked_load, builder.create_masked_store, interpreter.GridExecutor.__call__
    watch = Guard()

    # the parameters after the named ones differ between versions of Triton
    def create_masked_load(self, ptrs, mask, other, *policy, **policies):
        size = ptrs.get_element_ty().primitive_bitwidth // 8
        active = watch.check("load", self.grid_idx, ptrs.data, mask.data, size)
        watch.loads[watch.kernel] += active.size * size
        if other is None and 1 != ptrs.data.size != active.size:  # the interpreter drops a scalar's other=0
            raise Fault(f"{watch.kernel}: masked load without other= in program {self.grid_idx}")
        return load(self, ptrs, mask, other, *policy, **policies)

    def create_masked_store(self, ptrs, value, mask, *policy, **policies):
        size = ptrs.get_element_ty().primitive_bitwidth // 8
        active = watch.check("store", self.grid_idx, ptrs.data, mask.data, size)
        watch.stores[watch.kernel] += active.size * size
        watch.stored(self.grid_idx, active)
        return store(self, ptrs, value, mask, *policy, **policies)

    def call(self, *args, **kwargs):
        watch.enter(self.fn.__name__, {**dict(zip(self.arg_names, args, strict=False)), **kwargs})
        return launch(self, *args, **kwargs)

    with (
        mock.patch.object(builder, "create_masked_load", create_masked_load),
        mock.patch.object(builder, "create_masked_store", create_masked_store),
        mock.patch.object(interpreter.GridExecutor, "__call__", call),
    ):
        yield watch
