# SPDX-License-Identifier: Apache-2.0
"""What torch's attention kernels are given: tested with the one that runs on CPUs."""

from __future__ import annotations

import pytest
import torch

from peftkern.backends import torch_attention
from peftkern.backends.torch_attention import KERNELS, KernelInputs

CPU = next(kernel for kernel in KERNELS if kernel.name == "cpu flash")


@pytest.mark.parametrize("queries", [1, 9])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_causal_attention_is_aligned_at_the_end(queries, kv_heads):
    """The kernel aligns at the start; a single query at the end sees every key."""
    keys, scale = 9, 0.3
    q = torch.randn(2, 4, queries, 16, requires_grad=True)
    k, v = (torch.randn(2, kv_heads, keys, 16, requires_grad=True) for _ in range(2))
    inputs = KernelInputs(q, k, v, scale, True, None, None)
    with torch.no_grad():
        out, lse = torch_attention.attention(CPU, inputs)
    repeated = [x.repeat_interleave(4 // kv_heads, 1) for x in (k, v)]
    scores = scale * q @ repeated[0].mT
    hidden = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
    weights = scores.masked_fill(hidden, -torch.inf)
    want = weights.softmax(-1) @ repeated[1]
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, weights.logsumexp(-1), rtol=1e-4, atol=1e-5)
    dout = torch.randn_like(out)
    with torch.no_grad():
        got = torch_attention.attention_backward(CPU, dout, out, lse, inputs)
    for x, y in zip(got, torch.autograd.grad(want, (q, k, v), dout), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
