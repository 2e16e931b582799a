# SPDX-License-Identifier: Apache-2.0
"""The forward for few queries over many keys: rows packed over batch and group, keys cut into splits, then merged.

A row is one query of one head. The rows of all samples that share a key head attend to the prefix together, so the
prefix is read once per BLOCK_M rows instead of once per sample. The rows of one sample attend to its own keys. Each
split of the keys has a softmax of its own; a last kernel merges them in order (flash decoding, Dao et al. 2023; the
shared prefix as in Hydragen, Juravsky et al. 2024). Grids and workspaces depend on shapes alone, so that a CUDA graph
can replay the launches.
"""

import triton
import triton.language as tl

from .blocks import LN2, LOG2E, VARYING, RowBlock, all_sizes, finite, key_range, merge_state, tanh
from .forward import empty_softmax, inverse, softmax_step, visit_prefix, visit_sequence


@triton.jit
def _load_packed_rows(
    q, first, end, kv_head, sizes, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """(sample, head, query [BLOCK_M], q [BLOCK_M, BLOCK_D]) of the rows from ``first`` on, ordered [B, group, S]."""
    rows = first + tl.arange(0, BLOCK_M)
    inside = rows < end
    rows = tl.where(inside, rows, first)
    query, outer = rows % sizes.q_len, rows // sizes.q_len
    sample, head = outer // sizes.group, kv_head * sizes.group + outer % sizes.group
    columns = tl.arange(0, BLOCK_D)[None, :]
    offsets = sample.to(tl.int64) * q.stride_b + head.to(tl.int64) * q.stride_h + query.to(tl.int64) * q.stride_n
    mask = inside[:, None] & (columns < HEAD_DIM)
    return sample, head, query, tl.load(q.ptr + offsets[:, None] + columns, mask=mask, other=0.0)


@triton.jit
def _store_split(
    partial_ptr, lse_ptr, split, first, end, sample, head, query, state, opts, sizes,
    VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Store the average of the split's values [splits, B, Hq, S, D_v] and its lse [splits, B, Hq, S] (log2), fp32."""
    m, denom, acc = state
    index = (tl.cast(split, tl.int64) * sizes.batch + sample) * sizes.num_heads + head
    index = index * sizes.q_len + query
    inside = first + tl.arange(0, BLOCK_M) < end
    columns = tl.arange(0, BLOCK_DV)[None, :]
    values = acc * inverse(denom, opts)[:, None]
    mask = inside[:, None] & (columns < VALUE_DIM)
    tl.store(partial_ptr + index[:, None] * VALUE_DIM + columns, values, mask=mask)
    tl.store(lse_ptr + index, m + tl.log2(denom), mask=inside)


@triton.jit
def _visit_split(q_tile, prefix_k, prefix_v, sample, query, low, high, block):
    """The softmax state over tokens low to high of the prefixes that the rows' samples see."""
    opts, sizes = block.opts, block.sizes
    positions = (query + (sizes.kv_len - sizes.q_len))[:, None]
    state = empty_softmax(None, block.BLOCK_M, block.BLOCK_DV)
    if opts.prefix_ids is None:
        state = visit_prefix(
            softmax_step, state, None, q_tile, prefix_k, prefix_v, 0, low, high, positions, None, block
        )
    else:
        ids = tl.load(opts.prefix_ids + sample).to(tl.int32)
        for prefix in range(tl.maximum(tl.min(ids, 0), 0), tl.max(ids, 0) + 1):
            sees = ids == prefix
            if tl.max(sees.to(tl.int32), 0) > 0:
                state = visit_prefix(
                    softmax_step, state, None, q_tile, prefix_k, prefix_v, prefix, low, high, positions,
                    sees[:, None], block,
                )  # fmt: skip
    return state


@triton.jit(do_not_specialize=[*VARYING, "num_splits"])
def _prefix_attention_decode_prefix_kernel(
    q, prefix_k, prefix_v, partial_ptr, lse_ptr, opts, model, batch_size, q_len, kv_len, num_sequences, search_steps,
    mask_stride, scale, num_splits, split_size,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Splits 0 to num_splits - 1. A program has BLOCK_M rows of one key head, and split_size tokens of the prefix."""
    sizes = all_sizes(model, batch_size, q_len, kv_len, num_sequences, search_steps, mask_stride)
    split, outer = tl.program_id(0) % num_splits, tl.program_id(0) // num_splits
    num_kv_heads = sizes.num_heads // sizes.group
    kv_head, first = outer % num_kv_heads, outer // num_kv_heads * BLOCK_M
    end = sizes.batch * sizes.group * sizes.q_len
    sample, head, query, q_tile = _load_packed_rows(q, first, end, kv_head, sizes, HEAD_DIM, BLOCK_D, BLOCK_M)
    state = _visit_split(
        q_tile, prefix_k, prefix_v, sample, query, split * split_size, split * split_size + split_size,
        RowBlock(
            0, 0, head[:, None], kv_head, opts, sizes, scale, False, 0, HEAD_DIM, BLOCK_D, VALUE_DIM, BLOCK_DV,
            BLOCK_M, BLOCK_N,
        ),
    )  # fmt: skip
    _store_split(
        partial_ptr, lse_ptr, split, first, end, sample, head, query, state, opts, sizes,
        VALUE_DIM, BLOCK_DV, BLOCK_M,
    )  # fmt: skip


@triton.jit
def _within(bound, low, high):
    """``bound``, moved to the nearest value from low to high."""
    return tl.minimum(tl.maximum(bound, low), high)


@triton.jit(do_not_specialize=[*VARYING, "first_split", "num_splits"])
def _prefix_attention_decode_sequence_kernel(
    q, k, v, partial_ptr, lse_ptr, opts, model, batch_size, q_len, kv_len, num_sequences, search_steps, mask_stride,
    scale, first_split, num_splits, split_size,
    IS_CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Splits from first_split on. A program has BLOCK_M rows of one sample and key head, and split_size keys."""
    sizes = all_sizes(model, batch_size, q_len, kv_len, num_sequences, search_steps, mask_stride)
    split, outer = tl.program_id(0) % num_splits, tl.program_id(0) // num_splits
    num_kv_heads, num_rows = sizes.num_heads // sizes.group, sizes.group * sizes.q_len
    blocks = tl.cdiv(num_rows, BLOCK_M)
    kv_head, batch = outer // blocks % num_kv_heads, outer // blocks // num_kv_heads
    first, end = batch * num_rows + outer % blocks * BLOCK_M, (batch + 1) * num_rows
    sample, head, query, q_tile = _load_packed_rows(q, first, end, kv_head, sizes, HEAD_DIM, BLOCK_D, BLOCK_M)
    low, high = split * split_size, (split + 1) * split_size
    # the range of all queries: BLOCK_M is at least their number
    seen_low, full_low, full_high, seen_high = key_range(kv_head * 0, opts, sizes, IS_CAUSAL, BLOCK_M, BLOCK_N)
    bounds = (
        _within(seen_low, low, high), _within(full_low, low, high), _within(full_high, low, high),
        _within(seen_high, low, high),
    )  # fmt: skip
    state = visit_sequence(
        softmax_step, empty_softmax(None, BLOCK_M, BLOCK_DV), None, q_tile, k, v, bounds, query[:, None],
        RowBlock(
            0, batch, head[:, None], kv_head, opts, sizes, scale, IS_CAUSAL, 0, HEAD_DIM, BLOCK_D, VALUE_DIM,
            BLOCK_DV, BLOCK_M, BLOCK_N,
        ),
    )  # fmt: skip
    _store_split(
        partial_ptr, lse_ptr, first_split + split, first, end, sample, head, query, state, opts, sizes,
        VALUE_DIM, BLOCK_DV, BLOCK_M,
    )  # fmt: skip


@triton.jit
def _merge_splits(
    state, partial_ptr, lse_ptr, row, num_rows, first, last,
    VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The state (m, denom, acc [D_v]) of one row with splits first to last - 1 merged in, BLOCK_N at a time."""
    m, denom, acc = state
    columns = tl.arange(0, BLOCK_DV)[None, :]
    for start in range(first, last, BLOCK_N):
        splits = start + tl.arange(0, BLOCK_N)
        index = splits.to(tl.int64) * num_rows + row
        lse = tl.load(lse_ptr + index, mask=splits < last, other=-float("inf"))
        mask = (splits < last)[:, None] & (columns < VALUE_DIM)
        values = tl.load(partial_ptr + index[:, None] * VALUE_DIM + columns, mask=mask, other=0.0)
        m_new = tl.maximum(m, tl.max(lse, 0))
        weights, decay = tl.exp2(lse - finite(m_new)), tl.exp2(m - finite(m_new))
        denom = denom * decay + tl.sum(weights, 0)
        acc = acc * decay + tl.sum(weights[:, None] * values, 0)
        m = m_new
    return m, denom, acc


@triton.jit(do_not_specialize=[*VARYING, "prefix_splits", "num_splits"])
def _prefix_attention_decode_combine_kernel(
    partial_ptr, lse_ptr, out, out_lse_ptr, opts, model, batch_size, q_len, kv_len, num_sequences, search_steps,
    mask_stride, prefix_splits, num_splits,
    VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out [B, Hq, S, D_v] and lse [B, Hq, S] from all splits, the prefix's first, and the sink; a program per row."""
    sizes = all_sizes(model, batch_size, q_len, kv_len, num_sequences, search_steps, mask_stride)
    row = tl.program_id(0)
    query, outer = row % sizes.q_len, row // sizes.q_len
    head, batch = outer % sizes.num_heads, outer // sizes.num_heads
    num_rows = sizes.batch * sizes.num_heads * sizes.q_len
    zeros = tl.zeros([BLOCK_DV], tl.float32)
    nothing = (tl.full([], -float("inf"), tl.float32), tl.full([], 0.0, tl.float32), zeros)
    state = _merge_splits(
        nothing, partial_ptr, lse_ptr, row, num_rows, 0, prefix_splits, VALUE_DIM, BLOCK_DV, BLOCK_N
    )
    gated = zeros
    if opts.gate is not None:
        _, denom, acc = state
        gated = acc / tl.where(denom == 0.0, 1.0, denom) * tanh(tl.load(opts.gate + head))
        state = nothing
    state = _merge_splits(
        state, partial_ptr, lse_ptr, row, num_rows, prefix_splits, num_splits, VALUE_DIM, BLOCK_DV, BLOCK_N
    )
    if opts.sinks is not None:
        state = merge_state(state, tl.load(opts.sinks + head) * LOG2E, None)
    m, denom, acc = state
    result = acc / tl.where(denom == 0.0, 1.0, denom) + gated
    columns = tl.arange(0, BLOCK_DV)
    offset = tl.cast(batch, tl.int64) * out.stride_b + tl.cast(head, tl.int64) * out.stride_h
    offset += tl.cast(query, tl.int64) * out.stride_n
    tl.store(out.ptr + offset + columns, result.to(out.ptr.dtype.element_ty), mask=columns < VALUE_DIM)
    tl.store(out_lse_ptr + row, (m + tl.log2(denom)) * LN2)
