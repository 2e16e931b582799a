# SPDX-License-Identifier: Apache-2.0
"""The oracle equals the reference in blocks and for some heads; the examples of peftkern.testing run."""

from __future__ import annotations

import doctest

import pytest
import torch

from peftkern import reference, testing
from peftkern.testing import bounds, cases, error_analysis, oracle

CASES = [
    (testing.Shape(B=2, Hq=4, Hkv=2, S=5, T=17, P=7, D=16), {}),
    (testing.Shape(B=2, Hq=4, Hkv=2, S=33, P=9, D=16), {"window": 12}),
    (testing.Shape(B=1, Hq=4, Hkv=2, S=33, P=9, D=16), {"window": 12, "softcap": 5.0}),
    (testing.Shape(B=1, Hq=2, Hkv=2, S=9, P=5, D=8), {"scale": 0.3}),
    (testing.Shape(B=2, Hq=4, Hkv=2, S=5, T=17, P=7, D=16, Dv=12), {}),
    (testing.Shape(B=1, Hq=4, Hkv=2, S=33, P=9, D=16, Dv=24), {"window": 12}),
]


def _exact(inputs, dout, options):
    leaves = [x.double().requires_grad_() for x in inputs]
    out, _ = reference.prefix_attention(*leaves, **options)
    return out.detach(), torch.autograd.grad(out, leaves, dout.double())


@pytest.mark.parametrize("block", [oracle.BLOCK, 64])
@pytest.mark.parametrize(("shape", "options"), CASES, ids=[str(shape) for shape, _ in CASES])
def test_blocks_give_the_reference(monkeypatch, shape, options, block):
    monkeypatch.setattr(oracle, "BLOCK", block)
    inputs = list(testing.tensors(shape, torch.float32).values())
    dout = torch.randn(shape.B, shape.Hq, shape.S, shape.value_dim)
    found = testing.Oracle(*inputs, dout=dout, **options)
    out, gradients = _exact(inputs, dout, options)
    for got, true in zip([found.out(), *found.gradients()], [out, *gradients], strict=True):
        torch.testing.assert_close(got, true, rtol=1e-12, atol=1e-12)


def test_large_calls_compare_the_outer_heads(monkeypatch):
    monkeypatch.setattr(oracle, "ALL_HEADS", 8)
    inputs = list(testing.tensors(testing.Shape(Hq=6, Hkv=3), torch.float64).values())
    dout = torch.randn_like(inputs[0])
    found = testing.Oracle(*inputs, dout=dout)
    out, gradients = _exact(inputs, dout, {})
    assert found.kv_heads == [0, 2]
    assert torch.allclose(found.out(), out[:, [0, 1, 4, 5]], atol=1e-12)
    assert torch.allclose(found.gradients()[3], gradients[3][[0, 2]], atol=1e-12)
    assert max(found.errors(out, found.out())) < 1e-12
    norm, largest = found.errors(out * 1.5, found.out())
    assert norm == pytest.approx(0.5)
    assert largest == pytest.approx(0.5)


def test_exports_are_documented_and_examples_run():
    for name in testing.__all__:
        assert getattr(testing, name).__doc__ or name == "FEATURES", name
    for module in (testing, bounds, cases, error_analysis, oracle):
        assert doctest.testmod(module).failed == 0
