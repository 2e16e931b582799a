# SPDX-License-Identifier: Apache-2.0
"""The fused forward: one online softmax over [prefix blocks | sequence blocks] (FlashAttention, Dao et al. 2022).

:func:`visit_prefixes` and :func:`visit_sequence` walk over the keys that a block of rows sees. At each block of keys
they call ``STEP(state, operands, scores, unit, slope, k, v, keep, opts)``, which returns the new state. ``operands``
is what the step reads besides the keys: dout for a softmax, dout and the rows' statistics for dq.

Loads are by pointer on every GPU. Tensor descriptors (TMA) were compiled for comparison: at D = 128 they save 26
registers on sm_90 and 51 on sm_100, but no more blocks fit a multiprocessor, and sm_90 gets 15 % more instructions.
"""

import triton
import triton.language as tl

from .blocks import (
    LN2,
    LOG2E,
    VARYING,
    RowBlock,
    all_sizes,
    dropout_keep,
    find_sequence,
    finite,
    key_range,
    keys_seen,
    load_prefix_tile,
    load_query_tile,
    load_tile,
    locate,
    matrix,
    merge_state,
    prefix_length,
    prefix_of,
    prefix_scores,
    row_offset,
    segment,
    seq_scores,
    store_out_tile,
    tanh,
)


