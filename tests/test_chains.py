# SPDX-License-Identifier: Apache-2.0
"""Sequences with several prefixes, and prefixes that lie in k and v: against one call per sequence with torch.cat."""

from __future__ import annotations

import re

import pytest
import torch
from torch.autograd import gradcheck

import peftkern
from peftkern import backends, prefix_attention, reference
from peftkern.arguments import AttentionArgs, constant, host_values
from peftkern.backends import gather
from peftkern.backends.cpu import CpuPlan
from peftkern.testing.bounds import check_backend
from peftkern.testing.cases import Shape, feature, tensors
from tests.transfers import Moves

#: Two prefixes of a bank, and three in k and v: the first sequence, a part of it, and the second sequence. The last
#: sequence sees the same rows twice.
SHARED = {
    "cu_seqlens": torch.tensor([0, 6, 10, 15, 20]),
    "prefix_ids": torch.tensor([[0, -1, -1], [1, 2, -1], [-1, 3, 4], [4, 2, 4]]),
    "prefix_lens": torch.tensor([3, 2, 6, 3, 4]),
    "prefix_starts": torch.tensor([0, 2, 6]),
}
SHAPE = Shape(B=1, S=20, P=3, A=2)
BACKENDS = backends.available_backends()
NAMES = ("q", "k", "v", "prefix_k", "prefix_v")


def _by_cat(q, k, v, prefix_k, prefix_v, *, prefix_ids, prefix_lens, cu_seqlens=None, prefix_starts=None, **options):
    """One call per sequence or sample, whose prefix is the concatenation of its prefixes."""
    starts = [0] * len(prefix_k) + ([] if prefix_starts is None else prefix_starts.tolist())
    outs = []
    for n, row in enumerate(prefix_ids.tolist()):
        keys, values = ([x.new_zeros(x.shape[1], 0, x.shape[3])] for x in (k, v))
        for i in (i for i in row if i >= 0):
            rows = slice(starts[i], starts[i] + int(prefix_lens[i]))
            keys.append(prefix_k[i, :, rows] if i < len(prefix_k) else k[0, :, rows])
            values.append(prefix_v[i, :, rows] if i < len(prefix_v) else v[0, :, rows])
        if cu_seqlens is None:
            part = [x[n, None] for x in (q, k, v)]
        else:
            part = [x[:, :, cu_seqlens[n] : cu_seqlens[n + 1]] for x in (q, k, v)]
        outs.append(reference.prefix_attention(*part, torch.cat(keys, 1), torch.cat(values, 1), **options)[0])
    return torch.cat(outs, 0 if cu_seqlens is None else 2)


def _results(attention, inputs, options, needed=NAMES):
    """out and the gradients that are needed, by name."""
    leaves = {name: x.detach().requires_grad_(name in needed) for name, x in inputs.items()}
    out = attention(*leaves.values(), **options)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    gradients = torch.autograd.grad(out, [leaves[name] for name in needed], dout)
    return {"out": out.detach(), **dict(zip(needed, gradients, strict=True))}


def _on(backend, **options):
    return {**SHARED, **options, "backend": backend}


OPTIONS = {
    "plain": {},
    "window over some prefix tokens": {"window": 7},
    "window over some sequences": {"window": 12},
    "bidirectional": {"causal": False, "softcap": 2.0},
    "gate": {"gate": torch.linspace(-1, 1, 4), "sinks": torch.linspace(-1, 2, 4)},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPTIONS)
def test_chains_are_concatenations(name, backend, poisoned):
    dtype = torch.float64 if backend == "reference" else torch.float32
    inputs = tensors(SHAPE, dtype)
    got = _results(prefix_attention, inputs, _on(backend, **OPTIONS[name]))
    want = _results(_by_cat, {n: x.double() for n, x in inputs.items()}, {**SHARED, **OPTIONS[name]})
    for quantity, x in got.items():
        difference = (x.double() - want[quantity]).abs().max()
        assert difference < (1e-6 if backend == "reference" else 1e-5), f"{quantity} differs by {difference}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_of_a_batch_with_several_prefixes(backend, poisoned):
    options = {"prefix_ids": torch.tensor([[2, 0], [-1, 1], [-1, -1]]), "prefix_lens": torch.tensor([5, 0, 4])}
    inputs = tensors(Shape(B=3, S=4, T=9, A=3))
    want = _results(_by_cat, inputs, {**options, "window": 12})
    got = _results(prefix_attention, {n: x.float() for n, x in inputs.items()}, {**options, "window": 12})
    for quantity, x in got.items():
        torch.testing.assert_close(x, want[quantity].float(), atol=1e-5, rtol=1e-5)


