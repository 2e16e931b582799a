# SPDX-License-Identifier: Apache-2.0
"""Which kernels a call launches with how many blocks, on which device, and which tiles the blocks walk."""

from __future__ import annotations

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peftkern import native
from peftkern.arguments import (
    AttentionArgs,
    AttentionGradients,
    allocate_gradients,
    allocate_outputs,
    attention_call,
)
from peftkern.backends import cuda
from peftkern.backends.cuda import CudaPlan, CudaPrefixKernels
from peftkern.testing.cases import Shape, tensors

from . import shim as host
from .merging import args_of
from .shim import Launch, Shim

KERNELS, PLAN = CudaPrefixKernels(), CudaPlan()


@pytest.fixture
def shim(monkeypatch):
    return Shim(monkeypatch)


@pytest.fixture(scope="module")
def probes() -> ctypes.CDLL:
    return host.probes()


# -- tiles -----------------------------------------------------------------------------------------

ROWS = 16  # of a tile, in the probe


def _walk(probes, lengths: list[int], packed: bool, group: int, ids, only: int, first: int, end: int, step: int):
    """The (sequence, tile) pairs that a walk visits, or with a negative step the bound of the numbers of tiles."""
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    ids = torch.tensor(ids or [0] * len(lengths), dtype=torch.int32)
    out = torch.empty(sum(lengths) * group + 1, 2, dtype=torch.int32)
    count = probes.probe_walk(
        ctypes.c_void_p(bounds.data_ptr() if packed else 0), ctypes.c_void_p(ids.data_ptr()), len(lengths),
        int(bounds[-1]) if packed else lengths[0], group, only, first, end, step, ctypes.c_void_p(out.data_ptr()),
    )  # fmt: skip
    if step < 0:
        return count
    first_rows = {int(b): i for i, b in enumerate(bounds[:-1]) if lengths[i]} if packed else None
    return [(first_rows[x] if packed else x, tile) for x, tile in out[:count].tolist()]


LENGTHS = st.lists(st.integers(0, 70), min_size=1, max_size=9)


