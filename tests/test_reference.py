# SPDX-License-Identifier: Apache-2.0
"""The specification itself: gradients by finite differences, and values against torch's own attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from peftkern import reference
from peftkern.arguments import HINTS
from peftkern.testing.cases import FEATURES, Shape, combination, feature, tensors

SMALL = Shape(B=2, Hq=2, Hkv=1, S=3, P=2, D=3)


def _seeded(options):
    return {n: torch.as_tensor(x) if n == "dropout_seed" else x for n, x in options.items()}


def _gradcheck(shape, options):
    """Finite differences for the five tensors and every float option, through out and lse."""
    inputs = tensors(shape)
    inputs.update({n: x.double() for n, x in options.items() if torch.is_tensor(x) and x.is_floating_point()})
    constants = _seeded({n: x for n, x in options.items() if n not in inputs and n not in HINTS})
    names = list(inputs)

    def attention(*values):
        out, lse = reference.prefix_attention(**dict(zip(names, values, strict=True)), **constants)
        return out, lse.masked_fill(torch.isinf(lse), 0.0)

    leaves = [x.detach().clone().requires_grad_() for x in inputs.values()]
    assert torch.autograd.gradcheck(attention, leaves, fast_mode=True)


@pytest.mark.parametrize("name", FEATURES)
def test_gradcheck_of_each_feature(name):
    _gradcheck(*feature(name, SMALL))


@pytest.mark.parametrize("seed", range(40))
def test_gradcheck_of_combinations(seed):
    shape, options = combination(seed)
    _gradcheck(shape, options)


def _concatenated(q, k, v, prefix_k, prefix_v, mask=None, scale=None):
    """torch's attention over the concatenation, heads repeated, with an explicit mask [.., S, P+T]."""
    group = q.shape[1] // k.shape[1]
    k, v = (
        torch.cat([prefix.expand(len(q), -1, -1, -1), x], 2).repeat_interleave(group, 1)
        for prefix, x in ((prefix_k, k), (prefix_v, v))
    )
    if mask is None:
        S, P = q.shape[2], prefix_k.shape[-2]
        mask = torch.ones(S, k.shape[2], dtype=torch.bool).tril(k.shape[2] - S)
        assert mask[0, :P].all()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


@pytest.mark.parametrize("shape", [
    SMALL, Shape(), Shape(T=13), Shape(S=1, P=1), Shape(P=0), Shape(Hkv=4), Shape(D=24, Dv=16), Shape(Dv=12, P=0),
], ids=str)  # fmt: skip
def test_equals_attention_over_the_concatenation(shape):
    inputs = tensors(shape)
    out, _ = reference.prefix_attention(**inputs)
    torch.testing.assert_close(out, _concatenated(**inputs))


def test_lse_is_the_logarithm_of_the_denominator():
    inputs = tensors(Shape(Hq=2, Hkv=2))
    _, lse = reference.prefix_attention(**inputs, scale=1.0)
    keys = torch.cat([inputs["prefix_k"].expand(2, -1, -1, -1), inputs["k"]], 2)
    scores = inputs["q"] @ keys.transpose(-1, -2)
    scores = scores.masked_fill(~torch.ones(7, 12, dtype=torch.bool).tril(5), -torch.inf)
    torch.testing.assert_close(lse, scores.logsumexp(-1))


@given(st.integers(0, 10_000), st.integers(0, 12))
def test_merging_two_key_sets_is_attention_on_their_union(seed, cut):
    """Split the prefix anywhere: attention over both parts, merged by lse, equals attention over the whole."""
    inputs = tensors(Shape(P=12), seed=seed)
    whole, lse = reference.prefix_attention(**inputs)
    first = {n: x[..., :cut, :] if n.startswith("prefix") else x for n, x in inputs.items()}
    second = {n: x[..., cut:, :] if n.startswith("prefix") else x for n, x in inputs.items()}
    second |= {"k": inputs["k"][:, :, :0], "v": inputs["v"][:, :, :0]}
    out1, lse1 = reference.prefix_attention(**first)
    out2, lse2 = reference.prefix_attention(**second, causal=False)
    torch.testing.assert_close(torch.logaddexp(lse1, lse2), lse)
    merged = out1 * (lse1 - lse).exp()[..., None] + out2 * (lse2 - lse).exp()[..., None]
    torch.testing.assert_close(merged, whole)