@triton.jit
def visit_prefix(
    STEP: tl.constexpr, state, operands, q, prefix_k, prefix_v, prefix, start, end, positions, sees, block
):
    """Visit tokens start (a multiple of BLOCK_N) to end of prefix number ``prefix`` (-1: none), full blocks first.

    ``q`` [BLOCK_M, BLOCK_D] is the tile of the row block. ``positions`` and ``sees`` are those of
    :func:`prefix_scores`.
    """
    BLOCK_N: tl.constexpr = block.BLOCK_N
    opts = block.opts
    length = prefix_length(prefix, opts, block.sizes)
    low, high = start, tl.minimum(length, end)
    if opts.prefix_window is not None:
        nearest = tl.min(tl.min(positions, 1), 0)
        low = tl.maximum(low, (length + nearest - opts.prefix_window + 1) // BLOCK_N * BLOCK_N)
    FULL: tl.constexpr = sees is None and opts.prefix_window is None
    bounds = (low, tl.maximum(low, high // BLOCK_N * BLOCK_N) if FULL else low, high)
    for section in tl.static_range(0 if FULL else 1, 2):
        for first in range(bounds[section], bounds[section + 1], BLOCK_N):
            k = load_prefix_tile(
                prefix_k, prefix, block.kv_head, first, length, q.dtype, block.HEAD_DIM, BLOCK_N, block.BLOCK_D,
                section == 0,
            )  # fmt: skip
            tokens = first + tl.arange(0, BLOCK_N)[None, :]
            products = tl.dot(q, tl.trans(k), input_precision="ieee")
            scores, unit, slope = prefix_scores(products, positions, tokens, sees, length, block, section == 1)
            v = load_prefix_tile(
                prefix_v, prefix, block.kv_head, first, length, q.dtype, block.VALUE_DIM, BLOCK_N, block.BLOCK_DV,
                section == 0,
            )  # fmt: skip
            keep = None
            if block.DROPOUT_THRESHOLD > 0:
                keep = dropout_keep(first, block, 1)
            state = STEP(state, operands, scores, unit, slope, k, v, keep, opts)
    return state


@triton.jit
def visit_prefixes(STEP: tl.constexpr, state, operands, q, prefix_k, prefix_v, block):
    """Visit the prefixes that a block of rows sees: one, or for packed input and a bank one per packed sequence."""
    opts, sizes = block.opts, block.sizes
    rows = block.first_row + tl.arange(0, block.BLOCK_M)
    positions = (rows + (sizes.kv_len - sizes.q_len))[:, None]
    packed = tl.minimum(rows, sizes.q_len - 1)
    if opts.cu_seqlens is not None and opts.prefix_window is not None:
        start, _ = segment(packed, opts, sizes)
        positions = positions - start[:, None]
    if opts.cu_seqlens is not None and opts.prefix_ids is not None:
        sequence = find_sequence(packed, opts.cu_seqlens, sizes)
        for s in range(tl.min(sequence, 0), tl.max(sequence, 0) + 1):
            prefix = tl.load(opts.prefix_ids + s).to(tl.int32)
            state = visit_prefix(
                STEP, state, operands, q, prefix_k, prefix_v, prefix, 0, sizes.prefix_len, positions,
                sequence[:, None] == s, block,
            )  # fmt: skip
    else:
        state = visit_prefix(
            STEP, state, operands, q, prefix_k, prefix_v, prefix_of(block.batch, opts), 0, sizes.prefix_len,
            positions, None, block,
        )  # fmt: skip
    return state


@triton.jit
def visit_sequence(STEP: tl.constexpr, state, operands, q, k, v, bounds, rows, block):
    """Visit the sequence keys within ``bounds``, those of :func:`key_range`, for ``rows`` [BLOCK_M, 1].

    First come the keys that the window cuts, then those that all rows see, then those that the diagonal or the end
    cuts.
    """
    opts, sizes = block.opts, block.sizes
    BLOCK_N: tl.constexpr = block.BLOCK_N
    k_ptr, v_ptr = matrix(k, block.batch, block.kv_head), matrix(v, block.batch, block.kv_head)
    lower, upper = keys_seen(rows, opts, sizes, block.IS_CAUSAL)
    FULL: tl.constexpr = (opts.cu_seqlens is None) and (opts.key_mask is None)
    FIRST: tl.constexpr = 2 if not FULL else (1 if opts.window is None else 0)
    for section in tl.static_range(FIRST, 3):
        for first_key in range(bounds[section], bounds[section + 1], BLOCK_N):
            keys = first_key + tl.arange(0, BLOCK_N)[None, :]
            k_tile = load_tile(
                k_ptr, k.stride_n, first_key, sizes.kv_len, block.HEAD_DIM, BLOCK_N, block.BLOCK_D, section == 1
            )
            products = tl.dot(q, tl.trans(k_tile), input_precision="ieee")
            scores, unit, slope = seq_scores(products, rows, keys, lower, upper, block, False, section != 1)
            v_tile = load_tile(
                # FAULT: value-columns
                v_ptr, v.stride_n, first_key, sizes.kv_len, block.VALUE_DIM, BLOCK_N, block.BLOCK_DV, section == 1,
            )  # fmt: skip
            keep = None
            if block.DROPOUT_THRESHOLD > 0:
                keep = dropout_keep(first_key, block, 0)
            state = STEP(state, operands, scores, unit, slope, k_tile, v_tile, keep, opts)
    return state


@triton.jit
def softmax_step(state, dout, scores, unit, slope, k, v, keep, opts):
    """Add one block of keys to a softmax state: maximum m [M], denominator [M], and acc.

    acc is the sum of weighted values [M, D_v] or, if dout [M, D_v] is not None, of their products with dout [M].
    """
    m, denom, acc = state
    m_new = tl.maximum(m, tl.max(scores, 1) * unit)
    p = tl.exp2(scores * unit - finite(m_new)[:, None])  # FAULT: softmax-unit
    decay = tl.exp2(m - finite(m_new))
    denom = denom * decay + tl.sum(p, 1)
    if keep is not None:
        p = tl.where(keep, p, 0.0)
    if dout is None:
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")  # FAULT: softmax-decay
    else:
        acc = acc * decay + tl.sum(p * tl.dot(dout, tl.trans(v), input_precision="ieee"), 1)
    return m_new, denom, acc


@triton.jit
def empty_softmax(dout, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr):
    """The softmax state (m, denom, acc) over no keys; ``dout`` as in :func:`softmax_step`."""
    zeros = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32) if dout is None else zeros
    return zeros - float("inf"), zeros, acc


@triton.jit
def attend(q, dout, k, v, prefix_k, prefix_v, block):
    """(state of a gated prefix, state of everything else): the softmax states of a tile q.

    The first one counts only if there is a gate; otherwise the prefix is part of the second one, as sequence and sink
    always are. ``dout`` as in :func:`softmax_step`.
    """
    opts, sizes = block.opts, block.sizes
    prefix_state = visit_prefixes(
        softmax_step, empty_softmax(dout, block.BLOCK_M, block.BLOCK_DV), dout, q, prefix_k, prefix_v, block
    )
    state = prefix_state if opts.gate is None else empty_softmax(dout, block.BLOCK_M, block.BLOCK_DV)
    state = visit_sequence(
        softmax_step, state, dout, q, k, v,
        key_range(block.first_row, opts, sizes, block.IS_CAUSAL, block.BLOCK_M, block.BLOCK_N),
        block.first_row + tl.arange(0, block.BLOCK_M)[:, None], block,
    )  # fmt: skip
    if opts.sinks is not None:
        state = merge_state(state, tl.load(opts.sinks + block.head) * LOG2E, None)
    return prefix_state, state


@triton.jit
def inverse(denom, opts):
    """1 / denom with dropout's scale, which turns acc into an average. Without visible keys 1, and acc is 0."""
    factor = 1.0 / tl.where(denom == 0.0, 1.0, denom)
    if opts.dropout_scale is not None:
        factor *= opts.dropout_scale
    return factor


@triton.jit
def _forward_rows(q, k, v, prefix_k, prefix_v, out, lse_ptr, block):
    """Store one block of rows of out and lse."""
    opts, sizes = block.opts, block.sizes
    q_tile = load_query_tile(q, block)
    prefix_state, state = attend(q_tile, None, k, v, prefix_k, prefix_v, block)
    m, denom, acc = state  # Triton 3.4 does not parse nested targets
    result = acc * inverse(denom, opts)[:, None]
    if opts.gate is not None:
        _, prefix_denom, prefix_acc = prefix_state
        result += prefix_acc * (inverse(prefix_denom, opts) * tanh(tl.load(opts.gate + block.head)))[:, None]
    store_out_tile(out, result, block)
    rows = block.first_row + tl.arange(0, block.BLOCK_M)
    ptrs = lse_ptr + row_offset(block.batch, block.head, sizes) + rows
    tl.store(ptrs, (m + tl.log2(denom)) * LN2, mask=rows < sizes.q_len)


@triton.jit(do_not_specialize=VARYING)
def _prefix_attention_fwd_kernel(
    q, k, v, prefix_k, prefix_v, out, lse_ptr, opts, model, batch_size, q_len, kv_len, num_sequences, search_steps,
    mask_stride, scale,
    IS_CAUSAL: tl.constexpr, DROPOUT_THRESHOLD: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out [B, Hq, S, D_v] and lse [B, Hq, S]; a program per BLOCK_M rows of one head.

    ::

        out = sum_j exp2(s_j) v_j / (exp2(sink) + sum_j exp2(s_j))      s = log2(e) * score, j over prefix and keys
    """
    sizes = all_sizes(model, batch_size, q_len, kv_len, num_sequences, search_steps, mask_stride)
    index, head, batch = locate(tl.cdiv(sizes.q_len, BLOCK_M), sizes.num_heads)
    _forward_rows(
        q, k, v, prefix_k, prefix_v, out, lse_ptr,
        RowBlock(
            index * BLOCK_M, batch, head, head // sizes.group, opts, sizes, scale,
            IS_CAUSAL, DROPOUT_THRESHOLD, HEAD_DIM, BLOCK_D, VALUE_DIM, BLOCK_DV, BLOCK_M, BLOCK_N,
        ),
    )  # fmt: skip