@settings(max_examples=200, deadline=None)
@given(
    lengths=LENGTHS, packed=st.booleans(), group=st.sampled_from([1, 3, 4, 16]), splits=st.integers(1, 7),
    only=st.integers(-1, 2), data=st.data(),
)  # fmt: skip
def test_walks_visit_each_tile_once(probes, lengths, packed, group, splits, only, data):
    """Whether blocks take ranges of numbers or every so-manieth, of all sequences or of those of one prefix."""
    if not packed:
        lengths = lengths[:1] * len(lengths)
    ids = data.draw(st.lists(st.integers(-1, 2), min_size=len(lengths), max_size=len(lengths)))
    tiles = [-(-n * group // ROWS) for n in lengths]
    expected = [(i, t) for i, n in enumerate(tiles) for t in range(n) if only < 0 or ids[i] == only]
    count = _walk(probes, lengths, packed, group, ids, -1, 0, 0, -1)
    assert sum(tiles) <= count <= sum(tiles) + len(lengths) - 1
    assert packed or count == sum(tiles)
    ranges = [(count * i // splits, count * (i + 1) // splits, 1) for i in range(splits)]
    strides = [(i, count, splits) for i in range(splits)]
    by_range, by_stride = (
        [tile for walk in walks for tile in _walk(probes, lengths, packed, group, ids, only, *walk)]
        for walks in (ranges, strides)
    )
    assert by_range == expected
    assert sorted(by_stride) == expected


# -- launches --------------------------------------------------------------------------------------

PLAIN = Shape(B=2, Hq=4, Hkv=2, S=100, P=16, D=64)
PACKED = Shape(B=1, Hq=4, Hkv=2, S=200, P=16, D=64, A=1)
CU_SEQLENS = torch.tensor([0, 60, 60, 163, 200], dtype=torch.int32)


def _gradients(args: AttentionArgs, *, sequence: bool) -> AttentionGradients:
    return allocate_gradients(args, [True, sequence, sequence, True, True, *[False] * 4])


def _merge(args: AttentionArgs) -> None:
    KERNELS.merge_prefix(args, *allocate_outputs(args))


def _merge_backward(args: AttentionArgs) -> None:
    gradients = _gradients(args, sequence=False)
    KERNELS.merge_prefix_backward(*_results(args), args, gradients.dq, gradients)


def _concat(args: AttentionArgs) -> None:
    KERNELS.concat_prefix(args)


def _fused(args: AttentionArgs) -> None:
    PLAN.prefix_attention(args)


def _fused_backward(args: AttentionArgs) -> None:
    dout, out, lse = _results(args)
    PLAN.prefix_attention_backward(dout, None, out, lse, args, [True] * 5 + [False] * 4)


def _results(args: AttentionArgs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Any dout, out and lse."""
    return torch.zeros_like(args.q), *allocate_outputs(args)


def _launches(shim: Shim, call, args: AttentionArgs) -> list[Launch]:
    shim.reset()
    with shim.only_recording():
        call(args)
    return shim.launches()


# 4 multiprocessors; tiles of 64 rows, 2 rows a position; blocks of 64 keys
@pytest.mark.parametrize(
    ("call", "plain", "packed"),
    [
        # rows that differ in nothing are one sequence: 7 tiles, of which 4 blocks a key head take two each
        (_merge, [("prefix_forward", (4, 2, 1))], [("prefix_forward", (4, 2, 1))]),
        (_merge_backward, [("prefix_backward", (2, 2, 1)), ("add_splits", (2, 2, 1))],
                          [("prefix_backward", (2, 2, 1)), ("add_splits", (2, 2, 1))]),
        # 4 tiles for each sample; packed 2 + 0 + 4 + 2, and two numbers without a tile
        (_fused, [("sequence_forward", (8, 2, 1))], [("sequence_forward", (10, 2, 1))]),
        # 2 blocks of keys for each sample; packed 1 + 0 + 2 + 1, and three numbers without one
        (_fused_backward,
         [("row_sums", (100, 1, 1)), ("sequence_backward_queries", (8, 2, 1)), ("sequence_backward_keys", (4, 2, 1)),
          ("prefix_backward", (2, 2, 1)), ("add_splits", (2, 2, 1))],
         [("row_sums", (100, 1, 1)), ("sequence_backward_queries", (10, 2, 1)), ("sequence_backward_keys", (7, 2, 1)),
          ("prefix_backward", (2, 2, 1)), ("add_splits", (2, 2, 1))]),
        # chunks of 8 elements in blocks of 256, keys and values
        (_concat, [("concat", (15, 2, 1))], None),
    ],
)  # fmt: skip
def test_each_call_launches_what_is_written_here(shim, call, plain, packed):
    launched = _launches(shim, call, args_of(tensors(PLAIN, torch.float16)))
    assert [(x.kernel, x.grid) for x in launched] == plain
    if packed:
        given = tensors(PACKED, torch.float16)
        for options in ({}, {"prefix_ids": torch.tensor([-1, 0, 0, 0]), "prefix_start": 0}):
            launched = _launches(shim, call, args_of(given, cu_seqlens=CU_SEQLENS, **options))
            assert [(x.kernel, x.grid) for x in launched] == packed


def test_gradients_of_a_concatenated_prefix_are_one_launch_each(shim):
    args = args_of(tensors(PLAIN, torch.float16))
    djoined = torch.zeros(PLAIN.B, PLAIN.Hkv, PLAIN.P + PLAIN.S, PLAIN.D).half()
    total = torch.zeros(args.prefix_k.shape)
    launched = _launches(shim, lambda args: KERNELS.sum_prefix_gradient(args, djoined, total), args)
    assert [(x.kernel, x.grid) for x in launched] == [("concat_backward", (1, 1, 1))]


def test_decoding_splits_keys_in_three_launches(shim, monkeypatch):
    monkeypatch.setattr(cuda, "_SPLIT_KEYS", 0)
    args = args_of(tensors(Shape(B=1, Hq=4, Hkv=2, S=1, T=1000, P=100, D=64), torch.float16))
    # one tile a key head: as many splits as two blocks for each multiprocessor need, of at least 2 blocks of keys
    expected = [("sequence_forward", (1, 2, 1)), ("sequence_forward", (1, 2, 4)), ("combine_splits", (1, 1, 1))]
    assert [(x.kernel, x.grid) for x in _launches(shim, _fused, args)] == expected


@pytest.mark.parametrize("call", [_fused, _fused_backward])
def test_packed_calls_launch_few_blocks_without_work(shim, call):
    """17 sequences of 8192 tokens together: tiles of rows, and blocks of keys, and less than one more a sequence."""
    lengths = torch.tensor([128, *[504] * 16])
    group = 4
    args = args_of(
        tensors(Shape(B=1, Hq=group, Hkv=1, S=8192, P=128, D=64, A=1), torch.float16),
        cu_seqlens=torch.cat([torch.zeros(1), lengths.cumsum(0)]).int(),
        prefix_ids=torch.tensor([-1, *[0] * 16]), prefix_start=128,
    )  # fmt: skip
    row_tiles, key_blocks = (int((lengths * each / 64).ceil().sum()) for each in (group, 1))
    launched = {x.kernel: x.blocks for x in _launches(shim, call, args) if x.kernel.startswith("sequence")}
    for kernel, blocks in launched.items():
        needed = key_blocks if kernel == "sequence_backward_keys" else row_tiles
        print(f"{kernel}: {blocks} blocks, {needed} with work")
        assert needed <= blocks < needed + len(lengths)


# -- rows before the prefix ------------------------------------------------------------------------


def _shared_prompt(dtype: torch.dtype, start: int, sizes: list[int], **options) -> AttentionArgs:
    """Sequences of which the first has `start` rows and no prefix, the others share one."""
    shape = Shape(B=1, Hq=4, Hkv=2, S=start + sum(sizes), P=16, D=64, A=1)
    bounds = torch.tensor([0, start, *sizes]).cumsum(0)
    ids = torch.tensor([-1, *[0] * len(sizes)])
    return args_of(tensors(shape, dtype), cu_seqlens=bounds, prefix_ids=ids, **options)


def _parts(shim: Shim, args: AttentionArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """An attention over the sequence alone, of any values."""
    generator = torch.Generator().manual_seed(0)
    out, lse = allocate_outputs(args)
    shim.writable(out, lse)
    return out.normal_(generator=generator), lse.normal_(generator=generator)


def test_rows_before_the_prefix_are_left_alone(shim):
    """With the hint they are not read, and the others do not change but in the order of sums."""
    start = 192
    plain = _shared_prompt(torch.bfloat16, start, [40, 1, 70])
    results = []
    for hint in (None, start):
        args = plain._replace(prefix_start=hint)
        part_out, part_lse = _parts(shim, args)
        before = part_out.clone(), part_lse.clone()
        shim.reset()
        out, lse = KERNELS.merge_prefix(args, part_out, part_lse)
        moved = [shim.counters()]
        gradients = _gradients(args, sequence=False)
        gradients.dq.fill_(1.0)
        shim.writable(*gradients)
        shim.reset()
        KERNELS.merge_prefix_backward(torch.ones_like(out), out, lse, args, gradients.dq, gradients)
        assert torch.equal(out[:, :, :start], before[0][:, :, :start])
        assert torch.equal(gradients.dq[:, :, :start], torch.ones_like(gradients.dq[:, :, :start]))
        moved.append(shim.counters())
        results.append((out, lse, *gradients[:1], *gradients[3:5]))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    q_bytes, lse_bytes = (x[:, :, start:].numel() * x.element_size() for x in (args.q, lse))
    prefix_bytes = 2 * args.prefix_k.numel() * 2
    splits = 2
    sums = (2 * splits + 1) * 2 * prefix_bytes  # in fp32: each split written and read, their sum written
    least = [
        3 * q_bytes + 2 * lse_bytes + 4 * prefix_bytes,
        5 * q_bytes + lse_bytes + splits * prefix_bytes + sums,
    ]
    for counted, bytes_moved in zip(moved, least, strict=True):
        assert counted["loaded"] + counted["stored"] <= 1.05 * bytes_moved


@pytest.mark.parametrize("case", ["sinks", "another memory", "window"])
def test_rows_before_the_prefix_are_merged_where_they_need_it(shim, case):
    """A sink changes them, a result elsewhere must hold them, and a window tells positions apart."""
    options = {"sinks": {"sinks": torch.zeros(4)}, "window": {"window": 30}}.get(case, {})
    plain = _shared_prompt(torch.bfloat16, 64, [40, 1, 70], **options)
    results = []
    for hint in (None, 64):
        args = plain._replace(prefix_start=hint)
        part_out, part_lse = _parts(shim, args)
        if case == "another memory":
            part_out = part_out.contiguous()
        shim.reset()
        results.append((*KERNELS.merge_prefix(args, part_out, part_lse), shim.counters()["loaded"]))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_a_start_without_a_packed_bank_of_one_is_refused(shim):
    args = args_of(tensors(PLAIN, torch.float16), prefix_start=3)
    with pytest.raises(native.cuda.NativeError, match="out of range"):
        _merge(args)


# -- bytes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefix_len", "head_dim"),
    [
        pytest.param(p, d, marks=() if (p, d) in ((16, 64), (128, 64), (512, 64)) else pytest.mark.slow)
        for d in (64, 128, 256) for p in (16, 64, 128, 512) if p * d <= 65536
    ],
)  # fmt: skip
def test_the_cost_model_has_the_bytes_that_kernels_move(shim, prefix_len, head_dim):
    """And the cache those of what several blocks read: the prefix in each, the sums of the splits."""
    args = args_of(tensors(Shape(B=1, Hq=4, Hkv=2, S=256, P=prefix_len, D=head_dim), torch.bfloat16))
    costs = [x.bytes for x in KERNELS.merge_costs(attention_call(args))]
    prefix_bytes, q_bytes = 2 * args.prefix_k.numel() * 2, args.q.numel() * 2
    part_out, part_lse = _parts(shim, args)
    shim.reset()
    out, lse = KERNELS.merge_prefix(args, part_out, part_lse)
    moved = [shim.counters()]
    gradients = _gradients(args, sequence=False)
    gradients.dq.fill_(1.0)
    shim.writable(*gradients)
    shim.reset()
    KERNELS.merge_prefix_backward(torch.ones_like(out), out, lse, args, gradients.dq, gradients)
    moved.append(shim.counters())

    blocks, tiles, splits = 4, 8, 2  # of a key head
    reads = blocks if prefix_len * head_dim <= 16384 else tiles * (4 if head_dim > 128 else 1)  # per pass of columns
    sums = (2 * splits + 1) * 2 * prefix_bytes  # in fp32: each split written and read, their sum written
    cached = [(reads - 1) * prefix_bytes, (splits - 1) * prefix_bytes + sums]
    for counted, cost, cache in zip(moved, costs, cached, strict=True):
        total = counted["loaded"] + counted["stored"]
        print(f"P={prefix_len} D={head_dim}: {(total - cache) / q_bytes:.2f} q bytes, the model {cost / q_bytes:.2f}")
        assert 0.98 < total / (cost + cache) < 1.05


# -- devices ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("current", [0, 1])
@pytest.mark.parametrize("call", [_merge, _merge_backward, _concat, _fused, _fused_backward])
def test_a_call_leaves_the_current_device_as_it_was(shim, monkeypatch, call, current):
    """On the tensors' device, whatever the current one is; also after an error."""
    args = args_of(tensors(PLAIN, torch.float16))
    shim.device = current
    for device in (0, 1):
        monkeypatch.setattr(native.cuda, "_device_and_stream", lambda x, device=device: (device, 0))
        launched = _launches(shim, call, args)
        assert {x.device for x in launched} == {device}
        assert shim.device == current
        with shim.only_recording(succeed=False), pytest.raises(native.cuda.NativeError, match="the launcher failed"):
            call(args)
        assert shim.device == current
    monkeypatch.setattr(native.cuda, "_device_and_stream", lambda x: (2, 0))
    with pytest.raises(native.cuda.NativeError, match="invalid device"):
        call(args)
    assert shim.device == current
