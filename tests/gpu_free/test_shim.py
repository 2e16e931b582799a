# SPDX-License-Identifier: Apache-2.0
"""The host shim itself: its instructions against the tables of the PTX ISA, and every mistake that it must name."""

from __future__ import annotations

import ctypes
import re

import pytest
import torch

from . import shim

LANES = range(32)


@pytest.fixture(scope="module")
def probes() -> ctypes.CDLL:
    return shim.probes()


def _run(probes, function: str, kind: int, *inputs: torch.Tensor, out: torch.Tensor) -> str:
    """Run a probe and return what a check said, empty if none failed."""
    for x in inputs:
        probes.shim_register(x.data_ptr(), x.numel() * x.element_size(), 0, 1, b"in")
    probes.shim_register(out.data_ptr(), out.numel() * out.element_size(), 1, 0, b"out")
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (*inputs, out)]
    return probes.shim_message().decode() if getattr(probes, function)(kind, *pointers) else ""


def _instruction(probes, kind: int, a: torch.Tensor, b: torch.Tensor | None = None, out_words: int = 128):
    probes.shim_reset(0, 0)
    out = torch.zeros(out_words, dtype=torch.int32)
    b = torch.zeros(64, dtype=torch.int32) if b is None else b
    assert _run(probes, "probe_instruction", kind, a.contiguous(), b.contiguous(), out=out) == ""
    return out


# The tables of the PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type": (row, column) of element i
# of a lane, with groupID = lane >> 2 and threadID_in_group = lane % 4.
def fragment_a(lane: int, i: int) -> tuple[int, int]:
    row = lane >> 2 if 0 <= i < 2 or 4 <= i < 6 else (lane >> 2) + 8
    column = lane % 4 * 2 + (i & 1) if i < 4 else lane % 4 * 2 + (i & 1) + 8
    return row, column


def fragment_b(lane: int, i: int) -> tuple[int, int]:
    row = lane % 4 * 2 + (i & 1) if i < 2 else lane % 4 * 2 + (i & 1) + 8
    return row, lane >> 2


def fragment_d(lane: int, i: int) -> tuple[int, int]:
    row = lane >> 2 if i < 2 else (lane >> 2) + 8
    return row, lane % 4 * 2 + (i & 1)


def _words(x: torch.Tensor) -> torch.Tensor:
    """Pairs of 16-bit elements as 32-bit words, the first in the low half."""
    return x.contiguous().view(torch.int32).flatten()


@pytest.mark.parametrize(("kind", "dtype"), [(0, torch.float16), (1, torch.bfloat16)])
def test_mma_fragments_are_those_of_the_isa(probes, kind, dtype):
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    fragments_a = torch.stack([torch.stack([a[fragment_a(lane, i)] for i in range(8)]) for lane in LANES])
    fragments_b = torch.stack([torch.stack([b[fragment_b(lane, i)] for i in range(4)]) for lane in LANES])
    out = _instruction(probes, kind, _words(fragments_a), _words(fragments_b)).view(torch.float32).view(32, 4)
    product = a.double() @ b.double()
    expected = torch.stack([torch.stack([product[fragment_d(lane, i)] for i in range(4)]) for lane in LANES])
    torch.testing.assert_close(out, expected.float(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_is_that_of_the_isa(probes, transposed):
    """Lane 8 j + r addresses row r of matrix j; lane l gets row l / 4, elements 2 (l % 4) and the next, of each."""
    matrices = torch.arange(256, dtype=torch.int16).view(4, 8, 8)
    out = _instruction(probes, 3 if transposed else 2, _words(matrices)).view(torch.int16).view(32, 4, 2)
    given = matrices.transpose(1, 2) if transposed else matrices
    for lane in LANES:
        assert torch.equal(out[lane], given[:, lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2]), f"lane {lane}"


@pytest.mark.parametrize(("kind", "dtype"), [(4, torch.float16), (5, torch.bfloat16)])
def test_conversion_rounds_to_nearest_even(probes, kind, dtype):
    x = torch.randn(64) * torch.logspace(-6, 4, 64)
    x[:4] = torch.tensor([1.00390625, 1.01171875, 65520.0, -0.0])  # ties, and the edge of fp16
    out = _instruction(probes, kind, x.view(torch.int32), out_words=32)
    assert torch.equal(out.view(torch.int16), x.to(dtype).view(torch.int16))


def test_shuffle_exchanges_lanes(probes):
    x = torch.randint(2**31, (32,), dtype=torch.int32)
    assert torch.equal(_instruction(probes, 6, x, out_words=32), x[torch.arange(32) ^ 5])


MISTAKES = {
    1: "shared-memory race|uninitialised shared memory",  # by which thread came first
    3: "shared-memory race|uninitialised shared memory",
    5: "shared-memory race",
    7: "uninitialised shared memory",
    9: "the thread ends while a cp.async is under way",
    11: "uninitialised shared memory",
    13: "shared memory out of bounds",
    15: "global memory out of bounds: write of 4 bytes at out",
    17: "write to the read-only buffer in",
    19: "a barrier waits for threads that have ended",
    21: "warp divergence: .* meets",
    23: "global-memory race at out",
    25: "misaligned access of 16 bytes at in",
    27: "uninitialised global memory at out",
}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_named_and_its_correction_passes(probes, kind, seed):
    for right in (True, False):
        probes.shim_reset(seed, 0)
        given, out = torch.ones(256), torch.zeros(64)
        message = _run(probes, "probe_mistake", kind - right, given, out=out)
        if right:
            assert message == ""
        else:
            assert re.search(MISTAKES[kind], message), message
