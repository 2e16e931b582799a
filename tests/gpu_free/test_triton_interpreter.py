# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels in Triton's interpreter, under a guard: values, gradients, addresses, bytes.

What an interpreter cannot show (layouts, shared memory, registers) is the subject of test_aot.py.
"""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

import peftkern
from peftkern import functional
from peftkern.backends.triton import launch
from peftkern.testing.bounds import check_backend, ratios
from peftkern.testing.cases import FEATURES, Shape, combination, tensors

from .features import SETS, together
from .guard import guard

pytestmark = pytest.mark.interpreter
SHAPE = Shape(B=2, Hq=2, Hkv=1, S=33, P=19, D=20)  # two blocks of rows, three of keys, two of the prefix, all ragged


def _check(shape: Shape, options: dict, dtype: torch.dtype, prefix_dtype: torch.dtype | None = None, **kwargs):
    with guard() as watch:
        results = check_backend("triton", tensors(shape, dtype, prefix_dtype), options, **kwargs)
    return results, watch


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", FEATURES)
def test_every_feature_in_fp32(name):
    _check(*together(name, SHAPE), torch.float32, dlse=True)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("names", "dtype"),
    [
        *((names, torch.bfloat16) for names in SETS),
        *(pytest.param(x, torch.bfloat16, marks=pytest.mark.slow) for x in FEATURES if x not in SETS),
        *(pytest.param(x, torch.float16, marks=pytest.mark.slow) for x in FEATURES),
    ],
    ids=str,
)
def test_every_feature_in_half_precision(names, dtype):
    """With the fp32 prefix that PEFT keeps beside half-precision activations."""
    _check(*together(names, dataclasses.replace(SHAPE, S=17)), dtype, torch.float32)


@pytest.mark.parametrize("name", ["plain", "softcap", "gate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_right_results_have_room(dtype, name):
    """Results are not only within the bound, but within two thirds of it."""
    kernel = functools.partial(functional.prefix_attention, backend="triton", return_lse=True)
    shape, options = together(name, SHAPE)
    with guard():
        _, errors = ratios(kernel, tensors(shape, dtype, torch.float32), options)
    for one in errors.values():
        assert one.worst <= 2 / 3, one.message


MORE_SEEDS = [pytest.param(seed, marks=pytest.mark.slow) for seed in range(12, 72)]


@pytest.mark.parametrize("seed", [*range(12), *MORE_SEEDS])
def test_random_combinations(seed):
    shape, options = combination(seed)
    dtype = (torch.float32, torch.float16, torch.bfloat16)[seed % 3]
    _check(shape, options, dtype, dlse=seed % 2 == 0)


ODD = [
    Shape(S=1, P=130, D=40, T=70), Shape(S=63, P=7, D=64, B=1, Hq=1, Hkv=1),
    Shape(S=17, P=130, D=80, B=1, Hq=2, Hkv=1), Shape(S=17, P=1, D=16), Shape(S=63, P=0, D=40, B=1, Hq=1, Hkv=1),
    Shape(S=5, P=3, D=1), Shape(S=5, P=3, D=129, B=1),
    Shape(S=0, T=9), Shape(S=3, T=0), Shape(B=0), Shape(S=0, P=0), Shape(S=2, T=0, P=0),
]  # fmt: skip


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", ODD, ids=str)
def test_odd_shapes(shape):
    _check(shape, {"causal": shape.kv_len >= shape.S}, torch.float32)


@pytest.mark.parametrize("feature_name", ["window", "packed", "key_mask", "bias_row"])
def test_wide_windows_and_long_rows(feature_name):
    """One call with blocks that are full, cut at one edge, cut at both, and skipped."""
    shape = Shape(B=1, Hq=2, Hkv=1, S=97, P=9, D=16)
    shape, options = together(feature_name, shape)
    if feature_name == "window":
        options = {"window": 40}
    _check(shape, options, torch.float32)


def test_a_masked_row_is_zero_and_its_gradients_are_zero():
    shape = Shape(S=5, P=0)
    inputs = {n: x.requires_grad_() for n, x in tensors(shape, torch.float32).items()}
    mask = torch.zeros(shape.B, shape.S, dtype=torch.bool)
    with guard():
        out, lse = peftkern.prefix_attention(**inputs, key_mask=mask, backend="triton", return_lse=True)
        out.sum().backward()
    assert out.abs().max() == 0
    assert lse.max() == -torch.inf
    assert all(x.grad.abs().sum() == 0 for x in inputs.values() if x.numel())


def test_gradients_nobody_needs_are_not_computed(monkeypatch):
    inputs = tensors(Shape(S=3, P=2), torch.float32)
    inputs["prefix_k"].requires_grad_()
    with guard() as watch:
        peftkern.prefix_attention(**inputs, backend="triton").sum().backward()
    assert not any("dq" in kernel or "dkv" in kernel for kernel in watch.stores), watch.stores
    assert inputs["prefix_k"].grad.abs().sum() > 0


def test_runs_are_bitwise_equal_and_splits_do_not_lose_rows(monkeypatch):
    """The number of splits depends on the device. With any number, all rows are summed."""
    shape = Shape(B=1, Hq=2, Hkv=1, S=65, P=9, D=16)
    inputs = {n: x.requires_grad_() for n, x in tensors(shape, torch.float32).items()}

    def gradients():
        out = peftkern.prefix_attention(**inputs, backend="triton")
        return torch.autograd.grad(out.square().sum(), tuple(inputs.values()))

    first, second = gradients(), gradients()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for processors in (1, 1000):
        monkeypatch.setattr(launch, "processors", lambda device, n=processors: n)
        for a, b in zip(first, gradients(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [-0.5, 0.0, 1e-40])
def test_scales_that_do_not_keep_the_order_of_the_products(scale):
    """With a negative scale, or one that a GPU flushes to 0, the largest product does not have the largest score."""
    _check(SHAPE, {"scale": scale}, torch.float32)


def test_nan_propagates():
    inputs = tensors(Shape(S=5, P=2), torch.float32)
    inputs["prefix_v"][0, 0, 0] = torch.nan
    out = peftkern.prefix_attention(**inputs, backend="triton")
    assert out[:, :2, :, 0].isnan().all()
    assert not out[:, 2:].isnan().any()


def test_bytes_moved():
    """At most 5 % beyond one read of q, one of each key block by each block of rows, one store of out and lse."""
    shape = Shape(B=1, Hq=2, Hkv=1, S=64, P=32, D=32)
    _, watch = _check(shape, {}, torch.float32, backward=False)
    block_m, block_n = 32, 16
    keys = sum(-(-(row + block_m) // block_n) * block_n + shape.P for row in range(0, shape.S, block_m))
    row = 4 * shape.D
    least = shape.Hq * (shape.S * row + 2 * keys * row)
    kernel = "_prefix_attention_fwd_kernel"
    assert least <= watch.loads[kernel] <= 1.05 * least
    assert watch.stores[kernel] == shape.Hq * shape.S * (row + 4)


@pytest.mark.parametrize("bank", [False, True], ids=["shared", "bank"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_soft_prompt_embedding(bank, dtype):
    batch, length, vocabulary, width, prefix_len = 3, 5, 11, 1030, 4
    weight = torch.randn(vocabulary, width, dtype=dtype).t().contiguous().t().requires_grad_()
    prompt = torch.randn((2, prefix_len, width) if bank else (prefix_len, width)).requires_grad_()
    input_ids = torch.randint(vocabulary, (batch, length))
    options = {"prompt_ids": torch.tensor([1, 0, 1])} if bank else {}
    dout = torch.randn(batch, prefix_len + length, width).to(dtype)
    results = {}
    with guard():
        for name in ("triton", "reference"):
            out = functional.soft_prompt_embedding(input_ids, weight, prompt, backend=name, **options)
            results[name] = [out, *torch.autograd.grad(out, (weight, prompt), dout)]
    for got, expected in zip(results["triton"], results["reference"], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_auto_leaves_cpu_tensors_to_others():
    explanation = peftkern.explain(**tensors(Shape(), torch.float32))
    assert explanation.chosen != "triton"
    assert explanation.reasons["triton"] == []
