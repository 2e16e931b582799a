# SPDX-License-Identifier: Apache-2.0
"""The public calls: error messages, gradients that nobody needs, dtypes, autocast, random numbers."""

from __future__ import annotations

import doctest
import re

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import peftkern
from peftkern import backends, explanation, functional, ops, prefix_attention, soft_prompt_embedding
from peftkern.backends import registry
from peftkern.testing.bounds import check_backend
from peftkern.testing.cases import FEATURES, Shape, combination, feature, tensors


def _call(**changes):
    return prefix_attention(**{**tensors(Shape(), torch.float32), **changes})


X = torch.zeros
# what is wrong, and all words that the message must have
BAD_ATTENTION = [
    ({"softcap": "a"}, "softcap: expected None or a positive number, got 'a'"),
    ({"softcap": torch.tensor(30.0)}, "softcap: expected None or a positive number, got tensor(30.)"),
    ({"dropout_p": None}, "dropout_p: expected a probability in [0, 1), got None"),
    (
        {"dropout_p": 0.5, "dropout_seed": "a"},
        "dropout_seed: expected None, an int of at most 64 bits or a 0-dim int64 tensor, got 'a'",
    ),
    ({"scale": "a"}, "scale: expected None or a finite number, got 'a'"),
    ({"scale": float("nan")}, "scale: expected None or a finite number, got nan"),
    ({"prefix_in_window": 1}, "prefix_in_window: expected True or False, got 1"),
    ({"window": True}, "window: expected None or an int of at least 1 and at most 64 bits, got True"),
    ({"q": X(2, 4, 7)}, "q: expected shape [B, Hq, S, D], got [2, 4, 7]"),
    ({"q": [[1.0]]}, "q: expected a tensor, got list"),
    ({"q": X(2, 4, 7, 8, dtype=torch.int64)}, "q: expected fp32, fp16, bf16 or fp64, got torch.int64"),
    ({"q": X(2, 5, 7, 8)}, "q: expected Hq, a multiple of Hkv = 2, got 5"),
    ({"q": X(2, 4, 9, 8)}, "k: expected T >= S = 9 if causal, got 7"),
    ({"k": X(3, 2, 7, 8)}, "k: expected shape [2, Hkv, T, 8], got [3, 2, 7, 8]"),
    ({"k": X(2, 2, 7, 8, dtype=torch.float16)}, "k: expected torch.float32, got torch.float16"),
    ({"v": X(2, 2, 6, 8)}, "v: expected shape [2, 2, 7, D_v], got [2, 2, 6, 8]"),
    ({"v": X(2, 2, 7, 0)}, "v: expected D_v >= 1, got [2, 2, 7, 0]"),
    ({"v": X(2, 2, 7, 12)}, "prefix_v: expected shape [2, 5, 12], got [2, 5, 8]"),
    ({"v": X(2, 2, 7, 12), "k": X(2, 2, 7, 12)}, "k: expected shape [2, Hkv, T, 8], got [2, 2, 7, 12]"),
    ({"prefix_k": X(4, 5, 8)}, "prefix_k: expected shape [2, P, 8], got [4, 5, 8]"),
    ({"prefix_k": X(2, 5, 8).double()}, "prefix_k: expected torch.float32, got torch.float64"),
    ({"prefix_v": X(2, 6, 8)}, "prefix_v: expected shape [2, 5, 8], got [2, 6, 8]"),
    ({"prefix_v": X(2, 5, 12)}, "prefix_v: expected shape [2, 5, 8], got [2, 5, 12]"),
    ({"prefix_k": X(3, 2, 5, 8), "prefix_v": X(3, 2, 5, 8)}, "prefix_ids: expected the prefix of each sequence"),
    (
        {"prefix_ids": X(2, dtype=torch.int64)},
        "prefix_ids: expected None, since prefix_k [Hkv, P, D] is a single prefix",
    ),
    ({"key_mask": X(2, 7)}, "key_mask: expected bool, true for visible keys, got torch.float32"),
    ({"key_mask": X(2, 6, dtype=torch.bool)}, "key_mask: expected shape [2, 7], got [2, 6]"),
    ({"cu_seqlens": X(2, dtype=torch.int32)}, "cu_seqlens: expected packed q and k with B = 1 and S = T"),
    ({"window": 0}, "window: expected None or an int of at least 1 and at most 64 bits, got 0"),
    ({"window": 2.5}, "window: expected None or an int of at least 1 and at most 64 bits, got 2.5"),
    ({"causal": "no"}, "causal: expected True or False, got 'no'"),
    ({"key_mask": [True]}, "key_mask: expected a tensor or None, got list"),
    ({"q": X(2, 4, 7, 0)}, "q: expected D >= 1, got [2, 4, 7, 0]"),
    ({"softcap": float("inf")}, "softcap: expected None or a positive number, got inf"),
    (
        {"dropout_p": 0.5, "dropout_seed": 2**63},
        "dropout_seed: expected None, an int of at most 64 bits or a 0-dim int64 tensor, got 9223372036854775808",
    ),
    ({"sinks": X(4, dtype=torch.int64)}, "sinks: expected torch.float32 or torch.float16"),
    ({"softcap": -1.0}, "softcap: expected None or a positive number, got -1.0"),
    ({"dropout_p": 1.0}, "dropout_p: expected a probability in [0, 1), got 1.0"),
    ({"dropout_p": 0.5, "dropout_seed": X(())}, "dropout_seed: expected an int or a 0-dim int64 tensor, got torch.f"),
    (
        {"dropout_p": 0.5, "dropout_seed": X(1, dtype=torch.int64)},
        "dropout_seed: expected an int or a 0-dim int64 tensor, got torch.int64 [1]",
    ),
    ({"sinks": X(3)}, "sinks: expected shape [4], got [3]"),
    ({"gate": X(1)}, "gate: expected shape [4], got [1]"),
    ({"bias": X(7, 7)}, "bias: expected 4 dims broadcastable to [2, 4, 7, 7], got [7, 7]"),
    ({"bias": X(1, 1, 7, 7, dtype=torch.bool)}, "bias: expected a float tensor (a bool mask over keys is key_mask)"),
    ({"prefix_bias": X(4, 4)}, "prefix_bias: expected 2 dims broadcastable to [4, 5], got [4, 4]"),
    ({"k": X(2, 2, 7, 8, device="meta")}, "k: expected q's device cpu, got meta"),
    (
        {"backend": "cuda_graphs"},
        f"backend: expected 'auto' or one of {list(backends.BACKENDS)}, got 'cuda_graphs'",
    ),
]


