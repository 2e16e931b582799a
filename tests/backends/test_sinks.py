# SPDX-License-Identifier: Apache-2.0
"""Sinks that are not finite: the limit of the softmax in fp64, the same in every backend.

-inf is no sink. +inf takes the whole weight: out 0, lse inf, gradients 0. NaN gives NaN. Other heads do not notice.
"""

from __future__ import annotations

import functools

import pytest
import torch

from peftkern import backends, functional, reference
from peftkern.testing.bounds import run
from peftkern.testing.cases import Shape, tensors

INF = float("inf")
#: By name: (shape, options). Many rows, decoding with one prefix and with several, packed, gated, banks.
CASES = {
    "many rows": (Shape(B=2, Hq=4, Hkv=2, S=70, P=20, D=16), {}),
    "few keys": (Shape(B=1, Hq=4, Hkv=4, S=5, P=3, D=8), {}),
    "decoding": (Shape(B=3, Hq=4, Hkv=2, S=1, P=40, D=16, T=90), {}),
    "decoding many keys": (Shape(B=1, Hq=4, Hkv=1, S=2, P=600, D=16, T=900), {}),
    "without a prefix": (Shape(B=1, Hq=4, Hkv=2, S=33, P=0, D=16), {}),
    "packed": (Shape(B=1, Hq=4, Hkv=2, S=40, P=9, D=16), {"cu_seqlens": torch.tensor([0, 7, 7, 40])}),
    "bank": (Shape(B=3, Hq=4, Hkv=2, S=20, P=9, D=16, A=2), {"prefix_ids": torch.tensor([1, -1, 0])}),
    "window": (Shape(B=1, Hq=4, Hkv=2, S=40, P=9, D=16), {"window": 5}),
    "gate": (Shape(B=1, Hq=4, Hkv=2, S=20, P=9, D=16), {"gate": torch.tensor([0.3, -1.0, 0.5, 2.0])}),
    "hidden rows": (Shape(B=1, Hq=4, Hkv=2, S=9, P=0, D=16), {"key_mask": torch.arange(9)[None] > 4}),
}  # fmt: skip
SINKS = {
    "inf": [INF, 0.3, INF, -1.0], "-inf": [-INF, 0.3, -INF, -1.0], "mixed": [INF, -INF, 0.5, INF],
    "all inf": [INF] * 4, "NaN": [float("nan"), 0.3, -INF, INF], "large": [1e4, -1e4, 30.0, 0.0],
    "huge": [3e7, -1e10, 6e7, -1e8], "largest": [1e30, -1e30, 2e38, -2e38],
}  # fmt: skip
DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "reference": (torch.float64, torch.float32),
    "triton": (torch.float32,),
}
BACKENDS = [name for name in DTYPES if name in backends.available_backends()]


def _results(backend, case, sinks, dtype, dlse):
    shape, options = CASES[case]
    inputs = tensors(shape, dtype)
    kernel = functools.partial(functional.prefix_attention, backend=backend, return_lse=True)
    generator = torch.Generator().manual_seed(3)
    dout = torch.randn(shape.B, shape.Hq, shape.S, shape.D, generator=generator, dtype=torch.float64)
    d = torch.randn(dout.shape[:3], generator=generator, dtype=torch.float64)
    lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    got = run(
        kernel, inputs, {**options, "sinks": torch.tensor(sinks, dtype=lse_dtype)}, dout.to(dtype),
        d.to(lse_dtype) if dlse else None,
    )  # fmt: skip
    return {"out": got.out, "lse": got.lse, **{f"d{name}": x for name, x in got.gradients.items()}}


@functools.cache
def _expected(case, name, dlse):
    """Results of the reference in fp64, which other tests compare with the rule."""
    return _results("reference", case, SINKS[name], torch.float64, dlse)