def test_the_reference_has_the_gradients_of_its_results():
    shape = Shape(B=1, Hq=2, Hkv=1, S=20, P=3, D=2, A=2)
    inputs = {n: x.contiguous().requires_grad_() for n, x in tensors(shape).items()}
    assert gradcheck(lambda *x: reference.prefix_attention(*x, **SHARED), tuple(inputs.values()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_beside_an_fp32_bank(dtype, backend, poisoned):
    """The rows' gradients are added to dk and dv in fp32, and rounded once more."""
    check_backend(backend, tensors(SHAPE, dtype, torch.float32), SHARED, dlse=True)


@pytest.mark.parametrize("rows", ["every", "first"])
def test_a_repetition_that_is_not_added_up_is_noticed(rows, monkeypatch):
    folds = gather._folds
    monkeypatch.setattr(gather, "_folds", lambda *given: folds(*given)[1:] if rows == "first" else [])
    with pytest.raises(AssertionError, match="dk: error"):
        check_backend("cpu", tensors(SHAPE, torch.float32), SHARED)


EDGES = {
    "no sequence": (0, {"cu_seqlens": [0], "prefix_ids": torch.zeros(0, 2), "prefix_lens": [1, 2, 0]}),
    "no row": (0, {"cu_seqlens": [0, 0], "prefix_ids": [[0, 2]], "prefix_lens": [1, 2, 0]}),
    "no prefix": (9, {"cu_seqlens": [0, 4, 9], "prefix_ids": [[-1, -1], [-1, -1]], "prefix_lens": [1, 2, 4]}),
    "no column": (9, {"cu_seqlens": [0, 4, 9], "prefix_ids": torch.zeros(2, 0), "prefix_lens": [1, 2, 4]}),
    "empty prefixes": (9, {"cu_seqlens": [0, 4, 9], "prefix_ids": [[0, 2], [2, 1]], "prefix_lens": [0, 0, 0]}),
    "one number each": (9, {"cu_seqlens": [0, 4, 9], "prefix_ids": [-1, 2], "prefix_lens": [1, 2, 4]}),
    "the same row": (9, {"cu_seqlens": [0, 4, 9], "prefix_ids": [[1, 2], [1, 2]], "prefix_lens": [1, 2, 4]}),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", EDGES)
def test_edges(name, backend, dtype, poisoned):
    length, options = EDGES[name]
    options = {n: torch.as_tensor(x).to(dtype) for n, x in {**options, "prefix_starts": [0]}.items()}
    check_backend(backend, tensors(Shape(B=1, S=length, P=3, A=2), torch.float32), options)


@pytest.mark.parametrize("sizes", [{"A": 0}, {"P": 0}, {"A": 0, "P": 0}], ids=str)
def test_an_empty_bank(sizes, poisoned):
    shape = Shape(**{**vars(SHAPE), **sizes})
    ids = torch.where(SHARED["prefix_ids"] < 2, -1, SHARED["prefix_ids"] - (2 - shape.A))
    lens = torch.cat([torch.zeros(shape.A, dtype=torch.int64), SHARED["prefix_lens"][2:]])
    options = {**SHARED, "prefix_ids": ids, "prefix_lens": lens}
    for more in ({}, {"window": 5, "prefix_in_window": shape.A > 0}):
        check_backend("cpu", tensors(shape, torch.float32), {**options, **more})


def test_numbers_of_any_strides():
    inputs = tensors(SHAPE, torch.float32)
    want = prefix_attention(**inputs, **SHARED)
    spread = {n: torch.stack([x, x - 7], -1)[..., 0] for n, x in SHARED.items()}
    spread["prefix_ids"] = spread["prefix_ids"].t().contiguous().t()
    assert torch.equal(prefix_attention(**inputs, **spread), want)


def test_runs_are_bitwise_equal():
    torch.set_num_threads(2)
    inputs = tensors(Shape(B=1, S=20, P=3, D=64, A=2), torch.bfloat16, torch.float32)
    first, second = (_results(prefix_attention, inputs, SHARED) for _ in range(2))
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needed", [("q",), ("k",), ("v",), ("prefix_k",), ("prefix_v",), ("k", "prefix_v")], ids=str)
def test_some_gradients_are_those_among_all(needed, backend, poisoned):
    inputs = tensors(SHAPE, torch.float32)
    every = _results(prefix_attention, inputs, _on(backend))
    some = _results(prefix_attention, inputs, _on(backend), needed)
    for name, x in some.items():
        torch.testing.assert_close(x, every[name], msg=name)


def test_autocast_rounds_the_bank_with_the_activations():
    inputs = tensors(SHAPE, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = _results(prefix_attention, inputs, SHARED)
    half = {n: x if n.startswith("prefix") else x.bfloat16() for n, x in inputs.items()}
    want = _results(prefix_attention, half, SHARED)
    assert torch.equal(got["out"], want["out"])
    assert got["prefix_k"].dtype == torch.float32
    assert torch.equal(got["prefix_k"], want["prefix_k"])


def _args(options, inputs) -> AttentionArgs:
    fields = dict.fromkeys(AttentionArgs._fields)
    return AttentionArgs(**{**fields, **inputs, **options, "scale": 1.0, "causal": True, "softcap": 0.0})


def test_the_rows_behind_a_chain_are_zeros():
    """Masked kernels read them. k may be NaN in rows that no prefix contains."""
    inputs = tensors(SHAPE, torch.float32)
    inputs["k"][:, :, 10:] = torch.nan
    args = gather.gathered(_args(SHARED, inputs))
    assert args.prefix_lens.tolist() == [3, 8, 7, 14]
    for chain, length in enumerate(args.prefix_lens.tolist()):
        assert (args.prefix_k[chain, :, length:] == 0).all()
        assert args.prefix_k[chain, :, :length].isfinite().all()


@pytest.mark.parametrize(
    ("ids", "source"),
    [([[0, -1], [0, -1]], "bank"), ([[2, 4], [2, 4]], "k"), ([[2, 2], [2, 2]], None), ([[0, 1], [0, 1]], None)],
)
def test_rows_behind_each_other_are_not_copied(ids, source):
    inputs = tensors(Shape(B=1, S=20, P=3, A=2), torch.float32)
    options = {**SHARED, "cu_seqlens": torch.tensor([0, 10, 20]), "prefix_ids": torch.tensor(ids)}
    args = gather.gathered(_args(options, inputs))
    storages = {"bank": inputs["prefix_k"], "k": inputs["k"]}
    shared = [n for n, x in storages.items() if x.untyped_storage()._cdata == args.prefix_k.untyped_storage()._cdata]
    assert shared == ([] if source is None else [source])
    check_backend("cpu", inputs, options)


def test_layers_that_pass_constant_numbers_share_the_indices(monkeypatch):
    made, rows = [], gather._rows
    monkeypatch.setattr(gather, "_rows", lambda *given: made.append(1) or rows(*given))
    inputs = tensors(SHAPE, torch.float32)
    for marked, count in ((False, 4), (True, 1)):
        options = {n: constant(x.clone()) if marked else x for n, x in SHARED.items()}
        made.clear()
        for _ in range(2):
            _results(prefix_attention, inputs, options)
        assert len(made) == count


def test_values_that_the_host_knows_are_not_read_from_the_device():
    on_device = torch.empty(2, dtype=torch.int64, device="meta")  # whose values nobody can read
    assert host_values(constant(on_device, torch.tensor([3, 1]))).tolist() == [3, 1]
    with pytest.raises(NotImplementedError):
        host_values(torch.empty(2, device="meta"))


@pytest.mark.parametrize("num_chains", [1, 3, 5])
def test_indices_are_moved_without_waiting_and_those_of_all_folds_at_once(num_chains):
    prefixes = [[gather._Piece(0, 0, 3)], [gather._Piece(None, 0, 2)], [gather._Piece(None, 2, 4)]]
    ids = [[0, 1], [1, 0], [0, 2], [1, 2], [2, 0]][:num_chains]
    with Moves() as moves:
        rows = gather._rows(ids, prefixes, torch.device("meta"))
        _ = rows.of_bank, rows.of_sequence, rows.folds
    assert moves.asynchronous == [True] * 7, "ids, lens, folds; all and first copies from the bank, and from k and v"
    want = gather._rows(ids, prefixes, torch.device("cpu")).folds
    assert [(*fold.chains.shape, *fold[1:]) for fold in rows.folds] == [(*f.chains.shape, *f[1:]) for f in want]


def test_the_gathered_bank_is_not_kept_for_the_backward():
    leaves = {n: x.requires_grad_() for n, x in tensors(SHAPE, torch.float32).items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out, lse = prefix_attention(**leaves, **SHARED, return_lse=True)
    given = {x.data_ptr() for x in (*leaves.values(), *SHARED.values(), out, lse)}
    assert {x.data_ptr() for x in saved} == given


def test_a_plan_is_not_bound_to_one_set_of_values(monkeypatch):
    monkeypatch.setattr(CpuPlan, "bind", lambda *_: pytest.fail("bound"))
    prefix_attention(**tensors(SHAPE, torch.float32), **SHARED)


def test_other_values_do_not_recompile():
    torch._dynamo.reset()
    inputs = tensors(SHAPE, torch.float32)
    compiled = torch.compile(prefix_attention, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shift in range(3):
            options = {**SHARED, "prefix_ids": SHARED["prefix_ids"].roll(shift, 0)}
            assert torch.equal(compiled(**inputs, **options), prefix_attention(**inputs, **options))


X = torch.zeros
BAD = [
    ({"prefix_ids": X(3, 2).long()}, "prefix_ids: expected shape [4, K], got [3, 2]"),
    ({"prefix_ids": X(4, 2, 1).long()}, "prefix_ids: expected shape [4], got [4, 2, 1]"),
    ({"prefix_ids": torch.tensor([[0], [1], [5], [0]])}, "prefix_ids: expected values from -1 to 4, got values"),
    ({"prefix_lens": None}, "prefix_lens: expected the length of each prefix, since prefix_starts is given"),
    ({"prefix_lens": X(3).long()}, "prefix_lens: expected shape [5], got [3]"),
    ({"prefix_lens": torch.tensor([4, 0, 0, 0, 0])}, "prefix_lens: expected values from 0 to 3, got values"),
    ({"prefix_lens": torch.tensor([3, 0, 0, -1, 0])}, "prefix_lens: expected values from 0 to 20, got values"),
    ({"prefix_starts": X(3)}, "prefix_starts: expected torch.int32 or torch.int64, got torch.float32"),
    ({"prefix_starts": [0]}, "prefix_starts: expected a tensor or None, got list"),
    ({"prefix_starts": torch.tensor([0, -1, 0])}, "prefix_starts: expected values from 0 to 20, got values"),
    ({"prefix_starts": torch.tensor([0, 18, 0])}, "prefix_starts: expected prefixes that end by T = 20, got ends ["),
    ({"prefix_starts": X(3, device="meta").long()}, "prefix_starts: expected q's device cpu, got meta"),
    ({"cu_seqlens": None, "prefix_ids": X(1).long()}, "prefix_starts: expected None, since the input is not packed"),
    ({"window": 5, "prefix_in_window": False}, "prefix_starts: expected None, since prefix_in_window is False"),
    ({"prefix_bias": X(1, 3)}, "prefix_bias: expected None, since prefix_starts is given, got a tensor"),
    (
        {"prefix_bias": X(1, 3), "prefix_starts": None, "prefix_lens": None},
        "prefix_bias: expected None, since prefix_ids has two dims, got a tensor",
    ),
    ({"prefix_start": 0}, "prefix_start: expected None, since"),
    ({"max_prefix_len": 13}, "max_prefix_len: expected at least what a sequence sees, 14, got 13"),
    ({"max_prefix_len": -1}, "max_prefix_len: expected None or a non-negative int of at most 64 bits, got -1"),
    (
        {"max_prefix_len": 9, "prefix_ids": X(4).long(), "prefix_starts": None, "prefix_lens": None},
        "max_prefix_len: expected None, since prefix_ids does not have two dims and prefix_starts is None, got 9",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        prefix_attention(**tensors(SHAPE, torch.float32), **{**SHARED, **changes})


def test_prefixes_in_k_and_v_need_a_bank():
    with pytest.raises(ValueError, match=r"prefix_starts: expected None, since prefix_k .* is a single prefix"):
        prefix_attention(**tensors(Shape(B=1), torch.float32), prefix_starts=torch.tensor([0]))


def test_a_call_has_the_shape_of_the_gathered_bank():
    def shape_of(name, **changes):
        shape, options = feature(name, Shape(P=5))
        return peftkern.explain(**tensors(shape, torch.float32), **{**options, **changes}).call.prefix_shape

    assert shape_of("several_prefixes") == (2, 2, 15, 8)
    assert shape_of("packed_several", max_prefix_len=None) == (3, 2, 10, 8)
    assert shape_of("packed_several", max_prefix_len=9) == (3, 2, 9, 8)
    assert shape_of("packed_shared") == (3, 2, 7, 8)
