# SPDX-License-Identifier: Apache-2.0
"""Dense masks against a loop over their elements, and against the specification."""

from __future__ import annotations

import inspect

import pytest
import torch

import peftkern
from peftkern import reference, validation
from peftkern.arguments import AttentionArgs
from peftkern.backends import gather
from peftkern.backends.dense_mask import additive_mask, visibility
from peftkern.testing.cases import FEATURES, Shape, combination, feature, tensors


def _args(shape: Shape, options: dict) -> AttentionArgs:
    given = inspect.signature(peftkern.prefix_attention).bind(**tensors(shape, torch.float32), **options)
    given.apply_defaults()
    inputs = AttentionArgs(**{name: given.arguments[name] for name in AttentionArgs._fields})
    args = validation.validate_attention(inputs._replace(dropout_seed=None), inputs.dropout_seed)
    return gather.gathered(args) if args.has_chains else args


def _sequence_of(args: AttentionArgs, row: int) -> tuple[int, int]:
    """The index of the packed sequence that holds a row, and where it starts."""
    ends = args.cu_seqlens.tolist()
    index = max(n for n, start in enumerate(ends[:-1]) if start <= row < ends[n + 1])
    return index, ends[index]


def _sees_key(args: AttentionArgs, b: int, i: int, j: int) -> bool:
    position = i + args.k.shape[2] - args.q.shape[2]
    if args.causal and j > position:
        return False
    if args.window is not None and position - j >= args.window:
        return False
    if args.key_mask is not None and not args.key_mask[b, j]:
        return False
    return args.cu_seqlens is None or _sequence_of(args, i)[0] == _sequence_of(args, j)[0]


def _sees_prefix(args: AttentionArgs, b: int, i: int, p: int) -> bool:
    sequence, start = (b, 0) if args.cu_seqlens is None else _sequence_of(args, i)
    length = args.prefix_k.shape[-2]
    if args.prefix_ids is not None:
        prefix = int(args.prefix_ids[sequence])
        if prefix < 0:
            return False
        length = length if args.prefix_lens is None else int(args.prefix_lens[prefix])
    if p >= length:
        return False
    position = i + args.k.shape[2] - args.q.shape[2] - start
    return args.window is None or not args.prefix_in_window or position + length - p < args.window


CASES = [feature(name, Shape(B=2, S=6, P=4)) for name in FEATURES if name != "kv_cache"]
CASES += [feature("kv_cache", Shape(B=2, S=3, P=4)), *(combination(seed) for seed in range(60))]


@pytest.mark.parametrize(("shape", "options"), CASES)
def test_visibility_is_that_of_a_loop_over_elements(shape, options):
    args = _args(shape, options)
    batch, heads, q_len, _ = args.q.shape
    kv_len, prefix_len = args.k.shape[2], args.prefix_k.shape[-2]
    got = visibility(args)
    sequence = got.sequence.expand(batch, heads, q_len, kv_len)[:, 0]
    prefix = got.prefix.expand(batch, heads, q_len, prefix_len)[:, 0]
    for b in range(batch):
        for i in range(q_len):
            keys = [_sees_key(args, b, i, j) for j in range(kv_len)]
            assert sequence[b, i].tolist() == keys, f"sample {b}, query {i}: the sequence's keys"
            tokens = [_sees_prefix(args, b, i, p) for p in range(prefix_len)]
            assert prefix[b, i].tolist() == tokens, f"sample {b}, query {i}: the prefix"


@pytest.mark.parametrize(("shape", "options"), CASES)
def test_visibility_is_that_of_the_specification(shape, options):
    args = _args(shape, options)
    bank = args.prefix_k.shape[0] if args.prefix_k.dim() == 4 else 1
    sizes = (args.q.shape[0], args.q.shape[2], args.k.shape[2], bank, args.prefix_k.shape[-2])
    sequence, prefix = reference.visibility(
        sizes, args.q.device, args.causal, args.key_mask, args.cu_seqlens, args.prefix_ids, args.prefix_lens,
        args.window, args.prefix_in_window,
    )  # fmt: skip
    got = visibility(args)
    assert torch.equal(*torch.broadcast_tensors(got.sequence, sequence))
    assert torch.equal(*torch.broadcast_tensors(got.prefix, prefix.any(3)))


def test_an_additive_mask_has_aligned_rows_and_marks_empty_ones():
    q = torch.randn(2, 4, 3, 8, dtype=torch.bfloat16)
    visible = torch.ones(2, 1, 3, 5, dtype=torch.bool)
    visible[1, 0, 2] = False
    bias = torch.randn(1, 4, 1, 5)
    mask, empty = additive_mask(visible, bias, q, 5)
    assert mask.dtype == q.dtype
    assert mask.stride(-2) == 16
    assert torch.equal(mask[0], bias[0].expand(4, 3, 5).to(q.dtype))
    assert empty.nonzero().tolist() == [[1, head, 2] for head in range(4)]
