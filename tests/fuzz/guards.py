# SPDX-License-Identifier: Apache-2.0
"""Tensors between pages that nobody may access: one byte too far ends the process.

A tensor starts where its first page starts, or ends where its last page ends. What lies between the rows of a slice
is NaN, and so is all that a kernel is to write.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
from collections.abc import Iterator, Sequence
from typing import Literal
from unittest import mock

import torch
from torch import Tensor

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_PROT_NONE = 0
_PAGE = mmap.PAGESIZE

Place = Literal["start", "end"]


def empty(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype, place: Place) -> Tensor:
    """A tensor of NaN, or of numbers that are no index, whose memory has a guard page before it and one behind."""
    if 0 in size:
        return torch.empty(0, dtype=dtype).as_strided(size, stride)
    count = 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    length = count * dtype.itemsize
    pages = -(-length // _PAGE)
    memory = mmap.mmap(-1, (pages + 2) * _PAGE)
    offset = _PAGE if place == "start" else _PAGE + pages * _PAGE - length
    flat = torch.frombuffer(memory, dtype=dtype, count=count, offset=offset)
    base = flat.data_ptr() - offset
    for page in (base, base + (pages + 1) * _PAGE):
        if _LIBC.mprotect(page, _PAGE, _PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
    flat.fill_(float("nan") if dtype.is_floating_point else True if dtype == torch.bool else -(2**30))
    return flat.as_strided(size, stride)


def moved(x: Tensor, place: Place) -> Tensor:
    """A copy of a tensor in guarded memory, with its strides."""
    new = empty(x.shape, x.stride(), x.dtype, place)
    if x.numel():
        once = [slice(0, 1) if step == 0 else slice(None) for step in x.stride()]  # an expanded dim is written once
        new[tuple(once)].copy_(x[tuple(once)]) if x.dim() else new.copy_(x)
    return new


@contextlib.contextmanager
def allocating(place: Place) -> Iterator[None]:
    """Within the block, what the package allocates for a kernel to write lies in guarded memory."""
    originals = {name: getattr(Tensor, name) for name in ("new_empty", "new_empty_strided")}

    def of_package() -> bool:
        return sys._getframe(2).f_globals["__name__"].startswith("peftkern")

    def new_empty(self: Tensor, *size, dtype=None, device=None) -> Tensor:
        if not of_package():
            return originals["new_empty"](self, *size, dtype=dtype, device=device)
        sizes = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        return empty(sizes, _dense(sizes), dtype or self.dtype, place)

    def new_empty_strided(self: Tensor, size, stride, dtype=None, device=None) -> Tensor:
        if not of_package():
            return originals["new_empty_strided"](self, size, stride, dtype=dtype, device=device)
        return empty(size, stride, dtype or self.dtype, place)

    with mock.patch.multiple(Tensor, new_empty=new_empty, new_empty_strided=new_empty_strided):
        yield


def _dense(sizes: Sequence[int]) -> list[int]:
    strides = [1]
    for n in reversed(sizes[1:]):
        strides.insert(0, strides[0] * max(n, 1))
    return strides[: len(sizes)]
