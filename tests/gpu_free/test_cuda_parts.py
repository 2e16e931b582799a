# SPDX-License-Identifier: Apache-2.0
"""``merge`` and ``concat`` with the CUDA kernels on the host shim, beside torch's CPU op and stand-ins."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

import peftkern
from peftkern import backends, native
from peftkern.backends import composite, concat, merge, prefix_kernels
from peftkern.testing.bounds import check_backend
from peftkern.testing.cases import FEATURES, Shape, feature, tensors

from . import stand_ins
from .shim import Shim

SHAPE = Shape(B=2, Hq=4, Hkv=2, S=19, P=7, D=64)
#: Packed sequences with prefixes of their own.
PACKED = {name for name in FEATURES if name.startswith("packed_")} - {"packed_window"}
#: What one of the backends or the kernels refuses; a bias' gradient is the fused kernels'.
REFUSED = {
    "merge": {"softcap", "dropout", "bias", "bias_row", "narrow_values", "wide_values"},
    "concat": {"softcap", "dropout", "bias", "bias_row", "narrow_values", "wide_values", "gate", *PACKED},
}


@pytest.fixture
def shim(monkeypatch):
    """Kernels may write what torch's op has returned."""
    shim = Shim(monkeypatch)

    def marked(function):
        def run(*args):
            result = function(*args)
            shim.writable(*(result if isinstance(result, tuple) else (result,)))
            return result

        return run

    for module in (merge, concat):
        for name in ("attention", "attention_backward", "with_sequence"):
            monkeypatch.setattr(module, name, marked(getattr(module, name)))
    for module in (composite, concat):
        monkeypatch.setattr(module, "as_bshd", marked(module.as_bshd))
    return shim


def _feature(name: str, shape: Shape = SHAPE):
    return feature(name, dataclasses.replace(shape, S=9) if name == "kv_cache" else shape)


def _run(shim, monkeypatch, row: str, backend: str, shape: Shape, options: dict, dtype, **kwargs):
    stand_ins.install(monkeypatch, row)
    shim.reset()
    given = tensors(shape, dtype, torch.float32)
    results = check_backend(backend, given, options, **kwargs)
    assert shim.launches(), "Triton ran"
    return results


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("backend", ["merge", "concat"])
def test_every_feature(shim, monkeypatch, backend, name):
    """With the fp32 prefix that PEFT keeps beside half-precision activations, and an exact stand-in."""
    shape, options = _feature(name)
    if name in REFUSED[backend]:
        with pytest.raises(peftkern.BackendUnavailable, match=f"{backend}: .*: use backend='"):
            _run(shim, monkeypatch, "efficient", backend, shape, options, torch.float16)
    else:
        _run(shim, monkeypatch, "efficient", backend, shape, options, torch.float16)


@pytest.mark.parametrize("row", ["flash", "cudnn", "cpu flash"])
@pytest.mark.parametrize("backend", ["merge", "concat"])
def test_every_torch_kernel(shim, monkeypatch, backend, row):
    """Their lse in its own layout, their results in their own memory order."""
    for name in ("plain", "kv_cache"):
        _run(shim, monkeypatch, row, backend, *_feature(name), torch.bfloat16)


@pytest.mark.parametrize("name", ["bias", "bias_row"])
@pytest.mark.parametrize("backend", ["merge", "concat"])
def test_a_forward_takes_any_bias_of_the_sequence(shim, monkeypatch, backend, name):
    _run(shim, monkeypatch, "efficient", backend, *_feature(name), torch.float16, backward=False)


@pytest.mark.parametrize("shape", [Shape(S=0, T=9, D=64), Shape(S=3, T=0, D=64), Shape(B=0, D=64)], ids=str)
@pytest.mark.parametrize("backend", ["merge", "concat"])
def test_empty_tensors(shim, monkeypatch, backend, shape):
    stand_ins.install(monkeypatch, "efficient")
    check_backend(backend, tensors(shape, torch.float16), {"causal": shape.kv_len >= shape.S})


@pytest.mark.parametrize("backend", ["merge", "concat"])
def test_the_gradient_of_lse_is_the_fused_kernels(shim, monkeypatch, backend):
    _run(shim, monkeypatch, "efficient", backend, *_feature("plain"), torch.float16, dlse=True)


def test_rows_that_see_nothing_are_zero_whatever_torchs_kernel_leaves(shim, monkeypatch):
    stand_ins.install(monkeypatch, "efficient")
    inputs = {n: x.requires_grad_() for n, x in tensors(Shape(S=5, P=0, D=64), torch.float16).items()}
    mask = torch.tensor([[False] * 5, [True] * 5])
    for backend in ("merge", "concat"):
        out, lse = peftkern.prefix_attention(**inputs, key_mask=mask, backend=backend, return_lse=True)
        gradients = torch.autograd.grad(out.sum(), tuple(inputs.values()))
        assert out[0].abs().max() == 0
        assert lse[0].max() == -torch.inf
        assert all(x[0].abs().sum() == 0 for x in gradients[:3])


def test_embeddings_take_the_same_kernels(shim):
    weight, prompt, ids = torch.randn(11, 24).half(), torch.randn(5, 24), torch.randint(11, (4, 7))
    results = [peftkern.soft_prompt_embedding(ids, weight, prompt, backend=b) for b in ("merge", "reference")]
    assert torch.equal(*results)
    assert len(shim.launches()) == 1


def test_explain_says_which_kernels(shim, monkeypatch):
    stand_ins.install(monkeypatch, "cpu flash")
    text = str(peftkern.explain(**tensors(Shape(D=64), torch.float16), backend="merge"))
    assert "merge: ok (CUDA C++ beside torch's cpu flash), requested by backend" in text
    assert "concat: ok (CUDA C++ beside torch's cpu flash)" in text


def test_what_the_library_lacks_is_left_to_triton(shim, monkeypatch):
    """A dtype, a GPU that the wheel does not serve, no library: the next part in the table, and its reasons."""
    fp32 = peftkern.explain(**tensors(Shape(D=64), torch.float32)).call
    fp16 = peftkern.explain(**tensors(Shape(D=64), torch.float16)).call
    missing = "sm_75 has no asynchronous copies"
    (cuda, cuda_backend), (triton, _) = prefix_kernels.PREFIX_KERNELS
    for call, reason, lacks in ((fp32, "has no float32 kernels", ""), (fp16, missing, missing)):
        monkeypatch.setattr(native.cuda, "MISSING", lacks)
        refusal = prefix_kernels.refusal(prefix_kernels.candidates(call))
        assert reason in refusal.reasons[0]
        with monkeypatch.context() as patch:
            able = SimpleNamespace(plan=lambda call: backends.plan_named("triton"))
            patch.setattr(prefix_kernels, "PREFIX_KERNELS", [(cuda, cuda_backend), (triton, able)])
            assert prefix_kernels.candidates(call)["triton"] is triton
