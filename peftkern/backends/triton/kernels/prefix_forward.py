# SPDX-License-Identifier: Apache-2.0
"""Forward of the prefix alone, merged with attention over the sequence that another kernel has computed.

::

    m     = max(lse_s, m_p, sink)
    denom = exp2(lse_s - m) + sum_j exp2(s_j - m) + exp2(sink - m)
    out   = (exp2(lse_s - m) * out_s + sum_j exp2(s_j - m) v_j) / denom      lse = m + log2(denom)

where m_p is the largest prefix score s_j of a row. Softmax states merge in any order and number (Milakov & Gimelshein
2018; Juravsky et al., Hydragen, 2024): (out_s, lse_s) is one, the prefix another, the sink, which has no value, a
third.
"""

import triton
import triton.language as tl

from ..arguments import RowValues
from .blocks import (
    LN2,
    LOG2E,
    VARYING,
    RowBlock,
    all_sizes,
    load_out_tile,
    load_prefix_tile,
    load_query_tile,
    load_tile,
    locate,
    matrix,
    merge_state,
    prefix_scores,
    row_offset,
    store_out_tile,
    store_tile,
    tanh,
)
from .forward import empty_softmax, softmax_step, visit_prefixes


@triton.jit
def locate_tile(index, row_blocks, kv_head, sizes):
    """(block of rows, head, batch) of tile ``index`` among the tiles that read one key head."""
    outer = index // row_blocks
    row_block = index % row_blocks  # FAULT: tile-row-block
    return row_block, kv_head * sizes.group + outer % sizes.group, outer // sizes.group  # FAULT: tile-head


@triton.jit
def row_value_pointers(x, batch, head, rows):
    """[BLOCK_M] pointers to values of a [B, H, S] tensor with any strides."""
    ptrs = x.ptr + tl.cast(batch, tl.int64) * x.stride_b
    ptrs += tl.cast(head, tl.int64) * x.stride_h  # FAULT: row-value-head-stride
    return ptrs + rows.to(tl.int64) * x.stride_m  # FAULT: row-value-stride


@triton.jit
def load_lse(ptrs, inside):
    """[BLOCK_M] log2-sum-exp of rows from another library's, in natural logarithm.

    -inf means that a row sees no key. Some libraries write +inf instead.
    """
    lse = tl.load(ptrs, mask=inside, other=-float("inf"))
    lse *= LOG2E  # FAULT: merge-base
    return tl.where(lse == float("inf"), -float("inf"), lse)


@triton.jit
def _attend_to_resident(q, k, v, rows, block):
    """The softmax state of a tile q over a prefix that fits one block of keys, k and v."""
    tokens = tl.arange(0, block.BLOCK_N)[None, :]
    products = tl.dot(q, tl.trans(k), input_precision="ieee")
    length = block.sizes.prefix_len
    MASKED: tl.constexpr = True  # FAULT: merge-mask
    scores, unit, slope = prefix_scores(products, rows[:, None], tokens, None, length, block, MASKED)
    state = empty_softmax(None, block.BLOCK_M, block.BLOCK_DV)
    return softmax_step(state, None, scores, unit, slope, k, v, None, block.opts)


@triton.jit
def _merge_rows(q, prefix_k, prefix_v, k_tile, v_tile, part_out, part_lse, out, lse_ptr, block):
    """Store one block of rows of out and lse: the states of prefix, sequence and sink, merged.

    ``k_tile`` None: visit the blocks of the prefix. Otherwise k_tile and v_tile are the whole prefix.
    """
    opts = block.opts
    rows = block.first_row + tl.arange(0, block.BLOCK_M)
    inside = rows < block.sizes.q_len
    q_tile = load_query_tile(q, block)
    if k_tile is not None:
        state = _attend_to_resident(q_tile, k_tile, v_tile, rows, block)
    else:
        state = empty_softmax(None, block.BLOCK_M, block.BLOCK_DV)
        state = visit_prefixes(softmax_step, state, None, q_tile, prefix_k, prefix_v, block)
    if opts.gate is not None:  # a softmax of its own
        _, denom, acc = state
        gated = acc * (tanh(tl.load(opts.gate + block.head)) / tl.where(denom == 0.0, 1.0, denom))[:, None]
        state = empty_softmax(None, block.BLOCK_M, block.BLOCK_DV)
    if part_out is not None:
        values = load_out_tile(part_out, block)
        lse = load_lse(row_value_pointers(part_lse, block.batch, block.head, rows), inside)
        state = merge_state(state, lse, values)
    if opts.sinks is not None:
        state = merge_state(state, tl.load(opts.sinks + block.head) * LOG2E, None)
    m, denom, acc = state
    result = acc / tl.where(denom == 0.0, 1.0, denom)[:, None]
    if opts.gate is not None:
        result += gated
    store_out_tile(out, result, block)
    ptrs = lse_ptr + row_offset(block.batch, block.head, block.sizes) + rows
    tl.store(ptrs, (m + tl.log2(denom)) * LN2, mask=inside)  # FAULT: merge-store-mask