@pytest.mark.parametrize(("changes", "message"), BAD_ATTENTION, ids=[m for _, m in BAD_ATTENTION])
def test_bad_attention_arguments_are_named(changes, message):
    with pytest.raises(ValueError) as error:
        _call(**changes)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prefix_ids": torch.tensor([0, 3])}, "prefix_ids: expected values from -1 to 2, got values from 0 to 3"),
        ({"prefix_ids": torch.tensor([-2, 0])}, "prefix_ids: expected values from -1 to 2, got values from -2 to 0"),
        ({"prefix_lens": torch.tensor([6, 1, 1])}, "prefix_lens: expected values from 0 to 5, got values from 1"),
    ],
)
def test_indices_out_of_range_are_named(changes, message):
    shape, options = feature("ragged_bank", Shape())
    with pytest.raises(ValueError) as error:
        prefix_attention(**tensors(shape, torch.float32), **{**options, **changes})
    assert message in str(error.value)


@pytest.mark.parametrize("offsets", [[0, 3, 6], [1, 7], [0, 5, 3, 7]])
def test_offsets_that_do_not_cover_the_pack_are_named(offsets):
    with pytest.raises(ValueError, match="cu_seqlens: expected non-decreasing offsets from 0 to S = 7, got"):
        prefix_attention(**tensors(Shape(B=1), torch.float32), cu_seqlens=torch.tensor(offsets, dtype=torch.int32))


