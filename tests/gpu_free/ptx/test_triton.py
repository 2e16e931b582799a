# SPDX-License-Identifier: Apache-2.0
"""The backend's own host code on CPU tensors, each launch compiled for sm_80 and executed as PTX with all checks on.

Compiling is what takes time (0.7 s a kernel), so by default features are compiled together, in bf16, and the shapes
share what is compiled for the plain case; ``-m slow`` runs each feature in all dtypes, larger grids, and sm_90.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import pkgutil

import pytest
import torch
from triton.runtime.jit import JITFunction

from peftkern import functional
from peftkern.backends.triton import kernels
from peftkern.testing.bounds import check_backend
from peftkern.testing.cases import FEATURES, Shape, combination, tensors

from ..features import SETS, together
from .launch import emulated
from .traffic import minimum, moved, ratio

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton compiles nothing there")
SHAPE = Shape(B=2, Hq=2, Hkv=1, S=33, P=19, D=20)  # all ragged
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def check(shape, options, dtype, prefix_dtype=None, *, arch="sm_80", seed=0, **kwargs):
    """Check that results are within the bound and inputs are only read; returns the launches."""
    inputs = tensors(shape, dtype, prefix_dtype)
    given = [x for x in (*inputs.values(), *options.values()) if isinstance(x, torch.Tensor)]
    with emulated(arch, seed=seed, read_only=given) as watch:
        check_backend("triton", inputs, options, **kwargs)
    return watch


SECOND = {  # like another one
    "packed_shared_window", "packed_several", "window_after_prefix several_prefixes", "bias_row packed_bank",
}  # fmt: skip


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    "names",
    [
        *(pytest.param(x, marks=pytest.mark.slow if x in SECOND else ()) for x in SETS),
        *(pytest.param(x, marks=pytest.mark.slow) for x in FEATURES if x not in SETS),
    ],
)
def test_every_feature_in_bf16(names):
    """With the fp32 prefix that PEFT keeps."""
    check(*together(names, SHAPE), BF16, FP32, dlse=True)


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("dtype", [FP16, FP32], ids=str)
def test_every_feature_in_other_dtypes(name, dtype):
    check(*together(name, SHAPE), dtype, dlse=True)


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", FEATURES)
def test_every_feature_on_sm_90(name):
    shape, options = together(name, dataclasses.replace(SHAPE, D=64))
    watch = check(shape, options, BF16, FP32, arch="sm_90", dlse=True)
    forward = watch.of("fwd")[0]
    assert "wgmma" in forward.ptx
    assert forward.counts.mma > 0


def test_no_parameter_is_named_as_the_launchers_own():
    """Triton generates a function with a kernel's parameters, followed by ``**options``: names must not clash."""
    for module in pkgutil.iter_modules(kernels.__path__):
        for name, function in vars(importlib.import_module(f"{kernels.__name__}.{module.name}")).items():
            if isinstance(function, JITFunction) and name.endswith("_kernel"):
                with emulated("sm_80"):
                    function.create_binder()


# S and T are 2 modulo 4 and P is no multiple of 4: the sizes and strides differ in nothing that Triton specialises on
# (being 1, or a multiple of 16), so that all share six kernels
PLAIN = [
    Shape(B=B, Hq=4, Hkv=2, S=S, P=P, D=20, T=T)
    for B, S, P, T in [
        (2, 2, 3, None), (2, 18, 7, None), (3, 34, 5, None), (2, 66, 13, None), (2, 130, 61, None), (2, 6, 62, None),
        (3, 10, 33, 70), (2, 66, 31, 202), (2, 126, 63, 130), (2, 34, 2, 38), (5, 2, 3, None), (2, 14, 17, None),
        (2, 62, 57, None), (3, 30, 9, 34), (2, 130, 59, None), (2, 38, 41, None), (2, 22, 46, 150), (3, 118, 2, None),
    ]
]  # fmt: skip


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", PLAIN, ids=str)
def test_shapes_in_bf16(shape):
    check(shape, {}, BF16, seed=shape.S)


