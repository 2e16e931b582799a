# SPDX-License-Identifier: Apache-2.0
"""Forward of the prefix part alone, merged with attention over the sequence that another kernel has computed.

::

    weight_s = exp2(lse_s - pivot)      weight_p = exp2(m - pivot)      weight_sink = exp2(sink - pivot)
    denom    = weight_s + weight_p * sum_j exp2(s_j - m) + weight_sink
    out      = (weight_s * out_s + weight_p * sum_j exp2(s_j - m) v_j) / denom      lse = pivot + log2(denom)

with m the largest prefix score of a row and pivot the largest of lse_s, m and the sink. Softmax states merge in any
order and number (Milakov & Gimelshein 2018; Juravsky et al., Hydragen, 2024): (out_s, lse_s) is one, the prefix
another, the sink, which has no value, a third.
"""

import triton
import triton.language as tl

from .blocks import LN2, LOG2E, load_tile, matrix, prefix_scores, store_tile, tanh
from .forward import empty_softmax, softmax_step, visit_prefixes


@triton.jit
def locate_tile(index, row_blocks, kv_head, sizes):
    """(first block of rows, head, batch) of tile ``index`` among those that read one key head."""
    outer = index // row_blocks
    return index % row_blocks, kv_head * sizes.group + outer % sizes.group, outer // sizes.group


@triton.jit
def load_rows(x, batch, head, rows, inside, other):
    """[BLOCK_M] of a [B, H, S] tensor given by strides."""
    ptrs = x.ptr + tl.cast(batch, tl.int64) * x.stride_b + tl.cast(head, tl.int64) * x.stride_h
    return tl.load(ptrs + rows * x.stride_m, mask=inside, other=other)


@triton.jit
def _prefix_merge_fwd_kernel(
    q, prefix_k, prefix_v, part_out, part_lse, out, lse_ptr, opts, sizes, scale, part_lse_scale, workers,
    RESIDENT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out [B, Hq, S, D] and lse [B, Hq, S] from those of the sequence, ``part_out`` and ``part_lse``, and the prefix.

    ``out`` and ``part_out`` may be one tensor, and so may ``lse`` and ``part_lse``: a tile of rows has one owner,
    which reads it before it writes. ``part_out`` None: no sequence. ``part_lse * part_lse_scale`` is in log2, -inf
    for a row that sees no key. ``workers`` programs share the tiles of a key head.

    RESIDENT: a program loads the prefix, which fits BLOCK_N, once and walks over its tiles of rows. Else (a long
    prefix, a bank, a window over the prefix) each tile walks over the blocks of its prefix.
    """
    worker, kv_head = tl.program_id(0) % workers, tl.program_id(0) // workers
    dtype = q.ptr.dtype.element_ty
    if RESIDENT:
        k_tile = load_tile(
            matrix(prefix_k, 0, kv_head), prefix_k.stride_n, 0, sizes.prefix_len, HEAD_DIM, BLOCK_N, BLOCK_D
        ).to(dtype)
        v_tile = load_tile(
            matrix(prefix_v, 0, kv_head), prefix_v.stride_n, 0, sizes.prefix_len, HEAD_DIM, BLOCK_N, BLOCK_D
        ).to(dtype)
    row_blocks = tl.cdiv(sizes.q_len, BLOCK_M)
    for index in range(worker, row_blocks * sizes.group * sizes.batch, workers):
        block, head, batch = locate_tile(index, row_blocks, kv_head, sizes)
        first_row = block * BLOCK_M
        rows = first_row + tl.arange(0, BLOCK_M)
        inside = rows < sizes.q_len
        q_tile = load_tile(matrix(q, batch, head), q.stride_n, first_row, sizes.q_len, HEAD_DIM, BLOCK_M, BLOCK_D)

        state = empty_softmax(None, BLOCK_M, BLOCK_D)
        if RESIDENT:
            slots = tl.arange(0, BLOCK_N)[None, :]
            products = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
            scores, unit, slope = prefix_scores(
                products, scale, rows[:, None], slots, inside[:, None], sizes.prefix_len, head, opts, sizes, True
            )
            state = softmax_step(state, None, scores, unit, slope, k_tile, v_tile, None, opts)
        else:
            state = visit_prefixes(
                softmax_step, state, None, q_tile, prefix_k, prefix_v, first_row, batch, head, opts, sizes, scale,
                0, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        m, denom, acc = state
        if opts.gate is not None:  # a softmax of its own
            gated = acc * (tanh(tl.load(opts.gate + head)) / tl.where(denom == 0.0, 1.0, denom))[:, None]
            m, denom, acc = empty_softmax(None, BLOCK_M, BLOCK_D)

        if part_out is not None:
            part_ptr = matrix(part_out, batch, head)
            part = load_tile(part_ptr, part_out.stride_n, first_row, sizes.q_len, HEAD_DIM, BLOCK_M, BLOCK_D)
            part_m = load_rows(part_lse, batch, head, rows, inside, -float("inf")) * part_lse_scale
            m_new = tl.maximum(m, part_m)
            pivot = tl.where(m_new == -float("inf"), 0.0, m_new)
            decay, weight = tl.exp2(m - pivot), tl.exp2(part_m - pivot)
            denom = denom * decay + weight
            # where the weight is 0 the other kernel may have left anything, NaN included
            part = tl.where(weight[:, None] > 0.0, part.to(tl.float32) * weight[:, None], 0.0)
            acc = acc * decay[:, None] + part
            m = m_new
        if opts.sinks is not None:
            sink = tl.load(opts.sinks + head) * LOG2E
            m_new = tl.maximum(m, sink)
            pivot = tl.where(m_new == -float("inf"), 0.0, m_new)
            decay = tl.exp2(m - pivot)
            denom = denom * decay + tl.exp2(sink - pivot)
            acc = acc * decay[:, None]
            m = m_new
        result = acc / tl.where(denom == 0.0, 1.0, denom)[:, None]
        if opts.gate is not None:
            result += gated
        store_tile(matrix(out, batch, head), out.stride_n, first_row, sizes.q_len, result, HEAD_DIM, BLOCK_M, BLOCK_D)
        lse_row = lse_ptr + (tl.cast(batch, tl.int64) * sizes.num_heads + head) * sizes.q_len
        tl.store(lse_row + rows, (m + tl.log2(denom)) * LN2, mask=inside)
