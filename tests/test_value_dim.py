# SPDX-License-Identifier: Apache-2.0
"""Values of a head dim of their own, D_v, with every feature: the specification, its gradients, and the choice."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import peftkern
from peftkern import backends, native
from peftkern.testing.bounds import check_backend, run
from peftkern.testing.cases import FEATURES, Shape, feature, tensors

WIDTHS = {"narrow": 5, "wide": 11}  # beside D = 8
CPU_BACKENDS = [name for name in backends.available_backends() if name in ("reference", "cpu")]


def _case(name, width, **sizes):
    shape, options = feature(name, Shape(**sizes))
    return replace(shape, Dv=WIDTHS[width]), options


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", FEATURES)
def test_each_feature(name, width, backend):
    shape, options = _case(name, width)
    check_backend(backend, tensors(shape, torch.float32), options, dlse=True)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["plain", "ragged_bank", "several_prefixes", "packed_shared", "gate", "dropout"])
def test_padded_values_give_the_same(name, width, backend):
    """Values padded with zeros to a common width give an out padded with zeros, and the same gradients."""
    shape, options = _case(name, width)
    inputs = tensors(shape, torch.float64 if backend == "reference" else torch.float32)
    extra = 3 + max(shape.D, shape.value_dim) - shape.value_dim
    padded = {n: torch.nn.functional.pad(x, (0, extra)) if n.endswith("v") else x for n, x in inputs.items()}
    dout = torch.randn(shape.B, shape.Hq, shape.S, shape.value_dim)
    results = [
        run(lambda **x: peftkern.prefix_attention(**x, return_lse=True, backend=backend), given, options, grad, None)
        for given, grad in ((inputs, dout), (padded, torch.nn.functional.pad(dout, (0, extra))))
    ]
    got, want = results
    torch.testing.assert_close(got.out, want.out[..., : shape.value_dim])
    torch.testing.assert_close(got.lse, want.lse)
    for n, gradient in got.gradients.items():
        expected = want.gradients[n][..., : gradient.shape[-1]] if n.endswith("v") else want.gradients[n]
        torch.testing.assert_close(gradient, expected, msg=lambda text, n=n: f"d{n}: {text}")


def test_the_default_scale_is_that_of_the_keys():
    inputs = tensors(Shape(D=16, Dv=4))
    scaled = peftkern.prefix_attention(**inputs, scale=0.25)
    torch.testing.assert_close(peftkern.prefix_attention(**inputs), scaled)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_auto_finds_a_backend(dtype, width):
    shape, options = _case("gate", width)
    inputs = tensors(shape, dtype)
    assert peftkern.prefix_attention(**inputs, **options).shape == (shape.B, shape.Hq, shape.S, shape.value_dim)
    explanation = peftkern.explain(*inputs.values(), **options)
    assert f"values of head dim {WIDTHS[width]}" in str(explanation.call)
    assert explanation.chosen


@pytest.mark.skipif("cpu" not in CPU_BACKENDS, reason="the native CPU library is not built")
def test_the_head_dim_of_the_keys_in_the_place_of_the_values_is_noticed(monkeypatch):
    """A call that tells the native library D for D_v has columns of out that nothing computes."""
    layout = native.fill._attention_layout
    monkeypatch.setattr(native.fill, "_attention_layout", lambda q, k, _, *others: layout(q, k, q[3], *others))
    with pytest.raises(AssertionError, match="error"):
        check_backend("cpu", tensors(Shape(D=8, Dv=11, S=9), torch.float32), {})


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("width", [(192, 128), (24, 16), (16, 40)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decoding_and_training_of_models_with_compressed_keys(dtype, width, backend):
    """Their head dims, for a training step and for a decoding step over a cache."""
    head_dim, value_dim = width
    for sizes in ({"S": 70, "P": 33}, {"S": 1, "T": 1000, "P": 50}):
        shape = Shape(B=2, Hq=4, Hkv=4, D=head_dim, Dv=value_dim, **sizes)
        check_backend(backend, tensors(shape, dtype, torch.float32), {}, backward="T" not in sizes)