@given(st.integers(0, 10_000))
def test_order_of_the_prefix_does_not_matter(seed):
    inputs = tensors(Shape(P=6), seed=seed)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    shuffled = {n: x[:, order] if n.startswith("prefix") else x for n, x in inputs.items()}
    for got, want in zip(reference.prefix_attention(**shuffled), reference.prefix_attention(**inputs), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("window", [1, 3, 6, 8, 100])
def test_window_counts_the_prefix_as_earlier_positions(window):
    inputs = tensors(Shape(Hq=2))
    out, _ = reference.prefix_attention(**inputs, window=window)
    S, P = 7, 5
    distance = torch.arange(P, P + S)[:, None] - torch.arange(P + S)
    torch.testing.assert_close(out, _concatenated(**inputs, mask=(distance >= 0) & (distance < window)))


def test_window_may_leave_the_prefix_visible():
    inputs = tensors(Shape(Hq=2))
    out, _ = reference.prefix_attention(**inputs, window=2, prefix_in_window=False)
    distance = torch.arange(7)[:, None] - torch.arange(7)
    mask = torch.cat([torch.ones(7, 5, dtype=torch.bool), (distance >= 0) & (distance < 2)], 1)
    torch.testing.assert_close(out, _concatenated(**inputs, mask=mask))


def test_key_mask_hides_sequence_keys_only():
    shape, options = feature("key_mask", Shape(B=3))
    inputs = tensors(shape)
    out, _ = reference.prefix_attention(**inputs, **options)
    causal = torch.ones(7, 7, dtype=torch.bool).tril() & options["key_mask"][:, None, None, :]
    mask = torch.cat([torch.ones(3, 1, 7, 5, dtype=torch.bool), causal], -1)
    torch.testing.assert_close(out, _concatenated(**inputs, mask=mask))


def test_packed_sequences_equal_separate_ones():
    lens, P = (4, 0, 1, 6), 3
    inputs = tensors(Shape(B=1, S=sum(lens), P=P))
    offsets = torch.tensor([0, *torch.tensor(lens).cumsum(0)], dtype=torch.int32)
    for options in ({}, {"window": 5}):
        out, lse = reference.prefix_attention(**inputs, cu_seqlens=offsets, **options)
        for start, n in zip(offsets.tolist(), lens, strict=False):
            one = {x: t if x.startswith("prefix") else t[:, :, start : start + n] for x, t in inputs.items()}
            want_out, want_lse = reference.prefix_attention(**one, **options)
            torch.testing.assert_close(out[:, :, start : start + n], want_out)
            torch.testing.assert_close(lse[:, :, start : start + n], want_lse)


def test_a_bank_equals_one_prefix_per_sample():
    shape = Shape(B=4, A=3)
    inputs, ids, lens = tensors(shape), [2, -1, 0, 2], [5, 1, 3]
    for options in ({}, {"window": 6}):
        out, lse = reference.prefix_attention(
            **inputs, prefix_ids=torch.tensor(ids), prefix_lens=torch.tensor(lens), **options
        )
        for b, a in enumerate(ids):
            one = {x: inputs[x][b : b + 1] for x in "qkv"}
            length = 0 if a < 0 else lens[a]
            prefix = {x: inputs[x][a][:, :length] for x in ("prefix_k", "prefix_v")}
            want_out, want_lse = reference.prefix_attention(**one, **prefix, **options)
            torch.testing.assert_close(out[b : b + 1], want_out)
            torch.testing.assert_close(lse[b : b + 1], want_lse)


def test_sink_is_a_key_without_a_value():
    inputs = tensors(Shape(Hq=2, Hkv=2))
    sinks = torch.randn(2, dtype=torch.float64)
    out, lse = reference.prefix_attention(**inputs, sinks=sinks)
    plain_out, plain_lse = reference.prefix_attention(**inputs)
    torch.testing.assert_close(lse, torch.logaddexp(plain_lse, sinks[None, :, None]))
    torch.testing.assert_close(out, plain_out * (plain_lse - lse).exp()[..., None])


def test_gate_adds_a_second_softmax():
    inputs, gate = tensors(Shape(Hq=2, Hkv=2)), torch.randn(2, dtype=torch.float64)
    out, lse = reference.prefix_attention(**inputs, gate=gate)
    seq, seq_lse = reference.prefix_attention(**{n: x[..., :0, :] if "prefix" in n else x for n, x in inputs.items()})
    prefix = F.scaled_dot_product_attention(
        inputs["q"], *(inputs[n].expand(2, -1, -1, -1) for n in ("prefix_k", "prefix_v"))
    )
    torch.testing.assert_close(out, seq + torch.tanh(gate)[:, None, None] * prefix)
    torch.testing.assert_close(lse, seq_lse)


def test_bias_and_softcap_order():
    """Softcap first, bias after it: a bias of -inf hides whatever the cap."""
    inputs = tensors(Shape(Hq=2, Hkv=2))
    hidden = torch.zeros(1, 1, 7, 7, dtype=torch.float64)
    hidden[..., 2] = -torch.inf
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[:, 2] = False
    by_bias = reference.prefix_attention(**inputs, softcap=0.7, bias=hidden)
    by_mask = reference.prefix_attention(**inputs, softcap=0.7, key_mask=mask)
    for got, want in zip(by_bias, by_mask, strict=True):
        torch.testing.assert_close(got, want)


def test_a_query_that_sees_nothing_is_zero_with_zero_gradients():
    inputs = {n: x.detach().clone().requires_grad_() for n, x in tensors(Shape(P=0)).items()}
    out, lse = reference.prefix_attention(**inputs, key_mask=torch.zeros(2, 7, dtype=torch.bool))
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    out.sum().backward()
    for name, x in inputs.items():
        assert (x.grad == 0).all(), f"d{name} is not zero"


@pytest.mark.parametrize(
    "sizes", [{"P": 0}, {"S": 0}, {"B": 0}, {"S": 0, "P": 0}, {"S": 0, "T": 4}, {"P": 0, "Dv": 3}], ids=str
)
def test_empty_tensors(sizes):
    shape = Shape(**sizes)
    out, lse = reference.prefix_attention(**tensors(shape))
    assert out.shape == (shape.B, shape.Hq, shape.S, shape.value_dim)
    assert lse.shape == out.shape[:3]


def test_dropout_keeps_the_expected_share_and_scale():
    seed = torch.tensor(7)
    keep = reference.dropout_keep(seed, (2, 3, 64, 130), 0.25, part=0)
    assert abs(keep.float().mean().item() - 0.75) < 0.01
    assert torch.equal(keep, reference.dropout_keep(seed, (2, 3, 64, 130), 0.25, part=0))
    assert not torch.equal(keep, reference.dropout_keep(seed, (2, 3, 64, 130), 0.25, part=1))
    assert torch.equal(keep[..., :50], reference.dropout_keep(seed, (2, 3, 64, 50), 0.25, part=0))


# Random123's kat_vectors for philox4x32-10: counter, key, result
PHILOX_KNOWN = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), PHILOX_KNOWN)
def test_philox_known_answers(counter, key, words):
    got = reference.philox4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert [int(x) for x in got] == words


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_fp32_prefix_is_rounded_but_its_gradient_is_not(dtype):
    inputs = tensors(Shape(), dtype, prefix_dtype=torch.float32)
    rounded = {n: x.to(dtype) for n, x in inputs.items()}
    assert torch.equal(reference.prefix_attention(**inputs)[0], reference.prefix_attention(**rounded)[0])
    leaf = inputs["prefix_k"].detach().clone().requires_grad_()
    reference.prefix_attention(**{**inputs, "prefix_k": leaf})[0].float().sum().backward()
    assert not torch.equal(leaf.grad, leaf.grad.to(dtype).float()), "the gradient went through half precision"


def test_soft_prompt_embedding():
    ids, weight = torch.tensor([[1, 2, 3], [4, 5, 0]]), torch.randn(6, 4)
    prompt, bank = torch.randn(2, 4), torch.randn(3, 2, 4)
    out = reference.soft_prompt_embedding(ids, weight, prompt)
    assert torch.equal(out, torch.cat([prompt.expand(2, -1, -1), F.embedding(ids, weight)], 1))
    out = reference.soft_prompt_embedding(ids, weight, bank, torch.tensor([2, 0]))
    assert torch.equal(out[:, :2], bank[[2, 0]])


def test_soft_prompt_embedding_gradcheck():
    ids = torch.tensor([[1, 2, 1], [4, 5, 0]])
    for prompt_ids, sizes in ((None, (2, 3)), (torch.tensor([1, 1]), (3, 2, 3))):
        weight, prompt = (torch.randn(n, dtype=torch.float64, requires_grad=True) for n in ((6, 3), sizes))
        assert torch.autograd.gradcheck(reference.soft_prompt_embedding, (ids, weight, prompt, prompt_ids))