BAD_EMBEDDING = [
    ({"input_ids": [[1, 2]]}, "input_ids: expected a tensor, got list"),
    ({"prompt": X(3, 2, 4)}, "prompt_ids: expected the prompt of each sample, since prompt is a bank, got None"),
    ({"input_ids": X(2, 3)}, "input_ids: expected torch.int32 or torch.int64, got torch.float32"),
    ({"input_ids": X(3, dtype=torch.int64)}, "input_ids: expected shape [B, S], got [3]"),
    ({"input_ids": torch.tensor([[9]])}, "input_ids: expected values from 0 to 5, got values from 9 to 9"),
    ({"prompt": X(2, 5)}, "prompt: expected shape [P, 4], got [2, 5]"),
    ({"prompt": X(3, 2, 4), "prompt_ids": torch.tensor([0])}, "prompt_ids: expected shape [2], got [1]"),
    ({"prompt": X(3, 2, 4), "prompt_ids": torch.tensor([0, 3])}, "prompt_ids: expected values from 0 to 2"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_EMBEDDING, ids=[m for _, m in BAD_EMBEDDING])
def test_bad_embedding_arguments_are_named(changes, message):
    arguments = {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 0]]), "weight": torch.randn(6, 4), "prompt": X(2, 4)}
    with pytest.raises(ValueError) as error:
        soft_prompt_embedding(**{**arguments, **changes})
    assert message in str(error.value)


