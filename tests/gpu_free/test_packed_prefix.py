# SPDX-License-Identifier: Apache-2.0
"""The prefix kernels for packed sequences, and the merge of two results: direct calls in the guarded interpreter."""

from __future__ import annotations

import math

import pytest
import torch
from triton.runtime.errors import InterpreterError

from peftkern.arguments import AttentionArgs
from peftkern.backends.triton import TritonPrefixKernels

from .guard import guard
from .merging import args_of
from .triton_faults import FAULTS_OF_PACKED, plant

KERNELS = TritonPrefixKernels()
pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poisoned")]


def _strided(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random [B, H, N, D] in memory as [B, N, H, D + 3]."""
    batch, heads, length, head_dim = shape
    return torch.randn(batch, length, heads, head_dim + 3).to(dtype)[..., :head_dim].transpose(1, 2)


class Packed:
    """A packed call and, by torch alone, where its joined keys come from."""

    def __init__(self, lengths, prefix_len, ids=None, lens=None, value_dim=20, dtype=torch.float32, bank=None):
        heads, total, n = 2, sum(lengths), len(lengths)
        dims, shape = (20, value_dim), (heads, prefix_len) if bank is None else (bank, heads, prefix_len)
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        self.args: AttentionArgs = args_of(
            {
                "q": _strided(1, 4, total, 20, dtype=dtype),
                **{x: _strided(1, heads, total, dim, dtype=dtype) for x, dim in zip("kv", dims, strict=True)},
                **{f"prefix_{x}": torch.randn(*shape, dim) for x, dim in zip("kv", dims, strict=True)},
                "cu_seqlens": cu_seqlens,
                "prefix_ids": None if ids is None else torch.tensor(ids, dtype=torch.int32),
                "prefix_lens": None if lens is None else torch.tensor(lens, dtype=torch.int32),
            }
        )  # fmt: skip
        self.ids = [0] * n if ids is None else ids
        lens = lens or [prefix_len] * (bank or 1)
        self.used = [0 if i < 0 else lens[i] for i in self.ids]
        self.lengths = lengths
        sizes = torch.tensor([0, *(p + s for p, s in zip(self.used, lengths, strict=True))])
        self.cu_keys = sizes.cumsum(0).to(torch.int32)

    def joined(self, keys: torch.Tensor, prefix: torch.Tensor) -> torch.Tensor:
        prefix = prefix if prefix.dim() == 4 else prefix[None]
        parts, start = [], 0
        for number, used, length in zip(self.ids, self.used, self.lengths, strict=True):
            parts += [prefix[max(number, 0), :, :used].to(keys.dtype), keys[0, :, start : start + length]]
            start += length
        return torch.cat(parts, 1)[None] if parts else keys


CASES = {
    "one prefix": lambda **x: Packed([33, 64, 1], 19, **x),
    "long prefix": lambda **x: Packed([5, 70], 130, **x),
    "empty sequences": lambda **x: Packed([0, 7, 0, 0, 40, 0], 5, **x),
    "nothing but prefixes": lambda **x: Packed([0, 0], 5, **x),
    "no sequence": lambda **x: Packed([], 5, **x),
    "no prefix tokens": lambda **x: Packed([9, 3], 0, **x),
    "prompt first": lambda **x: Packed([19, 30, 2, 41], 19, ids=[-1, 0, 0, 0], bank=1, **x),
    "ragged bank": lambda **x: Packed([8, 0, 30, 17], 21, ids=[2, -1, 0, 2], lens=[21, 3, 0], bank=3, **x),
    "narrow values": lambda **x: Packed([8, 0, 30], 21, ids=[1, -1, 0], lens=[21, 3], bank=2, value_dim=13, **x),
    "wide values": lambda **x: Packed([33, 1], 19, value_dim=40, **x),
    "nobody sees a prefix": lambda **x: Packed([8, 3], 7, ids=[-1, -1], bank=2, **x),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_keys_of_packed_sequences_follow_their_prefix(name, dtype):
    """The fp32 prefix is rounded to the keys' dtype; rows behind the last sequence are not touched."""
    call = CASES[name](dtype=dtype)
    with guard():
        joined = KERNELS.concat_prefix(call.args, call.cu_keys)
    end = int(call.cu_keys[-1])
    for got, keys, prefix in zip(joined, call.args[1:3], call.args[3:5], strict=True):
        bound = call.args.k.shape[2] + len(call.lengths) * call.args.prefix_k.shape[-2]
        assert got.shape == (1, 2, bound, keys.shape[3])
        assert got.dtype == dtype
        assert got.transpose(1, 2).is_contiguous()
        assert torch.equal(got[:, :, :end], call.joined(keys, prefix))
        assert got[:, :, end:].isnan().all(), "poison is overwritten"


@pytest.mark.parametrize("needs", ["kv", "k", "v", ""])
@pytest.mark.parametrize("name", CASES)
def test_the_sequences_rows_come_back(name, needs):
    call = CASES[name](dtype=torch.float16)
    rows = call.args.k.shape[2] + len(call.lengths) * call.args.prefix_k.shape[-2]
    djoined = [_strided(1, 2, rows, x.shape[3], dtype=torch.float16) for x in call.args[1:3]]
    expected = []
    for x in djoined:
        starts = zip(call.cu_keys.tolist(), call.used, call.lengths, strict=False)
        expected.append(torch.cat([x[:, :, a + p : a + p + s] for a, p, s in starts] or [x], 2))
    targets = [
        torch.full_like(x, math.nan, dtype=torch.float16) if name in needs else x.new_empty(0)
        for name, x in zip("kv", call.args[1:3], strict=True)
    ]
    with guard():
        KERNELS.split_gradient(call.args, *djoined, call.cu_keys, *targets)
    for got, want in zip(targets, expected, strict=True):
        assert got.numel() == 0 or torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_prefixs_gradient_is_summed_over_the_sequences(name, dtype):
    """In fp32, and zero for tokens that no sequence sees."""
    call = CASES[name](dtype=dtype)
    args = call.args
    rows = args.k.shape[2] + len(call.lengths) * args.prefix_k.shape[-2]
    djoined = _strided(1, 2, rows, args.v.shape[3], dtype=dtype)
    djoined[:, :, int(call.cu_keys[-1]) :] = math.nan
    expected = torch.zeros(args.prefix_v.shape, dtype=torch.float64)
    each = expected if expected.dim() == 4 else expected[None]
    for start, number, used in zip(call.cu_keys.tolist(), call.ids, call.used, strict=False):
        each[max(number, 0), :, :used] += djoined[0, :, start : start + used]
    totals = [torch.full(args.prefix_v.shape, math.nan) for _ in range(2)]
    with guard():
        for total in totals:
            KERNELS.sum_prefix_gradient(args, djoined, total, call.cu_keys)
    torch.testing.assert_close(totals[0], expected.float(), rtol=1e-6, atol=1e-6)
    assert torch.equal(*totals)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 3, 33, 20), (1, 4, 1, 64), (1, 1, 64, 129), (2, 1, 5, 1), (1, 2, 0, 8)], ids=str
)
def test_two_results_merge_into_the_first(shape, dtype):
    """Rows without keys hold NaN and an lse of -inf or +inf, on either side and on both."""
    states = []
    for seed in range(2):
        out = _strided(*shape, dtype=dtype)
        lse = torch.randn(shape[0], shape[2], shape[1] + 2)[..., : shape[1]].transpose(1, 2) * 5
        index = torch.arange(lse.numel()).view(lse.shape)
        hidden = (index // 2**seed) % 2 == 1 if shape[2] > 1 else torch.zeros_like(index, dtype=torch.bool)
        lse[hidden] = torch.where(index[hidden] % 3 == 0, math.inf, -math.inf)
        out[hidden] = math.nan
        states.append((out, lse, hidden))
    weights = [torch.where(hidden, -math.inf, lse).double() for _, lse, hidden in states]
    values = [torch.where(hidden[..., None], 0, out).double() for out, _, hidden in states]
    lse = torch.logaddexp(*weights)
    shares = [torch.where(lse == -math.inf, 0, (w - lse).exp()) for w in weights]
    expected = sum(share[..., None] * value for share, value in zip(shares, values, strict=True))
    with guard() as watch:
        KERNELS.merge_states(*states[0][:2], *states[1][:2])
    torch.testing.assert_close(states[0][0], expected.to(dtype))
    torch.testing.assert_close(states[0][1], lse.float(), rtol=1e-6, atol=1e-6)
    assert len(watch.stores) == (shape[2] > 0), "more than one launch"


@pytest.mark.parametrize("fault", FAULTS_OF_PACKED, ids=str)
def test_a_slip_in_a_kernel_is_caught(fault, monkeypatch):
    def check() -> None:
        test_keys_of_packed_sequences_follow_their_prefix(fault.case, torch.float32)
        test_the_sequences_rows_come_back(fault.case, "kv")
        test_the_prefixs_gradient_is_summed_over_the_sequences(fault.case, torch.float32)

    check()
    plant(monkeypatch, fault)
    with pytest.raises((AssertionError, InterpreterError)):
        check()
