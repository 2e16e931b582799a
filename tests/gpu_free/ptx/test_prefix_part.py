# SPDX-License-Identifier: Apache-2.0
"""``merge`` and ``concat`` beside torch's CPU attention, their own kernels executed as PTX; the bytes these move."""

from __future__ import annotations

import os

import pytest
import torch

from peftkern.arguments import AttentionArgs, allocate_gradients, allocate_outputs
from peftkern.backends.triton import TritonPrefixKernels
from peftkern.testing.bounds import check_backend
from peftkern.testing.cases import Shape, tensors

from ...cover import product
from ..features import together
from .launch import emulated
from .traffic import moved

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton compiles nothing there")
SHORT, LONG = Shape(B=2, Hq=4, Hkv=2, S=66, P=13, D=64), Shape(B=2, Hq=4, Hkv=2, S=66, P=150, D=64)


def _check(backend, arch, shape, options=None, prefix_dtype=None):
    with emulated(arch) as watch:
        inputs = tensors(shape, torch.bfloat16, prefix_dtype)
        check_backend(backend, inputs, options or {})
    return watch


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("shape", "backend", "arch"),
    product(
        [SHORT, LONG, Shape(S=17, P=1, D=64), Shape(S=33, P=7, D=40)], ["merge", "concat"], ["sm_80", "sm_90"],
        strength=1, among=lambda shape, backend, arch: shape != LONG and arch == "sm_80",
    ),
    ids=str,
)  # fmt: skip
def test_beside_torchs_kernel(backend, arch, shape):
    watch = _check(backend, arch, shape, prefix_dtype=torch.float32)
    assert watch.of("prefix_merge" if backend == "merge" else "concat"), "no kernel of its own ran"


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    "names",
    [
        "sinks ragged_bank",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("sinks", "bank", "ragged_bank", "packed")),
    ],
)
def test_features_of_the_merge(names):
    shape, options = together(names, Shape(B=2, Hq=2, Hkv=1, S=33, P=19, D=64))
    _check("merge", "sm_80", shape, options)


# as many rows for each program as make its own reading of the prefix less than a twentieth
SHORT_ROWS, LONG_ROWS = (Shape(B=1, Hq=1, Hkv=1, S=16384, P=P, D=D) for P, D in ((128, 64), (64, 128)))


def _rows_and_archs(fast):
    return [
        pytest.param(shape, arch, marks=() if (shape, arch) == (fast, "sm_80") else pytest.mark.slow)
        for shape in (SHORT_ROWS, LONG_ROWS)
        for arch in ("sm_80", "sm_90")
    ]


def _call(shape):
    q, k, v, prefix_k, prefix_v = tensors(shape, torch.bfloat16).values()
    absent = dict.fromkeys(AttentionArgs._fields)
    return AttentionArgs(**{
        **absent, "q": q, "k": k, "v": v, "prefix_k": prefix_k, "prefix_v": prefix_v, "scale": shape.D**-0.5,
        "causal": True, "prefix_in_window": True, "softcap": 0.0, "dropout_p": 0.0,
    })  # fmt: skip


def _sizes(call) -> tuple[int, int, int]:
    """Bytes of q, of lse and of the prefix."""
    return 2 * call.q.numel(), 4 * call.q.numel() // call.q.shape[-1], 2 * 2 * call.prefix_k.numel()


@pytest.mark.parametrize(("shape", "arch"), _rows_and_archs(SHORT_ROWS), ids=str)
def test_bytes_of_the_merge(shape, arch):
    """At most 5 % beyond q and out read, out written, lse read and written, the prefix read."""
    call = _call(shape)
    out, lse = allocate_outputs(call)
    out.normal_()
    lse.normal_()
    with emulated(arch, processors=2) as watch:
        TritonPrefixKernels().merge_prefix(call, out, lse)
    q, statistics, prefix = _sizes(call)
    least, total = 3 * q + 2 * statistics + prefix, moved(watch.of("prefix_merge_fwd"))
    assert least <= total <= 1.05 * least, f"{total / least:.3f} times the least"


@pytest.mark.parametrize(("shape", "arch"), _rows_and_archs(LONG_ROWS), ids=str)
def test_bytes_of_the_backward(shape, arch):
    """At most 5 % beyond q, out, dout and dq read, dq written, lse and the prefix read, its gradients written.

    Counted per warp: lse, which each warp of a program reads for itself, is most of what is beyond.
    """
    call = _call(shape)
    out, lse = allocate_outputs(call)
    out.normal_()
    lse.fill_(5.0)
    gradients = allocate_gradients(call, [True] * 5 + [False] * 4)
    gradients.dq.normal_()
    with emulated(arch, processors=2) as watch:
        TritonPrefixKernels().merge_prefix_backward(torch.randn_like(out), out, lse, call, gradients.dq, gradients)
    q, statistics, prefix = _sizes(call)
    least, total = 5 * q + statistics + 3 * prefix, moved(watch.of("prefix_merge_bwd"))
    assert least <= total <= 1.05 * least, f"{total / least:.3f} times the least"
