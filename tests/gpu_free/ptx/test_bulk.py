# SPDX-License-Identifier: Apache-2.0
"""Tensor memory accelerator and mbarrier, in a matrix product whose tiles Triton moves by descriptors (sm_90).

The project's kernels load through pointers, which become cp.async on sm_90 too; this is what they would use with
descriptors made by the host. Descriptors made on the device (tensormap.replace), multicast and clusters are not
emulated.
"""

from __future__ import annotations

import os
import re

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import Violation, emulated
from .mutate import spans_of, without

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton compiles nothing there")


@triton.jit
def _product_kernel(a, b, c, length, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """c [M, N] = a [M, K] b [N, K]^T."""
    row, column = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, length, BLOCK_K):
        total = tl.dot(a.load([row, k]), b.load([column, k]).T, total)
    c.store([row, column], total.to(tl.float16))


def _product(block_k: int, seed: int = 0, rewrite=lambda kernel, ptx: ptx, m: int = 100, n: int = 72, k: int = 104):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(rows, k, generator=generator).half() for rows in (m, n))
    c = torch.full((m, n), torch.nan, dtype=torch.float16)
    blocks = ((a, [64, block_k]), (b, [64, block_k]), (c, [64, 64]))
    with emulated("sm_90", seed=seed, rewrite=rewrite, read_only=[a, b]) as watch:
        _product_kernel[(triton.cdiv(m, 64), triton.cdiv(n, 64))](
            *(TensorDescriptor.from_tensor(x, block) for x, block in blocks), k, 64, 64, block_k, num_warps=4,
            num_stages=3,
        )  # fmt: skip
    torch.testing.assert_close(c, (a.double() @ b.double().T).half(), rtol=2e-3, atol=2e-3)
    return watch.launches[0]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("block_k", [16, 32, 64])
def test_tiles_by_descriptors(block_k, seed):
    """Rows of 32, 64 and 128 bytes, each with its swizzle; tiles that hang over each edge are filled with zeros."""
    launch = _product(block_k, seed)
    assert "cp.async.bulk.tensor.2d" in launch.ptx
    assert launch.counts.mma > 0


FAULTS = {
    "wait for a tile": (r"@!complete bra\.uni waitLoop;", r"not waited for|race"),
    "expected bytes": (r"@%p\d+ mbarrier\.arrive\.expect_tx[^;]*;", r"deadlock|not waited for|race"),
    "initialisation": (r"@%p\d+ mbarrier\.init[^;]*;", r"no mbarrier was initialised"),
    "fence before the store": (r"fence\.proxy\.async[^;]*;", r"no fence\.proxy\.async"),
    "wait for wgmma": (r"wgmma\.wait_group\.sync\.aligned \d;", r"accumulator|write after a read by wgmma"),
}


@pytest.mark.parametrize("what", FAULTS)
def test_dropped_synchronisation_is_reported(what):
    """All of a kind, in one of a few orders."""
    pattern, message = FAULTS[what]

    def drop(kernel, ptx):
        found = spans_of(ptx, pattern)
        assert found
        return without(ptx, found)

    with pytest.raises(Violation, match=message):
        _in_several_orders(drop)


def _in_several_orders(rewrite):
    for seed in range(8):
        _product(32, seed, rewrite)


@pytest.mark.slow
def test_each_barrier_of_the_pipeline_is_told_or_orders_nothing():
    def findings(dropped):
        for seed in range(3):
            try:
                _product(32, seed, lambda kernel, ptx: without(ptx, dropped))
            except (Violation, AssertionError) as finding:
                return str(finding)
        return None

    ptx = _product(32).ptx
    sites = spans_of(ptx, r"bar\.sync\s+0;")
    spare = [site for site in sites if findings([site]) is None]
    together: list[tuple[int, int]] = []
    for site in spare:
        if findings([*together, site]) is None:
            together.append(site)
    print(f"{len(sites) - len(spare)} of {len(sites)} barriers reported, {len(together)} order nothing together")
    assert len(sites) > len(spare)
    assert re.search(r"bar\.sync", without(ptx, together)), "no barrier is needed at all?"