@pytest.mark.parametrize("dlse", [False, True], ids=["out", "out and lse"])
@pytest.mark.parametrize("name", SINKS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_follows_the_rule(backend, case, name, dlse):
    for dtype in DTYPES[backend]:
        got = _results(backend, case, SINKS[name], dtype, dlse)
        want = _expected(case, name, dlse)
        tolerance = {torch.float64: 1e-12, torch.float32: 2e-4, torch.bfloat16: 6e-2}[dtype]
        for key, x in want.items():
            assert torch.equal(got[key].isnan(), x.isnan()), f"{key}: NaN elsewhere than in fp64"
            scale = x[x.isfinite()].abs().max().clamp(min=1) if x.isfinite().any() else 1
            torch.testing.assert_close(
                got[key].double(), x.double(), rtol=tolerance, atol=float(tolerance * scale), equal_nan=True,
                msg=lambda m, key=key: f"{key}: {m}",
            )  # fmt: skip


@pytest.mark.parametrize("dlse", [False, True], ids=["out", "out and lse"])
@pytest.mark.parametrize("name", SINKS)
@pytest.mark.parametrize("case", ["many rows", "hidden rows", "gate"])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_only_sinks_need_a_gradient(backend, case, name, dlse):
    """The sequence's keys are not read again then, so the share of a sink comes from lse alone."""
    shape, options = CASES[case]

    def gradient(backend, dtype):
        sinks = torch.tensor(SINKS[name], dtype=dtype, requires_grad=True)
        out, lse = functional.prefix_attention(
            **tensors(shape, dtype), **options, sinks=sinks, backend=backend, return_lse=True
        )
        (out.sum() + (lse.sum() if dlse else 0)).backward()
        return sinks.grad.double()

    want = gradient("reference", torch.float64)
    torch.testing.assert_close(gradient(backend, torch.float32), want, rtol=1e-3, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_reference_is_the_limit(case, dtype):
    """+inf gives what a very large sink gives, but for lse; -inf gives what no sink gives."""
    large = _results("reference", case, [1e30] * 4, dtype, False)
    infinite = _results("reference", case, [INF] * 4, dtype, False)
    for name, x in infinite.items():
        assert not x.isnan().any(), name
        if name == "lse":
            assert (x == INF).all()
        else:
            torch.testing.assert_close(x, large[name], rtol=0, atol=0, msg=lambda m, name=name: f"{name}: {m}")
    none = functional.prefix_attention(**tensors(CASES[case][0], dtype), **CASES[case][1], backend="reference")
    got = _results("reference", case, [-INF] * 4, dtype, False)
    torch.testing.assert_close(got["out"], none)


@pytest.mark.parametrize("case", CASES)
def test_a_sink_of_inf_leaves_nothing(case):
    options = CASES[case][1]
    got = _results("reference", case, [INF] * 4, torch.float32, True)
    if "gate" not in options:  # a gated prefix has a softmax of its own
        assert (got["out"] == 0).all()
    assert (got["lse"] == INF).all()
    assert (got["dsinks"] == 0).all()
    assert (got["dk"] == 0).all()


def test_the_differentiable_reference_agrees():
    """:mod:`peftkern.reference`, whose derivative is autograd's, and the backend, whose derivative is closed."""
    shape, options = CASES["many rows"]
    for name, sinks in SINKS.items():
        given = {"sinks": torch.tensor(sinks, dtype=torch.float64)}
        inputs = tensors(shape, torch.float64)
        leaves = {n: x.clone().requires_grad_() for n, x in (inputs | given).items()}
        out, lse = reference.prefix_attention(**leaves, **options)
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        got = torch.autograd.grad(out, list(leaves.values()), dout)
        want = _results("reference", "many rows", sinks, torch.float64, False)
        torch.testing.assert_close(lse, want["lse"], equal_nan=True)
        for n, x in zip(leaves, got, strict=True):
            torch.testing.assert_close(
                x, want[f"d{n}"], equal_nan=True, msg=lambda m, n=n, name=name: f"{name}: d{n}: {m}"
            )