@triton.jit(do_not_specialize=[*VARYING, "row_start", "workers", "part_stride_b", "part_stride_h"])
def _prefix_merge_fwd_kernel(
    q, prefix_k, prefix_v, part_out, part_lse_ptr, part_stride_b, part_stride_h, part_stride_m, out, lse_ptr, opts,
    model, batch_size, q_len, kv_len, num_sequences, search_steps, mask_stride, scale, row_start,
    workers,
    RESIDENT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out [B, Hq, S, D_v] and lse [B, Hq, S] from those of the sequence, part_out and part_lse, and the prefix.

    out and part_out may be one tensor, and so may lse and part_lse: one program owns a tile of rows, and reads it
    before it writes it. ``part_out`` None: there is no sequence. Rows before ``row_start`` are left as they are.
    ``workers`` programs share the tiles of a key head.

    RESIDENT: the prefix fits BLOCK_N, and a program loads it once for all of its tiles of rows. Otherwise (a long
    prefix, a bank, a window over the prefix) each tile visits the blocks of its prefix.
    """
    sizes = all_sizes(model, batch_size, q_len, kv_len, num_sequences, search_steps, mask_stride)
    worker, kv_head = tl.program_id(0) % workers, tl.program_id(0) // workers
    dtype = q.ptr.dtype.element_ty
    if RESIDENT:
        k_tile = load_prefix_tile(prefix_k, 0, kv_head, 0, sizes.prefix_len, dtype, HEAD_DIM, BLOCK_N, BLOCK_D)
        v_tile = load_prefix_tile(prefix_v, 0, kv_head, 0, sizes.prefix_len, dtype, VALUE_DIM, BLOCK_N, BLOCK_DV)
    else:
        k_tile = None
        v_tile = None
    row_blocks = tl.cdiv(sizes.q_len - row_start, BLOCK_M)
    tiles = row_blocks * sizes.group * sizes.batch
    for index in range(worker, tiles, workers):  # FAULT: merge-first-tile, merge-last-tile
        row_block, head, batch = locate_tile(index, row_blocks, kv_head, sizes)
        _merge_rows(
            q, prefix_k, prefix_v, k_tile, v_tile, part_out,
            RowValues(part_lse_ptr, part_stride_b, part_stride_h, part_stride_m), out, lse_ptr,
            RowBlock(
                row_start + row_block * BLOCK_M, batch, head, kv_head, opts, sizes, scale,
                False, 0, HEAD_DIM, BLOCK_D, VALUE_DIM, BLOCK_DV, BLOCK_M, BLOCK_N,
            ),
        )  # fmt: skip


@triton.jit(do_not_specialize=["q_len", "stride_b", "stride_h", "part_stride_b", "part_stride_h"])
def _merge_states_kernel(
    out, lse_ptr, stride_b, stride_h, stride_m, part_out, part_lse_ptr, part_stride_b, part_stride_h, part_stride_m,
    num_heads, q_len,
    VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Merge attention over further keys, part_out and part_lse, into out [B, Hq, S, D_v] and lse [B, Hq, S]."""
    block, head, batch = locate(tl.cdiv(q_len, BLOCK_M), num_heads)
    first = block * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    inside = rows < q_len
    lse_ptrs = row_value_pointers(RowValues(lse_ptr, stride_b, stride_h, stride_m), batch, head, rows)
    part = RowValues(part_lse_ptr, part_stride_b, part_stride_h, part_stride_m)
    part_lse_ptrs = row_value_pointers(part, batch, head, rows)
    out_ptr = matrix(out, batch, head)
    values = load_tile(out_ptr, out.stride_n, first, q_len, VALUE_DIM, BLOCK_M, BLOCK_DV)
    state = merge_state(empty_softmax(None, BLOCK_M, BLOCK_DV), load_lse(lse_ptrs, inside), values)
    values = load_tile(matrix(part_out, batch, head), part_out.stride_n, first, q_len, VALUE_DIM, BLOCK_M, BLOCK_DV)
    state = merge_state(state, load_lse(part_lse_ptrs, inside), values)
    m, denom, acc = state
    result = acc / tl.where(denom == 0.0, 1.0, denom)[:, None]
    store_tile(out_ptr, out.stride_n, first, q_len, result, VALUE_DIM, BLOCK_M, BLOCK_DV)
    tl.store(lse_ptrs, (m + tl.log2(denom)) * LN2, mask=inside)
