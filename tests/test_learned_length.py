# SPDX-License-Identifier: Apache-2.0
"""Gates of a prefix's tokens, shorter and longer prefixes, and the bound for what pruning changes."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftkern import PrefixKV, load_prefix, prefix_attention, save_prefix
from tests.test_modules import llama, tokenizer

FP64 = torch.float64
GEOMETRY = {"num_layers": 3, "num_kv_heads": 2, "head_dim": 4}
TEXT = "A sentence of some tokens."


def gated(length=5, *, seed=0, **options):
    """A prefix with different gates."""
    torch.manual_seed(seed)
    prefix = PrefixKV(None, length, **{**GEOMETRY, "learn_length": True, **options})
    prefix.gate_logits.data.normal_(std=2.0)
    return prefix


def assert_same(actual, expected):
    for pair, want in zip(actual.layer_kv(), expected.layer_kv(), strict=True):
        torch.testing.assert_close(pair, want, rtol=0, atol=0)
    torch.testing.assert_close(actual.gates(), expected.gates(), rtol=0, atol=0)
    assert (actual.lengths, actual.positions) == (expected.lengths, expected.positions)


def test_gaps_are_positions_without_a_token():
    """Layers without tokens have none, nor has a prefix without gates, whose tokens are the last of its positions."""
    assert not PrefixKV(None, [4, 0, 4], **GEOMETRY, learn_length=True).has_gaps
    assert PrefixKV(None, [4, 3, 4], **GEOMETRY, learn_length=True).has_gaps
    assert PrefixKV(None, 4, **GEOMETRY, learn_length=True, positions=5).has_gaps
    assert not PrefixKV(None, 4, **GEOMETRY, positions=5).has_gaps


def test_gates_start_open_and_are_the_sigmoid_of_their_logits():
    prefix = PrefixKV(None, [4, 0, 2], **GEOMETRY, learn_length=True)
    assert [len(g) for g in prefix.gates()] == [4, 0, 2]
    assert all(bool(((g > 0.8) & (g < 0.95)).all()) for g in prefix.gates())
    prefix.gate_logits.data = torch.linspace(-3, 3, 6)
    want = torch.linspace(-3, 3, 6).sigmoid()
    torch.testing.assert_close(torch.cat(prefix.gates()), want)
    assert prefix.layer_bias()[1] is None
    torch.testing.assert_close(torch.cat([x for x in prefix.layer_bias() if x is not None]), want.log())
    torch.testing.assert_close(prefix.sparsity(), want.mean())
    prefix.sparsity().backward()
    torch.testing.assert_close(prefix.gate_logits.grad, want * (1 - want) / 6)


def test_frozen_tokens_have_a_gate_of_one_and_stay():
    prefix = gated([4, 1, 2], num_frozen_tokens=2)
    assert prefix.gate_logits.shape == (2,)
    assert [g[: min(2, n)].tolist() for g, n in zip(prefix.gates(), prefix.lengths, strict=True)] == [
        [1, 1], [1], [1, 1],
    ]  # fmt: skip
    prefix.gate_logits.data.fill_(-9.0)
    assert prefix.prune(0.5).lengths == (2, 1, 2)
    assert float(prefix.prune(0.5).sparsity().detach()) == 0.0


def test_gradients_through_a_gate_of_zero_are_finite():
    prefix = gated(2)
    prefix.gate_logits.data[0] = -torch.inf
    k, v = prefix.layer_kv()[0]
    q, kv = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4)
    prefix_attention(q, kv, kv, k, v, prefix_bias=prefix.layer_bias()[0][None]).sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in prefix.parameters())
    assert float(prefix.gate_logits.grad[0]) == 0.0


@pytest.mark.parametrize(
    ("length", "options"),
    [(5, {}), ([5, 0, 3], {}), (5, {"num_frozen_tokens": 1}), (5, {"projection": 7}), (5, {"value_head_dim": 3})],
)
def test_prune_keeps_the_tokens_with_larger_gates(length, options):
    prefix = gated(length, **options)
    prefix.trainable.requires_grad_(False)
    threshold = float(torch.cat(prefix.gates()).median())
    shorter = prefix.prune(threshold)
    for layer, gates in enumerate(prefix.gates()):
        keep = gates > threshold
        assert shorter.lengths[layer] == int(keep.sum())
        torch.testing.assert_close(shorter.gates()[layer], gates[keep], rtol=0, atol=0)
        for x, y in zip(shorter.layer_kv()[layer], prefix.layer_kv()[layer], strict=True):
            torch.testing.assert_close(x, y[:, keep], rtol=0, atol=0)
    assert sum(shorter.lengths) < sum(prefix.lengths)
    assert shorter.positions == prefix.positions == 5
    assert not any(x.requires_grad for x in shorter.trainable)
    assert shorter.gate_logits.requires_grad
    assert shorter.prune(threshold).lengths == shorter.lengths


def test_prune_of_all_tokens_leaves_none():
    assert gated().prune(1 - 1e-7).lengths == (0, 0, 0)


def test_prune_keeps_a_gate_that_is_not_a_number():
    prefix = gated()
    prefix.gate_logits.data[3] = torch.nan
    assert bool(prefix.prune(0.9).gates()[0].isnan().any())


@given(seed=st.integers(0, 10**6), threshold=st.floats(0.0, 0.9), scale=st.floats(0.1, 6.0))
def test_what_pruning_changes_is_within_its_bound(seed, threshold, scale):
    """The statements of PrefixKV.prune for one head: the removed weight bounds weights and output."""
    g = torch.Generator().manual_seed(seed)
    tokens, dim, keys = 6, 4, 3
    scores = scale * torch.randn(tokens + keys, generator=g, dtype=FP64)
    values = torch.randn(tokens + keys, dim, generator=g, dtype=FP64)
    gates = torch.rand(tokens, generator=g, dtype=FP64)
    factors = torch.cat([gates, torch.ones(keys, dtype=FP64)]) * scores.exp()
    removed = torch.cat([gates <= threshold, torch.zeros(keys, dtype=torch.bool)])
    old, new = factors / factors.sum(), factors.masked_fill(removed, 0) / factors[~removed].sum()
    weight = old[removed].sum()
    torch.testing.assert_close((old - new).abs().sum() / 2, weight)
    moved = (old @ values - new @ values).norm()
    assert float(moved) <= float(weight * torch.cdist(values, values).max()) + 1e-12
    bound = threshold * scores.exp()[removed].sum() / factors[~removed].sum()
    assert float(weight / (1 - weight)) <= float(bound) + 1e-12


def test_pruned_attention_is_within_the_bound_of_each_query():
    prefix = gated(8, dtype=FP64)
    threshold = float(torch.cat(prefix.gates()).median())
    shorter = prefix.prune(threshold)
    q, kv = torch.randn(2, 4, 6, 4, dtype=FP64), torch.randn(2, 2, 6, 4, dtype=FP64)
    for layer, gates in enumerate(prefix.gates()):
        (k, v), bias = prefix.layer_kv()[layer], prefix.layer_bias()[layer]
        (short_k, short_v), short_bias = shorter.layer_kv()[layer], shorter.layer_bias()[layer]
        full, lse = prefix_attention(q, kv, kv, k, v, prefix_bias=bias[None], return_lse=True)
        pruned = prefix_attention(q, kv, kv, short_k, short_v, prefix_bias=short_bias[None])
        scores = q @ k.repeat_interleave(2, 0).mT / 2 + bias
        weight = (scores - lse[..., None]).exp()[..., gates <= threshold].sum(-1)
        largest = 2 * max(float(x.norm(dim=-1).max()) for x in (v, kv))
        assert bool(((full - pruned).norm(dim=-1) <= weight * largest + 1e-12).all())
        assert float(weight.max()) > 1e-3


def test_a_text_grows_into_the_longer_text():
    model = llama()
    longer = PrefixKV.from_text(model, tokenizer, TEXT, 8)
    for learn in (False, True):
        short = PrefixKV.from_text(model, tokenizer, TEXT, 5, learn_length=learn)
        grown = short.grow_from_text(3, model, tokenizer, TEXT)
        assert (grown.lengths, grown.positions, grown.learn_length) == ((8, 8), 8, learn)
        for pair, want in zip(grown.layer_kv(), longer.layer_kv(), strict=True):
            torch.testing.assert_close(pair, want, rtol=1e-5, atol=1e-6)


def test_a_pruned_prefix_grows_behind_its_positions():
    model = llama()
    prefix = PrefixKV.from_text(model, tokenizer, TEXT, 5, learn_length=True, num_frozen_tokens=1)
    prefix.gate_logits.data = torch.tensor([-5.0, 1, 2, -5, 3, -5, -5, -5])
    cache = PrefixKV.from_text(model, tokenizer, TEXT, 9).layer_kv()
    grown = prefix.prune(0.1).grow([4, 2], cache)
    assert (grown.lengths, grown.positions) == ((3 + 4, 2 + 2), 9)
    torch.testing.assert_close(grown.layer_kv()[0][0][:, 3:], cache[0][0][:, 5:9])
    torch.testing.assert_close(grown.layer_kv()[1][1][:, 2:], cache[1][1][:, 5:7])
    logits = torch.tensor([1.0, 2, *[2.0] * 4, 3, *[2.0] * 2])
    torch.testing.assert_close(grown.gate_logits.data, logits)


@pytest.mark.parametrize("length", [5, [5, 0, 3]])
def test_checkpoints_and_copies_keep_gates_and_positions(length, tmp_path):
    prefix = gated(length).prune(0.5)
    assert prefix.positions == 5
    save_prefix(prefix, tmp_path)
    for other in (load_prefix(tmp_path), copy.deepcopy(prefix), prefix.bake()):
        assert_same(other, prefix)
        assert other.learn_length
        assert repr(other) == repr(prefix)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "PEFTKERN_PREFIX"
    again = PrefixKV(None, prefix.lengths, **GEOMETRY, learn_length=True, positions=5)
    again.load_state_dict(prefix.state_dict())
    assert_same(again, prefix)


def test_a_projection_with_gates_keeps_both_in_a_checkpoint(tmp_path):
    prefix = gated(projection=7)
    save_prefix(prefix, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "PEFTKERN_PREFIX"
    assert_same(load_prefix(tmp_path), prefix)
    assert load_prefix(tmp_path).projection == 7
    assert_same(prefix.bake(), prefix)


def test_positions_without_gates_keep_a_checkpoint_from_peft(tmp_path):
    save_prefix(PrefixKV(None, 3, **GEOMETRY, positions=7), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "PEFTKERN_PREFIX"
    assert load_prefix(tmp_path).positions == 7


def test_repr_tells_gates_and_positions():
    prefix = PrefixKV(None, 3, **GEOMETRY, learn_length=True, positions=7)
    assert repr(prefix).endswith("length=3, learn_length=True, positions=7)")
    assert "positions" not in repr(PrefixKV(None, 3, **GEOMETRY))


CASES = {
    "num_prefixes": lambda: PrefixKV(None, 3, **GEOMETRY, num_prefixes=2, learn_length=True),
    "learn_length": lambda: PrefixKV(None, 3, **GEOMETRY, peft_seq2seq_layout=True, learn_length=True),
    "positions": lambda: PrefixKV(None, 3, **GEOMETRY, positions=2),
    "threshold": lambda: gated().prune(1.0),
    "threshold: expected a number from 0 to below 1, got nan": lambda: gated().prune(float("nan")),
    "learn_length: expected a prefix with gates": lambda: PrefixKV(None, 3, **GEOMETRY).gates(),
    "learn_length: expected a prefix": lambda: PrefixKV(None, 3, **GEOMETRY).sparsity(),
    "learn_length: expected": lambda: PrefixKV(None, 3, **GEOMETRY).prune(0.1),
    "cache: layer 0: expected keys and values .* at least 7": lambda: gated().grow(2, cache_of(6)),
    "cache: expected keys and values of 3 layers, got 2": lambda: gated().grow(2, cache_of(9)[:2]),
    "num_prefixes: expected None in": lambda: PrefixKV(None, 3, **GEOMETRY, num_prefixes=2).grow(1, cache_of(9)),
    "peft_seq2seq_layout": lambda: PrefixKV(None, 3, **GEOMETRY, peft_seq2seq_layout=True).grow(1, cache_of(9)),
    "n: expected at most the model's 16": lambda: PrefixKV(
        small := llama(max_position_embeddings=16), 10, learn_length=True
    ).grow_from_text(7, small, tokenizer, TEXT),
    "prefixes.0.: expected .* got positions=7": lambda: PrefixKV.stack([PrefixKV(None, 3, **GEOMETRY, positions=7)]),
    "prefixes.0.: expected .* got learn_length=True": lambda: PrefixKV.stack([gated()]),
    "prompt_embeddings: expected a prefix without gates": lambda: gated().prompt_embeddings(),
}


def cache_of(tokens):
    return [(torch.randn(2, tokens, 4), torch.randn(2, tokens, 4)) for _ in range(3)]


@pytest.mark.parametrize("message", CASES)
def test_messages(message):
    with pytest.raises(ValueError, match=message):
        CASES[message]()