ODD = [
    Shape(S=1, P=130, D=40, T=70), Shape(S=63, P=7, D=64, B=1, Hq=1, Hkv=1),
    Shape(S=17, P=130, D=80, B=1, Hq=2, Hkv=1),
    Shape(S=17, P=1, D=16), Shape(S=63, P=0, D=40, B=1, Hq=1, Hkv=1), Shape(S=5, P=3, D=1),
    Shape(S=9, P=3, D=129, B=1),
    Shape(S=64, P=32, D=128), Shape(S=48, P=16, D=256, B=1, Hq=2, Hkv=1), Shape(S=3, P=3, D=20, B=5),
    Shape(S=65, P=13, D=20, B=3), Shape(S=130, P=67, D=20), Shape(S=9, P=129, T=71, D=20, Hq=6),
    Shape(S=127, P=63, T=129, D=20), Shape(S=31, P=9, T=35, Hq=14, D=20), Shape(S=129, P=127, D=20, Hq=3, Hkv=3),
    Shape(S=333, P=1, D=20),
]  # fmt: skip
EMPTY = [Shape(S=0, T=9), Shape(S=3, T=0), Shape(B=0), Shape(S=0, P=0), Shape(S=2, T=0, P=0)]


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("shape", [*ODD, *EMPTY], ids=str)
def test_odd_shapes(shape, dtype):
    check(shape, {"causal": shape.kv_len >= shape.S}, dtype)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [FP16, FP32], ids=str)
def test_the_other_dtypes(dtype):
    check(SHAPE, {}, dtype)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("head_dim", [64, pytest.param(128, marks=pytest.mark.slow)])
def test_hopper_executes_wgmma(head_dim, seed):
    """The order of the warps, drawn by a seed, does not matter."""
    shape = Shape(B=1, Hq=2, Hkv=1, S=150, P=70, D=head_dim)
    watch = check(shape, {}, BF16, arch="sm_90", seed=seed)
    for kernel in ("fwd", "dq", "dkv"):
        launch = watch.of(f"{kernel}_kernel")[0]
        assert "wgmma.mma_async" in launch.ptx, f"no wgmma in {kernel}"
        assert launch.counts.mma > 0


LARGE = [
    Shape(B=1, Hq=2, Hkv=1, S=333, P=130, D=64), Shape(B=2, Hq=4, Hkv=2, S=200, P=64, D=64),
    Shape(B=1, Hq=8, Hkv=2, S=512, P=128, D=128),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90"])
def test_large_grids(shape, arch):
    check(shape, {}, BF16, FP32, arch=arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("seed", range(30))
def test_random_combinations(seed, arch):
    shape, options = combination(seed)
    check(shape, options, (FP32, FP16, BF16)[seed % 3], arch=arch, dlse=seed % 2 == 0)


@pytest.mark.parametrize("bank", [False, True], ids=["shared", "bank"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_soft_prompt_embedding(bank, dtype):
    batch, length, vocabulary, width, prefix_len = 3, 5, 11, 1030, 4
    weight = torch.randn(vocabulary, width, dtype=dtype).t().contiguous().t().requires_grad_()
    prompt = torch.randn((2, prefix_len, width) if bank else (prefix_len, width)).requires_grad_()
    input_ids = torch.randint(vocabulary, (batch, length))
    options = {"prompt_ids": torch.tensor([1, 0, 1])} if bank else {}
    dout = torch.randn(batch, prefix_len + length, width).to(dtype)
    results = {}
    with emulated("sm_80", read_only=[weight, prompt, dout, input_ids]):
        for name in ("triton", "reference"):
            out = functional.soft_prompt_embedding(input_ids, weight, prompt, backend=name, **options)
            results[name] = [out, *torch.autograd.grad(out, (weight, prompt), dout)]
    for got, expected in zip(results["triton"], results["reference"], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_results_do_not_depend_on_the_order_of_warps_or_runs():
    inputs = {n: x.requires_grad_() for n, x in tensors(PLAIN[3], BF16).items()}

    def results(seed):
        with emulated("sm_80", seed=seed):
            out = functional.prefix_attention(**inputs, backend="triton")
            return [out, *torch.autograd.grad(out.float().square().sum(), tuple(inputs.values()))]

    first = results(0)
    for seed in (0, 1, 2):
        for a, b in zip(first, results(seed), strict=True):
            assert torch.equal(a, b)


def test_bytes_moved():
    """One block of rows: each tensor is read once and written once. More blocks of rows read the keys again."""
    once = check(Shape(B=1, Hq=2, Hkv=2, S=64, P=32, D=64), {}, BF16, backward=False).launches
    assert moved(once) == minimum(once) == 2 * (2 * (4 * 64 + 2 * 32) * 64) + 4 * 2 * 64  # q k v out, prefix; lse
    again = check(Shape(B=1, Hq=2, Hkv=2, S=256, P=32, D=64), {"causal": False}, BF16, backward=False).launches
    rows, prefix, keys = 2 * 256 * 64 * 2, 2 * 32 * 64 * 2, 2 * 256 * 64 * 2
    assert moved(again) == 2 * rows + 2 * 256 * 4 + 2 * (2 * prefix + 2 * keys)
    assert ratio(again) == pytest.approx(moved(again) / (moved(again) - 2 * prefix - 2 * keys))