@pytest.mark.parametrize("name", FEATURES)
def test_the_reference_backend_is_the_reference(name, poisoned):
    shape, options = feature(name, Shape())
    check_backend("reference", tensors(shape, torch.float32), options, dlse=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("seed", range(12))
def test_the_reference_backend_in_half_precision(seed, dtype, poisoned):
    shape, options = combination(seed)
    check_backend("reference", tensors(shape, dtype, prefix_dtype=torch.float32), options)


@pytest.mark.parametrize("backend", backends.available_backends())
@pytest.mark.parametrize("factor", [1e-20, 5.0, 10.0, 30.0])
@pytest.mark.parametrize("name", ["plain", "sinks", "bias", "gate"])
def test_small_and_large_scores(name, factor, backend):
    """Scores up to some 1e4, where the rounding of an fp32 log-sum-exp is no longer small."""
    shape, options = feature(name, Shape(S=9, D=16))
    check_backend(backend, {n: factor * x for n, x in tensors(shape, torch.float32).items()}, options)


@pytest.mark.parametrize("backend", backends.available_backends())
@pytest.mark.parametrize("needed", [("q",), ("prefix_k",), ("prefix_k", "prefix_v"), ("k", "v")], ids=str)
def test_gradients_that_nobody_needs_are_not_computed(backend, needed, monkeypatch):
    inputs = {n: x.requires_grad_(n in needed) for n, x in tensors(Shape(), torch.float32).items()}
    seen, backward = [], ops.attention_backward
    monkeypatch.setattr(ops, "attention_backward", lambda *args: seen.append(backward(*args)) or seen[-1])
    prefix_attention(**inputs, backend=backend).sum().backward()
    for name, gradient in zip(("q", "k", "v", "prefix_k", "prefix_v"), seen[0], strict=False):
        assert (gradient.numel() > 0) == (name in needed), f"d{name} {'missing' if name in needed else 'computed'}"
    for name, x in inputs.items():
        assert (x.grad is not None) == (name in needed)


@pytest.mark.parametrize("backend", backends.available_backends())
def test_double_backward_is_refused(backend):
    inputs = {n: x.requires_grad_() for n, x in tensors(Shape(), torch.float32).items()}
    out = prefix_attention(**inputs, backend=backend)
    (gradient,) = torch.autograd.grad((out * out).sum(), inputs["prefix_k"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("backend", backends.available_backends())
@pytest.mark.parametrize("layout", ["transposed", "expanded"])
def test_a_gradient_of_any_layout(backend, layout):
    """Kernels read the last dim of dout as dense; what autograd passes need not be."""
    inputs = {n: x.requires_grad_() for n, x in tensors(Shape(), torch.float32).items()}
    out = prefix_attention(**inputs, backend=backend)
    memory = torch.randn(2, 4, 8, 7).transpose(2, 3) if layout == "transposed" else torch.randn(2, 4, 7, 1)
    dout = memory.expand(out.shape)
    assert dout.stride(-1) != 1
    got = torch.autograd.grad(out, list(inputs.values()), dout, retain_graph=True)
    want = torch.autograd.grad(out, list(inputs.values()), dout.clone(memory_format=torch.contiguous_format))
    for name, x, y in zip(inputs, got, want, strict=True):
        assert torch.equal(x, y), f"d{name} depends on the layout of dout"


@pytest.mark.parametrize("backend", backends.available_backends())
def test_only_an_lse_that_is_used_gets_a_gradient(backend):
    inputs = {n: x.requires_grad_() for n, x in tensors(Shape(), torch.float32).items()}
    _, lse = prefix_attention(**inputs, return_lse=True, backend=backend)
    got = torch.autograd.grad(lse.sum(), inputs["prefix_k"])[0]
    _, want_lse = peftkern.reference.prefix_attention(**inputs)
    torch.testing.assert_close(got, torch.autograd.grad(want_lse.sum(), inputs["prefix_k"])[0])


@pytest.mark.parametrize("backend", backends.available_backends())
def test_nan_propagates_to_the_rows_that_see_it(backend):
    inputs = tensors(Shape(), torch.float32)
    inputs["k"][0, 0, 4, 1] = float("nan")
    leaves = {n: x.requires_grad_() for n, x in inputs.items()}
    out = prefix_attention(**leaves, backend=backend)
    out.sum().backward()
    assert out[0, :2, 4:].isnan().all(), "the queries that see the key are not NaN"
    assert not out[0, :, :4].isnan().any(), "a query that cannot see the key is NaN"
    assert not out[1].isnan().any(), "the other sample is NaN"
    assert leaves["prefix_k"].grad[0].isnan().any()


@pytest.mark.parametrize("backend", backends.available_backends())
def test_out_is_laid_out_for_the_next_linear_layer(backend):
    out = _call(backend=backend)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("backend", backends.available_backends())
def test_autocast_rounds_the_activations_and_not_the_prefix(backend):
    inputs = {n: x.requires_grad_() for n, x in tensors(Shape(), torch.float32).items()}
    with torch.autocast("cpu", torch.bfloat16):
        out = prefix_attention(**inputs, backend=backend)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert inputs["prefix_k"].grad.dtype == torch.float32
    assert not torch.equal(inputs["prefix_k"].grad, inputs["prefix_k"].grad.bfloat16().float())


@pytest.mark.parametrize("backend", backends.available_backends())
def test_dropout_follows_torch_s_generator_or_the_given_seed(backend):
    def run(**options):
        return _call(dropout_p=0.5, backend=backend, **options)

    torch.manual_seed(3)
    first = run()
    assert not torch.equal(first, run())
    torch.manual_seed(3)
    assert torch.equal(first, run())
    assert torch.equal(run(dropout_seed=11), run(dropout_seed=torch.tensor(11)))


def test_saved_for_backward_is_the_inputs_out_and_lse():
    inputs = {n: x.requires_grad_() for n, x in tensors(Shape(), torch.float32).items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out, lse = prefix_attention(**inputs, return_lse=True)
    storages = {x.untyped_storage().data_ptr() for x in saved}
    assert storages == {x.untyped_storage().data_ptr() for x in (*inputs.values(), out, lse)}


class _Shapes(TorchDispatchMode):
    """Collects the shapes of what operators other than ours return."""

    def __init__(self):
        super().__init__()
        self.copied = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.namespace != "peftkern" and isinstance(result, torch.Tensor) and not function.is_view:
            self.copied.append((str(function), tuple(result.shape)))
        return result


def test_nothing_is_copied_on_the_way_to_the_op():
    inputs = tensors(Shape(), torch.bfloat16, prefix_dtype=torch.float32)
    with _Shapes() as shapes:
        prefix_attention(**inputs)
    assert shapes.copied == []


@pytest.mark.parametrize("backend", backends.available_backends())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bank", [False, True], ids=["shared", "bank"])
def test_soft_prompt_embedding(backend, dtype, bank, poisoned):
    ids = torch.randint(0, 11, (4, 6))
    weight = torch.randn(11, 12).to(dtype).requires_grad_()
    prompt = torch.randn(*([3] if bank else []), 5, 12, requires_grad=True)
    prompt_ids = torch.tensor([2, 0, 2, 2]) if bank else None
    out = soft_prompt_embedding(ids, weight, prompt, prompt_ids=prompt_ids, backend=backend)
    dout = torch.randn(out.shape).to(dtype)
    got = torch.autograd.grad(out, (weight, prompt), dout)
    leaves = [x.detach().double().requires_grad_() for x in (weight, prompt)]
    true = peftkern.reference.soft_prompt_embedding(ids, *leaves, prompt_ids)
    want = torch.autograd.grad(true, leaves, dout.double())
    assert torch.equal(out, true.to(dtype))
    assert out.is_contiguous()
    torch.testing.assert_close(got[0], want[0].to(dtype))
    torch.testing.assert_close(got[1], want[1].float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", backends.available_backends())
def test_soft_prompt_embedding_with_a_gradient_of_any_layout(backend):
    weight, prompt = torch.randn(11, 12, requires_grad=True), torch.randn(5, 12, requires_grad=True)
    out = soft_prompt_embedding(torch.randint(0, 11, (4, 6)), weight, prompt, backend=backend)
    dout = torch.randn(4, 12, 11).transpose(1, 2)
    got = torch.autograd.grad(out, (weight, prompt), dout, retain_graph=True)
    want = torch.autograd.grad(out, (weight, prompt), dout.contiguous())
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("sizes", [(0, 3, 2), (2, 0, 2), (2, 3, 0)], ids=["B0", "S0", "P0"])
@pytest.mark.parametrize("backend", backends.available_backends())
def test_soft_prompt_embedding_of_nothing(backend, sizes):
    batch, length, prompt_len = sizes
    ids, weight = torch.zeros(batch, length, dtype=torch.int64), torch.randn(6, 4)
    prompt = torch.randn(prompt_len, 4, requires_grad=True)
    out = soft_prompt_embedding(ids, weight, prompt, backend=backend)
    assert out.shape == (batch, prompt_len + length, 4)
    out.sum().backward()
    assert torch.equal(prompt.grad, torch.full_like(prompt, float(batch)))


@pytest.mark.parametrize("module", [functional, registry, explanation])
def test_examples_run(module):
    failed, attempted = doctest.testmod(module)
    assert failed == 0
    assert attempted > 0


@pytest.mark.parametrize(
    ("hints", "message"),
    [
        ({"max_seqlen": 2}, "max_seqlen: expected at least the longest sequence, 4, got 2"),
        ({"prefix_start": 0}, "prefix_start: expected the first row of the sequences with prefix_ids 0, got 0"),
        ({"max_seqlen": -1}, "max_seqlen: expected None or a non-negative int of at most 64 bits, got -1"),
        ({"prefix_start": 7}, "prefix_start: expected at most S = 6, got 7"),
        ({"prefix_start": 2, "prefix_ids": None}, "prefix_ids: expected the prefix of each sequence"),
        ({"max_seqlen": 4, "cu_seqlens": None, "prefix_ids": torch.tensor([0])}, "max_seqlen: expected None"),
    ],
)
def test_a_hint_that_contradicts_the_tensors_raises(hints, message):
    q, prefix = torch.randn(1, 2, 6, 8), torch.randn(1, 2, 3, 8)
    options = {"cu_seqlens": torch.tensor([0, 2, 6]), "prefix_ids": torch.tensor([-1, 0])} | hints
    with pytest.raises(ValueError, match=re.escape(message)):
        prefix_attention(q, q, q, prefix, prefix, **options)


def test_the_prefix_of_an_empty_sequence_contradicts_no_hint():
    q, prefix = torch.randn(1, 2, 6, 8), torch.randn(1, 2, 3, 8)
    options = {"cu_seqlens": torch.tensor([0, 0, 2, 6]), "prefix_ids": torch.tensor([0, -1, 0])}
    got = prefix_attention(q, q, q, prefix, prefix, **options, prefix_start=2)
    assert torch.equal(got, prefix_attention(q, q, q, prefix, prefix, **options))


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
def test_forward_mode_is_refused(backend):
    """Its tangents would be lost silently."""
    inputs = tensors(Shape(), torch.float32)
    with forward_ad.dual_level():
        inputs["q"] = forward_ad.make_dual(inputs["q"], torch.ones_like(inputs["q"]))
        with pytest.raises(NotImplementedError, match="q: prefix_attention has no forward-mode derivative"):
            prefix_attention(**inputs, backend=backend)
