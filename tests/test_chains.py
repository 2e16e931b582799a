# SPDX-License-Identifier: Apache-2.0
"""Sequences with several prefixes, and prefixes that lie in k and v: against one call per sequence with torch.cat."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from peftkern import backends, prefix_attention, reference
from peftkern.testing.cases import Shape, tensors

#: Two prefixes of a bank, and three in k and v: the first sequence, a part of it, and the second sequence.
OFFSETS = torch.tensor([0, 6, 10, 15, 20])
STARTS, LENS = torch.tensor([0, 2, 6]), torch.tensor([3, 2, 6, 3, 4])
IDS = torch.tensor([[0, -1, -1], [1, 2, -1], [-1, 3, 4], [4, 2, 4]])
SHARED = {"cu_seqlens": OFFSETS, "prefix_ids": IDS, "prefix_lens": LENS, "prefix_starts": STARTS}
SHAPE = Shape(B=1, S=20, P=3, A=2)


def _by_cat(q, k, v, prefix_k, prefix_v, *, cu_seqlens, prefix_ids, prefix_lens, prefix_starts=None, **options):
    """One call per sequence, whose prefix is the concatenation of its prefixes."""
    starts = [0] * len(prefix_k) + ([] if prefix_starts is None else prefix_starts.tolist())
    outs = []
    for row, first, last in zip(prefix_ids.tolist(), cu_seqlens[:-1], cu_seqlens[1:], strict=True):
        keys, values = ([x.new_zeros(x.shape[1], 0, x.shape[3])] for x in (k, v))
        for i in (i for i in row if i >= 0):
            rows = slice(starts[i], starts[i] + int(prefix_lens[i]))
            keys.append(prefix_k[i, :, rows] if i < len(prefix_k) else k[0, :, rows])
            values.append(prefix_v[i, :, rows] if i < len(prefix_k) else v[0, :, rows])
        part = (x[:, :, first:last] for x in (q, k, v))
        out, _ = reference.prefix_attention(*part, torch.cat(keys, 1), torch.cat(values, 1), **options)
        outs.append(out)
    return torch.cat(outs, 2)


def _results(attention, inputs, options):
    leaves = [x.detach().requires_grad_() for x in inputs.values()]
    out = attention(*leaves, **options)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return dict(zip(("out", *inputs), (out, *torch.autograd.grad(out, leaves, dout.to(out.dtype))), strict=True))


WINDOWS = [{}, {"window": 7}, {"window": 12}, {"causal": False, "softcap": 2.0}]


@pytest.mark.parametrize("backend", backends.available_backends())
@pytest.mark.parametrize("options", WINDOWS, ids=str)
def test_chains_are_concatenations(options, backend, poisoned):
    dtype = torch.float64 if backend == "reference" else torch.float32
    inputs = tensors(SHAPE, dtype)
    got = _results(prefix_attention, inputs, {**SHARED, **options, "backend": backend})
    want = _results(_by_cat, {n: x.double() for n, x in inputs.items()}, {**SHARED, **options})
    tolerance = 1e-12 if backend == "reference" else 1e-5
    for name, x in got.items():
        difference = (x.double() - want[name]).abs().max()
        assert difference <= tolerance, f"{name} differs by {difference}"


def test_the_reference_has_the_gradients_of_its_results():
    shape = Shape(B=1, Hq=2, Hkv=1, S=20, P=3, D=2, A=2)
    inputs = {n: x.contiguous().requires_grad_() for n, x in tensors(shape).items()}
    assert gradcheck(lambda *x: reference.prefix_attention(*x, **SHARED), tuple(inputs.values()))
